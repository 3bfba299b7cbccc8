"""The image skip against PyTorch's bilinear sampler and against MATLAB's bicubic, written out as loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from moeisr_basicsr.core import make_coord, output_size
from moeisr_basicsr.core.coords import pixel_centres
from moeisr_basicsr.core.skip import keys_kernel, skip_at, skip_grid
from moeisr_basicsr.data.resize import imresize

CASES = [
    ((6, 9), 2),
    ((6, 9), 3),
    ((5, 4), (2.5, 3.3)),
    ((7, 3), (1, 4)),
    ((1, 1), 4),
    ((2, 2), 3),
    ((1, 2), 2.5),
    ((2, 1), (1.5, 7)),
    ((3, 17), 1),
]


def cubic(distance):
    """Keys' kernel with a = -1/2, in its textbook form for any a."""
    a, x = -0.5, abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def imresize_axis(image, n_out):
    """MATLAB's `imresize` along the last axis for an enlargement: symmetric padding, one output pixel at a time."""
    n = image.shape[-1]
    mirror = [*range(n), *reversed(range(n))]
    pixels = []
    for i in range(n_out):
        position = (i + 0.5) * n / n_out - 0.5
        first = math.floor(position) - 1
        pixels.append(sum(cubic(position - tap) * image[..., mirror[tap % (2 * n)]] for tap in range(first, first + 4)))
    return torch.stack(pixels, dim=-1)


def matlab_bicubic(image, size):
    image = imresize_axis(image.double().transpose(-1, -2), size[0]).transpose(-1, -2)
    return imresize_axis(image, size[1]).float()


def bilinear_border(image, size):
    coord = make_coord(size).view(1, *size, 2).flip(-1).expand(image.shape[0], -1, -1, -1)
    return F.grid_sample(image, coord, mode='bilinear', padding_mode='border', align_corners=False)


TRUTHS = {'bilinear': bilinear_border, 'bicubic': matlab_bicubic}


@pytest.mark.parametrize('mode', ['bilinear', 'bicubic'])
@pytest.mark.parametrize(('lr_size', 'factor'), CASES)
def test_skip_equals_its_truth(mode, lr_size, factor):
    image = torch.rand(2, 3, *lr_size, generator=torch.Generator().manual_seed(0))
    size = output_size(lr_size, factor)
    expected = TRUTHS[mode](image, size)
    on_grid = skip_grid(image, pixel_centres(size[0]), pixel_centres(size[1]), mode)
    scattered = skip_at(image, make_coord(size).expand(2, -1, -1), mode).transpose(1, 2).unflatten(-1, size)
    torch.testing.assert_close(on_grid, expected, rtol=0, atol=5e-6)
    torch.testing.assert_close(scattered, expected, rtol=0, atol=5e-6)
    torch.testing.assert_close(scattered, on_grid, rtol=0, atol=1e-6)


@pytest.mark.parametrize(('lr_size', 'factor'), CASES)
def test_bicubic_skip_is_the_bicubic_baseline(lr_size, factor):
    """The data pipeline's MATLAB resize, an implementation of its own, makes the same picture."""
    image = torch.rand(1, 3, *lr_size, generator=torch.Generator().manual_seed(0))
    size = output_size(lr_size, factor)
    baseline = imresize(image[0].permute(1, 2, 0).numpy(), size=size)
    ours = skip_grid(image, pixel_centres(size[0]), pixel_centres(size[1]), 'bicubic')[0].permute(1, 2, 0)
    torch.testing.assert_close(ours, torch.from_numpy(baseline), rtol=0, atol=5e-6)


@pytest.mark.parametrize('mode', ['bilinear', 'bicubic'])
def test_scattered_positions_anywhere(mode):
    """Off the pixel grid and up to the image's edge, each query of each image on its own."""
    image = torch.rand(2, 2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    coord = torch.rand(2, 60, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 2 - 1
    coord[:, :4] = torch.tensor([[-1, -1], [-1, 1], [1, -1], [1, 1]])
    actual = skip_at(image, coord, mode)
    if mode == 'bilinear':
        expected = F.grid_sample(
            image, coord.flip(-1).unsqueeze(1), mode='bilinear', padding_mode='border', align_corners=False
        )[:, :, 0].transpose(1, 2)
    else:
        expected = torch.zeros_like(actual)
        padded = torch.cat([image.flip(-2), image, image.flip(-2)], dim=-2)
        padded = torch.cat([padded.flip(-1), padded, padded.flip(-1)], dim=-1)  # (2, 2, 15, 24), mirrored
        for b in range(2):
            for q in range(60):
                row, col = (((float(coord[b, q, axis]) + 1) * n - 1) / 2 for axis, n in enumerate((5, 8)))
                for i in range(math.floor(row) - 1, math.floor(row) + 3):
                    for j in range(math.floor(col) - 1, math.floor(col) + 3):
                        expected[b, q] += cubic(row - i) * cubic(col - j) * padded[b, :, i + 5, j + 8]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_keys_kernel_interpolates_and_adds_up_to_one():
    distance = torch.linspace(-2.5, 2.5, 101, dtype=torch.float64)
    expected = torch.tensor([cubic(x) for x in distance.tolist()], dtype=torch.float64)
    torch.testing.assert_close(keys_kernel(distance), expected, rtol=0, atol=1e-14)
    assert keys_kernel(torch.tensor([0.0, 1.0, 2.0, 3.0])).tolist() == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize('mode', ['bilinear', 'bicubic'])
def test_strip_of_a_grid_is_the_whole(mode):
    image = torch.rand(1, 3, 6, 5)
    rows, cols = pixel_centres(20), pixel_centres(17)
    whole = skip_grid(image, rows, cols, mode)
    assert torch.equal(skip_grid(image, rows[7:13], cols, mode), whole[:, :, 7:13])


@pytest.mark.parametrize('mode', ['bilinear', 'bicubic'])
def test_identity_at_factor_one(mode):
    image = torch.rand(1, 3, 9, 6)
    torch.testing.assert_close(skip_grid(image, pixel_centres(9), pixel_centres(6), mode), image, rtol=0, atol=3e-6)
