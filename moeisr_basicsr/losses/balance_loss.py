"""The balance loss (MoEISR, section 3): experts share the work as the target says.

Shapes: B images, Q queries, J experts.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn

Target = str | float | Sequence[float]  # of the experts' load, or of the mean cost


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
        loss_weight: lambda. The paper's value is not known to us; 0.005 (the recipes in options) to 1 are
            sensible beside an L1 of about 0.02.
        target: 'uniform'; or the load of each expert, J fractions that add up to 1; or one number, the mean relative
            cost (1 = always the heaviest expert), a budget of multiply-adds. With scale_bounds also a list with the
            loads of each group.
        scale_bounds: Rising scale factors between groups of queries that meet the target each by itself, for example
            [2.5]. LR images of large factors are rich in detail, and without groups they take most of the depth.
    """

    def __init__(
        self,
        loss_weight: float = 1.0,
        target: Target | Sequence[Sequence[float]] = 'uniform',
        scale_bounds: Sequence[float] = (),
    ):
        super().__init__()
        if list(scale_bounds) != sorted(set(scale_bounds)):
            raise ValueError(f'MoEBalanceLoss scale_bounds must rise; got {list(scale_bounds)}.')
        if loss_weight < 0:
            raise ValueError(f'MoEBalanceLoss loss_weight must not be negative; got {loss_weight}.')
        self.loss_weight = loss_weight
        self.scale_bounds = list(scale_bounds)
        groups = len(self.scale_bounds) + 1
        by_group = is_list(target) and any(map(is_list, target))
        if by_group and len(target) != groups:
            raise ValueError(
                f'MoEBalanceLoss target lists {len(target)} groups; scale_bounds {self.scale_bounds} make {groups}.'
            )
        self.targets = list(target) if by_group else [target] * groups
        for entry in self.targets:
            check_target(entry)

    def forward(self, gates: Tensor, costs: Tensor, scale: Tensor | None = None) -> Tensor:
        """The weighted loss, a scalar: the mean over all groups, each counting by its queries.

        Args:
            gates: (B, Q, J), one-hot forward.
            costs: (J,) relative costs of the experts.
            scale: (B, Q) scale factor of each query, for `scale_bounds`.

        Raises:
            ValueError: The target lists another number of experts, or a mean cost that no mixture reaches.
        """
        if not self.scale_bounds:
            load = average_over_ranks(gates.float().mean(dim=(0, 1)))
            return self.loss_weight * distance(load, self.targets[0], costs)
        group = torch.bucketize(scale, scale.new_tensor(self.scale_bounds), right=True)  # a bound opens its group
        member = nn.functional.one_hot(group, len(self.scale_bounds) + 1).to(gates)  # (B, Q, G)
        loads = torch.einsum('bqj,bqg->gj', gates.float(), member.float()) / group.numel()
        loads, shares = average_over_ranks(torch.cat([loads, member.float().mean(dim=(0, 1))[:, None]], dim=1)).split(
            [gates.shape[-1], 1], dim=1
        )  # (G, J) of all queries, (G, 1)
        loads = loads / shares.clamp(min=torch.finfo(shares.dtype).tiny)
        return self.loss_weight * sum(
            share * distance(load, target, costs)  # an empty group's share is 0
            for share, load, target in zip(shares.detach().squeeze(1), loads, self.targets)
        )


def is_list(value: object) -> bool:
    """Whether `value` is a sequence and no text."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def check_target(target: Target) -> None:
    """ValueError unless `target` is one that a group of queries can have."""
    if isinstance(target, str):
        ok = target == 'uniform'
    elif is_list(target):
        ok = all(0 <= share <= 1 for share in target) and abs(sum(target) - 1) < 1e-6
    else:
        ok = 0 < target <= 1
    if not ok:
        raise ValueError(
            "MoEBalanceLoss target must be 'uniform', fractions that add up to 1, or a mean cost in "
            f'(0, 1]; got {target!r}.'
        )


def distance(load: Tensor, target: Target, costs: Tensor) -> Tensor:
    """Of a load (J,) from the target, as `MoEBalanceLoss.forward` has it."""
    num_experts = len(load)
    if isinstance(target, str):
        gap = load - 1 / num_experts
    elif is_list(target):
        if len(target) != num_experts:
            raise ValueError(f'MoEBalanceLoss target lists {len(target)} experts; the network has {num_experts}.')
        gap = load - load.new_tensor(target)
    else:
        least = float(costs.min())
        if target < least * (1 - 1e-6):  # fp32 costs: the cheapest expert's own cost is a valid target
            raise ValueError(
                f'MoEBalanceLoss target {target} is below the cheapest expert; at least '
                f'{math.ceil(least * 1e4) / 1e4:.4f} is possible.'
            )
        return ((load * costs.to(load)).sum() - target).square()
    # times J: the same pull per expert whatever their number
    return num_experts * torch.sum(gap.square())
