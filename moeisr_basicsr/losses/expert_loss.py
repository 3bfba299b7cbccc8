"""The objective of MoEISR-J, ours: each expert learns every query, the mapper each expert's own loss.

Shapes: B images, Q queries, J experts, C channels.
"""

from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn

from moeisr_basicsr.errors import UserError
from moeisr_basicsr.options.values import Weight


@LOSS_REGISTRY.register()
class MoEExpertLoss(nn.Module):
    """L1 of every expert on every query, and the relative L1 that the routing is to expect.

    Experts trained on their own queries only are poor elsewhere, so that a budget that moves queries costs quality.
    Here each one also learns all queries.

    The straight-through gradient (MoEISR, section 3) tells the mapper <dL/ds, f_j>: how the loss would change if expert
    j's prediction were added. It is the loss linearised, and a prediction that overshoots the truth by far looks best.
    Here the gates weigh the experts' losses instead of their predictions: sum_j g_j |f_j - gt| has the same value, and
    its gradient to g_j is expert j's own loss. Errors grow about as the scale factor does; divided by it, they make
    depth worth as much in dB at x2 as at x4.

    Args:
        loss_weight: Weight of the mean over all experts and queries.
        routing_weight: Weight of the expected loss for the mapper, which learns its routing from nothing else but the
            balance loss.

    Raises:
        UserError: A negative weight.
    """

    def __init__(self, loss_weight: Weight = 1.0, routing_weight: Weight = 1.0):
        super().__init__()
        for name, weight in (('loss_weight', loss_weight), ('routing_weight', routing_weight)):
            if weight < 0:
                raise UserError(f'MoEExpertLoss {name} must not be negative; got {weight}.')
        self.loss_weight = loss_weight
        self.routing_weight = routing_weight

    def forward(self, predictions: Tensor, gt: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
        """The weighted loss, a scalar. The expected loss has a gradient and adds nothing to the value.

        Args:
            predictions: (B, Q, J, C) of every expert.
            gt: (B, Q, C).
            gate: (B, Q, J), one-hot forward.
            scale: (B, Q) scale factor of each query.
        """
        error = (predictions - gt.unsqueeze(2)).abs().mean(dim=-1)  # (B, Q, J)
        expected = (gate * error.detach() / scale.unsqueeze(-1)).sum(dim=-1).mean()
        return self.loss_weight * error.mean() + self.routing_weight * (expected - expected.detach())
