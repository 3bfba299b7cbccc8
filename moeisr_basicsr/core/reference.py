"""MoEISR in one page: what every other file here computes faster. Read this first.

    z = E(I_LR)                               the encoder's features, (B, C, H, W)
    l = M(z, x)                               `logits`: one per expert for every query x
    g = GumbelSoftmax(l; tau), hard           `gates` in training; one-hot argmax at test
    s(x) = sum_j g_j f_j(z, x, cell)          `mixture` of the experts' `predict`

(Oh et al., arXiv 2311.12077, section 3.) The experts f_j are LIIF's (Chen et al., CVPR 2021), LTE's (Lee and Jin, CVPR
2022) or LMF's (He and Jin, CVPR 2024) decoders of different depth; one without layers predicts 0. No folding, no
dispatch, no tiles: every expert answers every query with a full pass per corner, over PyTorch's own `unfold` and
`grid_sample`. The weights are those of our modules, so this is the truth that tests compare the fast code with, in
output and gradients, and the plain algorithm that benchmarks time.

Shapes: B images, C feature channels, (H, W) LR size, Q queries, J experts, C_out output channels. `coord` (B, Q, 2)
lies in [-1, 1], rows first; `cell` (B, Q, 2) is 2 / output size.
"""

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .decoder import MoEDecoder
from .lm import LMExperts
from .lte import LTEExperts


