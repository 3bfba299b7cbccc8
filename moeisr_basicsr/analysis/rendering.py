"""Rendering with an expert map that is given instead of computed: for measurements and for comparisons.

Shapes: B images, C feature channels, (H, W) LR size, (R, S) output size, J experts.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moeisr_basicsr.core import MoEDecoder
from moeisr_basicsr.core.render import TORCH, Backend, FeatureWindow, Renderer

from .complexity import check_loads

CLUSTER = 4  # LR cells per side of a cluster; texture comes in patches, not in single pixels


class FixedMapRenderer(Renderer):
    """A `Renderer` whose expert map is given.

    Args:
        expert_map: (R, S) uint8; None for a dense decoder.
        with_mapper: Compute the mapper's routing too and throw it away, so that its time counts.
        **options: Of `Renderer`.
    """

    def __init__(
        self,
        decoder: MoEDecoder,
        size: tuple[int, int],
        lr_size: tuple[int, int],
        expert_map: Tensor | None,
        with_mapper: bool = False,
        **options,
    ):
        super().__init__(decoder, size, lr_size, **options)
        self.expert_map = expert_map
        self.with_mapper = with_mapper

    def strips(
        self, window: FeatureWindow, rows: tuple[int, int], cols: tuple[int, int]
    ) -> Iterator[tuple[int, int, Tensor | None]]:
        """Row strips with their part of the given map."""
        computed = (
            super().strips(window, rows, cols)
            if self.with_mapper
            else ((top, bottom, None) for top, bottom in self.row_spans(rows))
        )
        for top, bottom, _ in computed:
            yield top, bottom, None if self.expert_map is None else self.expert_map[top:bottom, cols[0] : cols[1]]


@torch.no_grad()
def render_fixed(
    decoder: MoEDecoder,
    feat: Tensor,
    size: tuple[int, int],
    expert_map: Tensor | None,
    cell: Tensor | None = None,
    backend: Backend | None = None,
    with_mapper: bool = False,
) -> Tensor:
    """One image (1, C, H, W) with a given expert map: (C_out, R, S) fp32."""
    lr_size = tuple(feat.shape[-2:])
    renderer = FixedMapRenderer(
        decoder, size, lr_size, expert_map, with_mapper, cell=cell, backend=backend or TORCH, device=feat.device
    )
    output = torch.empty(decoder.out_channels, *size, device=feat.device)
    for top, bottom, strip in renderer.render(FeatureWindow(feat, 0, 0, lr_size), (0, size[0]), (0, size[1])):
        output[:, top:bottom] = strip.output[0]
    return output


def clustered_map(size: tuple[int, int], lq_size: tuple[int, int], loads: Sequence[float], seed: int = 0) -> Tensor:
    """A made-up expert map, (R, S) uint8, with these loads to within one pixel, in patches as texture comes.

    Smooth noise is cut at its quantiles; the first expert gets the lowest values.
    """
    check_loads(loads, len(loads))
    generator = torch.Generator().manual_seed(seed)
    grid = [max(n // CLUSTER, 1) for n in lq_size]
    noise = F.interpolate(torch.randn(1, 1, *grid, generator=generator), size=size, mode='bilinear')[0, 0]
    order = noise.flatten().argsort()
    edges = [round(sum(loads[:j]) * order.numel()) for j in range(len(loads) + 1)]
    expert_map = torch.empty(order.numel(), dtype=torch.uint8)
    for j, (start, stop) in enumerate(zip(edges[:-1], edges[1:])):
        expert_map[order[start:stop]] = j
    return expert_map.view(size)
