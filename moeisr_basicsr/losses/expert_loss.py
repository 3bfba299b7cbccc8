"""The loss of every expert by itself, and what the mapper learns from it.

Shapes: B images, Q queries, J experts, C channels.
"""
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn


@LOSS_REGISTRY.register()
class MoEExpertLoss(nn.Module):
    """L1 of every expert on every query, and the relative L1 that the routing is to expect.

    Experts trained on their own queries only are poor elsewhere, so that a budget that moves queries costs quality. Here
    each one also learns all queries.

    The straight-through gradient (MoEISR, section 3) tells the mapper <dL/ds, f_j>: how the loss would change if expert
    j's answer were added. It is the loss linearised, and an answer that overshoots the truth by far looks best. With
    `routing_weight` the gates weigh the experts' losses instead of their answers: sum_j g_j |f_j - gt| has the same
    value, and its gradient to g_j is expert j's own loss. Errors grow about as the scale factor does; divided by it, they
    make depth worth as much in dB at x2 as at x4. These choices are ours, not the paper's.

    Args:
        loss_weight: Weight of the mean over all experts and queries.
        depth_emphasis: Experts count in that mean by their cost to this power: 0 alike, 1 in proportion to the cost.
        routing_weight: Weight of the expected loss for the mapper, which then learns its routing from nothing else but
            the balance loss; 0 leaves it the straight-through gradient.
    """

    def __init__(self, loss_weight: float = 1.0, routing_weight: float = 0.0, depth_emphasis: float = 0.0):
        super().__init__()
        for name, weight in (('loss_weight', loss_weight), ('routing_weight', routing_weight),
                             ('depth_emphasis', depth_emphasis)):
            if weight < 0:
                raise ValueError(f'MoEExpertLoss {name} must not be negative; got {weight}.')
        self.loss_weight = loss_weight
        self.routing_weight = routing_weight
        self.depth_emphasis = depth_emphasis

    def forward(self, answers: Tensor, gt: Tensor, gates: Tensor, costs: Tensor, scale: Tensor) -> Tensor:
        """The weighted loss, a scalar. The routing's part has a gradient and adds nothing to the value.

        Args:
            answers: (B, Q, J, C) of every expert.
            gt: (B, Q, C).
            gates: (B, Q, J), one-hot forward.
            costs: (J,) relative costs of the experts.
            scale: (B, Q) scale factor of each query.
        """
        error = (answers - gt.unsqueeze(2)).abs().mean(dim=-1)  # (B, Q, J)
        share = costs.to(error) ** self.depth_emphasis
        everywhere = (error * (share / share.sum())).sum(dim=-1).mean()
        expected = (gates * error.detach()).sum(dim=-1).div(scale).mean()
        return self.loss_weight * everywhere + self.routing_weight * (expected - expected.detach())

    def routed(self, answers: Tensor, gates: Tensor) -> Tensor:
        """sum_j g_j f_j, (B, Q, C); with `routing_weight` its gradient stops short of the gates."""
        return ((gates.detach() if self.routing_weight else gates).unsqueeze(-1) * answers).sum(dim=2)
