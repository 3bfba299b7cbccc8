"""Rendering: a whole output image from a feature map, in tiles of constant memory.

A tile of LR cells gives a tile of output pixels. Per tile: route its pixels, build the LR tables under it, decode.
Logits, order and LR tables of a whole image are never held.

Shapes: B images, C feature channels, (H, W) LR size, (R, S) rows and columns of an output tile, J experts.
"""
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .coords import GridAxis, grid_axis, grid_corners, pixel_centres
from .decoder import MoEDecoder
from .dispatch import dispatch
from .mapper import Mapper, nearest_axis
from .queries import Queries
from .routing import route_argmax

TILE = 32  # LR cells per side: the tables of four 256-wide experts then take 4 MiB in fp32 and stay in cache
CHUNK = 4096  # queries: four corners of 256 values are 16 MiB, below the size at which malloc maps memory anew


class Rendered(NamedTuple):
    """An image and who made which pixel."""
    output: Tensor  # (B, C_out, R, S)
    expert_map: Tensor | None  # (B, R, S) uint8; None with one expert


class Tile(NamedTuple):
    """One tile of the output of one image, and the LR window under it."""
    window: Tensor  # (1, C, h + 2, w + 2) features with a halo of one code per side, zero outside the image
    rows: GridAxis  # of the output rows, indices relative to the window without its halo
    cols: GridAxis
    cell: Tensor  # (2,) size of an output pixel in units of LR cells
    expert_map: Tensor | None  # (R, S) uint8


class Backend(Protocol):
    """Decodes one tile: the torch code below, or a fused kernel."""

    def __call__(self, decoder: MoEDecoder, tile: Tile) -> Tensor:
        """(C_out, R, S) fp32."""


def decode_tile(decoder: MoEDecoder, tile: Tile) -> Tensor:
    """The torch backend: LR tables of the window, each pixel to its expert, in chunks. (C_out, R, S)."""
    tables = [table[0] for table in decoder.pool.tables(tile.window, padding=0)]
    width = tile.window.shape[-1] - 2
    corners = grid_corners(tile.rows, tile.cols, width)
    queries = Queries(corners.index[:, 0], corners.rel[:, 0], corners.weight[:, 0], tile.cell[None])

    def evaluate(j: int, group: Queries) -> Tensor:
        return torch.cat([decoder.pool.evaluate(j, tables, chunk) for chunk in group.split(CHUNK)])

    if tile.expert_map is None:
        answers = evaluate(0, queries)
    else:
        answers = dispatch(evaluate, queries, tile.expert_map.flatten(), decoder.num_experts)
    size = tile.rows.rel.shape[1], tile.cols.rel.shape[1]
    return answers.t().reshape(-1, *size).float()  # (C_out, R, S)


def tile_logits(mapper: Mapper, table: Tensor, rows: tuple[Tensor, Tensor], cols: tuple[Tensor, Tensor], width: int,
                cell: Tensor) -> Tensor:
    """The mapper's logits on a grid; the same numbers as `Mapper.forward` gives for these positions.

    Args:
        table: (T, D), one image of `Mapper.table`.
        rows: Nearest LR row and distance of each output row, both (R,).
        cols: The same for the columns, both (S,).
        width: LR columns of the table.
        cell: (2,) in units of LR cells.

    Returns:
        (R, S, J) fp32.
    """
    w_rel, w_cell = mapper.split_query_in()
    x = table[rows[0][:, None] * width + cols[0]] + (cell[None] @ w_cell.t())  # (R, S, D)
    if mapper.granularity == 'pixel':
        size = rows[1].shape[0], cols[1].shape[0]
        rel = torch.stack([rows[1][:, None].expand(size), cols[1][None].expand(size)], dim=-1)  # (R, S, 2)
        x = x + rel @ w_rel.t()
    return mapper.query_out(F.relu(x))


