"""What every decoder family is built of, and the LIIF family (Chen et al., CVPR 2021, arXiv 2012.09161).

Expert j is an MLP f_j of its own depth. A LIIF expert reads 3x3-unfolded features, the relative coordinate and the
cell. Its first linear layer is linear in the features, and nearest sampling commutes with a linear layer: the feature
part equals one 3x3 convolution at LR resolution followed by a gather, zero padding included. Weights keep the
published layout (9C + 4 inputs); they are cut apart at run time.

Shapes: B images, C feature channels, T = H * W latent codes, N queries with 4 corners each, D width of a hidden layer
(D1 of the first), J experts.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .coords import Queries


def apply_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """(N, D_in) -> (N, D_out).

    On a CPU and without gradients as a 1x1 convolution over N rows: oneDNN multiplies in its blocked layout, where
    F.linear calls the BLAS; measured 1.1 to 1.9 times as fast in fp32 on 4,096 to 16,384 rows of 256.
    """
    if x.device.type != 'cpu' or x.dtype != torch.float32 or torch.is_grad_enabled() or x.shape[0] == 0:
        return layer(x)
    image = x.view(1, -1, 1, x.shape[1]).permute(0, 3, 1, 2)  # (1, D_in, N, 1), channels-last
    return F.conv2d(image, layer.weight[:, :, None, None], layer.bias).permute(0, 2, 3, 1).reshape(x.shape[0], -1)


class Expert(nn.Module):
    """The layers of one expert; ReLU stands between them.

    Parameter names follow the official LIIF and LTE checkpoints (`layers.0`, `layers.2`, ...).

    Args:
        widths: Of input, hidden layers and output; none at all for no layers.
    """

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        layers: list[nn.Module] = []
        for fan_in, fan_out in zip(widths[:-1], widths[1:]):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])


def is_widths(value: object) -> bool:
    """Whether it lists widths of layers, positive integers."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return False
    return all(type(width) is int and width > 0 for width in value)


