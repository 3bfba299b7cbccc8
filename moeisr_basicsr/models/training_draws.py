"""Random draws of the routing that depend on (seed, iteration, sample) only.

Resuming a run and training on another number of ranks draw the same numbers again.

Shapes: B images on this rank, Q queries, J experts.
"""
import math
from typing import NamedTuple

import torch
from torch import Tensor

from moeisr_basicsr.core import gumbel_noise

# Keeps the draws of 'sampled' apart from the routing's own noise of the same sample.
KEEP_SEED_OFFSET = 2**32


class DrawKey(NamedTuple):
    """What the draws of a batch depend on."""
    seed: int  # the run's manual_seed
    iteration: int
    rank: int
    world_size: int

    def slots(self, batch: int) -> list[int]:
        """Places of this rank's samples in the batch of all ranks.

        The sampler deals samples out in that order: one rank with a batch of 2n draws what two ranks with n each draw.
        """
        return [index * self.world_size + self.rank for index in range(batch)]


def batch_noise(key: DrawKey, shape: tuple[int, int, int]) -> Tensor:
    """Gumbel noise of this rank's batch, (B, Q, J) on the CPU; `shape` is (B, Q, J)."""
    return torch.stack([gumbel_noise(shape[1:], key.seed, key.iteration, slot) for slot in key.slots(shape[0])])


def batch_keep(key: DrawKey, shape: tuple[int, int, int], rate: float) -> Tensor:
    """Which unchosen experts run under expert_grad 'sampled', (B, Q, J) bool, each True with probability `rate`."""
    # A Gumbel variable is below t with probability exp(-exp(-t)).
    limit = math.inf if rate >= 1 else -math.log(-math.log(rate))
    return batch_noise(key._replace(seed=key.seed + KEEP_SEED_OFFSET), shape) < limit
