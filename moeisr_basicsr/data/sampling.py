"""Random draws of a training item: scale, crop, augmentation, queries. All come from one generator (see `repeatable`).

Shapes: (R, S) HR patch, Q queries.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moeisr_basicsr.core.coords import make_cell, pixel_centres

from .image_reader import to_float


class Augmentation(NamedTuple):
    """Flips first, then the transpose."""

    flip_rows: bool
    flip_cols: bool
    transpose: bool

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """(H, W, C) -> (H, W, C), or (W, H, C) if transposed; a view."""
        image = image[:: -1 if self.flip_rows else 1, :: -1 if self.flip_cols else 1]
        return image.swapaxes(0, 1) if self.transpose else image


def round_half_up(value: float) -> int:
    return math.floor(value + 0.5)


def draw_scale(rng: np.random.Generator, scale_range: tuple[float, float], asymmetric: bool) -> tuple[float, float]:
    """(row factor, column factor), uniform in `scale_range`; equal unless `asymmetric`."""
    rows = float(rng.uniform(*scale_range))
    return rows, float(rng.uniform(*scale_range)) if asymmetric else rows


def draw_crop(rng: np.random.Generator, size: tuple[int, ...], crop: tuple[int, int]) -> tuple[int, int]:
    """Top row and left column of a crop inside an image of `size`."""
    return int(rng.integers(size[0] - crop[0] + 1)), int(rng.integers(size[1] - crop[1] + 1))


def draw_augmentation(rng: np.random.Generator, use_flip: bool, use_rot: bool) -> Augmentation:
    """Each of the three with probability 1/2. All are drawn always: the options do not shift later draws."""
    flip_rows, flip_cols, transpose = (rng.random(3) < 0.5).tolist()
    return Augmentation(use_flip and flip_rows, use_flip and flip_cols, use_rot and transpose)


def draw_queries(
    rng: np.random.Generator,
    hr_patch: np.ndarray,
    count: int,
    coords: tuple[Tensor, Tensor] | None = None,
    cell: Tensor | None = None,
) -> dict[str, Tensor]:
    """`count` different pixels of an HR patch as queries in LIIF's convention, each as likely as any other.

    Args:
        hr_patch: (R, S, C) uint8 or uint16.
        count: Q, at most R * S.
        coords: (R,) fp32 coordinates of the patch's rows in the LR patch and (S,) of its columns; by default the HR
            patch covers exactly the LR patch.
        cell: (2,) fp32, given with `coords`.

    Returns:
        `gt` (Q, C) in [0, 1]; `coord` (Q, 2) in [-1, 1]; `cell` (Q, 2), 2 / output size; fp32.
    """
    size = hr_patch.shape[:2]
    if coords is None or cell is None:
        coords, cell = (pixel_centres(size[0]), pixel_centres(size[1])), make_cell(size)
    row, col = np.divmod(rng.choice(size[0] * size[1], count, replace=False), size[1])  # (Q,)
    coord = torch.stack([coords[0][torch.from_numpy(row)], coords[1][torch.from_numpy(col)]], dim=-1)  # (Q, 2)
    gt = torch.from_numpy(to_float(hr_patch[row, col]))  # (Q, C)
    return {'gt': gt, 'coord': coord, 'cell': cell.expand(count, 2).contiguous()}
