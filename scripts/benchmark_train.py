"""One training step of the decoder, as it is and as the plain sum over all experts; a part of `benchmark_decode.py`.

Shapes: B images, C feature channels, Q queries.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moeisr_basicsr.core import MoEDecoder, reference

PATCH, QUERIES, SCALE = 48, 2304, 2.5  # LIIF's recipe; the mean factor of U(1, 4)


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
        device = next(decoder.parameters()).device
        self.decoder = decoder.train()
        self.feat = torch.rand(batch, decoder.pool.in_channels, patch, patch, device=device) * 2 - 1
        self.coord = torch.rand(batch, queries, 2, device=device) * 2 - 1
        self.cell = torch.full_like(self.coord, 2 / (patch * SCALE))
        self.pull = torch.rand(batch, queries, decoder.out_channels, device=device) * 2 - 1  # the loss's gradient

    def run(self, form: str) -> list[Tensor]:
        """One step, 'plain' or 'exact': output (B, Q, C_out), gradients of the features and of all parameters."""
        torch.manual_seed(0)  # of the Gumbel noise
        feat = self.feat.clone().requires_grad_()
        if form == 'plain':
            logits = self.decoder.logits(feat, self.coord, self.cell)
            gate = F.gumbel_softmax(logits, hard=True)
            output = reference.mixture(self.decoder, feat, self.coord, self.cell, gate)
        else:
            output = self.decoder(feat, self.coord, self.cell).prediction
        return [output, *torch.autograd.grad(output, [feat, *self.decoder.parameters()], self.pull)]

    def compare(self) -> tuple[float, float]:
        """Largest difference of the outputs on the [0, 1] scale, and of a gradient as a part of its norm."""
        (expected, *true), (output, *gradients) = self.run('plain'), self.run('exact')
        parts = [float((one - two).norm() / one.norm().clamp(min=1e-12)) for one, two in zip(true, gradients)]
        return float((expected - output).detach().abs().max()) / 2, max(parts)
