"""The balance loss (MoEISR, section 3): experts share the work as the target says.

Shapes: B images, Q queries, J experts.
"""
import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn


def average_over_ranks(load: Tensor) -> Tensor:
    """The mean of `load` over all ranks, differentiable.

    Forward the global mean, backward the identity: DDP averages the ranks' parameter gradients afterwards, which
    supplies the 1 / world_size that the mean's own derivative has.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return load
    mean = load.detach().clone()
    dist.all_reduce(mean)
    return (load - load.detach()) + mean / dist.get_world_size()  # in this order: the same bits on every rank


@LOSS_REGISTRY.register()
class MoEBalanceLoss(nn.Module):
    """Quadratic distance between the experts' mean load and a target; 0 at the target.

    The load is the mean gate over the whole batch of all ranks. Gates are one-hot forward, so the value is that of
    the real load, and the gradient reaches the mapper through the gates only.

    Args:
        loss_weight: lambda. The paper's value is not known to us; 0.01 to 1 are sensible beside an L1 of about 0.02.
        target: 'uniform'; or the load of each expert, J fractions that add up to 1; or one number, the mean relative
            cost (1 = always the heaviest expert), a budget of multiply-adds.
    """

    def __init__(self, loss_weight: float = 1.0, target: str | float | Sequence[float] = 'uniform'):
        super().__init__()
        if loss_weight < 0:
            raise ValueError(f'MoEBalanceLoss loss_weight must not be negative; got {loss_weight}.')
        if isinstance(target, str):
            ok = target == 'uniform'
        elif isinstance(target, Sequence):
            ok = all(0 <= share <= 1 for share in target) and abs(sum(target) - 1) < 1e-6
        else:
            ok = 0 < target <= 1
        if not ok:
            raise ValueError("MoEBalanceLoss target must be 'uniform', fractions that add up to 1, or a mean cost in "
                             f'(0, 1]; got {target!r}.')
        self.loss_weight = loss_weight
        self.target = target

    def forward(self, gates: Tensor, costs: Tensor) -> Tensor:
        """The weighted loss, a scalar.

        Args:
            gates: (B, Q, J), one-hot forward.
            costs: (J,) relative costs of the experts.

        Raises:
            ValueError: The target lists another number of experts, or a mean cost that no mixture reaches.
        """
        num_experts = gates.shape[-1]
        load = average_over_ranks(gates.float().mean(dim=(0, 1)))  # (J,)
        if isinstance(self.target, str):
            gap = load - 1 / num_experts
        elif isinstance(self.target, Sequence):
            if len(self.target) != num_experts:
                raise ValueError(f'MoEBalanceLoss target lists {len(self.target)} experts; the network has '
                                 f'{num_experts}.')
            gap = load - load.new_tensor(self.target)
        else:
            least = float(costs.min())
            if self.target < least * (1 - 1e-6):  # fp32 costs: the cheapest expert's own cost is a valid target
                raise ValueError(f'MoEBalanceLoss target {self.target} is below the cheapest expert; at least '
                                 f'{math.ceil(least * 1e4) / 1e4:.4f} is possible.')
            return self.loss_weight * ((load * costs.to(load)).sum() - self.target).square()
        # times J: the same pull per expert whatever their number
        return self.loss_weight * num_experts * torch.sum(gap.square())
