"""The balance loss (MoEISR, section 3): experts share the work as the target says."""

from collections.abc import Sequence
from typing import Literal

from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn

from moeisr_basicsr.errors import UserError
from moeisr_basicsr.options.values import Share, Weight


@LOSS_REGISTRY.register()
class MoEBalanceLoss(nn.Module):
    """J times the squared distance between the experts' shares of the queries and a target; 0 at the target.

    Shares are mean gates over the batch of all ranks. Gates are one-hot forward, so the value is that of the real
    shares, and the gradient reaches the mapper through the gates only.

    Args:
        loss_weight: lambda. The paper's value is not known to us; 0.005 (the recipes in options) to 1 are
            sensible beside an L1 of about 0.02.
        target: 'uniform' as in the paper, or the share of each expert, J fractions that add up to 1.

    Raises:
        UserError: A negative weight, or another target.
    """

    def __init__(self, loss_weight: Weight = 1.0, target: Literal['uniform'] | Sequence[Share] = 'uniform'):
        super().__init__()
        if loss_weight < 0:
            raise UserError(f'MoEBalanceLoss loss_weight must not be negative; got {loss_weight}.')
        shares = [] if target == 'uniform' else target
        if isinstance(shares, str) or not all(0 <= share <= 1 for share in shares):
            raise UserError(f"MoEBalanceLoss target must be 'uniform' or fractions that add up to 1; got {target!r}.")
        if target != 'uniform' and abs(sum(shares) - 1) > 1e-6:
            raise UserError(f'MoEBalanceLoss target must add up to 1; {list(shares)} add up to {sum(shares):.6g}.')
        self.loss_weight = loss_weight
        self.target = list(shares)

    def forward(self, shares: Tensor) -> Tensor:
        """The weighted loss, a scalar; `shares` (J,) add up to 1.

        Raises:
            UserError: The target lists another number of experts.
        """
        num_experts = len(shares)
        if self.target and len(self.target) != num_experts:
            raise UserError(f'MoEBalanceLoss target lists {len(self.target)} experts; the network has {num_experts}.')
        target = shares.new_tensor(self.target) if self.target else 1 / num_experts
        # times J: the same pull per expert whatever their number
        return self.loss_weight * num_experts * (shares - target).square().sum()
