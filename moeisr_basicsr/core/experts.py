"""Experts: the MLPs of different depth among which the mapper chooses.

Shapes: N query-corner pairs, D_in input features, D hidden width, C output channels.
"""
from collections.abc import Sequence

from torch import Tensor, nn


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
        """(N, D_in) -> (N, C)."""
        return self.layers(x)


def check_experts(experts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The hidden widths of every expert as lists of positive integers.

    Raises:
        ValueError: There is no expert, or an entry is not a list of positive integers.
    """
    ok = isinstance(experts, Sequence) and not isinstance(experts, str) and len(experts) > 0 and all(
        isinstance(hidden, Sequence) and not isinstance(hidden, str)
        and all(isinstance(width, int) and not isinstance(width, bool) and width > 0 for width in hidden)
        for hidden in experts)
    if not ok:
        raise ValueError('experts must list the hidden widths of each expert, for example '
                         f'[[256], [256, 256]]; got {experts!r}.')
    return [list(hidden) for hidden in experts]
