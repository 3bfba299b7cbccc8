"""PSNR and SSIM by the protocols, against LIIF's formulas written out and BasicSR's own metrics."""

import math

import numpy as np
import pytest
import torch
from basicsr.metrics import calculate_metric
from basicsr.utils import tensor2img
from helpers import shared_data
from PIL import Image

from moeisr_basicsr.data.resize import imresize
from moeisr_basicsr.errors import UserError
from moeisr_basicsr.metrics.psnr_ssim_sr_metric import calculate_psnr_sr, calculate_ssim_sr, shave


def pair(height=60, width=72, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    first = torch.rand(channels, height, width, generator=generator)
    second = (first + 0.05 * torch.randn(channels, height, width, generator=generator)).clamp(0, 1)
    return second, first


def slow_psnr(first, second, rows, cols, luma):
    """Pixel by pixel, as LIIF's utils.calc_psnr defines it."""
    channels, height, width = first.shape
    total, count = 0.0, 0
    weights = [65.738 / 256, 129.057 / 256, 25.064 / 256]
    for row in range(rows, height - rows):
        for col in range(cols, width - cols):
            difference = [float(first[c, row, col]) - float(second[c, row, col]) for c in range(channels)]
            if luma and channels == 3:
                difference = [sum(w * d for w, d in zip(weights, difference))]
            total += sum(d * d for d in difference)
            count += len(difference)
    return -10 * math.log10(total / count)


@pytest.mark.parametrize(
    'protocol, scale, rule',
    [
        ('benchmark', 2, (2, 2)),
        ('benchmark', 3.3, (4, 4)),
        ('benchmark', (2, 3.5), (2, 4)),
        ('benchmark', 2.0000001, (2, 2)),
        ('div2k', 2, (8, 8)),
        ('div2k', (2.5, 4), (9, 10)),
        ('benchmark', 1, (1, 1)),
    ],
)
@pytest.mark.parametrize('channels', [1, 3])
def test_psnr_against_the_definition(protocol, scale, rule, channels):
    assert shave(protocol, scale) == rule
    first, second = pair(40, 46, channels)
    expected = slow_psnr(first, second, *rule, luma=protocol == 'benchmark')
    assert calculate_psnr_sr(first, second, scale, protocol) == pytest.approx(expected, abs=1e-5)
    assert calculate_psnr_sr(
        first[None], second[None], list(np.atleast_1d(scale)) * (2 // np.size(scale)), protocol
    ) == pytest.approx(expected, abs=1e-5)


def test_rounded_psnr_and_ssim_are_basicsrs():
    first, second = pair()
    images = {'img': tensor2img([first]), 'img2': tensor2img([second])}  # BGR, 8 bits
    for ours, theirs, tolerance in (
        ('calculate_psnr_sr', 'calculate_psnr', 2e-3),
        ('calculate_ssim_sr', 'calculate_ssim', 1e-5),
    ):
        for protocol, luma, border in (('benchmark', True, 3), ('div2k', False, 9)):
            expected = calculate_metric(images, {'type': theirs, 'crop_border': border, 'test_y_channel': luma})
            from_arrays = calculate_metric(images, {'type': ours, 'scale': 3, 'protocol': protocol, 'better': 'higher'})
            assert from_arrays == pytest.approx(expected, abs=tolerance)
            assert calculate_metric(
                {'img': first, 'img2': second}, {'type': ours, 'scale': 3, 'protocol': protocol, 'rounded': True}
            ) == pytest.approx(from_arrays, abs=1e-9)
            floats = calculate_metric({'img': first, 'img2': second}, {'type': ours, 'scale': 3, 'protocol': protocol})
            assert floats != from_arrays and floats == pytest.approx(from_arrays, abs=0.05)
            bordered = {'type': ours, 'crop_border': [border, border], 'protocol': protocol}
            assert calculate_metric(images, bordered) == from_arrays


def test_values_beyond_the_range_are_clipped_and_equal_images_are_infinite():
    first, second = pair()
    assert calculate_psnr_sr(first * 3 - 1, second, 2) == calculate_psnr_sr((first * 3 - 1).clamp(0, 1), second, 2)
    assert calculate_psnr_sr(second, second, 2) == float('inf')
    assert calculate_ssim_sr(second, second, 2) == pytest.approx(1)


def test_grey_images():
    first, second = pair(channels=1)
    three = [image.repeat(3, 1, 1) for image in (first, second)]
    # Luma of R = G = B is the grey value times the sum of the weights, 219.859 / 256: range 16 to 235.
    assert calculate_psnr_sr(*three, 2) == pytest.approx(
        calculate_psnr_sr(first, second, 2) - 20 * math.log10(219.859 / 256), abs=1e-6
    )
    array = (first[0].numpy() * 255).round().astype(np.uint8)
    assert calculate_psnr_sr(array, array, 2) == float('inf')
    assert calculate_ssim_sr(array, array, 2) == pytest.approx(1)
    assert calculate_psnr_sr(first, second, 2, 'div2k') == pytest.approx(calculate_psnr_sr(*three, 2, 'div2k'))


def test_colours_are_in_the_right_order():
    """An error in green weighs most in luma; arrays are BGR, tensors RGB."""
    truth = np.full((30, 30, 3), 100, np.uint8)
    values = []
    for channel in range(3):
        wrong = truth.copy()
        wrong[..., channel] += 10
        values.append(calculate_psnr_sr(wrong, truth, 2))
        as_tensor = [torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1) / 255 for image in (wrong, truth)]
        assert calculate_psnr_sr(*as_tensor, 2) == pytest.approx(values[-1], abs=1e-4)
    assert values[0] > values[2] > values[1]
    assert values[1] == pytest.approx(20 * math.log10(255 / (10 * 129.057 / 256)), abs=1e-9)


def test_the_published_bicubic_value_of_set5():
    values = []
    for path in sorted(shared_data('Set5').glob('*.png')):
        hr = np.asarray(Image.open(path).convert('RGB'))
        hr = hr[: hr.shape[0] // 4 * 4, : hr.shape[1] // 4 * 4]
        up = imresize(imresize(hr, (hr.shape[0] // 4, hr.shape[1] // 4)), hr.shape[:2])
        values.append(calculate_psnr_sr(up[..., ::-1], hr[..., ::-1], 4))
    assert len(values) == 5 and abs(np.mean(values) - 28.42) < 0.02


@pytest.mark.parametrize(
    'arguments, words',
    [
        ({'scale': None}, 'needs the scale'),
        ({'scale': 0.5}, 'at least 1, .*got 0.5'),
        ({'scale': (2, 3, 4)}, 'at least 1'),
        ({'scale': 2, 'protocol': 'benchmrk'}, "Did you mean 'benchmark'"),
        ({'scale': 30}, 'none left after a shave of 30 x 30'),
        ({'crop_border': -1}, 'at least 0'),
    ],
)
def test_wrong_arguments(arguments, words):
    first, second = pair(60, 60)
    for metric in (calculate_psnr_sr, calculate_ssim_sr):
        with pytest.raises(UserError, match=words):
            metric(first, second, **arguments)


def test_images_that_do_not_fit():
    first, second = pair()
    with pytest.raises(UserError, match='one kind and shape'):
        calculate_psnr_sr(first, second[:, 1:], 2)
    with pytest.raises(UserError, match='one kind and shape'):
        calculate_psnr_sr(first, second.numpy(), 2)
    with pytest.raises(UserError, match='1 or 3 channels'):
        calculate_psnr_sr(first[:2], second[:2], 2)
    with pytest.raises(UserError, match='SSIM needs 11 x 11'):
        calculate_ssim_sr(first[:, :14], second[:, :14], 2)
