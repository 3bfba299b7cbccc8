"""The processes of a run: how they find each other, which device each takes, and what they tell each other."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from moeisr_basicsr.compat import init_dist

from .rendezvous import agent_store, fresh_store, launch_name

DEFAULT_TIMEOUT_MINUTES = 30  # rank 0 may validate alone (BasicSR's own models) or write to a slow disk meanwhile


class Ranks(NamedTuple):
    """This process among the processes of the run."""

    rank: int = 0
    world_size: int = 1
    control: dist.ProcessGroup | None = None  # gloo: messages on the CPU never wait for the GPU's queue
    launch: str | None = None  # name of this torchrun, the same after its restarts; None where it is not known

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files."""
        return self.rank == 0

    def largest(self, value: int) -> int:
        """The largest `value` of all ranks."""
        if self.world_size == 1:
            return value
        packed = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(packed, op=dist.ReduceOp.MAX, group=self.control)
        return int(packed)

    def from_main(self, value: Any) -> Any:
        """Rank 0's `value` (any picklable object) on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: Any) -> list:
        """The `value` of every rank, in order, on every rank."""
        if self.world_size == 1:
            return [value]
        box = [None] * self.world_size
        dist.all_gather_object(box, value, group=self.control)
        return box

    def together(self, action: Any) -> Any:
        """Run `action` on rank 0 while the others wait; its result, or its error, reaches every rank."""
        result, error = None, None
        if self.is_main:
            try:
                result = action()
            except Exception as caught:
                error = caught
        error = self.from_main(error)
        if error is not None:
            raise error
        return self.from_main(result)


@contextmanager
def launched(launcher: str, dist_params: dict | None = None) -> Iterator[Ranks]:
    """The process group of a run, taken down when the block ends without an error.

    Args:
        launcher: 'none', 'pytorch' (torchrun) or 'slurm'.
        dist_params: `backend` (nccl with a GPU, gloo without), `port` (slurm), `timeout` in minutes.

    Raises:
        UserError: An unknown launcher, or its environment variables are missing.
    """
    own = launcher != 'none' and not dist.is_initialized()
    options, launch = dict(dist_params or {}), None
    timeout = timedelta(minutes=float(options.pop('timeout', DEFAULT_TIMEOUT_MINUTES)))
    if own:
        store = agent_store(timeout) if launcher == 'pytorch' else None
        if store is not None:
            rank, world_size = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
            launch = launch_name(store)
            options.update(store=fresh_store(store, rank, world_size, timeout), rank=rank, world_size=world_size)
        init_dist(launcher, **options, timeout=timeout)
    ranks = Ranks()
    if dist.is_initialized():
        control = dist.new_group(backend='gloo', timeout=timeout)
        ranks = Ranks(dist.get_rank(), dist.get_world_size(), control, launch)
    yield ranks
    if own:
        # After an error the others may be anywhere: leaving the group would wait for them.
        dist.destroy_process_group()


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
