"""Rendering: a whole output image from a feature map, in tiles of constant memory.

A tile of LR pixels gives a tile of output pixels. Per tile: route its pixels, build the LR tables under it, decode.
Logits, order and LR tables of a whole image are never held. Mapper, routing and experts are those of training.

Shapes: B images, C feature channels, (H, W) LR size, (R, S) rows and columns of an output tile, J experts.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .control import Budget, CostWeight, Shuffle
from .coords import (
    GridAxis,
    Near,
    Queries,
    grid_axis,
    grid_corners,
    grid_near,
    make_cell,
    make_queries,
    near_axis,
    pixel_centres,
)
from .decoder import MoEDecoder, dispatch, reads_of
from .mapper import Mapper

LOGITS = 1 << 18  # pixels whose logits are held at once
MAPPER_PIXELS = 1 << 16  # LR pixels whose mapper activations are held at once: 8 MiB for 32 channels
CHUNK = 4096  # queries: four corners of 256 values are 16 MiB, below the size at which malloc maps memory anew


Control = CostWeight | Budget
Clock = Callable[[str], AbstractContextManager]  # clock(stage) is entered around each piece of work of that stage


class Rendered(NamedTuple):
    """An image and who made which pixel."""

    output: Tensor  # (B, C_out, R, S)
    expert_map: Tensor | None  # (B, R, S) uint8; None with one expert


class Tile(NamedTuple):
    """One tile of the output of one image, and the LR window under it."""

    window: Tensor  # (1, C, h + 2, w + 2) features with a halo of one code per side, zero outside the image
    rows: GridAxis  # of the output rows, indices relative to the window without its halo
    cols: GridAxis
    cell_lr: Tensor  # (2,) size of an output pixel in units of LR pixels
    expert_map: Tensor | None  # (R, S) uint8


class Backend(Protocol):
    """Computes tiles: the torch code below, or fused kernels with the same results to rounding."""

    tile: int  # LR pixels per side of a tile that suit it

    def decode(self, decoder: MoEDecoder, tile: Tile) -> Tensor:
        """The tile's pixels, each from its expert: (C_out, R, S) fp32."""

    def logits(self, mapper: Mapper, table: Tensor, rows: Near, cols: Near, cell_lr: Tensor) -> Tensor:
        """The mapper's logits on a grid, (R, S, J) fp32; `table` (h, w, D) from `Mapper.table`, `cell_lr` (2,)."""

    def route(self, mapper: Mapper, table: Tensor, rows: Near, cols: Near, cell_lr: Tensor) -> Tensor:
        """The expert with the largest logit, (R, S) uint8; arguments as for `logits`."""


class TorchBackend:
    """Plain torch, on any device."""

    tile = 32  # the tables of four 256-wide experts then take 4 MiB in fp32 and stay in cache

    def decode(self, decoder: MoEDecoder, tile: Tile) -> Tensor:
        """LR tables of the window, then each pixel to its expert, in chunks."""
        height, width = tile.window.shape[-2] - 2, tile.window.shape[-1] - 2
        corners = grid_corners(tile.rows, tile.cols, width)
        reads = None
        if tile.expert_map is not None and decoder.pool.skips_unread:
            reads = reads_of(corners.index, tile.expert_map.reshape(1, -1), decoder.num_experts, height * width)
        tables = [table[0] for table in decoder.pool.tables(tile.window, 0, tile.cell_lr[None, None], reads)]
        queries = make_queries(corners, tile.cell_lr[None])

        def predict(j: int, group: Queries) -> Tensor:
            return torch.cat([decoder.pool.predict(j, chunk, tables) for chunk in group.split(CHUNK)])

        if tile.expert_map is None:
            prediction = predict(0, queries)
        else:
            prediction = dispatch(predict, queries, tile.expert_map.flatten(), decoder.num_experts)
        size = tile.rows.rel.shape[1], tile.cols.rel.shape[1]
        return prediction.t().reshape(-1, *size).float()  # (C_out, R, S)

    def logits(self, mapper: Mapper, table: Tensor, rows: Near, cols: Near, cell_lr: Tensor) -> Tensor:
        """The mapper's own on the pixels of the grid."""
        logits = mapper(table.flatten(0, 1)[None], grid_near(rows, cols, table.shape[1]), cell_lr)
        return logits.view(rows.rel.shape[0], cols.rel.shape[0], -1)

    def route(self, mapper: Mapper, table: Tensor, rows: Near, cols: Near, cell_lr: Tensor) -> Tensor:
        """argmax of `logits`."""
        return self.logits(mapper, table, rows, cols, cell_lr).argmax(dim=-1).to(torch.uint8)


def spans(start: int, stop: int, count: int) -> list[tuple[int, int]]:
    """Output positions `start` to `stop` in at most `count` consecutive spans of nearly equal length."""
    edges = sorted({start + round((stop - start) * at / count) for at in range(max(count, 1) + 1)})
    return list(zip(edges[:-1], edges[1:]))


