"""The LTE decoder family (Lee and Jin, CVPR 2022, arXiv 2111.08918).

Two 3x3 convolutions at LR resolution give a coefficient and a frequency per latent code; the phase follows from the
cell. An expert reads coefficient * [cos, sin](pi (frequency . relative coordinate + phase)). All experts share the
convolutions and the phase, and differ in the MLP behind them.

Shapes: B images, C feature channels, T = H * W latent codes, N queries, K = hidden_dim / 2 frequencies.
"""

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from .coords import Queries
from .liif import ExpertPool


class LTEExperts(ExpertPool):
    """LTE decoders over one feature map; `tables` are two, (T, 2 K): coefficient and frequency.

    Args:
        in_channels: C.
        out_channels: C_out.
        experts: Hidden widths of each expert.
        hidden_dim: 2 K, width of the Fourier basis; even.
        shared_layers: See `ExpertPool`; convolutions and phase are always shared.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        experts: Sequence[Sequence[int]],
        hidden_dim: int = 256,
        shared_layers: int = 0,
    ):
        if hidden_dim < 2 or hidden_dim % 2:
            raise ValueError(f'hidden_dim must be a positive even number; got {hidden_dim}.')
        super().__init__(hidden_dim, out_channels, experts, shared_layers)
        self.in_channels = in_channels
        self.hidden_dim = hidden_dim
        self.coef = nn.Conv2d(in_channels, hidden_dim, 3, padding=1)
        self.freq = nn.Conv2d(in_channels, hidden_dim, 3, padding=1)
        self.phase = nn.Linear(2, hidden_dim // 2, bias=False)

    def tables(
        self, feat: Tensor, padding: int = 1, cell_lr: Tensor | None = None, reads: Tensor | None = None
    ) -> list[Tensor]:
        """Coefficient and frequency at LR resolution.

        Returns:
            Two of (B, T, 2 K).
        """
        feat = feat.contiguous(memory_format=torch.channels_last)  # the convolutions then write rows of the tables
        maps = (nn.functional.conv2d(feat, conv.weight, conv.bias, padding=padding) for conv in (self.coef, self.freq))
        return [rearrange(table, 'b d h w -> b (h w) d') for table in maps]

    def basis(self, tables: list[Tensor], queries: Queries) -> Tensor:
        """What the MLPs read: (4 N, 2 K). LTE, equations 4 and 5."""
        coef, freq = (queries.gather(table) for table in tables)  # (4 N, 2 K)
        rel = queries.rel.flatten(0, 1).to(freq)  # (4 N, 2)
        phase = self.phase(queries.cell_lr)  # (N, K) or (1, K)
        # (4 N, K); row part and column part of each frequency stand side by side
        angle = freq[:, 0::2] * rel[:, :1] + freq[:, 1::2] * rel[:, 1:]
        angle = math.pi * (angle.view(-1, 4, phase.shape[-1]) + phase.unsqueeze(1)).flatten(0, 1)
        return coef * torch.cat([angle.cos(), angle.sin()], dim=-1)

    def enter(self, j: int, tables: list[Tensor], queries: Queries) -> tuple[int, Tensor]:
        """The Fourier basis, before any layer: 0, (4 N, 2 K)."""
        return 0, self.basis(tables, queries)

    def macs(self, j: int) -> int:
        """Multiply-adds of expert j for one query, LR tables not counted: angles, MLP."""
        if not self.linears(j):
            return 0
        *hidden, last = self.linears(j)
        return 4 * (self.hidden_dim + sum(layer.weight.numel() for layer in hidden)) + last.weight.numel()

    def own_table_macs(self, j: int) -> int:
        """Multiply-adds of both convolutions for one LR pixel; none without layers."""
        return 2 * 9 * self.in_channels * self.hidden_dim if self.linears(j) else 0

    def table_macs(self, reads: Sequence[float] | None = None) -> float:
        """The same: all experts share both convolutions."""
        return max(map(self.own_table_macs, range(len(self.experts))))
