"""Parameters and multiply-adds (MACs) in closed form.

Counted are the multiply-adds of linear layers, convolutions and attention products, one per multiply-add, biases not:
what `mmengine.analysis` counts. Interpolation, activations and the blending of the four corners are not; the largest of
these, the blend of the last hidden vectors, is 4 x width per pixel (1024 at width 256, below 0.1 % of plain LIIF). What
the skip's resampling takes is told beside the sums: 24 to 200 per pixel. A tail that makes the skip's image is counted
with the encoder.

The published decoder costs, in thousand MACs per output pixel at 320x180 -> 1280x720, and what they count:

- LIIF 1383: four corner passes through the whole MLP (580 -> 256 x 4 -> 3). Nothing runs at LR.
- LIIF folded 794: the same with the 576 feature inputs of the first layer taken out; the convolution at LR that stands
  for them is left out. With it (9.2 at x4), the cell in the bias, and the last layer after the blend: 798.5.
- LTE 791: four corner passes through phase and MLP; its two convolutions at LR (18.4 at x4) are left out.
- LM 16.8: four corner passes through the render MLP (6.6), and the latent MLP at LR (163 per LR pixel).

This module counts the work at LR in every sum, for the dense baselines as for MoEISR.

Shapes: (H, W) LR size, (R, S) output size, J experts.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moeisr_basicsr.archs.moeisr_arch import MoEISR
from moeisr_basicsr.core import MoEDecoder, reference
from moeisr_basicsr.core.lm import LMExperts
from moeisr_basicsr.core.lte import LTEExperts
from moeisr_basicsr.core.skip import resampling_macs


class DecoderMacs(NamedTuple):
    """MACs of mapper and experts for one image, per output pixel."""

    mapper: float
    tables: float  # LR tables of all experts
    experts: list[int]  # J

    def experts_at(self, shares: Sequence[float]) -> float:
        """Mean MACs of the chosen expert; `shares` (J) are the experts' shares of the pixels."""
        check_shares(shares, len(self.experts))
        return sum(share * macs for share, macs in zip(shares, self.experts))

    def total(self, shares: Sequence[float]) -> float:
        """Mapper, LR tables and experts."""
        return self.mapper + self.tables + self.experts_at(shares)


def check_shares(shares: Sequence[float], num_experts: int) -> None:
    """One share per expert, adding up to 1.

    Raises:
        ValueError: They are not.
    """
    if len(shares) != num_experts or abs(sum(shares) - 1) > 1e-6 or min(shares) < 0:
        raise ValueError(f'there must be {num_experts} shares that add up to 1; got {list(shares)}.')


def lr_density(lq_size: tuple[int, int], size: tuple[int, int]) -> float:
    """LR pixels per output pixel."""
    return lq_size[0] * lq_size[1] / (size[0] * size[1])


def decoder_macs(
    decoder: MoEDecoder, lq_size: tuple[int, int], size: tuple[int, int], reads: Sequence[float] | None = None
) -> DecoderMacs:
    """MACs behind the encoder, as the folded code runs them.

    Tiles overlap by one LR pixel, which adds a few per cent to the LR tables in practice; not counted.

    Args:
        lq_size: (H, W).
        size: (R, S).
        reads: (J,) share of the LR pixels that each expert's queries read, see `routing_stats.lr_reads`; None for all.
    """
    mapper, density = decoder.mapper, lr_density(lq_size, size)
    return DecoderMacs(
        0.0 if mapper is None else mapper.table_macs() * density + mapper.macs(),
        decoder.pool.table_macs(reads) * density,
        decoder.expert_macs,
    )


def most_expensive(decoder: MoEDecoder) -> int:
    """The expert that costs most; alone it is the dense baseline."""
    return max(range(decoder.num_experts), key=decoder.pool.cost)


def dense_folded_macs(decoder: MoEDecoder, lq_size: tuple[int, int], size: tuple[int, int]) -> float:
    """MACs per output pixel of the most expensive expert alone, folded as here: its LR tables and its queries."""
    j = most_expensive(decoder)
    return decoder.pool.own_table_macs(j) * lr_density(lq_size, size) + decoder.expert_macs[j]


