"""Patches of LR and HR images at any real factor, where HR pixel borders need not fall on LR pixel borders.

Shapes: (h, w) LR image, (H, W) HR image, one LR patch of (L, L); Q queries.
"""

from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moeisr_basicsr.core.coords import pixel_centres
from moeisr_basicsr.errors import UserError

from .sampling import Augmentation, Queries, draw_crop, queries_at, round_half_up


class PatchAxis(NamedTuple):
    """One axis of an HR patch that belongs to an LR patch."""

    start: int  # first HR position whose centre lies in the LR patch
    stop: int  # one past the last
    coord: Tensor  # (stop - start,) fp32 positions of their centres in the LR patch, in [-1, 1]
    cell: float  # size of an HR pixel in the same units


class PairPatch(NamedTuple):
    """A training patch of a pair."""

    lq: np.ndarray  # (L, L, 3) uint8 or uint16
    queries: Queries
    scale: Tensor  # (2,) fp32 (rows, columns)


def align_pair(
    lq_size: tuple[int, int], gt_size: tuple[int, int], scale: tuple[float, float] | None, paths: dict[str, str]
) -> tuple[int, int]:
    """(rows, columns) of the HR image that the LR image shows; the rest at the lower and right border is cut off.

    Raises:
        UserError: The HR image is smaller than the LR image, or smaller than the LR image times `scale`.
    """
    label = f'{paths["gt_path"]} ({gt_size[0]} x {gt_size[1]} rows x columns)'
    if scale is not None:
        wanted = tuple(round_half_up(n * s) for n, s in zip(lq_size, scale))
        if any(n < m for n, m in zip(gt_size, wanted)):
            raise UserError(
                f'{label}: too small for {lq_size[0]} x {lq_size[1]} times the scale of {scale[0]:g} x '
                f'{scale[1]:g} ({paths["lq_path"]}).'
            )
        return wanted
    if any(n < m for n, m in zip(gt_size, lq_size)):
        raise UserError(f'{label}: smaller than its LR image {paths["lq_path"]} ({lq_size[0]} x {lq_size[1]}).')
    whole = [n // m for n, m in zip(gt_size, lq_size)]
    # The same whole factor on both axes, and floor(HR / factor) is the LR size: a rest that the LR image lacks.
    if whole[0] == whole[1] and all(n // whole[0] == m for n, m in zip(gt_size, lq_size)):
        return lq_size[0] * whole[0], lq_size[1] * whole[1]
    return gt_size


def patch_axis(first: int, count: int, n_lr: int, n_hr: int) -> PatchAxis:
    """The HR positions whose centres lie in `count` LR positions from `first` on, decided in whole numbers.

    Args:
        first: First LR position.
        count: LR positions of the patch.
        n_lr: LR size of the image.
        n_hr: HR size of the image, at least `n_lr`.
    """
    # The centre of HR position i lies at (2 i + 1) n_lr / (2 n_hr) LR pixels.
    start, stop = (-((n_lr - 2 * edge * n_hr) // (2 * n_lr)) for edge in (first, first + count))
    cell = Fraction(2 * n_lr, count * n_hr)
    if (first * n_hr) % n_lr == 0 and (count * n_hr) % n_lr == 0:
        coord = pixel_centres(stop - start)  # pixel borders meet: bit for bit the coordinates of the HR patch alone
    else:
        position = (2 * np.arange(start, stop) + 1) * (n_lr / n_hr) - 2 * first  # (R,) twice the distance to `first`
        coord = torch.from_numpy((position / count - 1).astype(np.float32))
    return PatchAxis(start, stop, coord, float(cell))


def draw_pair_patch(
    rng: np.random.Generator,
    lq: np.ndarray,
    gt: np.ndarray,
    patch_size: int,
    sample_q: int,
    draw_augmentation: Callable[[np.random.Generator], Augmentation],
) -> PairPatch:
    """A random LR patch with `sample_q` queries inside it.

    Args:
        lq: (h, w, 3) at least `patch_size` on both axes.
        gt: (H, W, 3) of the same area, at least as large as `lq`.
        patch_size: L.
        draw_augmentation: Draws flips and transpose.
    """
    top, left = draw_crop(rng, lq.shape[:2], (patch_size, patch_size))
    lq_patch = lq[top : top + patch_size, left : left + patch_size]
    rows = patch_axis(top, patch_size, lq.shape[0], gt.shape[0])
    cols = patch_axis(left, patch_size, lq.shape[1], gt.shape[1])
    gt_patch = gt[rows.start : rows.stop, cols.start : cols.stop]
    augment = draw_augmentation(rng)
    lq_patch, gt_patch = augment(lq_patch), augment(gt_patch)
    coords = [
        _mirrored(rows.coord) if augment.flip_rows else rows.coord,
        _mirrored(cols.coord) if augment.flip_cols else cols.coord,
    ]
    cell, scale = [rows.cell, cols.cell], [gt.shape[0] / lq.shape[0], gt.shape[1] / lq.shape[1]]
    if augment.transpose:
        coords, cell, scale = coords[::-1], cell[::-1], scale[::-1]
    position = rng.choice(gt_patch.shape[0] * gt_patch.shape[1], sample_q, replace=False)
    return PairPatch(lq_patch, queries_at(position, gt_patch, *coords, torch.tensor(cell)), torch.tensor(scale))


def _mirrored(coord: Tensor) -> Tensor:
    """Coordinates of the reversed axis; a symmetric axis keeps its own, to the bit."""
    if torch.equal(coord, pixel_centres(len(coord))):
        return coord
    return -coord.flip(0)
