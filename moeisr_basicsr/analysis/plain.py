"""The published decoders without any of our shortcuts: what speed and equality are measured against.

LIIF (Chen et al., CVPR 2021, section 3) and LTE (Lee and Jin, CVPR 2022, section 3) as their official code runs them:
queries in chunks; LIIF unfolds the features anew for each chunk; each of the four corners samples the maps with
`grid_sample` and takes a full pass through the MLP. Weights are those of our modules.

Shapes: B images, C feature channels, (H, W) LR size, Q queries.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moeisr_basicsr.core import MoEDecoder, make_coord
from moeisr_basicsr.core.coords import EPS_AREA, EPS_SHIFT


def sample_nearest(image: Tensor, coord: Tensor) -> Tensor:
    """(B, D, H, W) at (B, Q, 2) -> (B, Q, D)."""
    taken = F.grid_sample(image, coord.flip(-1).unsqueeze(1), mode='nearest', align_corners=False)
    return taken[:, :, 0].permute(0, 2, 1)


def lte_maps(decoder: MoEDecoder, feat: Tensor) -> list[Tensor] | None:
    """LTE's coefficients and frequencies, which it computes once per image; None for LIIF."""
    return [decoder.pool.coef(feat), decoder.pool.freq(feat)] if decoder.family == 'lte' else None


def predict(
    decoder: MoEDecoder, j: int, feat: Tensor, coord: Tensor, cell: Tensor, maps: list[Tensor] | None = None
) -> Tensor:
    """Expert j's answers, (B, Q, C_out).

    Args:
        feat: (B, C, H, W).
        coord: (B, Q, 2).
        cell: (B, Q, 2), 2 / output size.
        maps: `lte_maps`, where several calls share them.
    """
    return ensemble(decoder, feat, coord, cell, lambda inputs: expert_mlp(decoder, j, inputs), maps)


def mixture(decoder: MoEDecoder, feat: Tensor, coord: Tensor, cell: Tensor, gates: Tensor) -> Tensor:
    """sum_j g_j f_j, every expert on every query under autograd, (B, Q, C_out); `gates` are (B, Q, J).

    The experts share what they read: the sum's own cost, not that of four separate decoders.
    """
    weights = gates.flatten(0, 1).unsqueeze(-1)  # (B Q, J, 1)
    return ensemble(
        decoder,
        feat,
        coord,
        cell,
        lambda inputs: sum(weights[:, j] * expert_mlp(decoder, j, inputs) for j in range(decoder.num_experts)),
    )


def expert_mlp(decoder: MoEDecoder, j: int, x: Tensor) -> Tensor:
    """All layers of expert j: (N, inputs) -> (N, C_out)."""
    *hidden, last = decoder.pool.linears(j)
    for linear in hidden:
        x = F.relu(linear(x))
    return last(x)


def ensemble(
    decoder: MoEDecoder,
    feat: Tensor,
    coord: Tensor,
    cell: Tensor,
    mlp: Callable[[Tensor], Tensor],
    maps: list[Tensor] | None = None,
) -> Tensor:
    """Four full passes of `mlp`, (B Q, inputs) -> (B Q, C_out), blended by the diagonally opposite areas."""
    height, width = feat.shape[-2:]
    maps = maps or lte_maps(decoder, feat)
    if maps is None:
        maps = [F.unfold(feat, 3, padding=1).view(feat.shape[0], -1, height, width)]  # (B, 9 C, H, W), in every chunk
    positions = make_coord((height, width), feat.device).view(height, width, 2).permute(2, 0, 1)  # (2, H, W)
    positions = positions.expand(feat.shape[0], -1, -1, -1)
    cell = cell * cell.new_tensor([height, width])
    answers, areas = [], []
    for row_side in (-1, 1):
        for col_side in (-1, 1):
            shifted = coord.clone()
            shifted[..., 0] += row_side / height + EPS_SHIFT
            shifted[..., 1] += col_side / width + EPS_SHIFT
            shifted.clamp_(-1 + EPS_SHIFT, 1 - EPS_SHIFT)
            sampled = [sample_nearest(one, shifted) for one in maps]
            rel = coord - sample_nearest(positions, shifted)
            rel[..., 0] *= height
            rel[..., 1] *= width
            inputs = mlp_inputs(decoder, sampled, rel, cell)
            answers.append(mlp(inputs.flatten(0, 1)).unflatten(0, rel.shape[:2]))
            areas.append((rel[..., 0] * rel[..., 1]).abs() + EPS_AREA)
    total = torch.stack(areas).sum(dim=0)
    output = 0
    for answer, opposite in zip(answers, reversed(areas)):
        output = output + answer * (opposite / total).unsqueeze(-1)
    return output


def mlp_inputs(decoder: MoEDecoder, sampled: list[Tensor], rel: Tensor, cell: Tensor) -> Tensor:
    """What one pass reads: (B, Q, 9 C + 4) for LIIF, (B, Q, 2 K) for LTE."""
    if decoder.family == 'liif':
        inputs = torch.cat([sampled[0], rel], dim=-1)
        return torch.cat([inputs, cell], dim=-1)  # in two steps as published: the copy is part of its time
    coef, freq = sampled
    angle = (freq.unflatten(-1, (-1, 2)) * rel.unsqueeze(-2)).sum(dim=-1)  # (B, Q, K)
    angle = math.pi * (angle + decoder.pool.phase(cell))
    return coef * torch.cat([angle.cos(), angle.sin()], dim=-1)