def dense_plain_macs(decoder: MoEDecoder, lq_size: tuple[int, int], size: tuple[int, int]) -> float:
    """MACs per output pixel of the most expensive expert alone, run as published: four passes, nothing folded."""
    j, at_lr = most_expensive(decoder), 0
    if isinstance(decoder.pool, LMExperts):  # the cell counts
        at_lr = sum(layer.weight.numel() for layer in decoder.pool.latent_linears(j))
    elif isinstance(decoder.pool, LTEExperts):
        at_lr = decoder.pool.own_table_macs(j)
    return at_lr * lr_density(lq_size, size) + plain_query_macs(decoder, j)


def plain_query_macs(decoder: MoEDecoder, j: int) -> int:
    """MACs of expert j per output pixel in the published way, what runs at LR not counted."""
    per_corner = sum(layer.weight.numel() for layer in decoder.pool.linears(j))
    if isinstance(decoder.pool, LTEExperts):
        per_corner += decoder.pool.phase.weight.numel()
    return 4 * per_corner


@lru_cache(maxsize=256)  # counting runs the encoder's Python code; a test set repeats its sizes
def encoder_macs(encoder: Any, lq_size: tuple[int, int], in_channels: int = 3, tail: bool = False) -> int:
    """MACs of the encoder, or of encoder and tail, for a whole image of `lq_size`, without halos of tiles.

    Runs the encoder on tensors without data, so it takes no memory and no time whatever the size; the counter of
    `mmengine.analysis` would run it on the image. They claim to lie on the encoder's device: code for 16 bit asks.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton

    device = next(encoder.parameters()).device
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        run = encoder.with_image if tail else encoder
        run(torch.empty(1, in_channels, *lq_size, device=device))
    return counter.get_total_flops() // 2  # PyTorch counts a multiply-add as two


def macs_per_pixel(
    net: MoEISR,
    lq_size: tuple[int, int],
    size: tuple[int, int],
    shares: Sequence[float],
    dense: MoEDecoder | None = None,
    reads: Sequence[float] | None = None,
) -> dict:
    """The `macs` of a results row (see `schema`): per output pixel by part, as routed.

    `shares` are as in `DecoderMacs`, `reads` as in `decoder_macs`. The baseline is the most expensive expert of
    `dense`, or of the network's own decoder.
    """
    baseline = net.decoder if dense is None else dense
    parts = decoder_macs(net.decoder, lq_size, size, reads)
    encoder = encoder_macs(net.encoder, lq_size, net.in_channels, net.skip == 'network') / (size[0] * size[1])
    return {
        'encoder': encoder,
        'mapper': parts.mapper,
        'tables': parts.tables,
        'experts': parts.experts_at(shares),
        'skip': skip_macs(net, lq_size, size),
        'total': encoder + parts.total(shares),
        'dense_folded': dense_folded_macs(baseline, lq_size, size),
        **({'dense_plain': dense_plain_macs(baseline, lq_size, size)} if reference.describes(baseline) else {}),
        'each_expert': parts.experts,
    }


def skip_macs(net: MoEISR, lq_size: tuple[int, int], size: tuple[int, int]) -> float:
    """MACs of the skip's resampling per output pixel."""
    if net.skip == 'none':
        return 0.0
    scale = net.encoder.scale if net.skip == 'network' else 1
    base_size = scale * lq_size[0], scale * lq_size[1]
    return resampling_macs(base_size, size, net.skip, net.decoder.out_channels)


def parameters(net: MoEISR) -> dict:
    """Number of parameters by part, the `parameters` of a results document's model (see `schema`)."""
    from mmengine.analysis import (
        parameter_count,
    )  # here: its first import ever must not run in two ranks at once (yapf)

    count = parameter_count(net)
    experts = [count.get(f'decoder.pool.experts.{j}', 0) for j in range(net.num_experts)]
    parts = {'encoder': count['encoder'], 'mapper': count.get('decoder.mapper', 0)}
    return {**parts, 'shared': count['decoder.pool'] - sum(experts), 'experts': experts, 'total': count['']}
