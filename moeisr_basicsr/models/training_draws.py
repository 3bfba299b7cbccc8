"""The routing's noise and temperature, pure functions of (seed, iteration, sample).

Resuming a run and training on another number of ranks draw the same numbers again, without any saved state.

Shapes: B images on this rank, Q queries, J experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moeisr_basicsr.core import gumbel_noise
from moeisr_basicsr.errors import UserError


def batch_noise(shape: tuple[int, int, int], seed: int, iteration: int, rank: int, world_size: int) -> Tensor:
    """Gumbel noise of this rank's batch, (B, Q, J) on the CPU.

    The sampler deals samples out over the ranks in turn, so a sample's place in the batch of all ranks is
    index * world_size + rank: one rank with a batch of 2 n draws what two ranks with n each draw.
    """
    slots = (index * world_size + rank for index in range(shape[0]))
    return torch.stack([gumbel_noise(shape[1:], seed, iteration, slot) for slot in slots])


def check_tau(tau: float | Sequence[float]) -> tuple[float, float]:
    """`train: tau` as temperatures (first, last).

    Raises:
        UserError: It is neither a number above 0 nor two of them.
    """
    ends = list(tau) if isinstance(tau, Sequence) else [tau, tau]
    if len(ends) != 2 or not all(type(end) in (int, float) and end > 0 for end in ends):
        raise UserError(f'train: tau must be a number above 0, or [first, last], annealed in between; got {tau!r}.')
    return float(ends[0]), float(ends[1])


def tau_at(ends: tuple[float, float], iteration: int, total_iter: int) -> float:
    """The temperature at `iteration` (the first is 1) of `total_iter`: exponential from the first to the last."""
    done = (iteration - 1) / max(total_iter - 1, 1)
    return ends[0] * (ends[1] / ends[0]) ** min(done, 1.0)