TORCH = TorchBackend()


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
        backend: Computes routing and tiles.
        tile: LR pixels per side of a tile; the backend's choice where it is None.
        device: Device of the features.
        shuffle: Deals the routed experts out to other pixels; None leaves them where they are.
        clock: Told of the stages 'map' and 'decode'.
    """

    def __init__(
        self,
        decoder: MoEDecoder,
        size: tuple[int, int],
        lr_size: tuple[int, int],
        cell: Tensor | None = None,
        control: Control | None = None,
        backend: Backend = TORCH,
        tile: int | None = None,
        device: torch.device | str | None = None,
        shuffle: Shuffle | None = None,
        clock: Clock = nullcontext,
    ):
        self.decoder = decoder
        self.size, self.lr_size, self.tile = size, lr_size, tile or backend.tile
        self.control = control or CostWeight()
        self.backend = backend
        self.shuffle, self.clock = shuffle, clock
        cell = make_cell(size) if cell is None else cell
        self.cell_lr = (cell * torch.tensor(lr_size, dtype=torch.float32)).to(device)  # in units of LR pixels
        self.rows, self.cols = (grid_axis(n_out, n_lr, device=device) for n_out, n_lr in zip(size, lr_size))
        self.near_rows, self.near_cols = (
            near_axis(pixel_centres(n_out, device), n_lr) for n_out, n_lr in zip(size, lr_size)
        )
        self.costs = decoder.expert_costs.to(device)

    @property
    def margin(self) -> int:
        """LR codes around those in use that must be right: the mapper's receptive radius, at least the unfolding's."""
        return max(1, self.decoder.mapper.num_layers if self.decoder.mapper is not None else 1)

    def window_of(self, rows: tuple[int, int], cols: tuple[int, int]) -> tuple[int, int, int, int]:
        """LR codes (top, bottom, left, right; ends excluded) that the output region needs, margin included."""
        bounds: list[int] = []
        for axis, (start, stop), n_lr in zip((self.rows, self.cols), (rows, cols), self.lr_size):
            index = axis.index[:, start:stop]
            bounds += [max(int(index.min()) - self.margin, 0), min(int(index.max()) + self.margin + 1, n_lr)]
        top, bottom, left, right = bounds
        return top, bottom, left, right

    def mapper_table(self, window: FeatureWindow) -> Tensor:
        """The mapper's LR table of a window: (h, w, D). Its convolutions see bands of rows, with the halo they need."""
        mapper = self.decoder.mapper
        assert mapper is not None  # one expert needs no routing
        height, width = window.feat.shape[-2:]
        bands = spans(0, height, math.ceil(height * width / MAPPER_PIXELS))
        weight = mapper.query_in.weight
        table = weight.new_empty(height, width, weight.shape[0])
        for top, bottom in bands:
            first, last = max(top - mapper.num_layers, 0), min(bottom + mapper.num_layers, height)
            band = mapper.table(window.feat[..., first:last, :])[0].unflatten(0, (last - first, width))
            table[top:bottom] = band[top - first : bottom - first]
        return table

    def near(self, window: FeatureWindow, rows: tuple[int, int], cols: tuple[int, int]) -> tuple[Near, Near]:
        """The LR pixels under an output region, relative to the window."""
        near_rows, near_cols = (
            Near(near.index[start:stop] - origin, near.rel[start:stop])
            for near, (start, stop), origin in ((self.near_rows, rows, window.top), (self.near_cols, cols, window.left))
        )
        return near_rows, near_cols

    def row_spans(self, rows: tuple[int, int]) -> list[tuple[int, int]]:
        """Output rows in strips of `tile` LR rows."""
        return spans(*rows, math.ceil((rows[1] - rows[0]) * self.lr_size[0] / self.size[0] / self.tile))

    def strips(
        self, window: FeatureWindow, rows: tuple[int, int], cols: tuple[int, int]
    ) -> Iterator[tuple[int, int, Tensor | None]]:
        """Row strips of an output region with their expert maps, (r, s) uint8."""
        if self.decoder.mapper is None:
            yield from ((*span, None) for span in self.row_spans(rows))
        elif self.shuffle is not None:
            for top, bottom in self.row_spans(rows):
                yield top, bottom, self.shuffle.expert_map[top:bottom, cols[0] : cols[1]]
        else:
            yield from self.routed_strips(window, rows, cols)

    def routed_strips(
        self, window: FeatureWindow, rows: tuple[int, int], cols: tuple[int, int]
    ) -> Iterator[tuple[int, int, Tensor]]:
        """`strips` as the mapper and the control route them."""
        with self.clock('map'):
            table = self.mapper_table(window)
        for top, bottom in self.row_spans(rows):
            with self.clock('map'):
                expert_map = self.route(window, table, (top, bottom), cols)
            yield top, bottom, expert_map

    def route(self, window: FeatureWindow, table: Tensor, rows: tuple[int, int], cols: tuple[int, int]) -> Tensor:
        """The expert map of an output region: (r, s) uint8."""
        assert self.decoder.mapper is not None
        if isinstance(self.control, CostWeight) and self.control.cost_weight == 0:
            return self.backend.route(self.decoder.mapper, table, *self.near(window, rows, cols), self.cell_lr)
        return torch.cat(
            [
                self.control.route(logits, self.costs).to(torch.uint8)
                for logits in self.logits(window, table, rows, cols)
            ]
        )

    def logits(
        self, window: FeatureWindow, table: Tensor, rows: tuple[int, int], cols: tuple[int, int]
    ) -> Iterator[Tensor]:
        """The mapper's logits of an output region in pixel order, in blocks of rows of about `LOGITS` pixels."""
        assert self.decoder.mapper is not None
        count = math.ceil((rows[1] - rows[0]) * (cols[1] - cols[0]) / LOGITS)
        for block in spans(*rows, count):
            yield self.backend.logits(self.decoder.mapper, table, *self.near(window, block, cols), self.cell_lr)

    def previews(self) -> Sequence[Callable[[FeatureWindow, tuple[int, int], tuple[int, int]], None]]:
        """What must see every region of the image before anything is rendered, one after the other."""
        return [self.observe] * isinstance(self.control, Budget) + [self.count] * (self.shuffle is not None)

    def observe(self, window: FeatureWindow, rows: tuple[int, int], cols: tuple[int, int]) -> None:
        """Show a region's logits to a `Budget`."""
        assert isinstance(self.control, Budget)
        with self.clock('map'):
            for logits in self.logits(window, self.mapper_table(window), rows, cols):
                self.control.observe(logits)

    def count(self, window: FeatureWindow, rows: tuple[int, int], cols: tuple[int, int]) -> None:
        """Show a region's routing to the `Shuffle`."""
        assert self.shuffle is not None
        for _, _, expert_map in self.routed_strips(window, rows, cols):
            self.shuffle.count(expert_map)

    def render_region(
        self, window: FeatureWindow, rows: tuple[int, int], cols: tuple[int, int]
    ) -> Iterator[tuple[int, int, Rendered]]:
        """An output region, strip by strip from top to bottom.

        Yields:
            First row, last row + 1, and the strip as `Rendered` with B = 1.
        """
        count = math.ceil((cols[1] - cols[0]) * self.lr_size[1] / self.size[1] / self.tile)
        for top, bottom, expert_map in self.strips(window, rows, cols):
            output = torch.empty(
                1, self.decoder.out_channels, bottom - top, cols[1] - cols[0], device=window.feat.device
            )
            for left, right in spans(*cols, count):
                piece = None if expert_map is None else expert_map[:, left - cols[0] : right - cols[0]]
                tile_rows = GridAxis(self.rows.index[:, top:bottom] - window.top, self.rows.rel[:, top:bottom])
                tile_cols = GridAxis(self.cols.index[:, left:right] - window.left, self.cols.rel[:, left:right])
                with self.clock('decode'):
                    crop, tile_rows, tile_cols = crop_window(window.feat, tile_rows, tile_cols)
                    output[0, :, :, left - cols[0] : right - cols[0]] = self.backend.decode(
                        self.decoder, Tile(crop, tile_rows, tile_cols, self.cell_lr, piece)
                    )
            yield top, bottom, Rendered(output, None if expert_map is None else expert_map[None])
            del output  # before the next one is made


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
    window = feat[..., max(top - 1, 0) : bottom + 2, max(left - 1, 0) : right + 2]
    pad = (int(left == 0), int(right == width - 1), int(top == 0), int(bottom == height - 1))
    return F.pad(window, pad), axes[0], axes[1]


