"""Experts: the MLPs of different depth among which the mapper chooses, and the pool of them that a family builds on.

Shapes: N queries, 4 corners each, D_in input features, D hidden width, J experts, C output channels.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .queries import Queries


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
    """One decoder f_j: an MLP with ReLU between its linear layers (LIIF, section 3.1; MoEISR, section 3).

    Parameter names follow the official LIIF and LTE checkpoints (`layers.0`, `layers.2`, ...).

    Args:
        in_features: D_in.
        out_features: C.
        hidden: Widths of the hidden layers from first to last; empty for one linear layer.
        zero_init_last: Start with an output of exactly zero, so that a network with an image skip starts as that skip.
    """

    def __init__(self, in_features: int, out_features: int, hidden: Sequence[int], zero_init_last: bool = False):
        super().__init__()
        widths = [in_features, *hidden, out_features]
        layers: list[nn.Module] = []
        for fan_in, fan_out in zip(widths[:-1], widths[1:]):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])
        if zero_init_last:
            nn.init.zeros_(self.layers[-1].weight)
            nn.init.zeros_(self.layers[-1].bias)

    @property
    def linears(self) -> list[nn.Linear]:
        """The linear layers from first to last."""
        return list(self.layers[::2])

    def forward(self, x: Tensor) -> Tensor:
        """(..., D_in) -> (..., C)."""
        return self.layers(x)


class ExpertPool(nn.Module):
    """The MLPs of a decoder family, which may have leading hidden layers in common.

    With all hidden layers in common the experts are exits of one network at different depths: each trains the layers of
    all that are deeper, and one pass through the deepest answers for all. What runs at test does not change.

    Args:
        in_features: D_in of the MLPs.
        out_channels: C.
        experts: Hidden widths of each expert.
        shared_layers: How many leading hidden layers the experts have in common; one with fewer shares all it has.
        zero_init_last: See `Expert`.

    Raises:
        ValueError: The experts cannot share their layers; see `unshareable`.
    """

    def __init__(
        self,
        in_features: int,
        out_channels: int,
        experts: Sequence[Sequence[int]],
        shared_layers: int = 0,
        zero_init_last: bool = False,
    ):
        super().__init__()
        if problem := self.unshareable(experts, shared_layers):
            raise ValueError(f'shared_layers: {problem}')
        common = max(experts, key=len)[:shared_layers]
        widths = [in_features, *common]
        self.shared = nn.ModuleList(nn.Linear(*pair) for pair in zip(widths[:-1], widths[1:]))
        self.num_shared = [min(len(hidden), len(common)) for hidden in experts]  # layers of each expert
        self.experts = nn.ModuleList(
            Expert(widths[count], out_channels, hidden[count:], zero_init_last)
            for hidden, count in zip(experts, self.num_shared)
        )

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
        """Whether the experts share all hidden layers and only have output layers of their own."""
        return all(len(expert.linears) == 1 for expert in self.experts) and len(self.shared) > 0

    def linears(self, j: int) -> list[nn.Linear]:
        """Expert j's linear layers from first to last."""
        return [*self.shared[: self.num_shared[j]], *self.experts[j].linears]

    def evaluate(self, j: int, tables: list[Tensor], queries: Queries) -> Tensor:
        """Expert j's answers to N queries of one image: (N, C); `tables` as the family makes them, without a batch."""
        steps = self.trunk(tables, queries)
        x = next(x for depth, x in steps if depth == self.num_shared[j])
        return self.leave(j, x, queries)

    def enter(self, tables: list[Tensor], queries: Queries) -> tuple[int, Tensor]:
        """What every expert computes first: how many shared layers that is, and their activations (4 N, D)."""
        raise NotImplementedError

    def evaluate_all(self, tables: list[Tensor], queries: Queries) -> Tensor:
        """Every expert's answers, shared layers computed once: (N, J, C)."""
        answers: dict[int, Tensor] = {}
        for depth, x in self.trunk(tables, queries):
            answers |= {j: self.leave(j, x, queries) for j, count in enumerate(self.num_shared) if count == depth}
        return torch.stack([answers[j] for j in range(len(self.experts))], dim=1)

    def trunk(self, tables: list[Tensor], queries: Queries) -> Iterator[tuple[int, Tensor]]:
        """The number of shared layers done and their activations (4 N, D), deeper and deeper."""
        depth, x = self.enter(tables, queries)
        yield depth, x
        for layer in self.shared[depth:]:
            depth, x = depth + 1, F.relu_(apply_linear(layer, x))
            yield depth, x

    def leave(self, j: int, x: Tensor, queries: Queries) -> Tensor:
        """Expert j from the last activations that it shares: (4 N, D) -> (N, C)."""
        *hidden, last = self.experts[j].linears
        for layer in hidden:
            x = F.relu_(apply_linear(layer, x))
        return last(queries.blend(x))  # the last layer is linear: blended before it, the four corners need one pass


def check_experts(experts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The hidden widths of every expert as lists of positive integers.

    Raises:
        ValueError: There is no expert or more than 256, or an entry is not a list of positive integers.
    """
    ok = (
        isinstance(experts, Sequence)
        and not isinstance(experts, str)
        and len(experts) > 0
        and all(
            isinstance(hidden, Sequence)
            and not isinstance(hidden, str)
            and all(isinstance(width, int) and not isinstance(width, bool) and width > 0 for width in hidden)
            for hidden in experts
        )
    )
    if not ok:
        raise ValueError(
            f'experts must list the hidden widths of each expert, for example [[256], [256, 256]]; got {experts!r}.'
        )
    if len(experts) > 256:  # expert maps are bytes
        raise ValueError(f'there may be 256 experts at most; got {len(experts)}.')
    return [list(hidden) for hidden in experts]
