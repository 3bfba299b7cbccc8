"""Rendering: a whole output image from a feature map, in tiles of constant memory.

A tile of LR cells gives a tile of output pixels. Per tile: route its pixels, build the LR tables under it, decode.
Logits, order and LR tables of a whole image are never held.

Shapes: B images, C feature channels, (H, W) LR size, (R, S) rows and columns of an output tile, J experts.
"""
import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .control import Budget, CostWeight
from .coords import GridAxis, grid_axis, grid_corners, make_cell, pixel_centres
from .decoder import MoEDecoder
from .dispatch import dispatch
from .mapper import Mapper, nearest_axis
from .queries import Queries, make_queries

TILE = 32  # LR cells per side: the tables of four 256-wide experts then take 4 MiB in fp32 and stay in cache
CHUNK = 4096  # queries: four corners of 256 values are 16 MiB, below the size at which malloc maps memory anew


Control = CostWeight | Budget


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
    queries = make_queries(corners, tile.cell[None])

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
    with torch.autocast(table.device.type, enabled=False):
        w_rel, w_cell = mapper.split_query_in()
        x = table[rows[0][:, None] * width + cols[0]] + (cell[None] @ w_cell.t())  # (R, S, D)
        if mapper.granularity == 'pixel':
            size = rows[1].shape[0], cols[1].shape[0]
            rel = torch.stack([rows[1][:, None].expand(size), cols[1][None].expand(size)], dim=-1)  # (R, S, 2)
            x = x + rel @ w_rel.t()
        return mapper.query_out(F.relu(x))


def spans(start: int, stop: int, count: int) -> list[tuple[int, int]]:
    """Output positions `start` to `stop` in at most `count` consecutive spans of nearly equal length."""
    edges = sorted({start + round((stop - start) * at / count) for at in range(max(count, 1) + 1)})
    return list(zip(edges[:-1], edges[1:]))


class FeatureWindow(NamedTuple):
    """Features of a part of an image. Cut edges need a margin of `Renderer.margin` codes around the codes in use."""
    feat: Tensor  # (1, C, h, w)
    top: int  # LR row of the image that feat[..., 0, :] belongs to
    left: int
    lr_size: tuple[int, int]  # (H, W) of the whole image


