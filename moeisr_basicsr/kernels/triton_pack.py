"""Weights in the layout of the Triton kernels, and the layers that make their LR tables.

Legend: as in `triton_decode`.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from moeisr_basicsr.core.liif import LIIFExperts
from moeisr_basicsr.core.lm import LMExperts
from moeisr_basicsr.core.lte import LTEExperts
from moeisr_basicsr.core.precision import full_fp32
from moeisr_basicsr.kernels.latent import Latent, latent_of

MIN_WIDTH = 16  # the least inner size of a tensor core product


def padded(width: int) -> int:
    return max(MIN_WIDTH, triton.next_power_of_2(width))


def _pad(x: Tensor, *sizes: int) -> Tensor:
    """Zeros behind each of the first dimensions of `x` up to `sizes`."""
    pads = [pad for have, size in zip(x.shape, sizes) for pad in (size - have, 0)]
    return F.pad(x, [0, 0] * (x.dim() - len(sizes)) + pads[::-1])


def _pad_halves(x: Tensor, half: int) -> Tensor:
    """Zeros behind each half of the first dimension of `x`: (2 K, ...) -> (2 * half, ...)."""
    return torch.cat([_pad(part, half) for part in x.chunk(2)])


class PackedExpert(NamedTuple):
    """One expert in the kernel's layout."""

    weights: Tensor  # flat: each layer behind the table or basis as (inputs, outputs)
    biases: Tensor  # flat fp32
    w_rel: Tensor | None  # LIIF, lm: (2, D_IN) fp32, relative row and column in the first layer; None for LTE
    w_cell: Tensor | None  # LIIF: (D_IN, 2) fp32; LTE: (D_IN / 2, 2) fp32, the phase; None for lm
    bias: Tensor | None  # LIIF: (D_IN,) fp32, first layer
    d_in: int
    d: int
    layers: int

    def coordinate_part(self, cell_lr: Tensor) -> Tensor:
        """What the kernel reads as `w_coord`, for the cell (2,) in units of LR pixels."""
        if self.w_cell is None:  # lm: the cell is in the tables
            assert self.w_rel is not None
            return self.w_rel
        constant = (self.w_cell * cell_lr).sum(dim=1)
        if self.w_rel is None or self.bias is None:  # LTE
            return constant
        return torch.cat([self.w_rel, (constant + self.bias)[None]])


def _pack_layers(
    linears: list[tuple[Tensor, Tensor]], d_in: int, d_out: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, int]:
    """Weights (out, in) and biases, padded with zeros, transposed and laid end to end; and D."""
    d = max([padded(weight.shape[0]) for weight, _ in linears[:-1]], default=MIN_WIDTH)
    widths = [d_in, *[d] * (len(linears) - 1), d_out]
    weights = [
        _pad(weight, fan_out, fan_in).t().flatten()
        for (weight, _), fan_in, fan_out in zip(linears, widths[:-1], widths[1:])
    ]
    biases = [_pad(bias, fan_out) for (_, bias), fan_out in zip(linears, widths[1:])]
    return torch.cat(weights).to(dtype), torch.cat(biases), d


def pack_liif(pool: LIIFExperts, j: int, d_out: int, dtype: torch.dtype) -> PackedExpert:
    (_, bias), *linears = [(layer.weight.float(), layer.bias.float()) for layer in pool.linears(j)]
    d_in = padded(bias.shape[0])
    w_rel, w_cell = _pad(pool.split_first(j)[1].float(), d_in).split(2, dim=1)  # (D_IN, 2) each
    weights, biases, d = _pack_layers(linears, d_in, d_out, dtype)
    return PackedExpert(weights, biases, w_rel.t().contiguous(), w_cell, _pad(bias, d_in), d_in, d, len(linears))


