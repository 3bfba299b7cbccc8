"""Random draws of the routing that depend on (seed, iteration, sample) only.

Resuming a run and training on another number of ranks draw the same numbers again.

Shapes: B images on this rank, Q queries, J experts.
"""

import math
from concurrent.futures import Future, ThreadPoolExecutor
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


class Draws(NamedTuple):
    """The draws of one rank's batch in one iteration."""

    noise: Tensor  # (B, Q, J)
    keep: Tensor | None  # (B, Q, J) bool; None without a rate


def batch_draws(key: DrawKey, shape: tuple[int, int, int], rate: float | None) -> Draws:
    """All draws; `rate` is that of `batch_keep`, None where nothing is sampled."""
    return Draws(batch_noise(key, shape), None if rate is None else batch_keep(key, shape, rate))


class DrawAhead:
    """`batch_draws`, made during the iteration before: a batch of 16 takes 8 ms, in which a GPU would wait."""

    def __init__(self):
        self._pool = ThreadPoolExecutor(1, thread_name_prefix='draws')
        self._next: tuple[tuple, Future] | None = None

    def __call__(self, key: DrawKey, shape: tuple[int, int, int], rate: float | None) -> Draws:
        asked = (key, shape, rate)
        ready = self._next is not None and self._next[0] == asked
        draws = self._next[1].result() if ready else batch_draws(*asked)
        coming = (key._replace(iteration=key.iteration + 1), shape, rate)
        self._next = (coming, self._pool.submit(batch_draws, *coming))
        return draws