class Renderer:
    """Renders regions of the output of one image; all coordinates come from whole-image indices.

    Args:
        decoder: Routing is that of test time, whatever its mode.
        size: (R, S) of the whole output.
        lr_size: (H, W) of the whole feature map.
        cell: (2,) 2 / size, or what the network was trained to see in its place.
        control: Routes a strip's logits; the trained routing where it is None.
        backend: Decodes one tile.
        tile: LR cells per side of a tile.
        device: Device of the features.
    """

    def __init__(self, decoder: MoEDecoder, size: tuple[int, int], lr_size: tuple[int, int], cell: Tensor | None = None,
                 control: Control | None = None, backend: Backend = decode_tile, tile: int = TILE,
                 device: torch.device | str | None = None):
        self.decoder = decoder
        self.size, self.lr_size, self.tile = size, lr_size, tile
        self.control = control or CostWeight()
        self.backend = backend
        cell = make_cell(size) if cell is None else cell
        self.cell = (cell * torch.tensor(lr_size, dtype=torch.float32)).to(device)  # in units of LR cells
        self.rows, self.cols = (grid_axis(n_out, n_lr, device=device) for n_out, n_lr in zip(size, lr_size))
        self.near_rows, self.near_cols = (nearest_axis(pixel_centres(n_out, device), n_lr)
                                          for n_out, n_lr in zip(size, lr_size))
        self.costs = decoder.expert_costs.to(device)

    @property
    def margin(self) -> int:
        """LR codes around those in use that must be right: the mapper's receptive radius, at least the unfolding's."""
        return max(1, self.decoder.mapper.num_layers if self.decoder.mapper is not None else 1)

    def window_of(self, rows: tuple[int, int], cols: tuple[int, int]) -> tuple[int, int, int, int]:
        """LR codes (top, bottom, left, right; ends excluded) that the output region needs, margin included."""
        bounds = []
        for axis, (start, stop), n_lr in zip((self.rows, self.cols), (rows, cols), self.lr_size):
            index = axis.index[:, start:stop]
            bounds += [max(int(index.min()) - self.margin, 0), min(int(index.max()) + self.margin + 1, n_lr)]
        return tuple(bounds)

    def logits(self, window: FeatureWindow, table: Tensor, rows: tuple[int, int], cols: tuple[int, int]) -> Tensor:
        """The mapper's logits of an output region: (r, s, J); `table` is `Mapper.table` of the window, (T, D)."""
        near_rows, near_cols = ((near[0][start:stop] - origin, near[1][start:stop]) for near, (start, stop), origin in
                                ((self.near_rows, rows, window.top), (self.near_cols, cols, window.left)))
        return tile_logits(self.decoder.mapper, table, near_rows, near_cols, window.feat.shape[-1], self.cell)

    def strips(self, window: FeatureWindow, rows: tuple[int, int], cols: tuple[int, int]
               ) -> Iterator[tuple[int, int, Tensor | None]]:
        """Row strips of an output region with their expert maps, (r, s) uint8."""
        table = None if self.decoder.mapper is None else self.decoder.mapper.table(window.feat)[0]
        count = math.ceil((rows[1] - rows[0]) * self.lr_size[0] / self.size[0] / self.tile)
        for top, bottom in spans(*rows, count):
            yield top, bottom, None if table is None else self.expert_map(window, table, (top, bottom), cols)

    def expert_map(self, window: FeatureWindow, table: Tensor, rows: tuple[int, int], cols: tuple[int, int]) -> Tensor:
        """Experts of an output region: (r, s) uint8."""
        return self.control.route(self.logits(window, table, rows, cols), self.costs).to(torch.uint8)

    def observe(self, window: FeatureWindow, rows: tuple[int, int], cols: tuple[int, int]) -> None:
        """Show a region's logits to a `Budget` before anything is rendered."""
        table = self.decoder.mapper.table(window.feat)[0]
        count = math.ceil((rows[1] - rows[0]) * self.lr_size[0] / self.size[0] / self.tile)
        for strip in spans(*rows, count):
            self.control.observe(self.logits(window, table, strip, cols))

    def render(self, window: FeatureWindow, rows: tuple[int, int], cols: tuple[int, int]
               ) -> Iterator[tuple[int, int, Rendered]]:
        """An output region, strip by strip from top to bottom.

        Yields:
            First row, last row + 1, and the strip as `Rendered` with B = 1.
        """
        count = math.ceil((cols[1] - cols[0]) * self.lr_size[1] / self.size[1] / self.tile)
        for top, bottom, expert_map in self.strips(window, rows, cols):
            pieces = []
            for left, right in spans(*cols, count):
                piece = None if expert_map is None else expert_map[:, left - cols[0]:right - cols[0]]
                tile_rows = GridAxis(self.rows.index[:, top:bottom] - window.top, self.rows.rel[:, top:bottom])
                tile_cols = GridAxis(self.cols.index[:, left:right] - window.left, self.cols.rel[:, left:right])
                crop, tile_rows, tile_cols = crop_window(window.feat, tile_rows, tile_cols)
                pieces.append(self.backend(self.decoder, Tile(crop, tile_rows, tile_cols, self.cell, piece)))
            yield top, bottom, Rendered(torch.cat(pieces, dim=-1)[None], None if expert_map is None else expert_map[None])


def crop_window(feat: Tensor, rows: GridAxis, cols: GridAxis) -> tuple[Tensor, GridAxis, GridAxis]:
    """The features (1, C, h, w) under a tile with a halo of one code, and the axes relative to that window.

    Where the halo lies outside `feat` it is zero: the image's border, since a window has a margin elsewhere.
    """
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


@torch.no_grad()
def render(decoder: MoEDecoder, feat: Tensor, size: tuple[int, int], cell: Tensor | None = None,
           control: Control | None = None, backend: Backend = decode_tile, tile: int = TILE) -> Rendered:
    """The whole output of a batch of feature maps (B, C, H, W), without gradients; arguments as in `Renderer`."""
    lr_size = tuple(feat.shape[-2:])
    renderer = Renderer(decoder, size, lr_size, cell, control, backend, tile, feat.device)
    windows = [FeatureWindow(feat[image:image + 1], 0, 0, lr_size) for image in range(feat.shape[0])]
    everything = (0, size[0]), (0, size[1])
    if isinstance(control, Budget):
        for window in windows:
            renderer.observe(window, *everything)
    output = torch.empty(feat.shape[0], decoder.out_channels, *size, device=feat.device)
    expert_map = None
    if decoder.num_experts > 1:
        expert_map = torch.empty(feat.shape[0], *size, dtype=torch.uint8, device=feat.device)
    for image, window in enumerate(windows):
        for top, bottom, strip in renderer.render(window, *everything):
            output[image, :, top:bottom] = strip.output[0]
            if expert_map is not None:
                expert_map[image, top:bottom] = strip.expert_map[0]
    return Rendered(output, expert_map)
