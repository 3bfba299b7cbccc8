"""The LIIF decoder family (Chen et al., CVPR 2021, arXiv 2012.09161) with its first layer folded to LR resolution.

A LIIF expert reads 3x3-unfolded features, the relative coordinate and the cell. Its first linear layer is linear in
the features, and nearest sampling commutes with a linear layer: the feature part equals one 3x3 convolution at LR
resolution followed by a gather, zero padding included. Weights keep the published layout (9C + 4 inputs); they are
cut apart at run time.

Shapes: B images, C feature channels, T = H * W latent codes, N queries, D1 first hidden width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .experts import ExpertPool, apply_linear
from .queries import Queries


class LIIFExperts(ExpertPool):
    """A pool of LIIF decoders over one feature map. `tables` is a list of one per expert.

    Args:
        in_channels: C.
        out_channels: Channels of the signal.
        experts: Hidden widths of each expert.
        shared_layers: See `ExpertPool`; from 1 on there is one LR table for all experts.
        zero_init_last: See `Expert`.

    Raises:
        ValueError: The experts cannot share their layers; see `unshareable`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        experts: Sequence[Sequence[int]],
        shared_layers: int = 0,
        zero_init_last: bool = False,
    ):
        super().__init__(in_channels * 9 + 4, out_channels, experts, shared_layers, zero_init_last)
        self.in_channels = in_channels

    @classmethod
    def unshareable(cls, experts: Sequence[Sequence[int]], shared_layers: int) -> str | None:
        """As in `ExpertPool`; the first layer, folded to LR resolution, is shared or not for all experts alike."""
        if shared_layers > 0 and not all(experts):
            return (
                f'{shared_layers} needs at least one hidden layer in each LIIF expert; got '
                f'{[list(hidden) for hidden in experts]}.'
            )
        return super().unshareable(experts, shared_layers)

    @property
    def num_tables(self) -> int:
        """Number of different LR tables: one per expert, or one in all."""
        return 1 if len(self.shared) else len(self.experts)

    def split_first(self, j: int) -> tuple[Tensor, Tensor]:
        """Expert j's first weight cut apart: for the features (D1, C, 3, 3), for coordinate and cell (D1, 4)."""
        weight = self.linears(j)[0].weight
        unfolded = self.in_channels * 9
        kernel = rearrange(weight[:, :unfolded], 'd (c kh kw) -> d c kh kw', kh=3, kw=3)  # as F.unfold orders them
        return kernel, weight[:, unfolded:]

    def tables(self, feat: Tensor, padding: int = 1) -> list[Tensor]:
        """The feature part of every expert's first layer at LR resolution.

        Args:
            feat: (B, C, H, W), or with its halo of one code per side and `padding` 0.

        Returns:
            One (B, T, D1) per expert, first-layer bias included; the same one for all that share it.
        """
        kernels = [self.split_first(j)[0] for j in range(self.num_tables)]
        biases = [self.linears(j)[0].bias for j in range(self.num_tables)]
        feat = feat.contiguous(memory_format=torch.channels_last)  # the convolution then writes rows of the table
        table = F.conv2d(feat, torch.cat(kernels), torch.cat(biases), padding=padding)  # (B, sum of D1, H, W)
        table = rearrange(table, 'b d h w -> b (h w) d')  # (B, T, sum of D1)
        tables = list(table.split([bias.shape[0] for bias in biases], dim=-1))
        return tables if self.num_tables > 1 else tables * len(self.experts)

    def first(self, j: int, tables: list[Tensor], queries: Queries) -> Tensor:
        """Expert j's first layer before its ReLU: (4 N, D1)."""
        x = queries.gather(tables[j])
        return x.addmm_(queries.local().to(x), self.split_first(j)[1].t().to(x))

    def evaluate(self, j: int, tables: list[Tensor], queries: Queries) -> Tensor:
        """Expert j's answers to N queries of one image: (N, out_channels); `tables` are one (T, D1) per expert."""
        if len(self.shared):
            return super().evaluate(j, tables, queries)
        hidden = self.linears(j)[1:]
        x = self.first(j, tables, queries)
        for linear in hidden[:-1]:
            x = apply_linear(linear, F.relu_(x))
        if not hidden:
            return queries.blend(x)
        # The last layer is linear: blended before it, the four corners need one pass.
        return hidden[-1](queries.blend(F.relu_(x)))

    def evaluate_all(self, tables: list[Tensor], queries: Queries) -> Tensor:
        """Every expert's answers: (N, J, out_channels)."""
        if len(self.shared):
            return super().evaluate_all(tables, queries)
        return torch.stack([self.evaluate(j, tables, queries) for j in range(len(self.experts))], dim=1)

    def enter(self, tables: list[Tensor], queries: Queries) -> tuple[int, Tensor]:
        """The first layer: 1, (4 N, D1)."""
        return 1, F.relu_(self.first(0, tables, queries))

    def macs(self, j: int) -> int:
        """Multiply-adds of expert j's linear layers for one query, LR tables not counted."""
        linears = self.linears(j)
        per_corner = 2 * linears[0].out_features + sum(layer.weight.numel() for layer in linears[1:-1])
        last = linears[-1].weight.numel() if len(linears) > 1 else 0
        return 4 * per_corner + last

    def table_macs(self) -> int:
        """Multiply-adds of the LR tables of all experts for one LR cell."""
        return sum(9 * self.in_channels * self.linears(j)[0].out_features for j in range(self.num_tables))
