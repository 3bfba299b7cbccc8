"""PSNR and SSIM by the shave and colour rules of super-resolution's protocols, at any scale.

Shapes: (H, W, C) arrays, (C, H, W) or (1, C, H, W) tensors; C is 3, or 1 for grey images.
"""

from typing import Literal

import numpy as np
import torch
from basicsr.metrics.psnr_ssim import _ssim
from basicsr.utils.registry import METRIC_REGISTRY

from moeisr_basicsr.errors import UserError

from .shave import LUMA, shave

SSIM_WINDOW = 11  # BasicSR's, after Wang et al. 2004


@METRIC_REGISTRY.register()
def calculate_psnr_sr(
    img: torch.Tensor | np.ndarray,
    img2: torch.Tensor | np.ndarray,
    scale: float | tuple[float, float] | None = None,
    protocol: Literal['benchmark', 'div2k'] = 'benchmark',
    crop_border: int | tuple[int, int] | None = None,
    rounded: bool = False,
    better: str = 'higher',
) -> float:
    """PSNR in dB as LIIF computes it (utils.calc_psnr), infinite for equal images.

    Args:
        img: Result: a tensor is RGB in [0, 1] (values outside are clipped); an array is BGR, (H, W, C) or (H, W), in
            [0, 255], as BasicSR's metrics take it.
        img2: Truth, of the same kind and shape.
        scale: Factor, or (row factor, column factor); the model gives it.
        protocol: 'benchmark': luma, shave ceil(scale) on each axis; 'div2k': RGB, shave ceil(scale) + 6.
        crop_border: Shave this many pixels instead, or (rows, columns).
        rounded: Round both images to 8 bits first, as if they had been saved.
        better: Not used; BasicSR's models hand every key of a metric's section to its function.

    Raises:
        UserError: Shapes differ, the shave leaves no pixel, no scale, or an unknown protocol.
    """
    first, second = _prepare(img, img2, scale, protocol, crop_border, rounded)
    difference = first - second
    if protocol == 'benchmark':
        difference = _luma(difference)
    error = float(np.mean(difference**2))
    return float('inf') if error == 0 else float(20 * np.log10(255) - 10 * np.log10(error))


@METRIC_REGISTRY.register()
def calculate_ssim_sr(
    img: torch.Tensor | np.ndarray,
    img2: torch.Tensor | np.ndarray,
    scale: float | tuple[float, float] | None = None,
    protocol: Literal['benchmark', 'div2k'] = 'benchmark',
    crop_border: int | tuple[int, int] | None = None,
    rounded: bool = False,
    better: str = 'higher',
) -> float:
    """SSIM (Wang et al. 2004) through BasicSR's implementation: of the luma, or with 'div2k' the mean over R, G, B.

    Args:
        img, img2, scale, protocol, crop_border, rounded, better: As `calculate_psnr_sr`.

    Raises:
        UserError: As `calculate_psnr_sr`; or less than 11 rows or columns are left.
    """
    first, second = _prepare(img, img2, scale, protocol, crop_border, rounded)
    if min(first.shape[:2]) < SSIM_WINDOW:
        raise UserError(
            f'SSIM needs {SSIM_WINDOW} x {SSIM_WINDOW} pixels within the shave; {first.shape[0]} x '
            f'{first.shape[1]} are left.'
        )
    if protocol == 'benchmark':
        first, second = (_luma(image) + 16 * (image.shape[2] == 3) for image in (first, second))
    return float(np.mean([_ssim(first[..., c], second[..., c]) for c in range(first.shape[2])]))


def _prepare(
    img: torch.Tensor | np.ndarray,
    img2: torch.Tensor | np.ndarray,
    scale: float | tuple[float, float] | None,
    protocol: str,
    crop_border: int | tuple[int, int] | None,
    rounded: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Both images as (H', W', C) float64 RGB in [0, 255], shaved."""
    if tuple(img.shape) != tuple(img2.shape) or torch.is_tensor(img) != torch.is_tensor(img2):
        raise UserError(
            f'A metric compares images of one kind and shape; got {tuple(img.shape)} and {tuple(img2.shape)}.'
        )
    if scale is None and crop_border is None:
        raise UserError('This metric needs the scale: it comes from the dataset, or give it, or a crop_border.')
    rule = shave(protocol, 1 if scale is None else scale)  # checks the protocol's name in any case
    if crop_border is not None:
        rule = tuple(crop_border) if isinstance(crop_border, (tuple, list)) else (crop_border, crop_border)
        if len(rule) != 2 or min(rule) < 0:
            raise UserError(f'crop_border must be one or two whole numbers of at least 0; got {crop_border}.')
    images = [_as_rgb(image) for image in (img, img2)]
    height, width = images[0].shape[:2]
    if height <= 2 * rule[0] or width <= 2 * rule[1]:
        raise UserError(f'An image of {height} x {width} pixels has none left after a shave of {rule[0]} x {rule[1]}.')
    images = [image[rule[0] : height - rule[0], rule[1] : width - rule[1]] for image in images]
    return tuple(np.rint(image) if rounded else image for image in images)


def _as_rgb(image: torch.Tensor | np.ndarray) -> np.ndarray:
    """(H, W, C) float64 RGB in [0, 255]."""
    if torch.is_tensor(image):
        image = image.detach().squeeze(0) if image.ndim == 4 else image.detach()  # (C, H, W)
        image = image.double().clamp(0, 1).permute(1, 2, 0).cpu().numpy() * 255  # (H, W, C)
        channels_in_order = image
    else:
        image = image[..., None] if image.ndim == 2 else image
        channels_in_order = image[..., ::-1].astype(np.float64)
    if channels_in_order.ndim != 3 or channels_in_order.shape[2] not in (1, 3):
        raise UserError(f'A metric takes one image with 1 or 3 channels; got shape {tuple(image.shape)}.')
    return channels_in_order


def _luma(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> (H, W, 1), without MATLAB's offset of 16; a grey image is its own luma."""
    return image @ (np.array(LUMA)[:, None] / 256) if image.shape[2] == 3 else image
