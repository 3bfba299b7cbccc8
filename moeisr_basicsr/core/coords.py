"""Coordinates of output pixels and of the latent codes around them, in LIIF's convention.

An image spans [-1, 1] on both axes, row before column, rows grow downwards; positions are pixel centres. Every
formula below uses the official code's fp32 operations in the official order: the relative coordinates and the areas
at the image border are differences of nearly equal numbers, so another order of operations is another result.

Shapes: B images, Q queries, N positions on one axis, (H, W) LR size.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

EPS_SHIFT = 1e-6  # LIIF, query_rgb: breaks ties between two latent codes, and keeps shifted coordinates inside
EPS_AREA = 1e-9  # LIIF, query_rgb: keeps the total area above zero


class GridAxis(NamedTuple):
    """One axis of a regular output grid, for the corner shifts -1 and +1."""

    index: Tensor  # (2, N) int64, nearest latent code on this axis
    rel: Tensor  # (2, N) fp32, distance to that code in units of LR cells


class Corners(NamedTuple):
    """The four latent codes around each query, in the order (-1, -1), (-1, 1), (1, -1), (1, 1)."""

    index: Tensor  # (4, B, Q) int64, row * W + column
    rel: Tensor  # (4, B, Q, 2) fp32, distance to the code in units of LR cells
    weight: Tensor  # (4, B, Q) fp32, local-ensemble weight; the four add up to 1


def pixel_centres(n: int, device: torch.device | str | None = None) -> Tensor:
    """Centres of `n` pixels on [-1, 1]: (n,) fp32 (LIIF, `make_coord`)."""
    half = 2 / (2 * n)
    return -1 + half + (2 * half) * torch.arange(n, device=device).float()


def make_coord(size: tuple[int, int], device: torch.device | str | None = None) -> Tensor:
    """Centres of all pixels of an image of `size` (rows, columns): (rows * columns, 2) fp32, row-major."""
    rows, cols = (pixel_centres(n, device) for n in size)
    return torch.stack(torch.meshgrid(rows, cols, indexing='ij'), dim=-1).flatten(0, 1)  # (H * W, 2)


def make_cell(size: tuple[int, int], device: torch.device | str | None = None) -> Tensor:
    """Height and width of one output pixel of an image of `size`: (2,) fp32, 2 / size."""
    return torch.tensor([2 / size[0], 2 / size[1]], dtype=torch.float32, device=device)


def output_size(size: tuple[int, int], scale: float | tuple[float, float]) -> tuple[int, int]:
    """Output (rows, columns) for an input of `size`: each side times its factor, halves rounded up.

    Args:
        size: Input (rows, columns).
        scale: One factor for both axes, or (row factor, column factor).

    Raises:
        ValueError: A factor is below 1 or not finite.
    """
    factors = tuple(scale) if isinstance(scale, (tuple, list)) else (scale, scale)
    if len(factors) != 2 or not all(math.isfinite(s) and s >= 1 for s in factors):
        raise ValueError(f'scale must be a finite factor of at least 1, or two of them (rows, columns); got {scale}.')
    return math.floor(size[0] * factors[0] + 0.5), math.floor(size[1] * factors[1] + 0.5)


def nearest_index(coord: Tensor, n: int) -> Tensor:
    """Index of the LR cell that contains `coord`, on an axis of `n` cells; int64, same shape.

    Same cell as `F.grid_sample(mode='nearest', align_corners=False)` picks.
    """
    return torch.round(((coord + 1) * n - 1) / 2).long().clamp_(0, n - 1)


def corner_axis(coord: Tensor, n: int) -> GridAxis:
    """Nearest codes on one axis after a shift by half a cell down and up (LIIF, `query_rgb`).

    Args:
        coord: Positions on this axis, (...) fp32.
        n: Number of LR cells on this axis.

    Returns:
        `index` and `rel`, both (2, ...): first the shift -1, then the shift +1.
    """
    centres = pixel_centres(n, coord.device)
    radius = 2 / n / 2
    shifted = torch.stack([coord + (-radius + EPS_SHIFT), coord + (radius + EPS_SHIFT)])  # (2, ...)
    index = nearest_index(shifted.clamp_(-1 + EPS_SHIFT, 1 - EPS_SHIFT), n)
    rel = (coord - centres[index]) * n
    return GridAxis(index, rel)


def grid_axis(
    n_out: int, n_lr: int, start: int = 0, stop: int | None = None, device: torch.device | str | None = None
) -> GridAxis:
    """`corner_axis` for the positions `start` to `stop` of a whole output axis of `n_out` pixels.

    A strip gets the numbers that the whole image would get: coordinates always come from whole-image indices.
    """
    return corner_axis(pixel_centres(n_out, device)[start:stop], n_lr)


def ensemble_weight(rel_row: Tensor, rel_col: Tensor) -> Tensor:
    """Local-ensemble weights: each corner by the area diagonally opposite to it (LIIF, section 3.2).

    Args:
        rel_row: (2, ...) relative row for the shifts -1 and +1.
        rel_col: (2, ...) relative column, broadcastable against `rel_row`.

    Returns:
        (4, ...) in the order of `Corners`.
    """
    area = [(rel_row[i] * rel_col[j]).abs() + EPS_AREA for i in (0, 1) for j in (0, 1)]
    total = torch.stack(area).sum(dim=0)
    return torch.stack(area[::-1]) / total  # the diagonal opposite of corner c is corner 3 - c


def make_corners(coord: Tensor, lr_size: tuple[int, int]) -> Corners:
    """The four corners of scattered queries.

    Args:
        coord: (B, Q, 2) fp32.
        lr_size: (H, W) of the feature map.
    """
    height, width = lr_size
    rows = corner_axis(coord[..., 0], height)
    cols = corner_axis(coord[..., 1], width)
    index = torch.stack([rows.index[i] * width + cols.index[j] for i in (0, 1) for j in (0, 1)])  # (4, B, Q)
    rel = torch.stack([torch.stack([rows.rel[i], cols.rel[j]], dim=-1) for i in (0, 1) for j in (0, 1)])
    return Corners(index, rel, ensemble_weight(rows.rel, cols.rel))


def grid_corners(rows: GridAxis, cols: GridAxis, width: int) -> Corners:
    """The four corners of every pixel of a grid, B = 1 and Q = rows * columns in row-major order.

    Args:
        rows: Axis of the R output rows; indices relative to the table at hand.
        cols: Axis of the C output columns.
        width: Number of columns of the LR table that `index` points into.
    """
    index = rows.index[:, None, :, None] * width + cols.index[None, :, None, :]  # (2, 2, R, C)
    rel = torch.stack(torch.broadcast_tensors(rows.rel[:, None, :, None], cols.rel[None, :, None, :]), dim=-1)
    weight = ensemble_weight(rows.rel[:, :, None], cols.rel[:, None, :])  # (4, R, C)
    return Corners(index.reshape(4, 1, -1), rel.reshape(4, 1, -1, 2), weight.reshape(4, 1, -1))
