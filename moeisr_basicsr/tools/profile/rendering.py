"""Whole images decoded in ways that only measurements need: as published, and with an expert map that is given.

Shapes: C feature channels, (H, W) LR size, (R, S) output size, Q = R * S queries.
"""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from moeisr_basicsr.analysis.complexity import check_shares
from moeisr_basicsr.core import MoEDecoder, make_coord, reference
from moeisr_basicsr.core.render import TORCH, Backend, FeatureWindow, Renderer

CHUNK = 30000  # queries at once; the default of the official test and demo scripts
CLUSTER = 4  # LR pixels per side of a cluster; texture comes in patches, not in single pixels


@torch.no_grad()
def plain_image(
    decoder: MoEDecoder,
    j: int,
    feat: Tensor,
    size: tuple[int, int],
    cell: Tensor,
    chunk: int = CHUNK,
    max_chunks: int | None = None,
) -> Tensor:
    """Expert j's predictions for a whole image, (1, Q, C_out) in row-major order.

    Args:
        feat: (1, C, H, W).
        size: (R, S).
        cell: (2,), 2 / size, or what the network is shown in its place.
        chunk: Queries at once.
        max_chunks: Stop after that many chunks. All chunks cost the same, so a part is enough to know the time.
    """
    coord = make_coord(size, feat.device)[None].split(chunk, dim=1)[:max_chunks]
    # As published, LTE makes its maps once per image, LIIF unfolds the features in every chunk.
    maps = reference.maps_of(decoder, feat) if decoder.family == 'lte' else None
    parts = [reference.predict(decoder, j, feat, at, cell.to(feat).expand_as(at), maps) for at in coord]
    return torch.cat(parts, dim=1)


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
    lr_size = feat.shape[-2], feat.shape[-1]
    renderer = Renderer(decoder, size, lr_size, cell, backend=backend, device=feat.device)
    if expert_map is not None:
        renderer.shuffle = SimpleNamespace(expert_map=expert_map)  # type: ignore[assignment]  # a `Shuffle` that is done
    output = torch.empty(decoder.out_channels, *size, device=feat.device)
    for top, bottom, strip in renderer.render_region(FeatureWindow(feat, 0, 0, lr_size), (0, size[0]), (0, size[1])):
        output[:, top:bottom] = strip.output[0]
    return output


@torch.no_grad()
def route(decoder: MoEDecoder, feat: Tensor, size: tuple[int, int], backend: Backend = TORCH) -> Tensor:
    """The expert map of the mapper for one image (1, C, H, W), without decoding: (R, S) uint8."""
    lr_size = feat.shape[-2], feat.shape[-1]
    renderer = Renderer(decoder, size, lr_size, backend=backend, device=feat.device)
    strips = renderer.strips(FeatureWindow(feat, 0, 0, lr_size), (0, size[0]), (0, size[1]))
    return torch.cat([expert_map for _, _, expert_map in strips if expert_map is not None])


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
