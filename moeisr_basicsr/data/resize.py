"""Bicubic resizing: MATLAB's `imresize`, bit for bit, and Pillow's.

The papers' low-resolution images come from these two. They differ: MATLAB resizes the axis with the smaller factor
first (rows first where both are equal) and rounds 8-bit images between the passes; Pillow resizes columns first and
works in fixed point.

Shapes: (H, W, C) or (H, W) images; n input and m output positions on one axis, T taps per output position.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import sparse

from moeisr_basicsr.errors import UserError, did_you_mean

KERNEL_WIDTH = 4.0  # support of the cubic kernel
BLOCK = 1 << 16  # values per input block and pass: the block in float64 and its result stay in the cache
METHODS = ('matlab', 'pil')


class Taps(NamedTuple):
    """What every output position of one axis sums up."""

    index: np.ndarray  # (m, T) int64 input positions, mirrored at the borders
    weight: np.ndarray  # (m, T) float64, rows sum to 1


def resize(image: np.ndarray, size: tuple[int, int], method: str = 'matlab') -> np.ndarray:
    """Resize `image` to `size` (rows, columns) by bicubic interpolation, anti-aliased when shrinking.

    Args:
        image: (H, W, C) or (H, W), uint8, uint16, float32 or float64.
        size: Output (rows, columns), at least 1.
        method: 'matlab' or 'pil'.

    Returns:
        An array of the same type, integers rounded and clipped.

    Raises:
        UserError: An unknown method.
    """
    if method == 'matlab':
        return imresize(image, size=size)
    if method == 'pil':
        return pil_resize(image, size)
    raise UserError(
        f"'{method}' is not a way to resize; there are {', '.join(METHODS)}.{did_you_mean(method, METHODS)}"
    )


def imresize(
    image: np.ndarray,
    scale: float | tuple[float, float] | None = None,
    size: tuple[int, int] | None = None,
    antialias: bool = True,
) -> np.ndarray:
    """MATLAB's `imresize(image, scale)` or `imresize(image, [rows columns])` with its bicubic kernel.

    Integer images are rounded (halves up) and clipped after each of the two passes, as MATLAB does: the published
    low-resolution images are reproduced bit for bit. Sums are in float64.

    Args:
        image: (H, W, C) or (H, W), uint8, uint16, float32 or float64.
        scale: Factor, or (row factor, column factor), above 0; the output size is factor times size, rounded up.
        size: Output (rows, columns) instead; the factors are then output / input size.
        antialias: Widen the kernel when shrinking.

    Returns:
        An array of the same type.

    Raises:
        ValueError: Not exactly one of `scale` and `size`, a factor or size that is not positive, an empty image, or
            another type of values.
    """
    if (scale is None) == (size is None):
        raise ValueError('Give either scale or size.')
    if image.ndim not in (2, 3) or 0 in image.shape:
        raise ValueError(f'The image must be (H, W) or (H, W, C) and not empty; got shape {image.shape}.')
    if image.dtype not in (np.uint8, np.uint16, np.float32, np.float64):
        raise ValueError(f'The image must be uint8, uint16, float32 or float64; got {image.dtype}.')
    if size is None:
        scales = tuple(map(float, scale)) if isinstance(scale, (tuple, list)) else (float(scale), float(scale))
        if len(scales) != 2 or not all(math.isfinite(s) and s > 0 for s in scales):
            raise ValueError(f'scale must be one or two factors above 0; got {scale}.')
        size = tuple(math.ceil(s * n) for s, n in zip(scales, image.shape))
    else:
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f'size must be (rows, columns), at least 1; got {size}.')
        size = tuple(map(int, size))
        scales = tuple(m / n for m, n in zip(size, image.shape))
    result = image
    for axis in (0, 1) if scales[0] <= scales[1] else (1, 0):
        matrix = _tap_matrix(image.shape[axis], size[axis], scales[axis], antialias)
        if matrix is not None:
            result = _resize_axis(result, axis, matrix)
    return image.copy() if result is image else result


def pil_resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pillow's bicubic `Image.resize`, always anti-aliased; what LIIF and LTE train with.

    Args:
        image: (H, W, C) or (H, W). uint8 takes Pillow's fixed-point path; other types go channel by channel through its
            float path, uint16 is rounded at the end.
        size: Output (rows, columns).
    """
    box = (size[1], size[0])
    if image.dtype == np.uint8 and (image.ndim == 2 or image.shape[2] == 3):
        return np.asarray(Image.fromarray(image).resize(box, Image.Resampling.BICUBIC))
    if image.ndim == 3:
        return np.stack([pil_resize(np.ascontiguousarray(image[..., c]), size) for c in range(image.shape[2])], axis=-1)
    plane = np.asarray(Image.fromarray(image.astype(np.float32)).resize(box, Image.Resampling.BICUBIC))
    return _store(plane.astype(np.float64), np.empty(plane.shape, image.dtype))


def cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel with a = -1/2."""
    near = np.abs(distance)
    near2, near3 = near**2, near**3
    inner = (1.5 * near3 - 2.5 * near2 + 1) * (near <= 1)
    return inner + (-0.5 * near3 + 2.5 * near2 - 4 * near + 2) * ((near > 1) & (near <= 2))


def axis_taps(n: int, m: int, scale: float, antialias: bool = True) -> Taps:
    """Input positions and weights of one axis, as `contributions` in MATLAB's imresize.m.

    Args:
        n: Input size.
        m: Output size.
        scale: Factor of this axis; not always m / n.
        antialias: Widen the kernel when `scale` is below 1.
    """
    stretch = min(scale, 1.0) if antialias else 1.0
    width = KERNEL_WIDTH / stretch
    # MATLAB counts from 1: output position 0.5 lies on input position 0.5, and 0.5 + scale on 1.5.
    centre = np.arange(1, m + 1) / scale + 0.5 * (1 - 1 / scale)  # (m,)
    left = np.floor(centre - width / 2)
    index = left[:, None] + np.arange(math.ceil(width) + 2)  # (m, T)
    weight = stretch * cubic(stretch * (centre[:, None] - index))
    weight /= weight.sum(axis=1, keepdims=True)
    mirrored = np.concatenate([np.arange(n), np.arange(n)[::-1]])
    index = mirrored[(index.astype(np.int64) - 1) % (2 * n)]
    used = weight.any(axis=0)
    return Taps(index[:, used], weight[:, used])


@lru_cache(maxsize=1024)  # a training run meets a few hundred (crop, patch) sizes
def _tap_matrix(n: int, m: int, scale: float, antialias: bool) -> sparse.csr_matrix | None:
    """`axis_taps` as a sparse (m, n) matrix; None where it changes nothing."""
    if n == m and scale == 1:
        return None
    index, weight = axis_taps(n, m, scale, antialias)
    starts = np.arange(m + 1) * index.shape[1]
    return sparse.csr_matrix((weight.ravel(), index.ravel(), starts), shape=(m, n))


def _resize_axis(image: np.ndarray, axis: int, matrix: sparse.csr_matrix) -> np.ndarray:
    """One pass, in blocks of lines so that a large image never lies in float64 as a whole."""
    image = np.ascontiguousarray(image)
    m, n = matrix.shape
    if axis == 0:
        lines = image.reshape(n, -1)  # (n, W * C)
        result = np.empty((m, *image.shape[1:]), image.dtype)
        target = result.reshape(m, -1)
        step = max(BLOCK // n, 64)
        for start in range(0, lines.shape[1], step):
            part = slice(start, start + step)
            _store(matrix @ lines[:, part].astype(np.float64), target[:, part])
        return result
    height, _, *channels = image.shape
    result = np.empty((height, m, *channels), image.dtype)
    step = max(BLOCK // image[0].size, 1)
    for start in range(0, height, step):
        block = image[start : start + step].swapaxes(0, 1).astype(np.float64, order='C')  # (n, rows, C)
        resized = (matrix @ block.reshape(n, -1)).reshape(m, *block.shape[1:])
        _store(resized.swapaxes(0, 1), result[start : start + step])
    return result


def _store(values: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Write float64 `values` into `target`; integers are rounded with halves up, as MATLAB's for values above 0."""
    if target.dtype.kind == 'u':
        values += 0.5
        np.clip(values, 0, np.iinfo(target.dtype).max, out=values)
    target[...] = values
    return target
