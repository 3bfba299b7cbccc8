"""Rendering with an expert map that is given instead of computed: for benchmarks and comparisons.

Shapes: C feature channels, (H, W) LR size, (R, S) output size, J experts.
"""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from moeisr_basicsr.analysis.complexity import check_shares
from moeisr_basicsr.core import MoEDecoder
from moeisr_basicsr.core.render import TORCH, Backend, FeatureWindow, Renderer

CLUSTER = 4  # LR pixels per side of a cluster; texture comes in patches, not in single pixels


@torch.no_grad()
def render_fixed(
    decoder: MoEDecoder,
    feat: Tensor,
    size: tuple[int, int],
    expert_map: Tensor | None,
    cell: Tensor | None = None,
    backend: Backend = TORCH,
) -> Tensor:
    """One image (1, C, H, W) with a given expert map (R, S), None for a dense decoder: (C_out, R, S) fp32."""
    lr_size = tuple(feat.shape[-2:])
    given = None if expert_map is None else SimpleNamespace(expert_map=expert_map)  # a `Shuffle` that is done
    renderer = Renderer(decoder, size, lr_size, cell, backend=backend, device=feat.device, shuffle=given)
    output = torch.empty(decoder.out_channels, *size, device=feat.device)
    for top, bottom, strip in renderer.render(FeatureWindow(feat, 0, 0, lr_size), (0, size[0]), (0, size[1])):
        output[:, top:bottom] = strip.output[0]
    return output


@torch.no_grad()
def route(decoder: MoEDecoder, feat: Tensor, size: tuple[int, int], backend: Backend = TORCH) -> Tensor:
    """The expert map of the mapper for one image (1, C, H, W), without decoding: (R, S) uint8."""
    lr_size = tuple(feat.shape[-2:])
    renderer = Renderer(decoder, size, lr_size, backend=backend, device=feat.device)
    strips = renderer.strips(FeatureWindow(feat, 0, 0, lr_size), (0, size[0]), (0, size[1]))
    return torch.cat([expert_map for _, _, expert_map in strips])


def clustered_map(size: tuple[int, int], lq_size: tuple[int, int], shares: Sequence[float], seed: int = 0) -> Tensor:
    """A made-up expert map, (R, S) uint8, with these shares to within one pixel, in patches as texture comes.

    Smooth noise is cut at its quantiles; the first expert gets the lowest values.
    """
    check_shares(shares, len(shares))
    generator = torch.Generator().manual_seed(seed)
    grid = [max(n // CLUSTER, 1) for n in lq_size]
    noise = F.interpolate(torch.randn(1, 1, *grid, generator=generator), size=size, mode='bilinear')[0, 0]
    rank = noise.flatten().argsort().argsort()
    edges = torch.tensor([round(sum(shares[: j + 1]) * rank.numel()) for j in range(len(shares) - 1)])
    return torch.bucketize(rank, edges, right=True).to(torch.uint8).view(size)