def pack_lte(pool: LTEExperts, j: int, d_out: int, dtype: torch.dtype) -> PackedExpert:
    linears = [(layer.weight.float(), layer.bias.float()) for layer in pool.linears(j)]
    half = padded(pool.hidden_dim // 2)
    linears[0] = _pad_halves(linears[0][0].t(), half).t(), linears[0][1]
    weights, biases, d = _pack_layers(linears, 2 * half, d_out, dtype)
    phase = _pad(pool.phase.weight.float(), half)
    return PackedExpert(weights, biases, None, phase, None, 2 * half, d, len(linears))


class TableConv(NamedTuple):
    """The 3x3 convolution that makes the LR tables of all experts."""

    weight: Tensor  # LIIF: (sum of D_IN, C, 3, 3), or (D_IN, C, 3, 3) where the experts share their first layer;
    # LTE: (2 D_IN, C, 3, 3) fp32, coefficients before frequencies
    bias: Tensor | None  # LTE only; LIIF's goes into `PackedExpert.coordinate_part`, in fp32
    exact: bool  # without rounding fp32 operands to tf32

    def __call__(self, window: Tensor) -> Tensor:
        """(1, C, h + 2, w + 2) -> (T, channels): one row per latent code."""
        window = window.to(self.weight.dtype).contiguous(memory_format=torch.channels_last)
        with full_fp32(window.device) if self.exact else nullcontext():
            table = F.conv2d(window, self.weight, self.bias)  # (1, channels, h, w)
        return table[0].permute(1, 2, 0).flatten(0, 1).contiguous()  # no copy where the convolution is channels-last


def liif_conv(pool: LIIFExperts, dtype: torch.dtype, exact: bool) -> TableConv:
    kernels = [pool.split_first(j)[0].float() for j in pool.owners]
    weight = torch.cat([_pad(kernel, padded(kernel.shape[0])) for kernel in kernels])
    return TableConv(weight.to(dtype).contiguous(memory_format=torch.channels_last), None, exact)


def lte_conv(pool: LTEExperts) -> TableConv:
    half = padded(pool.hidden_dim // 2)
    assert pool.coef.bias is not None and pool.freq.bias is not None  # the default of nn.Conv2d
    # Official frequency channels alternate between row and column. Rounded frequencies would be off by whole turns.
    pairs = [
        (coef.float(), torch.cat([freq[0::2], freq[1::2]]).float())
        for coef, freq in ((pool.coef.weight, pool.freq.weight), (pool.coef.bias, pool.freq.bias))
    ]
    weight, bias = (torch.cat([_pad_halves(part, half) for part in pair]) for pair in pairs)
    return TableConv(weight.contiguous(memory_format=torch.channels_last), bias, True)


def pack_lm(pool: LMExperts, j: int, d_out: int, dtype: torch.dtype) -> PackedExpert:
    """Expert j's render MLP."""
    first, *rest = pool.linears(j)
    d_in = padded(pool.render_width)
    linears = [(layer.weight.float(), layer.bias.float()) for layer in rest]
    weights, biases, _ = _pack_layers(linears, d_in, d_out, dtype)
    w_rel = _pad(first.weight[:, -4:-2].float(), d_in).t().contiguous()
    return PackedExpert(weights, biases, w_rel, None, None, d_in, d_in, len(linears))


class LatentTable(NamedTuple):
    """The latent MLP that makes the LR table of an expert of lm."""

    latent: Latent
    dtype: torch.dtype  # of operands
    exact: bool  # as in `TableConv`

    def __call__(self, window: Tensor, cell_lr: Tensor, reads: Tensor | None) -> Tensor:
        """(1, C, h + 2, w + 2) -> (T, channels); with `reads` (T,) bool the other rows hold nothing."""
        first, *rest = (weight.to(self.dtype) for weight in self.latent.weights)
        bias, *biases = (bias.to(self.dtype) for bias in self.latent.biases_at(cell_lr))
        window = window.to(self.dtype).contiguous(memory_format=torch.channels_last)
        with full_fp32(window.device) if self.exact else nullcontext():
            if reads is None:
                x = F.conv2d(window, first, bias)[0].permute(1, 2, 0).flatten(0, 1)  # (T, D)
            else:
                patches = window[0].unfold(1, 3, 1).unfold(2, 3, 1)  # (C, h, w, 3, 3), a view
                row, col = reads.view(patches.shape[1:3]).nonzero(as_tuple=True)
                x = F.linear(patches[:, row, col].transpose(0, 1).flatten(1), first.flatten(1), bias)  # (N, D)
            for weight, bias in zip(rest, biases):
                x = F.linear(F.relu(x), weight, bias)
        if reads is None:
            return x.contiguous()
        table = x.new_empty(reads.shape[0], x.shape[1])
        table[reads] = x
        return table


def lm_table(pool: LMExperts, j: int, dtype: torch.dtype, exact: bool) -> LatentTable:
    return LatentTable(latent_of(pool, j, padded(pool.render_width)), dtype, exact)
