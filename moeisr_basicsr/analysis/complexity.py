"""Parameters and multiply-adds (MACs) in closed form.

Counted are the multiply-adds of linear layers, convolutions and attention products, one per multiply-add, biases not:
what `mmengine.analysis` counts. Interpolation, activations and the blending of the four corners are not; the largest of
these, the blend of the last hidden vectors, is 4 x width per pixel (1024 at width 256, below 0.1 % of plain LIIF).

The published decoder costs, in thousand MACs per output pixel at 320x180 -> 1280x720, and what they count:

- LIIF 1383: four corner passes through the whole MLP (580 -> 256 x 4 -> 3). Nothing runs at LR.
- LIIF folded 794: the same with the 576 feature inputs of the first layer taken out; the convolution at LR that stands
  for them is left out. With it (9.2 at x4), the cell in the bias, and the last layer after the blend: 798.5.
- LTE 791: four corner passes through phase and MLP; its two convolutions at LR (18.4 at x4) are left out.

This module counts the convolutions at LR in every sum, for the dense baselines as for MoEISR.

Shapes: (H, W) LR size, (R, S) output size, J experts.
"""

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moeisr_basicsr.core import MoEDecoder


class DecoderMacs(NamedTuple):
    """MACs of mapper and experts for one image; `*_cell` per LR cell, the others per output pixel."""

    cells_per_pixel: float  # LR cells per output pixel
    mapper_cell: int
    mapper_query: int
    tables_cell: int  # LR tables of all experts
    experts: list[int]  # J

    @property
    def mapper(self) -> float:
        """The mapper's MACs per output pixel."""
        return self.mapper_cell * self.cells_per_pixel + self.mapper_query

    @property
    def tables(self) -> float:
        """MACs of the LR tables per output pixel."""
        return self.tables_cell * self.cells_per_pixel

    def experts_at(self, loads: Sequence[float]) -> float:
        """Mean MACs of the chosen expert per output pixel; `loads` are the experts' shares of the pixels."""
        check_loads(loads, len(self.experts))
        return sum(load * macs for load, macs in zip(loads, self.experts))

    def total(self, loads: Sequence[float]) -> float:
        """Mapper, LR tables and experts per output pixel."""
        return self.mapper + self.tables + self.experts_at(loads)


class Parameters(NamedTuple):
    """Number of parameters."""

    encoder: int
    mapper: int
    shared: int  # what experts share: LTE's convolutions and phase, hidden layers with shared_layers
    experts: list[int]  # J
    total: int


def check_loads(loads: Sequence[float], num_experts: int) -> None:
    """One share per expert, adding up to 1.

    Raises:
        ValueError: They are not.
    """
    if len(loads) != num_experts or abs(sum(loads) - 1) > 1e-6 or min(loads) < 0:
        raise ValueError(f'loads must be {num_experts} shares that add up to 1; got {list(loads)}.')


def decoder_macs(decoder: MoEDecoder, lq_size: tuple[int, int], size: tuple[int, int]) -> DecoderMacs:
    """MACs behind the encoder, as the folded code runs them.

    Tiles overlap by one LR cell, which adds a few per cent to the LR tables in practice; not counted.

    Args:
        lq_size: (H, W).
        size: (R, S).
    """
    mapper = decoder.mapper
    cells_per_pixel = lq_size[0] * lq_size[1] / (size[0] * size[1])
    return DecoderMacs(
        cells_per_pixel,
        0 if mapper is None else mapper.table_macs(),
        0 if mapper is None else mapper.macs(),
        decoder.pool.table_macs(),
        decoder.expert_macs,
    )


def heaviest(decoder: MoEDecoder) -> int:
    """The expert with the most MACs; alone it is the dense baseline."""
    return max(range(decoder.num_experts), key=lambda j: decoder.expert_macs[j])


