"""A network as one graph without Python: encode once, then a loop over tiles of the output that route and decode.

TorchScript's tracer records the package's own code; only what a trace would freeze into constants (sizes, the number of
queries of each expert) is written anew here. The loop is compiled, because a trace has none.

Python's numbers are doubles and LIIF's formulas depend on their rounding. In the graph a size is therefore a double
tensor without dimensions, which PyTorch treats like such a number.

Shapes: C feature channels, T = H * W latent codes, (H, W) LR size, (R, S) output size, (r, s) size of a tile.
"""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeisr_basicsr.archs.moeisr_arch import MoEISR
from moeisr_basicsr.core.coords import (
    GridAxis,
    grid_axis,
    grid_corners,
    grid_near,
    make_queries,
    near_axis,
    pixel_centres,
)
from moeisr_basicsr.core.decoder import reads_of
from moeisr_basicsr.core.skip import grid_taps

TILE = 128  # output pixels per side: the activations of four corners of 256 values take 64 MiB


class Encode(nn.Module):
    """What is computed once per image."""

    def __init__(self, net: MoEISR):
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(1, 3, H, W) -> features with a border of zeros (1, C, H + 2, W + 2), the mapper's table (1, T, D), base."""
        feat, base = self.net.encode(image)
        mapper = self.net.decoder.mapper
        return F.pad(feat, (1,) * 4), feat if mapper is None else mapper.table(feat), image if base is None else base


