"""What the default model does to photographs that it was not trained on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import shared_data

from moeisr_basicsr import shipped
from moeisr_basicsr.analysis.pictures import bicubic
from moeisr_basicsr.analysis.routing_stats import expert_shares
from moeisr_basicsr.checkpoint import load_model, read_model
from moeisr_basicsr.core import output_size
from moeisr_basicsr.data.image_reader import read_image, to_float
from moeisr_basicsr.data.resize import imresize
from moeisr_basicsr.inference import evaluation, upscale
from moeisr_basicsr.metrics.psnr_ssim_sr_metric import calculate_psnr_sr

ROOT = Path(__file__).resolve().parents[1]
PIECE = 120  # HR pixels per side: whole LR sizes at every factor
FACTORS = (2, 2.5, 3, 4)
MARGIN = 0.05  # dB: an untrained network is its bicubic skip, without MATLAB's rounding between the passes
PHOTOGRAPHS = sorted((ROOT / 'assets' / 'quickstart').glob('*/*.png'))


@pytest.fixture(scope='module')
def net():
    return load_model(shipped.shipped_file(shipped.DEFAULT))


@pytest.fixture(autouse=True)
def _torch_code(monkeypatch):
    monkeypatch.setenv('MOEISR_KERNELS', 'off')  # the kernels are compared with it elsewhere; nothing is compiled here


def as_tensor(image):
    """(1, 3, H, W) of 8-bit RGB (H, W, 3)."""
    return torch.from_numpy(to_float(np.ascontiguousarray(image))).permute(2, 0, 1)[None]


def middle(path):
    """The middle of a photograph, (PIECE, PIECE, 3)."""
    rgb = read_image(path).rgb
    top, left = ((n - PIECE) // 2 for n in rgb.shape[:2])
    return rgb[top : top + PIECE, left : left + PIECE]


def shrunk(rgb, factor):
    """(1, 3, h, w): MATLAB's bicubic LR image."""
    return as_tensor(imresize(rgb, size=tuple(round(n / factor) for n in rgb.shape[:2])))


def psnr(image, truth, factor):
    """Luma PSNR of 8-bit images."""
    return calculate_psnr_sr(image, truth, scale=factor, rounded=True)


def check_gain(net, path, factors):
    rgb = middle(path)
    truth = as_tensor(rgb)
    for factor in factors:
        lq = shrunk(rgb, factor)
        ours = psnr(upscale(net, lq, size=(PIECE, PIECE)).image, truth, factor)
        theirs = psnr(bicubic(lq[0], (PIECE, PIECE))[None], truth, factor)
        assert ours > theirs + MARGIN, f'{path.name} x{factor}: {ours:.2f} dB, bicubic {theirs:.2f} dB'


@pytest.mark.parametrize('path', PHOTOGRAPHS, ids=lambda path: path.stem)
def test_it_beats_bicubic_on_every_photograph_of_the_repository(net, path):
    check_gain(net, path, FACTORS)


@pytest.mark.parametrize('number', range(1, 25))
def test_it_beats_bicubic_on_every_image_of_kodak(net, number):
    check_gain(net, shared_data('Kodak24', f'{number:02}.png'), FACTORS[number % 4 :][:1])


def test_every_expert_works_and_none_does_everything(net):
    """Shares of the pixels of all photographs: an expert without any would be dead weight."""
    for factor in (2, 4):
        maps = [upscale(net, shrunk(middle(path), factor), scale=factor).expert_map for path in PHOTOGRAPHS]
        shares = expert_shares(torch.stack(maps), net.num_experts)
        assert min(shares) > 0.01 and max(shares) < 0.9, f'x{factor}: {shares}'
        by_image = torch.tensor([expert_shares(expert_map, net.num_experts) for expert_map in maps])
        assert by_image.std(dim=0).max() > 0.01, f'x{factor}: every photograph is routed alike'


@pytest.mark.parametrize(('factor', 'path'), zip(FACTORS, PHOTOGRAPHS))
def test_bf16_gives_the_same_picture(net, factor, path):
    """To two levels of 8 bits, where the routing agrees: rounded features let near ties of the mapper fall otherwise.

    Most of the difference comes from the encoder in bf16.
    """
    lq = shrunk(middle(path), factor)
    exact, fast = (upscale(net, lq, scale=factor, precision=precision) for precision in ('fp32', 'bf16'))
    same = exact.expert_map == fast.expert_map
    assert same.float().mean() > 0.98
    difference = (exact.image.clamp(0, 1) - fast.image.clamp(0, 1)).abs().amax(dim=1)  # (1, R, S)
    assert difference[same].max() < 2 / 255 and difference.mean() < 1e-3


@pytest.mark.parametrize('factor', [2.5, 4])
def test_the_decoder_in_bf16_from_the_same_features(net, factor):
    with torch.no_grad():
        lq = shrunk(middle(PHOTOGRAPHS[1]), factor)
        encoded, size = net.encode(lq), output_size(tuple(lq.shape[-2:]), factor)
        exact = net.decode_image(encoded, size)
    with evaluation(net, 'cpu', 'bf16'):
        fast = net.decode_image(encoded, size)
    assert (exact.expert_map == fast.expert_map).float().mean() >= 0.999  # the mapper is fp32 in both
    assert (exact.output - fast.output).abs().max() < 4e-3


def test_the_figures_of_the_metadata_are_true(net):
    """Set5 at x4, whole images, by the protocol of the published tables."""
    folder = shared_data('Set5')
    results = json.loads(read_model(shipped.shipped_file(shipped.DEFAULT)).metadata['results'])
    claimed = next(row for row in results if 'Set5' in row['dataset'] and row['scale'] == [4, 4])['metrics']
    measured = []
    for path in sorted(folder.glob('*.png')):
        rgb = read_image(path).rgb
        rgb = rgb[: rgb.shape[0] // 4 * 4, : rgb.shape[1] // 4 * 4]
        result = upscale(net, shrunk(rgb, 4), scale=4).image
        measured.append(calculate_psnr_sr(result, as_tensor(rgb), scale=4))
    assert len(measured) == 5
    assert np.mean(measured) == pytest.approx(
        next(value for name, value in claimed.items() if name.startswith('psnr')), abs=0.02
    )