def decode(
    decoder: MoEDecoder, feat: Tensor, coord: Tensor, cell: Tensor, noise: Tensor | None = None, tau: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The whole method behind the encoder.

    Args:
        decoder: Its weights.
        feat: z, (B, C, H, W).
        coord: Queries.
        cell: Their output pixels' size.
        noise: Standard Gumbel noise (B, Q, J) in training, None at test.
        tau: Gumbel temperature.

    Returns:
        s, (B, Q, C_out), and the gates, (B, Q, J).
    """
    gate = gates(logits(decoder, feat, coord, cell), noise, tau)
    return mixture(decoder, feat, coord, cell, gate), gate


def logits(decoder: MoEDecoder, feat: Tensor, coord: Tensor, cell: Tensor) -> Tensor:
    """M(z, x), (B, Q, J): convolutions at LR, then a small layer that also sees relative coordinate and cell."""
    mapper = decoder.mapper
    assert mapper is not None  # one expert needs no routing
    code, position = (sample(image, coord) for image in (mapper.convs(feat), centres(feat)))
    rel = (coord - position) * lr_size(feat)
    if mapper.granularity == 'lr_pixel':  # ours: one decision for all output pixels of an LR pixel
        rel = torch.zeros_like(rel)
    return mapper.query_out(F.relu(mapper.query_in(torch.cat([code, rel, cell * lr_size(feat)], dim=-1))))


def gates(logits: Tensor, noise: Tensor | None, tau: float) -> Tensor:
    """(B, Q, J), one-hot; with noise, backward is the gradient of the softmax (straight-through)."""
    if noise is None:
        return F.one_hot(logits.argmax(dim=-1), logits.shape[-1]).to(logits)
    soft = F.softmax((logits + noise) / tau, dim=-1)
    hard = F.one_hot(soft.argmax(dim=-1), logits.shape[-1]).to(logits)
    return hard + (soft - soft.detach())


def mixture(decoder: MoEDecoder, feat: Tensor, coord: Tensor, cell: Tensor, gate: Tensor) -> Tensor:
    """sum_j g_j f_j, (B, Q, C_out); the experts read the same."""

    def experts(x: Tensor) -> Tensor:
        terms = (gate[..., j, None] * mlp(decoder, j, x) for j in range(decoder.num_experts))
        return sum(terms, gate.new_zeros(()))

    return ensemble(decoder, feat, coord, cell, experts)


def predict(
    decoder: MoEDecoder, j: int, feat: Tensor, coord: Tensor, cell: Tensor, maps: list[Tensor] | None = None
) -> Tensor:
    """f_j(z, x, cell), (B, Q, C_out); several calls may share `maps` from `maps_of`."""
    return ensemble(decoder, feat, coord, cell, lambda x: mlp(decoder, j, x), maps)


def mlp(decoder: MoEDecoder, j: int, x: Tensor) -> Tensor:
    """Expert j's layers with ReLU between them: (B, Q, inputs) -> (B, Q, C_out); 0 without layers."""
    if not decoder.pool.linears(j):
        return x.new_zeros(*x.shape[:-1], decoder.pool.out_channels)
    if decoder.family == 'lm':
        return modulated(cast(LMExperts, decoder.pool), j, x)
    *hidden, last = decoder.pool.linears(j)
    for linear in hidden:
        x = F.relu(linear(x))
    return last(x)


def modulated(pool: LMExperts, j: int, x: Tensor) -> Tensor:
    """Expert j of 'lm': the latent MLP's scales, shifts and code, then the render MLP (He and Jin, CVPR 2024)."""
    codes, rel, cell_lr = x.split([x.shape[-1] - 4, 2, 2], dim=-1)
    row = cast(nn.Sequential, pool.latent(j))(torch.cat([codes, cell_lr], dim=-1))
    *hidden, last = pool.linears(j)
    width = last.in_features
    *modulations, code = row.split(width, dim=-1)
    x = torch.cat([code, rel, cell_lr], dim=-1)
    for layer, linear in enumerate(hidden):
        x = F.relu(linear(x) * (1 + modulations[layer]) + modulations[len(hidden) + layer])
    return last(x)


def ensemble(
    decoder: MoEDecoder,
    feat: Tensor,
    coord: Tensor,
    cell: Tensor,
    predict: Callable[[Tensor], Tensor],
    maps: list[Tensor] | None = None,
) -> Tensor:
    """Local ensemble of four corners: what each reads from its latent code, a full pass, blended by area."""
    maps = maps_of(decoder, feat) if maps is None else maps
    read = read_lte if decoder.family == 'lte' else read_liif
    (height, width), positions = feat.shape[-2:], centres(feat)
    predictions, areas = [], []
    for row_side in (-1, 1):
        for col_side in (-1, 1):
            shift = coord.new_tensor([row_side / height + 1e-6, col_side / width + 1e-6])  # half an LR pixel
            corner = (coord + shift).clamp(-1 + 1e-6, 1 - 1e-6)
            rel = (coord - sample(positions, corner)) * lr_size(feat)
            x = read(decoder, [sample(one, corner) for one in maps], rel, cell * lr_size(feat))
            predictions.append(predict(x))
            areas.append((rel[..., 0] * rel[..., 1]).abs() + 1e-9)
    total = torch.stack(areas).sum(dim=0)  # each corner counts by the area diagonally opposite to it
    terms = (one * (area / total).unsqueeze(-1) for one, area in zip(predictions, reversed(areas)))
    return sum(terms, total.new_zeros(()))


def maps_of(decoder: MoEDecoder, feat: Tensor) -> list[Tensor]:
    """What the corners sample: unfolded features (B, 9 C, H, W); LTE's coefficients and frequencies."""
    if decoder.family != 'lte':
        return [F.unfold(feat, 3, padding=1).unflatten(-1, feat.shape[-2:])]
    pool = cast(LTEExperts, decoder.pool)  # or, in tests, the layers of an official network
    return [pool.coef(feat), pool.freq(feat)]


def read_liif(decoder: MoEDecoder, codes: list[Tensor], rel: Tensor, cell_lr: Tensor) -> Tensor:
    """What a LIIF or LM expert reads, (B, Q, 9 C + 4)."""
    return torch.cat([*codes, rel, cell_lr], dim=-1)


def read_lte(decoder: MoEDecoder, codes: list[Tensor], rel: Tensor, cell_lr: Tensor) -> Tensor:
    """What an LTE expert reads, (B, Q, 2 K): coefficient * [cos, sin](pi (frequency . rel + phase))."""
    coef, freq = codes
    phase = cast(LTEExperts, decoder.pool).phase(cell_lr)
    angle = freq[..., 0::2] * rel[..., :1] + freq[..., 1::2] * rel[..., 1:] + phase
    return coef * torch.cat([torch.cos(math.pi * angle), torch.sin(math.pi * angle)], dim=-1)


def lr_size(feat: Tensor) -> Tensor:
    """(2,): H and W."""
    return feat.new_tensor(feat.shape[-2:])


def centres(feat: Tensor) -> Tensor:
    """Positions of the LR pixels on [-1, 1], (B, 2, H, W); in fp32 as published, rounding is part of the method."""
    rows, cols = (-1 + 1 / n + (2 / n) * torch.arange(n, device=feat.device).float() for n in feat.shape[-2:])
    return torch.stack(torch.meshgrid(rows, cols, indexing='ij')).to(feat).expand(feat.shape[0], -1, -1, -1)


def sample(image: Tensor, coord: Tensor) -> Tensor:
    """The nearest pixel of (B, D, H, W) at each query: (B, Q, D)."""
    return F.grid_sample(image, coord.flip(-1).unsqueeze(1), mode='nearest', align_corners=False)[:, :, 0].transpose(
        1, 2
    )