class RenderTile(nn.Module):
    """One tile of the output, as `core.render` makes it."""

    costs: Tensor

    def __init__(self, net: MoEISR):
        super().__init__()
        self.net = net
        self.decoder = net.decoder
        self.register_buffer('costs', net.expert_costs.double(), persistent=False)

    def forward(
        self, feat: Tensor, table: Tensor, base: Tensor, size: Tensor, start: Tensor, cost_weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The tile that begins at the output pixel `start` (2,): image (C_out, r, s), expert map (r, s)."""
        lr_size: list[Any] = [n - 2 for n in feat.shape[-2:]]  # tensors, while it is traced; so are all sizes
        spans: Any = list(zip(start.unbind(), torch.minimum(start + TILE, size).unbind()))
        sizes: Any = [(n_out.double(), n.double()) for n_out, n in zip(size.unbind(), lr_size)]
        cell_lr = self.cell_lr(sizes)  # (2,)
        near = [near_axis(pixel_centres(n_out)[slice(*span)], n) for span, (n_out, n) in zip(spans, sizes)]
        expert = self.route(table, grid_near(near[0], near[1], lr_size[1]), cell_lr, cost_weight)  # (1, r s)
        window, rows, cols = crop(feat, *(grid_axis(*both, *span) for both, span in zip(sizes, spans)))
        shape = rows.rel.shape[1], cols.rel.shape[1]
        image = self.decode(window, rows, cols, cell_lr, expert).t().reshape(-1, *shape) * 0.5
        if self.net.skip == 'none':
            return image + 0.5, expert.view(shape).to(torch.uint8)
        return image + skip_tile(base[0], size, spans, self.net.skip), expert.view(shape).to(torch.uint8)

    def cell_lr(self, sizes: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Size of an output pixel in units of LR pixels as `MoEISR.shown_cell` limits it, (2,)."""
        cell, lr_size = (
            torch.stack(pair).float() for pair in ([2 / n_out for n_out, _ in sizes], [n for _, n in sizes])
        )
        if self.net.cell_scale_max:
            cell = cell.maximum(2 / (self.net.cell_scale_max * lr_size))
        return cell * lr_size

    def route(self, table: Tensor, near: Any, cell_lr: Tensor, cost_weight: Tensor) -> Tensor:
        """The expert map (1, N)."""
        if self.decoder.mapper is None:
            return torch.zeros_like(near.index)
        logits = self.decoder.mapper(table, near, cell_lr)
        return (logits.double() - cost_weight.double() * self.costs).argmax(dim=-1)

    def decode(self, window: Tensor, rows: GridAxis, cols: GridAxis, cell_lr: Tensor, expert: Tensor) -> Tensor:
        """Each query from its own expert only, (N, C_out)."""
        pool = self.decoder.pool
        height, width = (n - 2 for n in window.shape[-2:])
        corners = grid_corners(rows, cols, width)
        reads = None
        if pool.skips_unread and self.decoder.mapper is not None:
            reads = reads_of(corners.index, expert, self.decoder.num_experts, height * width)
        tables = [one[0] for one in pool.tables(window, 0, cell_lr[None, None], reads)]
        queries = make_queries(corners, cell_lr[None])
        output = queries.rel.new_zeros(expert.shape[1], self.decoder.out_channels)
        for j in range(self.decoder.num_experts):
            if pool.linears(j):
                which = (expert[0] == j).nonzero().flatten()
                output = output.index_copy(0, which, pool.predict(j, queries.select(which), tables))
        return output


def crop(feat: Tensor, rows: GridAxis, cols: GridAxis) -> tuple[Tensor, GridAxis, GridAxis]:
    """The window under a tile with a halo of one code, and the axes relative to it; `feat` has its border of zeros."""
    (top, bottom), (left, right) = ((axis.index.min(), axis.index.max()) for axis in (rows, cols))
    window = feat[..., top : bottom + 3, left : right + 3]
    return window, GridAxis(rows.index - top, rows.rel), GridAxis(cols.index - left, cols.rel)


def skip_tile(base: Tensor, size: Tensor, spans: list, mode: str) -> Tensor:
    """`core.skip.skip_grid` of one tile, from the whole base image (C, h, w): (C, r, s)."""
    axes: Any = zip(spans, size.unbind(), base.shape[1:])
    (row_index, row_weight), (col_index, col_weight) = (
        grid_taps(span, n_out, n, 0, mode, base.device) for span, n_out, n in axes
    )
    left = col_index.min()
    lines = base[:, :, left : col_index.max() + 1]
    lines = (lines[:, row_index] * row_weight.to(base)[:, :, None]).sum(dim=2)  # (C, r, w)
    return (lines[:, :, col_index - left] * col_weight.to(base)).sum(dim=3)


class Upscale(nn.Module):
    """The whole network, to be compiled: image (1, 3, H, W), size (2,), cost weight -> (1, 3, R, S) and (1, R, S)."""

    def __init__(self, encode: nn.Module, tile: nn.Module):
        super().__init__()
        self.encode, self.tile = encode, tile
        self.side = TILE

    def forward(self, image: Tensor, size: Tensor, cost_weight: Tensor) -> tuple[Tensor, Tensor]:
        feat, table, base = self.encode(image)
        image_bands, expert_bands = [], []
        for top in range(0, int(size[0]), self.side):
            images, experts = [], []
            for left in range(0, int(size[1]), self.side):
                part, expert = self.tile(feat, table, base, size, torch.tensor([top, left]), cost_weight)
                images.append(part)
                experts.append(expert)
            image_bands.append(torch.cat(images, 2))
            expert_bands.append(torch.cat(experts, 1))
        return torch.cat(image_bands, 1)[None], torch.cat(expert_bands, 0)[None]


def example(net: MoEISR) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of `Upscale` for the tracer: no side occurs twice."""
    return torch.rand(1, net.in_channels, 24, 40), torch.tensor([100, 150]), torch.tensor(0.0)


def script(net: MoEISR) -> torch.jit.ScriptModule:
    """`Upscale` of a network in eval mode, compiled."""
    image, size, cost_weight = example(net)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of the tracer: what it takes for constants is constant
        with torch.no_grad():
            encode = torch.jit.trace(Encode(net), (image,), check_trace=False)
            encoded = encode(image)
        # Without no_grad: there `apply_linear` is a convolution, which onnxruntime refuses for no queries.
        inputs = (*encoded, size, torch.tensor([0, 128]), cost_weight)
        tile = torch.jit.trace(RenderTile(net), inputs, check_trace=False)
        return torch.jit.script(Upscale(encode, tile))
