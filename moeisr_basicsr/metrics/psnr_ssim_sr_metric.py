"""PSNR and SSIM by the shave and colour rules of super-resolution's protocols, at any scale.

'benchmark' (Set5, Set14, B100, Urban100): luma, borders of ceil(s) pixels left out on each axis.
'div2k': RGB, borders of ceil(s) + 6.

Shapes: (H, W, C) arrays, (C, H, W) or (1, C, H, W) tensors; C is 3, or 1 for grey images.
"""

import math
from typing import Literal

import numpy as np
import torch
from basicsr.metrics.psnr_ssim import _ssim
from basicsr.utils.registry import METRIC_REGISTRY

from moeisr_basicsr.errors import UserError, did_you_mean

PROTOCOLS = {'benchmark': 0, 'div2k': 6}  # pixels to leave out beyond the factor; LIIF, utils.calc_psnr
LUMA = (65.738, 129.057, 25.064)  # MATLAB's rgb2ycbcr for R, G, B in [0, 1], times 256 / 255; LIIF, utils.calc_psnr
EPS_CEIL = 1e-6  # a factor that was computed from sizes may exceed a whole number by rounding
SSIM_WINDOW = 11  # BasicSR's, after Wang et al. 2004

Image = torch.Tensor | np.ndarray
Pair = float | tuple[float, float]  # one for both axes, or (rows, columns)


@METRIC_REGISTRY.register()
def calculate_psnr_sr(
    img: Image,
    img2: Image,
    scale: Pair | None = None,
    protocol: Literal['benchmark', 'div2k'] = 'benchmark',
    crop_border: Pair | None = None,
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
    error = float(np.mean((_luma(difference) if protocol == 'benchmark' else difference) ** 2))
    return float('inf') if error == 0 else float(20 * np.log10(255) - 10 * np.log10(error))


@METRIC_REGISTRY.register()
def calculate_ssim_sr(
    img: Image,
    img2: Image,
    scale: Pair | None = None,
    protocol: Literal['benchmark', 'div2k'] = 'benchmark',
    crop_border: Pair | None = None,
    rounded: bool = False,
    better: str = 'higher',
) -> float:
    """SSIM (Wang et al. 2004) through BasicSR's implementation: of the luma, or with 'div2k' the mean over R, G, B.

    Arguments and errors are those of `calculate_psnr_sr`; at least 11 rows and columns must be left.
    """
    first, second = _prepare(img, img2, scale, protocol, crop_border, rounded)
    rows, cols, channels = first.shape
    if min(rows, cols) < SSIM_WINDOW:
        raise UserError(f'SSIM needs {SSIM_WINDOW} x {SSIM_WINDOW} pixels within the shave; {rows} x {cols} are left.')
    if protocol == 'benchmark':
        first, second = (_luma(image) + 16 * (channels == 3) for image in (first, second))
    return float(np.mean([_ssim(first[..., c], second[..., c]) for c in range(first.shape[2])]))


def shave(protocol: str, scale: Pair) -> tuple[int, int]:
    """(rows, columns) to leave out at each border."""
    if protocol not in PROTOCOLS:
        raise UserError(
            f"'{protocol}' is not a protocol of evaluation; there are {', '.join(PROTOCOLS)}."
            f'{did_you_mean(protocol, PROTOCOLS)}'
        )
    rows, cols = _pair('scale', scale, 1)
    return math.ceil(rows - EPS_CEIL) + PROTOCOLS[protocol], math.ceil(cols - EPS_CEIL) + PROTOCOLS[protocol]


def _pair(name: str, value: Pair, least: float) -> tuple[float, float]:
    """(rows, columns) of one number or two."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(math.isfinite(n) and n >= least for n in pair):
        raise UserError(f'The {name} of a metric must be at least {least}, or two such (rows, columns); got {value}.')
    return pair


def _prepare(
    img: Image, img2: Image, scale: Pair | None, protocol: str, crop_border: Pair | None, rounded: bool
) -> list[np.ndarray]:
    """Both images as (H', W', C) float64 RGB in [0, 255], shaved."""
    if img.shape != img2.shape or type(img) is not type(img2):
        raise UserError(
            f'A metric compares images of one kind and shape; got {tuple(img.shape)} and {tuple(img2.shape)}.'
        )
    if scale is None and crop_border is None:
        raise UserError('This metric needs the scale: it comes from the dataset, or give it, or a crop_border.')
    rows, cols = shave(protocol, 1 if scale is None else scale)  # checks the protocol's name in any case
    if crop_border is not None:
        rows, cols = map(int, _pair('crop_border', crop_border, 0))
    images = [_as_rgb(image) for image in (img, img2)]
    height, width = images[0].shape[:2]
    if height <= 2 * rows or width <= 2 * cols:
        raise UserError(f'An image of {height} x {width} pixels has none left after a shave of {rows} x {cols}.')
    images = [image[rows : height - rows, cols : width - cols] for image in images]
    return [np.rint(image) if rounded else image for image in images]


def _as_rgb(image: Image) -> np.ndarray:
    """(H, W, C) float64 RGB in [0, 255]."""
    if isinstance(image, torch.Tensor):
        image = image.detach().squeeze(0) if image.ndim == 4 else image.detach()  # (C, H, W)
        rgb = image.double().clamp(0, 1).permute(1, 2, 0).cpu().numpy() * 255
    else:
        rgb = (image[..., None] if image.ndim == 2 else image)[..., ::-1].astype(np.float64)
    if rgb.ndim != 3 or rgb.shape[2] not in (1, 3):
        raise UserError(f'A metric takes one image with 1 or 3 channels; got shape {tuple(image.shape)}.')
    return rgb


def _luma(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> (H, W, 1), without MATLAB's offset of 16; a grey image is its own luma."""
    return image @ (np.array(LUMA)[:, None] / 256) if image.shape[2] == 3 else image