def dense_decoder(decoder: MoEDecoder, hidden: Sequence[int]) -> MoEDecoder:
    """A decoder like `decoder`, of one expert of the given hidden widths and random weights, to measure against."""
    pool = decoder.pool
    family_options = {'hidden_dim': pool.hidden_dim} if decoder.family == 'lte' else {}
    dense = MoEDecoder(pool.in_channels, decoder.out_channels, decoder.family, [hidden], **family_options)
    return dense.to(next(decoder.parameters()).device).eval()


def dense_folded_macs(decoder: MoEDecoder, lq_size: tuple[int, int], size: tuple[int, int]) -> float:
    """MACs per output pixel of the heaviest expert alone, folded as here: its LR tables and its queries."""
    j = heaviest(decoder)
    pool = decoder.pool
    if decoder.family == 'liif':
        tables_cell = 9 * pool.in_channels * pool.linears(j)[0].out_features
    else:
        tables_cell = pool.table_macs()  # all experts share them
    return tables_cell * lq_size[0] * lq_size[1] / (size[0] * size[1]) + decoder.expert_macs[j]


def dense_plain_macs(decoder: MoEDecoder, lq_size: tuple[int, int], size: tuple[int, int]) -> float:
    """MACs per output pixel of the heaviest expert alone, run as published: four passes per pixel, nothing folded."""
    at_lr = decoder.pool.table_macs() if decoder.family == 'lte' else 0
    return at_lr * lq_size[0] * lq_size[1] / (size[0] * size[1]) + plain_query_macs(decoder, heaviest(decoder))


def plain_query_macs(decoder: MoEDecoder, j: int) -> int:
    """MACs of expert j per output pixel in the published way, convolutions at LR not counted."""
    per_corner = sum(layer.weight.numel() for layer in decoder.pool.linears(j))
    if decoder.family == 'lte':
        per_corner += decoder.pool.phase.weight.numel()
    return 4 * per_corner


def encoder_macs(encoder: nn.Module, lq_size: tuple[int, int], in_channels: int = 3) -> int:
    """MACs of the encoder for a whole image of `lq_size`, without halos of tiles.

    Runs a copy of the encoder on tensors without data, so it takes no memory and no time whatever the size.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shadow = copy.deepcopy(encoder).to('meta').eval()
        shadow(torch.empty(1, in_channels, *lq_size, device='meta'))
    return counter.get_total_flops() // 2  # PyTorch counts a multiply-add as two


@lru_cache(maxsize=256)  # counting runs the encoder's Python code; a test set repeats its sizes
def encoder_macs_of(encoder: nn.Module, lq_size: tuple[int, int]) -> int:
    """`encoder_macs` with the channels of the encoder's first convolution."""
    in_channels = next(parameter for parameter in encoder.parameters() if parameter.dim() == 4).shape[1]
    return encoder_macs(encoder, lq_size, in_channels)


def macs_per_pixel(
    net: nn.Module,
    lq_size: tuple[int, int],
    size: tuple[int, int],
    loads: Sequence[float],
    dense: MoEDecoder | None = None,
) -> dict:
    """The `macs` of a results row (see `schema`): per output pixel by part, as routed; `loads` as in `DecoderMacs`.

    The heaviest expert of `dense` is the baseline, of the network's own decoder where it is not given.
    """
    dense = dense or net.decoder
    parts = decoder_macs(net.decoder, lq_size, size)
    encoder = encoder_macs_of(net.encoder, lq_size) / (size[0] * size[1])
    return {
        'encoder': encoder,
        'mapper': parts.mapper,
        'tables': parts.tables,
        'experts': parts.experts_at(loads),
        'total': encoder + parts.total(loads),
        'dense_folded': dense_folded_macs(dense, lq_size, size),
        'dense_plain': dense_plain_macs(dense, lq_size, size),
        'each_expert': parts.experts,
    }


def parameters(net: nn.Module) -> Parameters:
    """Number of parameters of a `MoEISR` by part."""
    pool = net.decoder.pool
    experts = [count(expert) for expert in pool.experts]
    return Parameters(
        count(net.encoder),
        0 if net.decoder.mapper is None else count(net.decoder.mapper),
        count(pool) - sum(experts),
        experts,
        count(net),
    )


def count(module: nn.Module) -> int:
    """Number of a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
