"""Routing: from the mapper's logits to one expert per query (MoEISR, section 3).

Shapes: B images, Q queries, J experts.
"""

import hashlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST = torch.finfo(torch.float32).tiny  # the least exponential draw that Gumbel noise is made of


class Routing(NamedTuple):
    """Which expert answers which query; the same type in training and test."""

    expert: Tensor  # (B, Q) int64, the expert map
    gates: Tensor | None  # (B, Q, J) one-hot forward, softmax backward; None where nothing is learned
    logits: Tensor | None  # (B, Q, J); None without a mapper


def gumbel_noise(shape: tuple[int, ...], seed: int, iteration: int, slot: int) -> Tensor:
    """Standard Gumbel noise that depends on its key only, so that resume and other rank counts draw it again.

    Args:
        shape: Shape of one sample's noise, (Q, J).
        seed: The run's `manual_seed`.
        iteration: Training iteration.
        slot: Position of the sample in the batch of all ranks.
    """
    digest = hashlib.blake2b(f'gumbel/{seed}/{iteration}/{slot}'.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, 'little') >> 1)
    # Without MKL one draw in 2^24 is 0: its noise would be infinite, and the softmax not a number.
    return torch.empty(shape).exponential_(generator=generator).clamp_(min=SMALLEST).log_().neg_()


def route_gumbel(logits: Tensor, noise: Tensor, tau: float) -> Routing:
    """Hard Gumbel-softmax with the straight-through gradient (Jang et al., arXiv 1611.01144).

    The gates are written hard + (p - sg p): exactly one-hot forward, the gradient of p = softmax((l + g) / tau)
    backward.

    Args:
        logits: (B, Q, J).
        noise: Gumbel noise g, (B, Q, J).
        tau: Temperature, above 0.
    """
    if tau <= 0:
        raise ValueError(f'The Gumbel temperature tau must be above 0; got {tau}.')
    prob = F.softmax((logits + noise) / tau, dim=-1)
    expert = prob.argmax(dim=-1)
    hard = F.one_hot(expert, logits.shape[-1]).to(prob)
    return Routing(expert, hard + (prob - prob.detach()), logits)


def route_fitted(logits: Tensor, offset: Tensor) -> Routing:
    """The routing of the test, argmax, whose gates teach the experts' offsets and nothing else.

    Where the mapper's scores are fitted to the experts' losses, the gates have nothing to teach them; what is left for
    a balance loss is how much each expert is preferred everywhere. (An offset per expert instead of a loss on the
    scores is the idea of Wang et al., arXiv 2408.15664; theirs moves by a rule, ours by its gradient.)

    Args:
        logits: (B, Q, J), scores plus offsets.
        offset: (J,).
    """
    movable = logits.detach() + (offset - offset.detach())
    return route_gumbel(movable, torch.zeros_like(movable), tau=1.0)._replace(logits=logits)
