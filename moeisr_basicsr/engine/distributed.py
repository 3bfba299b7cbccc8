"""The processes of a run: how they find each other, which device each takes, and what they tell each other."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from mmengine.dist import all_gather_object, all_reduce, broadcast_object_list

from moeisr_basicsr.compat import init_dist
from moeisr_basicsr.errors import UserError

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

    def options(self, opt: dict) -> dict:
        """A copy of the options with what BasicSR's models read of the processes."""
        return {**opt, 'rank': self.rank, 'world_size': self.world_size, 'dist': self.world_size > 1}

    def largest(self, value: int) -> int:
        """The largest `value` of all ranks."""
        packed = torch.tensor([value], dtype=torch.int64)
        all_reduce(packed, 'max', self.control)
        return int(packed)

    def from_main(self, value: Any) -> Any:
        """Rank 0's `value` (any picklable object) on every rank."""
        box = [value]
        broadcast_object_list(box, 0, self.control)
        return box[0]

    def gather(self, value: Any) -> list:
        """The `value` of every rank, in order, on every rank."""
        return all_gather_object(value, self.control)

    def together(self, action: Callable[[], Any]) -> Any:
        """Run `action` on rank 0 while the others wait; its result, or its error, reaches every rank."""
        result, error = None, None
        if self.is_main:
            try:
                result = action()
            except Exception as caught:
                error = caught
        result, error = self.from_main((result, error))
        if error is not None:
            raise error
        return result


def process_number() -> tuple[int, int]:
    """This process among those of torchrun, and how many there are; (0, 1) without it.

    Raises:
        UserError: The environment has no number where torchrun sets one.
    """
    for key in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_PORT', 'TORCHELASTIC_RESTART_COUNT'):
        if not os.environ.get(key, '0').isdecimal():
            raise UserError(f'The environment variable {key} must be a whole number; got {os.environ[key]!r}.')
    rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    if 'WORLD_SIZE' in os.environ and rank >= world_size:
        raise UserError(f'The environment variable RANK must be below WORLD_SIZE; got {rank} of {world_size}.')
    return (rank, world_size) if 'WORLD_SIZE' in os.environ else (0, 1)


def find_launcher(given: str | None) -> str:
    """The launcher of `--launcher`; where none is named, 'pytorch' for one of several processes of torchrun.

    Raises:
        UserError: See `process_number`.
    """
    world_size = process_number()[1]
    return given or ('pytorch' if 'RANK' in os.environ and world_size > 1 else 'none')


@contextmanager
def launched(opt: dict) -> Iterator[Ranks]:
    """The process group of a run, taken down when the block ends without an error.

    It reads `launcher`: 'none', 'pytorch' (torchrun) or 'slurm'; and `dist_params`: `backend` (nccl with a GPU, gloo
    without), `port` (slurm), `timeout` in minutes.

    Raises:
        UserError: An unknown launcher, or its environment variables are missing.
    """
    launcher, options, launch = opt.get('launcher', 'none'), dict(opt.get('dist_params') or {}), None
    own = launcher != 'none' and not dist.is_initialized()
    timeout = timedelta(minutes=float(options.pop('timeout', DEFAULT_TIMEOUT_MINUTES)))
    if own:
        if launcher == 'pytorch' and (store := agent_store(timeout)) is not None:
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
