"""The base image against PyTorch's bilinear sampler and against MATLAB's bicubic, written out as loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from reference import grid

from moeisr_basicsr.core import make_coord, output_size
from moeisr_basicsr.core.skip import ImageWindow, keys_kernel, resampling_macs, skip_at, skip_grid
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
# Sizes of a base image and of an output that is smaller on an axis: there the kernel is widened.
SMALLER = [((24, 16), (12, 8)), ((24, 16), (19, 11)), ((9, 20), (10, 7)), ((5, 4), (2, 1)), ((16, 16), (15, 17))]


def cubic(distance):
    """Keys' kernel with a = -1/2, in its textbook form for any a."""
    a, x = -0.5, abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def imresize_axis(image, n_out):
    """MATLAB's `imresize` along the last axis: symmetric padding, one output pixel at a time."""
    n = image.shape[-1]
    stretch = max(n / n_out, 1)
    mirror = [*range(n), *reversed(range(n))]
    pixels = []
    for i in range(n_out):
        position = (i + 0.5) * n / n_out - 0.5
        taps = range(math.floor(position - 2 * stretch) - 1, math.ceil(position + 2 * stretch) + 2)
        weights = [cubic((position - tap) / stretch) for tap in taps]
        terms = [weight * image[..., mirror[tap % (2 * n)]] for weight, tap in zip(weights, taps)]
        pixels.append(sum(terms) / sum(weights))
    return torch.stack(pixels, dim=-1)


def matlab_double(image, size):
    image = imresize_axis(image.double().transpose(-1, -2), size[0]).transpose(-1, -2)
    return imresize_axis(image, size[1])


def matlab_bicubic(image, size):
    return matlab_double(image, size).float()


def on_grid(image, size, mode='bicubic'):
    return skip_grid(ImageWindow.whole(image), size, (0, size[0]), (0, size[1]), mode)


def scattered(image, size, mode='bicubic'):
    coord, cell = grid(size, image.shape[0])
    return skip_at(image, coord, cell, mode).transpose(1, 2).unflatten(-1, size)


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
    torch.testing.assert_close(on_grid(image, size, mode), expected, rtol=0, atol=5e-6)
    torch.testing.assert_close(scattered(image, size, mode), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize(('base', 'size'), SMALLER)
def test_smaller_than_the_base_image_is_anti_aliased(base, size):
    image = torch.rand(2, 3, *base, generator=torch.Generator().manual_seed(0))
    expected = matlab_bicubic(image, size)
    torch.testing.assert_close(on_grid(image, size), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(scattered(image, size), expected, rtol=0, atol=2e-6)
    resized = imresize(image[0].permute(1, 2, 0).numpy(), size=size)  # the data pipeline's own
    torch.testing.assert_close(on_grid(image, size)[0].permute(1, 2, 0), torch.from_numpy(resized), rtol=0, atol=2e-6)


@pytest.mark.parametrize(('lr_size', 'factor'), CASES)
def test_bicubic_skip_is_the_bicubic_baseline(lr_size, factor):
    """The data pipeline's MATLAB resize, an implementation of its own, makes the same picture."""
    image = torch.rand(1, 3, *lr_size, generator=torch.Generator().manual_seed(0))
    size = output_size(lr_size, factor)
    baseline = imresize(image[0].permute(1, 2, 0).numpy(), size=size)
    ours = on_grid(image, size)[0].permute(1, 2, 0)
    torch.testing.assert_close(ours, torch.from_numpy(baseline), rtol=0, atol=5e-6)


@pytest.mark.parametrize('mode', ['bilinear', 'bicubic'])
def test_scattered_positions_anywhere(mode):
    """Off the pixel grid and up to the image's edge, each query of each image on its own."""
    image = torch.rand(2, 2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    coord = torch.rand(2, 60, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 2 - 1
    coord[:, :4] = torch.tensor([[-1, -1], [-1, 1], [1, -1], [1, 1]])
    actual = skip_at(image, coord, torch.full_like(coord, 0.1), mode)
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


def test_each_query_has_its_own_cell():
    """A batch in which cells differ from query to query: each is what it would be alone."""
    image = torch.rand(2, 3, 12, 10, dtype=torch.float64)
    coord = torch.rand(2, 40, 2, dtype=torch.float64) * 2 - 1
    coord[:, :20, 0] = coord[:, :1, 0]  # many queries on one row
    cell = 2 / torch.randint(3, 30, (2, 40, 2)).double()
    together = skip_at(image, coord, cell, 'network')
    for b in range(2):
        for q in range(40):
            alone = skip_at(image[b : b + 1], coord[b : b + 1, q : q + 1], cell[b : b + 1, q : q + 1], 'network')
            torch.testing.assert_close(together[b : b + 1, q : q + 1], alone, rtol=0, atol=1e-13)


def test_queries_in_chunks(monkeypatch):
    image, (coord, cell) = torch.rand(1, 3, 12, 10), grid((9, 13))
    whole = skip_at(image, coord, cell, 'network')
    monkeypatch.setattr('moeisr_basicsr.core.skip.CHUNK', 10)
    torch.testing.assert_close(skip_at(image, coord, cell, 'network'), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize('size', [(20, 17), (6, 7)])
@pytest.mark.parametrize('mode', ['bilinear', 'bicubic'])
def test_region_of_a_grid_is_the_whole(mode, size):
    """With the pixels that its kernels reach and no more."""
    image = torch.rand(1, 3, 16, 12)
    whole = on_grid(image, size, mode)
    assert torch.equal(skip_grid(ImageWindow.whole(image), size, (2, 5), (0, size[1]), mode), whole[:, :, 2:5])
    radius = 2 * max(16 / size[0], 12 / size[1], 1)
    top, bottom = math.floor(2.5 * 16 / size[0] - 0.5 - radius) + 1, math.ceil(4.5 * 16 / size[0] - 0.5 + radius)
    window = ImageWindow(image[:, :, max(top, 0) : bottom, :], max(top, 0), 0, (16, 12))
    torch.testing.assert_close(skip_grid(window, size, (2, 5), (3, 6), mode), whole[:, :, 2:5, 3:6], rtol=0, atol=1e-6)


@pytest.mark.parametrize('mode', ['bilinear', 'bicubic'])
def test_identity_at_the_own_size(mode):
    image = torch.rand(1, 3, 997, 6)
    assert torch.equal(on_grid(image, (997, 6), mode), image)
    torch.testing.assert_close(scattered(image, (997, 6), mode), image, rtol=0, atol=1e-4)  # fp32 coordinates


@pytest.mark.parametrize('size', [(7, 5), (19, 24)])
def test_gradients_reach_the_image(size):
    """Against the matrix of the resampling, column by column."""
    image = torch.rand(1, 1, 10, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(1, 1, *size, dtype=torch.float64)
    units = torch.eye(80, dtype=torch.float64).view(80, 1, 10, 8)
    expected = (matlab_double(units, size) * weight).sum(dim=(1, 2, 3)).view(1, 1, 10, 8)
    for resampled in (on_grid, scattered):
        (gradient,) = torch.autograd.grad((resampled(image, size) * weight).sum(), image)
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-5)  # fp32 coordinates


def test_multiply_adds_of_the_resampling():
    assert resampling_macs((8, 8), (32, 32), 'bicubic', 3) == 3 * (4 / 4 + 4)
    assert resampling_macs((8, 8), (8, 8), 'network', 3) == 3 * 2
    assert resampling_macs((32, 32), (16, 16), 'network', 3) == 3 * (8 * 2 + 8)
