"""Queries: output positions, the LR pixel under each and the latent codes around it, in LIIF's convention.

An image spans [-1, 1] on both axes, row before column, rows grow downwards; positions are pixel centres. Every
formula below uses the official code's fp32 operations in the official order: the relative coordinates and the areas
at the image border are differences of nearly equal numbers, so another order of operations is another result.

Shapes: B images, Q queries, N positions on one axis or queries of one image, (H, W) LR size, T = H * W latent codes,
D width of a table or of an activation.

A field `index` hides tuple's method of that name, which nobody calls on these; hence each `type: ignore`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

EPS_SHIFT = 1e-6  # LIIF, query_rgb: breaks ties between two latent codes, and keeps shifted coordinates inside
EPS_AREA = 1e-9  # LIIF, query_rgb: keeps the total area above zero


class GridAxis(NamedTuple):
    """One axis of a regular output grid, for the corner shifts -1 and +1."""

    index: Tensor  # type: ignore[assignment]  # (2, N) int64, nearest latent code on this axis
    rel: Tensor  # (2, N) fp32, distance to that code in units of LR pixels


class Near(NamedTuple):
    """The LR pixel under each position of one axis, or of each query."""

    index: Tensor  # type: ignore[assignment]  # (N,) int64; of queries (B, Q), row * W + column
    rel: Tensor  # (N,) fp32, distance to its centre in units of LR pixels; of queries (B, Q, 2)


class Corners(NamedTuple):
    """The four latent codes around each query, in the order (-1, -1), (-1, 1), (1, -1), (1, 1)."""

    index: Tensor  # type: ignore[assignment]  # (4, B, Q) int64, row * W + column
    rel: Tensor  # (4, B, Q, 2) fp32, distance to the code in units of LR pixels
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


def output_size(size: tuple[int, int], scale: float | Sequence[float]) -> tuple[int, int]:
    """Output (rows, columns) for an input of `size`: each side times its factor, halves rounded up.

    Args:
        size: Input (rows, columns).
        scale: One factor for both axes, or (row factor, column factor).

    Raises:
        ValueError: A factor is below 1 or not finite.
    """
    factors = tuple(scale) if isinstance(scale, Sequence) else (scale, scale)
    if len(factors) != 2 or not all(math.isfinite(s) and s >= 1 for s in factors):
        raise ValueError(f'scale must be a finite factor of at least 1, or two of them (rows, columns); got {scale}.')
    return math.floor(size[0] * factors[0] + 0.5), math.floor(size[1] * factors[1] + 0.5)


def nearest_index(coord: Tensor, n: int) -> Tensor:
    """Index of the LR pixel that contains `coord`, on an axis of `n` pixels; int64, same shape.

    The same as `F.grid_sample(mode='nearest', align_corners=False)` picks.
    """
    return torch.round(((coord + 1) * n - 1) / 2).clamp_(0, n - 1).long()


def near_axis(coord: Tensor, n: int) -> Near:
    """The LR pixel under each position (...) of an axis of `n` pixels."""
    index = nearest_index(coord, n)
    return Near(index, (coord - pixel_centres(n, coord.device)[index]) * n)


def make_near(coord: Tensor, lr_size: tuple[int, int]) -> Near:
    """The LR pixels under scattered queries (B, Q, 2)."""
    rows, cols = (near_axis(axis, n) for axis, n in zip(coord.unbind(-1), lr_size))
    return Near(rows.index * lr_size[1] + cols.index, torch.stack([rows.rel, cols.rel], dim=-1))


def grid_near(rows: Near, cols: Near, width: int) -> Near:
    """The LR pixels under every pixel of a grid in row-major order, B = 1; `width` is that of the table at hand."""
    index = rows.index[:, None] * width + cols.index  # (R, C)
    rel = torch.stack(torch.broadcast_tensors(rows.rel[:, None], cols.rel), dim=-1)  # (R, C, 2)
    return Near(index.reshape(1, -1), rel.reshape(1, -1, 2))


def corner_axis(coord: Tensor, n: int) -> GridAxis:
    """Nearest codes on one axis after a shift by half an LR pixel down and up (LIIF, `query_rgb`).

    Args:
        coord: Positions on this axis, (...) fp32.
        n: Number of LR pixels on this axis.

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


class Queries(NamedTuple):
    """N queries of one image with everything that an expert needs to answer them.

    The four corners of one query lie side by side: an expert sees 4 N rows, and blending them is one small product per
    query.
    """

    index: Tensor  # type: ignore[assignment]  # (N, 4) int64, rows of the LR table
    rel: Tensor  # (N, 4, 2) relative coordinate in units of LR pixels
    weight: Tensor  # (N, 4) local-ensemble weight
    cell_lr: Tensor  # (N, 2), or (1, 2) where one cell serves all, size of the output pixel in units of LR pixels

    def select(self, which: Tensor | slice) -> 'Queries':
        """The queries at the positions `which`, in that order."""
        cell_lr = self.cell_lr if self.cell_lr.shape[0] == 1 else self.cell_lr[which]
        return Queries(self.index[which], self.rel[which], self.weight[which], cell_lr)

    def split(self, size: int) -> list['Queries']:
        """Consecutive pieces of at most `size` queries."""
        return [self.select(slice(at, at + size)) for at in range(0, max(self.index.shape[0], 1), size)]

    def gather(self, table: Tensor) -> Tensor:
        """Rows of an LR table (T, D) for every corner: (4 N, D)."""
        return table.index_select(0, self.index.flatten())

    def local(self) -> Tensor:
        """What an expert reads beside the features, relative coordinate and cell: (4 N, 4)."""
        cell_lr = self.cell_lr.unsqueeze(1).expand(self.rel.shape[0], 4, 2)
        return torch.cat([self.rel, cell_lr], dim=-1).flatten(0, 1)

    def blend(self, x: Tensor) -> Tensor:
        """Local ensemble of the corners' vectors: (4 N, D) -> (N, D)."""
        return torch.bmm(self.weight.unsqueeze(1).to(x), x.unflatten(0, (-1, 4))).squeeze(1)


def make_queries(corners: Corners, cell_lr: Tensor, image: int = 0) -> Queries:
    """The queries of one image of a batch; `cell_lr` is (N, 2) or (1, 2)."""
    return Queries(
        corners.index[:, image].t().contiguous(),
        corners.rel[:, image].transpose(0, 1).contiguous(),
        corners.weight[:, image].t().contiguous(),
        cell_lr,
    )
