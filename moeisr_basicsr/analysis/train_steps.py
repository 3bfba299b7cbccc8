"""One training step of the decoder in several forms, to compare them.

Shapes: B images, C feature channels, Q queries.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moeisr_basicsr.core import MoEDecoder, gumbel_noise
from moeisr_basicsr.core.mapper import route_gumbel

from .plain import plain_mixture

PATCH, QUERIES, SCALE = 48, 2304, 2.5  # LIIF's recipe; the mean factor of U(1, 4)


class Difference(NamedTuple):
    """How far two forms are apart."""

    output: float  # largest, on the [0, 1] scale
    gradient: float  # largest over all parameters and the features: norm of the difference over the norm


class TrainSteps:
    """Forward and backward of one decoder on noise, always with the same gates.

    The backward starts from given numbers in place of a loss: L1's sign would turn rounding into jumps.

    Args:
        decoder: Several experts and their mapper.
        batch: B.
        patch: LR pixels per side.
        queries: Q.
    """

    def __init__(self, decoder: MoEDecoder, batch: int, patch: int = PATCH, queries: int = QUERIES):
        self.decoder = decoder
        weight = next(decoder.parameters())
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator).to(weight.device)

        self.feat = draw(batch, decoder.pool.in_channels, patch, patch) * 2 - 1
        self.coord = draw(batch, queries, 2) * 2 - 1
        self.cell = torch.full_like(self.coord, 2 / (patch * SCALE))
        self.pull = draw(batch, queries, decoder.out_channels) * 2 - 1  # the loss's gradient
        self.noise = torch.stack(
            [gumbel_noise((queries, decoder.num_experts), 0, 0, slot) for slot in range(batch)]
        ).to(weight.device)

    def run(self, form: str) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            form: 'plain-naive', the naive sum of four plain decoders; or an `expert_grad`.

        Returns:
            The output (B, Q, C_out) and the features' gradient (B, C, h, w); the parameters hold theirs.
        """
        decoder, mode, grad_kind = self.decoder, self.decoder.training, self.decoder.expert_grad
        decoder.train()
        decoder.zero_grad()
        feat = self.feat.clone().requires_grad_()
        try:
            if form == 'plain-naive':
                lr_size = tuple(feat.shape[-2:])
                cell = self.cell * self.cell.new_tensor(lr_size)
                logits = decoder.mapper(decoder.mapper.table(feat), self.coord, cell, lr_size)
                gates = route_gumbel(logits, self.noise, decoder.tau).gates
                output = plain_mixture(decoder, feat, self.coord, self.cell, gates)
            else:
                decoder.expert_grad = form
                output = decoder(feat, self.coord, self.cell, self.noise).output
            output.backward(self.pull)
        finally:
            decoder.expert_grad = grad_kind
            decoder.train(mode)
        return output.detach(), feat.grad

    def compare(self, form: str, reference: str = 'plain-naive') -> Difference:
        """How far a form's output and gradients are from the reference's."""
        results = []
        for each in (reference, form):
            output, grad = self.run(each)
            results.append((output, [grad, *(parameter.grad.clone() for parameter in self.decoder.parameters())]))
        (expected, true_grads), (output, grads) = results
        gradient = max(float((a - b).norm() / a.norm().clamp(min=1e-12)) for a, b in zip(true_grads, grads))
        return Difference(float((expected - output).abs().max()) / 2, gradient)