@torch.no_grad()
def render_image(
    decoder: MoEDecoder,
    feat: Tensor,
    size: tuple[int, int],
    cell: Tensor | None = None,
    control: Control | None = None,
    backend: Backend = TORCH,
    tile: int | None = None,
) -> Rendered:
    """The whole output of a batch of feature maps (B, C, H, W), without gradients; arguments as in `Renderer`."""
    lr_size = feat.shape[-2], feat.shape[-1]
    renderer = Renderer(decoder, size, lr_size, cell, control, backend, tile, feat.device)
    windows = [FeatureWindow(feat[image : image + 1], 0, 0, lr_size) for image in range(feat.shape[0])]
    everything = (0, size[0]), (0, size[1])
    if isinstance(control, Budget):
        for window in windows:
            renderer.observe(window, *everything)
    output = torch.empty(feat.shape[0], decoder.out_channels, *size, device=feat.device)
    expert_map = None
    if decoder.num_experts > 1:
        expert_map = torch.empty(feat.shape[0], *size, dtype=torch.uint8, device=feat.device)
    for image, window in enumerate(windows):
        for top, bottom, strip in renderer.render_region(window, *everything):
            output[image, :, top:bottom] = strip.output[0]
            if expert_map is not None and strip.expert_map is not None:
                expert_map[image, top:bottom] = strip.expert_map[0]
    return Rendered(output, expert_map)
