"""Random draws of a training item: scale, crop, augmentation, queries.

Every draw of an item comes from one generator seeded by (seed, epoch, index): an item is the same in any worker, on any
rank and after any resume.

Shapes: (h, w) LR patch, (R, S) HR patch, Q queries.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moeisr_basicsr.core.coords import make_cell, pixel_centres


class Augmentation(NamedTuple):
    """Flips first, then the transpose."""

    flip_rows: bool
    flip_cols: bool
    transpose: bool

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """(H, W, C) -> (H, W, C), or (W, H, C) if transposed; a view."""
        image = image[:: -1 if self.flip_rows else 1, :: -1 if self.flip_cols else 1]
        return image.swapaxes(0, 1) if self.transpose else image


class Queries(NamedTuple):
    """Output positions and their true colours, in LIIF's convention."""

    gt: Tensor  # (Q, C) fp32 in [0, 1]
    coord: Tensor  # (Q, 2) fp32 in [-1, 1], rows first
    cell: Tensor  # (Q, 2) fp32, 2 / output size


def item_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of one training item; numpy's seed sequence mixes the three numbers."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, index])))


def round_half_up(value: float) -> int:
    return math.floor(value + 0.5)


def draw_scale(rng: np.random.Generator, scale_range: tuple[float, float], asymmetric: bool) -> tuple[float, float]:
    """(row factor, column factor), uniform in `scale_range`; equal unless `asymmetric`."""
    low, high = scale_range
    rows = float(rng.uniform(low, high))
    return rows, float(rng.uniform(low, high)) if asymmetric else rows


def draw_crop(rng: np.random.Generator, size: tuple[int, int], crop: tuple[int, int]) -> tuple[int, int]:
    """Top row and left column of a crop inside an image of `size`."""
    return int(rng.integers(size[0] - crop[0] + 1)), int(rng.integers(size[1] - crop[1] + 1))


def draw_augmentation(rng: np.random.Generator, use_flip: bool, use_rot: bool) -> Augmentation:
    """Each of the three with probability 1/2. All are drawn always: the options do not shift later draws."""
    flip_rows, flip_cols, transpose = (rng.random(3) < 0.5).tolist()
    return Augmentation(use_flip and flip_rows, use_flip and flip_cols, use_rot and transpose)


def draw_queries(rng: np.random.Generator, hr_patch: np.ndarray, count: int) -> Queries:
    """`count` different pixels of an HR patch, each as likely as any other.

    Args:
        hr_patch: (R, S, C) uint8 or uint16; it covers exactly the LR patch.
        count: Q, at most R * S.
    """
    rows, cols = hr_patch.shape[:2]
    return queries_at(
        rng.choice(rows * cols, count, replace=False),
        hr_patch,
        pixel_centres(rows),
        pixel_centres(cols),
        make_cell((rows, cols)),
    )


def queries_at(
    position: np.ndarray, hr_patch: np.ndarray, row_coord: Tensor, col_coord: Tensor, cell: Tensor
) -> Queries:
    """Queries at flat positions of an HR patch.

    Args:
        position: (Q,) int64, row * S + column.
        hr_patch: (R, S, C) uint8 or uint16.
        row_coord: (R,) fp32 coordinates of the patch's rows; `col_coord`: (S,) of its columns.
        cell: (2,) fp32.
    """
    row, col = np.divmod(position, hr_patch.shape[1])
    gt = hr_patch[row, col].astype(np.float32) / np.float32(np.iinfo(hr_patch.dtype).max)  # (Q, C)
    coord = torch.stack([row_coord[torch.from_numpy(row)], col_coord[torch.from_numpy(col)]], dim=-1)  # (Q, 2)
    return Queries(torch.from_numpy(gt), coord, cell.expand(len(position), 2).contiguous())