class ExpertPool(nn.Module):
    """The experts of a decoder family, which may have leading hidden layers in common.

    An entry `[]` is the expert without layers: it predicts 0 and costs nothing.

    With all hidden layers in common the experts are exits of one network at different depths: each trains the layers of
    all that are deeper, and one pass through the deepest answers for all. What runs at test does not change.

    Args:
        in_features: Inputs of the MLPs.
        out_channels: C_out.
        experts: Hidden widths of each expert.
        shared_layers: How many leading hidden layers the experts have in common; one with fewer shares all it has.

    Raises:
        ValueError: The experts cannot share their layers; see `unshareable`.
    """

    in_channels: int  # C, which each family sets
    entries = 'the hidden widths of each expert, for example [[256], [256, 256]]'  # what `experts` lists
    skips_unread = False  # whether `tables` leaves out the LR pixels that no query of an expert reads

    def __init__(self, in_features: int, out_channels: int, experts: Sequence[Sequence[int]], shared_layers: int = 0):
        super().__init__()
        if problem := self.unshareable(experts, shared_layers):
            raise ValueError(f'shared_layers: {problem}')
        common = max(experts, key=len)[:shared_layers]
        widths = [in_features, *common]
        self.shared = nn.ModuleList(nn.Linear(*pair) for pair in zip(widths[:-1], widths[1:]))
        self.out_channels = out_channels
        self.num_shared = [min(len(hidden), len(common)) for hidden in experts]  # layers of each expert
        self.experts = nn.ModuleList(
            Expert([widths[count], *hidden[count:], out_channels] if hidden else [])
            for hidden, count in zip(experts, self.num_shared)
        )

    @staticmethod
    def is_entry(entry: object) -> bool:
        """Whether `experts` may list it."""
        return is_widths(entry)

    @classmethod
    def unshareable(cls, experts: Sequence[Sequence[int]], shared_layers: int) -> str | None:
        """Why this family's experts cannot have that many layers in common, or None."""
        if shared_layers < 0:
            return f'must not be negative; got {shared_layers}.'
        widths = [list(hidden) for hidden in experts]
        common = max(widths, key=len)[:shared_layers]
        if any(hidden[:shared_layers] != common[: len(hidden)] for hidden in widths):
            return f'{shared_layers} needs experts whose first widths agree; got {widths}.'
        return None

    @property
    def is_nested(self) -> bool:
        """Whether the experts share all hidden layers and have at most an output layer of their own."""
        return len(self.shared) > 0 and all(len(self.linears(j)) <= n + 1 for j, n in enumerate(self.num_shared))

    def linears(self, j: int) -> list[nn.Linear]:
        """Expert j's linear layers from first to last; none for an expert without layers."""
        modules = [*self.shared[: self.num_shared[j]], *cast(Expert, self.experts[j]).layers]
        return [module for module in modules if isinstance(module, nn.Linear)]

    @torch.no_grad()
    def scale_output(self, factor: float) -> None:
        """Multiply what every expert predicts; with 0 a network with an image skip starts as exactly that skip."""
        for j in range(len(self.experts)):
            for last in self.linears(j)[-1:]:  # never shared
                last.weight.mul_(factor)
                last.bias.mul_(factor)

    def tables(
        self, feat: Tensor, padding: int = 1, cell_lr: Tensor | None = None, reads: Tensor | None = None
    ) -> list[Tensor]:
        """What can be computed once per LR pixel, each (B, T, width).

        Args:
            feat: (B, C, H, W), or with its halo of one code per side and `padding` 0.
            padding: 1, or 0.
            cell_lr: (B, N, 2), the queries' or one for all, in LR pixels; for families whose tables depend on it.
            reads: (J, B, T) bool, which rows each expert's queries read; the others stay zero if `skips_unread`.
        """
        raise NotImplementedError

    def enter(self, j: int, tables: list[Tensor], queries: Queries) -> tuple[int, Tensor]:
        """Expert j's first step: how many of its layers that is, and the activations (4 N, D) after their ReLU."""
        raise NotImplementedError

    def macs(self, j: int) -> int:
        """Multiply-adds of expert j for one query, LR tables not counted."""
        raise NotImplementedError

    def own_table_macs(self, j: int) -> int:
        """Multiply-adds for one LR pixel of the LR tables that expert j reads."""
        raise NotImplementedError

    def table_macs(self, reads: Sequence[float] | None = None) -> float:
        """Multiply-adds of all LR tables for one LR pixel, in the mean.

        Args:
            reads: (J,) share of the LR pixels that each expert's queries read, where `skips_unread`; None for all.
        """
        raise NotImplementedError

    def cost(self, j: int) -> float:
        """What expert j costs the routing: its multiply-adds for one query."""
        return self.macs(j)

    def predict(self, j: int, queries: Queries, tables: list[Tensor], trunk: dict[int, Tensor] | None = None) -> Tensor:
        """Expert j's predictions for N queries of one image: (N, C_out).

        Args:
            j: The expert.
            queries: The queries.
            tables: As `tables` makes them, without the batch.
            trunk: Activations after the shared layers that an earlier expert has computed, by their number; those that
                this expert adds are put there.
        """
        if not self.linears(j):
            return queries.rel.new_zeros(queries.rel.shape[0], self.out_channels)
        return self.run(j, queries, tables, trunk)

    def run(self, j: int, queries: Queries, tables: list[Tensor], trunk: dict[int, Tensor] | None) -> Tensor:
        """`predict` for an expert with layers."""
        shared = self.num_shared[j]
        known = max((depth for depth in trunk or () if depth <= shared), default=None)
        start, x = self.enter(j, tables, queries) if trunk is None or known is None else (known, trunk[known])
        *hidden, last = self.linears(j)
        for depth in range(start, len(hidden) + 1):  # number of layers done
            if depth > start:
                x = F.relu_(apply_linear(hidden[depth - 1], x))  # (4 N, D)
            if trunk is not None and depth <= shared:
                trunk[depth] = x
        return last(queries.blend(x))  # the last layer is linear: blended before it, the corners need one pass

    def predict_all(self, queries: Queries, tables: list[Tensor]) -> Tensor:
        """Every expert's predictions, what they share computed once: (N, J, C_out)."""
        trunk: dict[int, Tensor] = {}
        return torch.stack([self.predict(j, queries, tables, trunk) for j in range(len(self.experts))], dim=1)


