"""The loss of every expert by itself, and what the mapper learns from it.

Shapes: B images, Q queries, J experts, C channels.
"""

from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn


@LOSS_REGISTRY.register()
class MoEExpertLoss(nn.Module):
    """L1 of every expert on every query, and the relative L1 that the routing is to expect.

    Experts trained on their own queries only are poor elsewhere, so that a budget that moves queries costs quality.
    Here each one also learns all queries.

    The straight-through gradient (MoEISR, section 3) tells the mapper <dL/ds, f_j>: how the loss would change if expert
    j's answer were added. It is the loss linearised, and an answer that overshoots the truth by far looks best. With
    `routing_weight` the gates weigh the experts' losses instead of their answers: sum_j g_j |f_j - gt| has the same
    value, and its gradient to g_j is expert j's own loss. Errors grow about as the scale factor does; divided by it,
    they make depth worth as much in dB at x2 as at x4.

    With `fit_temperature` the mapper's scores are instead fitted to these losses, negative and in units of the
    temperature, by least squares. Its scores then are what each query would lose by another expert, on one scale for
    all queries: a cost weight has a unit, and first moves the queries that lose least. Gates teach an order, whose
    scale is whatever the training left. At equal cost the rows of RESULTS.md have the same quality either way.

    These choices are ours, not the paper's.

    Args:
        loss_weight: Weight of the mean over all experts and queries.
        depth_emphasis: Experts count in that mean by their cost to this power: 0 alike, 1 in proportion to the cost.
        routing_weight: Weight of the expected loss for the mapper, which then learns its routing from nothing else but
            the balance loss; 0 leaves it the straight-through gradient. With `fit_temperature` the weight of the fit.
        fit_temperature: Difference of relative L1 (L1 over the scale factor) that makes one unit of score; None for no
            fit. Of the order of what the experts differ by, 1e-4.
    """

    def __init__(
        self,
        loss_weight: float = 1.0,
        routing_weight: float = 0.0,
        depth_emphasis: float = 0.0,
        fit_temperature: float | None = None,
    ):
        super().__init__()
        for name, weight in (
            ('loss_weight', loss_weight),
            ('routing_weight', routing_weight),
            ('depth_emphasis', depth_emphasis),
        ):
            if weight < 0:
                raise ValueError(f'MoEExpertLoss {name} must not be negative; got {weight}.')
        if fit_temperature is not None and not (fit_temperature > 0 and routing_weight > 0):
            raise ValueError(
                'MoEExpertLoss fit_temperature must be above 0 and needs a routing_weight above 0; got '
                f'{fit_temperature} and {routing_weight}.'
            )
        self.loss_weight = loss_weight
        self.routing_weight = routing_weight
        self.depth_emphasis = depth_emphasis
        self.fit_temperature = fit_temperature

    def forward(
        self, answers: Tensor, gt: Tensor, gates: Tensor, costs: Tensor, scale: Tensor, scores: Tensor | None = None
    ) -> Tensor:
        """The weighted loss, a scalar. The expected loss has a gradient and adds nothing to the value.

        Args:
            answers: (B, Q, J, C) of every expert.
            gt: (B, Q, C).
            gates: (B, Q, J), one-hot forward.
            costs: (J,) relative costs of the experts.
            scale: (B, Q) scale factor of each query.
            scores: (B, Q, J) the mapper's logits without the experts' offsets, for the fit.
        """
        error = (answers - gt.unsqueeze(2)).abs().mean(dim=-1)  # (B, Q, J)
        share = costs.to(error) ** self.depth_emphasis
        everywhere = (error * (share / share.sum())).sum(dim=-1).mean()
        relative = error.detach() / scale.unsqueeze(-1)
        if self.fit_temperature is not None:
            fit = centred(scores + relative / self.fit_temperature).square().mean()
            return self.loss_weight * everywhere + self.routing_weight * fit
        expected = (gates * relative).sum(dim=-1).mean()
        return self.loss_weight * everywhere + self.routing_weight * (expected - expected.detach())

    def routed(self, answers: Tensor, gates: Tensor) -> Tensor:
        """sum_j g_j f_j, (B, Q, C); with `routing_weight` its gradient stops short of the gates."""
        return ((gates.detach() if self.routing_weight else gates).unsqueeze(-1) * answers).sum(dim=2)


def centred(scores: Tensor) -> Tensor:
    """(B, Q, J) less the mean over the experts: what is the same for all experts chooses none."""
    return scores - scores.mean(dim=-1, keepdim=True)