def spans(n_out: int, n_lr: int, tile: int) -> list[tuple[int, int]]:
    """Consecutive spans of output positions, each over about `tile` of `n_lr` LR cells."""
    count = max(1, -(-n_lr // tile))
    edges = sorted({round(n_out * at / count) for at in range(count + 1)})
    return list(zip(edges[:-1], edges[1:]))


def crop_window(feat: Tensor, rows: GridAxis, cols: GridAxis) -> tuple[Tensor, GridAxis, GridAxis]:
    """The features (1, C, H, W) under a tile with a halo of one code, and the axes relative to that window."""
    bounds, axes = [], []
    for axis in (rows, cols):
        first, last = int(axis.index.min()), int(axis.index.max())
        bounds.append((first, last))
        axes.append(GridAxis(axis.index - first, axis.rel))
    (top, bottom), (left, right) = bounds
    height, width = feat.shape[-2:]
    window = feat[..., max(top - 1, 0):bottom + 2, max(left - 1, 0):right + 2]
    pad = (int(left == 0), int(right == width - 1), int(top == 0), int(bottom == height - 1))
    return F.pad(window, pad), axes[0], axes[1]


def render_strips(decoder: MoEDecoder, feat: Tensor, size: tuple[int, int], cell: Tensor, cost_weight: float = 0.0,
                  backend: Backend = decode_tile, tile: int = TILE) -> Iterator[tuple[int, int, Rendered]]:
    """The output image of one feature map, strip by strip from top to bottom.

    Args:
        decoder: In eval mode or not, routing is that of test time.
        feat: (1, C, H, W).
        size: Output (rows, columns).
        cell: (2,) 2 / size, or what the network was trained to see in its place.
        cost_weight: kappa of `route_argmax`.
        backend: Decodes one tile.
        tile: LR cells per side of a tile.

    Yields:
        First row, last row + 1, and the strip as `Rendered` with B = 1.
    """
    lr_size = feat.shape[-2:]
    device = feat.device
    cell = cell.to(device) * torch.tensor(lr_size, dtype=torch.float32, device=device)
    whole_rows, whole_cols = (grid_axis(n_out, n_lr, device=device) for n_out, n_lr in zip(size, lr_size))
    mapper = decoder.mapper
    if mapper is not None:
        table = mapper.table(feat)[0]
        near_rows, near_cols = (nearest_axis(pixel_centres(n_out, device), n_lr) for n_out, n_lr in zip(size, lr_size))
        costs = decoder.expert_costs.to(device)
    for top, bottom in spans(size[0], lr_size[0], tile):
        pieces, maps = [], []
        for left, right in spans(size[1], lr_size[1], tile):
            expert_map = None
            if mapper is not None:
                logits = tile_logits(mapper, table, tuple(part[top:bottom] for part in near_rows),
                                     tuple(part[left:right] for part in near_cols), lr_size[1], cell)
                expert_map = route_argmax(logits, costs, cost_weight).to(torch.uint8)
                maps.append(expert_map)
            rows = GridAxis(*(part[:, top:bottom] for part in whole_rows))
            cols = GridAxis(*(part[:, left:right] for part in whole_cols))
            window, rows, cols = crop_window(feat, rows, cols)
            pieces.append(backend(decoder, Tile(window, rows, cols, cell, expert_map)))
        yield top, bottom, Rendered(torch.cat(pieces, dim=-1)[None], torch.cat(maps, dim=-1)[None] if maps else None)


@torch.no_grad()
def render(decoder: MoEDecoder, feat: Tensor, size: tuple[int, int], cell: Tensor | None = None,
           cost_weight: float = 0.0, backend: Backend = decode_tile, tile: int = TILE) -> Rendered:
    """The whole output of a batch of feature maps, without gradients; arguments as in `render_strips`."""
    cell = torch.tensor([2 / size[0], 2 / size[1]]) if cell is None else cell
    strips = partial(render_strips, decoder, size=size, cell=cell, cost_weight=cost_weight, backend=backend, tile=tile)
    output = torch.empty(feat.shape[0], decoder.out_channels, *size, device=feat.device)
    with_map = decoder.num_experts > 1
    expert_map = torch.empty(feat.shape[0], *size, dtype=torch.uint8, device=feat.device) if with_map else None
    for image in range(feat.shape[0]):
        for top, bottom, strip in strips(feat[image:image + 1]):
            output[image, :, top:bottom] = strip.output[0]
            if with_map:
                expert_map[image, top:bottom] = strip.expert_map[0]
    return Rendered(output, expert_map)