class LIIFExperts(ExpertPool):
    """LIIF decoders over one feature map; `tables` are one (T, D1) per expert, D1 = 0 without layers.

    Args:
        in_channels: C.
        out_channels: C_out.
        experts: Hidden widths of each expert.
        shared_layers: See `ExpertPool`; from 1 on there is one LR table for all experts.

    Raises:
        ValueError: The experts cannot share their layers; see `unshareable`.
    """

    def __init__(self, in_channels: int, out_channels: int, experts: Sequence[Sequence[int]], shared_layers: int = 0):
        super().__init__(in_channels * 9 + 4, out_channels, experts, shared_layers)
        self.in_channels = in_channels

    @property
    def num_tables(self) -> int:
        """Number of different LR tables: one per expert, or one in all."""
        return 1 if len(self.shared) else len(self.experts)

    @property
    def owners(self) -> list[int]:
        """The experts whose first layers, hence LR tables, differ: all with layers, or one where they share it."""
        layered = [j for j in range(len(self.experts)) if self.linears(j)]
        return layered[:1] if len(self.shared) else layered

    def split_first(self, j: int) -> tuple[Tensor, Tensor]:
        """Expert j's first weight cut apart: for the features (D1, C, 3, 3), for coordinate and cell (D1, 4)."""
        weight = self.linears(j)[0].weight
        unfolded = self.in_channels * 9
        kernel = rearrange(weight[:, :unfolded], 'd (c kh kw) -> d c kh kw', kh=3, kw=3)  # as F.unfold orders them
        return kernel, weight[:, unfolded:]

    def tables(
        self, feat: Tensor, padding: int = 1, cell_lr: Tensor | None = None, reads: Tensor | None = None
    ) -> list[Tensor]:
        """The feature part of every expert's first layer at LR resolution, its bias included.

        Returns:
            One (B, T, D1) per expert; the same one for all that share it.
        """
        owners = self.owners
        if not owners:
            return [feat.new_zeros(feat.shape[0], 0, 0)] * len(self.experts)
        kernels = [self.split_first(j)[0] for j in owners]
        biases: list[Tensor] = [self.linears(j)[0].bias for j in owners]
        feat = feat.contiguous(memory_format=torch.channels_last)  # the convolution then writes rows of the table
        table = F.conv2d(feat, torch.cat(kernels), torch.cat(biases), padding=padding)  # (B, sum of D1, H, W)
        table = rearrange(table, 'b d h w -> b (h w) d')  # (B, T, sum of D1)
        own = dict(zip(owners, table.split([bias.shape[0] for bias in biases], dim=-1)))
        shared = own[owners[0]] if len(self.shared) else table[..., :0]
        return [own.get(j, shared) for j in range(len(self.experts))]

    def enter(self, j: int, tables: list[Tensor], queries: Queries) -> tuple[int, Tensor]:
        """The first layer: 1, (4 N, D1)."""
        x = queries.gather(tables[j])
        return 1, F.relu_(x.addmm_(queries.local().to(x), self.split_first(j)[1].t().to(x)))

    def macs(self, j: int) -> int:
        """Multiply-adds of expert j's linear layers for one query, LR tables not counted."""
        if not self.linears(j):
            return 0
        first, *hidden, last = self.linears(j)
        per_corner = 2 * first.out_features + sum(layer.weight.numel() for layer in hidden)
        return 4 * per_corner + last.weight.numel()

    def own_table_macs(self, j: int) -> int:
        """Multiply-adds of expert j's LR table for one LR pixel."""
        return sum(9 * self.in_channels * first.out_features for first in self.linears(j)[:1])

    def table_macs(self, reads: Sequence[float] | None = None) -> float:
        """Multiply-adds of the LR tables of all experts for one LR pixel."""
        return sum(map(self.own_table_macs, self.owners))
