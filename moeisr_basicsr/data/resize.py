"""Bicubic resizing: MATLAB's `imresize`, bit for bit, and Pillow's.

The papers' low-resolution images come from these two. They differ: MATLAB resizes the axis with the smaller factor
first (rows first where both are equal) and rounds 8-bit images between the passes; Pillow resizes columns first and
works in fixed point.

Shapes: (H, W, C) or (H, W) images, uint8, uint16, float32 or float64; n input and m output positions on one axis, T
taps per output position.
"""

import math
from functools import lru_cache

import numpy as np
from PIL import Image
from scipy import sparse

KERNEL_WIDTH = 4.0  # support of the cubic kernel
BLOCK = 1 << 16  # values per input block and pass: the block in float64 and its result stay in the cache


def resize(image: np.ndarray, size: tuple[int, int], method: str = 'matlab') -> np.ndarray:
    """`image` in another size (rows, columns), of the same type; anti-aliased when shrinking. See `METHODS`."""
    return METHODS[method](image, size)


def imresize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """MATLAB's `imresize(image, [rows columns])` with its bicubic kernel.

    Integer images are rounded (halves up) and clipped after each of the two passes, as MATLAB does: the published
    low-resolution images are reproduced bit for bit. Sums are in float64.
    """
    if 0 in image.shape or min(size) < 1 or image.dtype not in (np.uint8, np.uint16, np.float32, np.float64):
        raise ValueError(f'{image.shape} {image.dtype} cannot be resized to {size}.')
    factors = [m / n for m, n in zip(size, image.shape)]
    result = image.copy()
    for axis in (0, 1) if factors[0] <= factors[1] else (1, 0):
        if size[axis] != image.shape[axis]:
            result = _resize_axis(result, axis, _tap_matrix(image.shape[axis], size[axis]))
    return result


def pil_resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pillow's bicubic `Image.resize`; what LIIF and LTE train with.

    uint8 takes Pillow's fixed-point path; other types go channel by channel through its float path, uint16 is rounded
    at the end.
    """
    box = (size[1], size[0])
    if image.dtype == np.uint8 and (image.ndim == 2 or image.shape[2] == 3):
        return np.asarray(Image.fromarray(image).resize(box, Image.Resampling.BICUBIC))
    if image.ndim == 3:
        return np.stack([pil_resize(np.ascontiguousarray(image[..., c]), size) for c in range(image.shape[2])], axis=-1)
    plane = np.asarray(Image.fromarray(image.astype(np.float32)).resize(box, Image.Resampling.BICUBIC))
    result = np.empty(plane.shape, image.dtype)
    _store(plane.astype(np.float64), result)
    return result


METHODS = {'matlab': imresize, 'pil': pil_resize}


def cubic(distance: np.ndarray) -> np.ndarray:
    """`core.skip.keys_kernel` in MATLAB's order of operations: halves are rounded up or down by the last bit."""
    near = np.abs(distance)
    near2, near3 = near**2, near**3
    inner = (1.5 * near3 - 2.5 * near2 + 1) * (near <= 1)
    return inner + (-0.5 * near3 + 2.5 * near2 - 4 * near + 2) * ((near > 1) & (near <= 2))


@lru_cache(maxsize=1024)  # a training run meets a few hundred (crop, patch) sizes
def _tap_matrix(n: int, m: int) -> sparse.csr_matrix:
    """Weights of one axis as a sparse (m, n) matrix, as `contributions` in MATLAB's imresize.m."""
    scale = m / n
    stretch = min(scale, 1.0)  # widens the kernel when shrinking
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
    index, weight = index[:, used], weight[:, used]
    starts = np.arange(m + 1) * index.shape[1]
    return sparse.csr_matrix((weight.ravel(), index.ravel(), starts), shape=(m, n))


def _resize_axis(image: np.ndarray, axis: int, matrix: sparse.csr_matrix) -> np.ndarray:
    """One pass, in blocks of lines so that a large image never lies in float64 as a whole."""
    m, n = matrix.shape
    result = np.empty((*image.shape[:axis], m, *image.shape[axis + 1 :]), image.dtype)
    source, target = (array.swapaxes(0, axis) for array in (image, result))  # (n, lines, C), (m, lines, C)
    step = max(BLOCK // (n * math.prod(source.shape[2:])), 16)  # products with fewer lines are slow
    for start in range(0, source.shape[1], step):
        block = source[:, start : start + step].astype(np.float64, order='C')
        _store((matrix @ block.reshape(n, -1)).reshape(m, *block.shape[1:]), target[:, start : start + step])
    return result


def _store(values: np.ndarray, target: np.ndarray) -> None:
    """Write float64 `values` into `target`; integers are rounded with halves up, as MATLAB's for values above 0."""
    if target.dtype.kind == 'u':
        values += 0.5
        np.clip(values, 0, np.iinfo(target.dtype).max, out=values)
    target[...] = values
