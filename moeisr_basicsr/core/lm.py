"""The LM decoder family: latent modulated functions (He and Jin, CVPR 2024, arXiv 2404.16451).

A latent MLP runs once per LR pixel: it reads the 3x3-unfolded features and the cell, and gives a compressed latent code
and, for every hidden layer of the render MLP, a scale and a shift per channel. The small render MLP runs per query and
corner: it reads code, relative coordinate and cell, and before each ReLU takes x to x (1 + scale) + shift. Corners are
blended as in LIIF. An expert is a pair of both MLPs. The latent MLP is the expensive one: at test it runs only on LR
pixels that some query of its expert reads.

A row of an LR table, W + 2 L W wide: the scales of hidden layers 1 to L, their shifts, the code. That is the order of
the official weights (HeZongyao/LMF).

Shapes: B images, C feature channels, (H, W) LR size, T = H * W latent codes, N queries with 4 corners each, W width of
the render MLP, L its hidden layers, D1 the width of a latent MLP's first layer.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .coords import Queries
from .liif import Expert, ExpertPool, is_widths

COST_DENSITY = 1 / 16  # LR pixels per query at x4, in `cost`


class LMExperts(ExpertPool):
    """LM decoders over one feature map; `tables` are one (T, W + 2 L W) per expert.

    Args:
        in_channels: C.
        out_channels: C_out.
        experts: `latent`, hidden widths of the latent MLP, and `depth`, L, of each expert; or [].
        render_width: W.
        shared_layers: 0, the experts have nothing in common.
    """

    skips_unread = True
    entries = "the layers of each expert, for example [[], {'latent': [208], 'depth': 6}]"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        experts: Sequence[Mapping[str, Any] | Sequence],
        render_width: int = 16,
        shared_layers: int = 0,
    ):
        if shared_layers:
            raise ValueError(f"shared_layers: experts of 'lm' have no layers in common; got {shared_layers}.")
        depths = [entry['depth'] if isinstance(entry, Mapping) else 0 for entry in experts]
        super().__init__(render_width + 4, out_channels, [[render_width] * depth for depth in depths])
        self.in_channels = in_channels
        self.render_width = render_width
        for expert, entry in zip(self.experts, experts):
            if isinstance(entry, Mapping):
                row = render_width * (1 + 2 * entry['depth'])
                expert.latent = Expert([in_channels * 9 + 2, *entry['latent'], row])

    @staticmethod
    def is_entry(entry: object) -> bool:
        """Whether `experts` may list it: [], or `latent` and `depth`."""
        if isinstance(entry, Mapping):
            depth = entry.get('depth')
            return set(entry) == {'latent', 'depth'} and is_widths(entry['latent']) and type(depth) is int and depth > 0
        return is_widths(entry) and not entry

    def latent(self, j: int) -> nn.Sequential | None:
        """Expert j's latent MLP; None without layers."""
        return cast(Expert, self.experts[j].latent).layers if self.linears(j) else None

    def latent_linears(self, j: int) -> list[nn.Linear]:
        """Its linear layers from first to last."""
        return [layer for layer in self.latent(j) or () if isinstance(layer, nn.Linear)]

    def tables(
        self, feat: Tensor, padding: int = 1, cell_lr: Tensor | None = None, reads: Tensor | None = None
    ) -> list[Tensor]:
        """Every expert's latent MLP at LR resolution, one (B, T, W + 2 L W) per expert; see `ExpertPool.tables`.

        Raises:
            ValueError: The queries of an image differ in their cell.
        """
        assert cell_lr is not None
        cell = cell_lr[:, 0]  # (B, 2)
        if not (cell_lr == cell[:, None]).all():
            raise ValueError("the decoder 'lm' needs one cell for all queries of an image.")
        own = [None] * len(self.experts) if reads is None else reads
        return [self.table(j, feat, padding, cell, rows) for j, rows in enumerate(own)]

    def table(self, j: int, feat: Tensor, padding: int, cell: Tensor, reads: Tensor | None) -> Tensor:
        """Expert j's latent MLP on the LR pixels `reads` (B, T), or on all: (B, T, W + 2 L W)."""
        latent = self.latent(j)
        if latent is None:
            return feat.new_zeros(feat.shape[0], 0, 0)
        first, rest = cast(nn.Linear, latent[0]), latent[1:]
        w_feat, w_cell = first.weight.split([first.in_features - 2, 2], dim=1)
        local = F.linear(cell, w_cell, first.bias)  # (B, D1)
        if reads is None:  # linear in the features: one convolution, as in LIIF
            kernel = rearrange(w_feat, 'd (c kh kw) -> d c kh kw', kh=3, kw=3)
            x = F.conv2d(feat.contiguous(memory_format=torch.channels_last), kernel, padding=padding)
            return rest(rearrange(x, 'b d h w -> b (h w) d') + local[:, None])
        codes = F.pad(feat, (padding,) * 4).permute(0, 2, 3, 1)  # (B, H + 2, W + 2, C)
        height, width = (n - 2 for n in codes.shape[1:3])
        image, row, col = reads.unflatten(1, (height, width)).nonzero(as_tuple=True)
        side = torch.arange(3, device=row.device)
        near = codes[image[:, None, None], row[:, None, None] + side[:, None], col[:, None, None] + side]
        w_feat = rearrange(w_feat, 'd (c k) -> d (k c)', k=9)
        rows = rest(F.linear(near.flatten(1), w_feat) + local[image])  # near is (N, 3, 3, C)
        table = rows.new_zeros(*reads.shape, rows.shape[1])
        table[reads] = rows
        return table

    def run(self, j: int, queries: Queries, tables: list[Tensor], trunk: dict[int, Tensor] | None) -> Tensor:
        """The render MLP; nothing is shared, so `trunk` stays empty."""
        *hidden, last = self.linears(j)
        modulation = len(hidden) * self.render_width
        scales, shifts, code = queries.gather(tables[j]).split([modulation, modulation, self.render_width], dim=1)
        x = torch.cat([code, queries.local().to(code)], dim=1)  # (4 N, W + 4)
        for layer, scale, shift in zip(hidden, *(part.split(self.render_width, dim=1) for part in (scales, shifts))):
            x = F.relu(layer(x) * (1 + scale) + shift)  # (4 N, W)
        return last(queries.blend(x))  # as in LIIF, the last layer after the blend

    def macs(self, j: int) -> int:
        """Multiply-adds of expert j's render MLP for one query; the cell counts for the bias."""
        if not self.linears(j):
            return 0
        *hidden, last = self.linears(j)
        return 4 * (sum(layer.weight.numel() for layer in hidden) - 2 * self.render_width) + last.weight.numel()

    def own_table_macs(self, j: int) -> int:
        """Multiply-adds of expert j's latent MLP for one LR pixel; the cell counts for the bias."""
        linears = self.latent_linears(j)
        return sum(layer.weight.numel() for layer in linears) - sum(2 * first.out_features for first in linears[:1])

    def table_macs(self, reads: Sequence[float] | None = None) -> float:
        """Multiply-adds of the latent MLPs for one LR pixel; an expert's run where its queries read them."""
        shares = [1.0] * len(self.experts) if reads is None else reads
        return sum(share * self.own_table_macs(j) for j, share in enumerate(shares))

    def cost(self, j: int) -> float:
        """What expert j costs the routing: its multiply-adds for one query at x4, most of which its latent MLP has."""
        return self.macs(j) + COST_DENSITY * self.own_table_macs(j)
