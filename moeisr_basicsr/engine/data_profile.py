"""Speed of the training loader: items per second by number of workers, and the time of one item stage by stage."""

import copy
import itertools
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from .data_loading import Place, TrainData
from .distributed import Ranks

STAGES = ('read', 'resize', 'queries', 'tensor', 'collate')
CPU = torch.device('cpu')


class LoaderSpeed(NamedTuple):
    """What a loader delivered."""

    workers: int
    items: int  # timed
    items_per_second: float
    items_per_cpu_second: float | None  # CPU time of this process and of all workers; None where it is not known


class StageClock:
    """Adds up the time of stages that follow each other.

    Attributes:
        seconds: Stage -> seconds so far.
    """

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.start()

    def start(self) -> None:
        """The next stage begins now."""
        self.last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """`stage` ends now, the next begins."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.last
        self.last = now


def open_loader(opt: dict, workers: int) -> TrainData:
    """The loader that training builds, with another number of workers; batches stay in the host's memory.

    Args:
        opt: The whole options; not changed.
        workers: Processes besides this one; 0 loads in this process.

    Raises:
        UserError: A wrong dataset, or an epoch holds less than one batch.
    """
    opt = {**opt, 'manual_seed': opt.get('manual_seed') or 0, 'datasets': copy.deepcopy(opt['datasets'])}
    opt['datasets']['train']['num_worker_per_gpu'] = workers
    return TrainData(opt, Ranks(), CPU)


def stage_times(data: TrainData, items: int) -> dict[str, float]:
    """Mean milliseconds of one item, made in this process.

    Args:
        data: Of `open_loader`; its dataset calls its `lap` at the end of each stage if it is one of this package.
        items: How many to time, rounded up to whole batches.

    Returns:
        Stages of `STAGES` in their order, as far as the dataset tells them apart; `other`; `total`, the sum of all.
    """
    clock, indices = StageClock(), _endless_indices(data)
    if hasattr(data.dataset, 'lap'):
        data.dataset.lap = clock.lap
    _timed_batch(data, indices, clock)  # the first one opens files and fills the library's caches
    clock.seconds.clear()
    batches = -(-items // data.batch)
    total = sum(_timed_batch(data, indices, clock) for _ in range(batches))
    to_ms = 1e3 / (batches * data.batch)
    stages = {stage: clock.seconds[stage] * to_ms for stage in STAGES if stage in clock.seconds}
    return {**stages, 'other': max(total * to_ms - sum(stages.values()), 0.0), 'total': total * to_ms}


def loader_speed(data: TrainData, items: int) -> LoaderSpeed:
    """Items per second of a loader whose consumer does nothing but wait for the next batch.

    Args:
        data: Of `open_loader`.
        items: How many to time, rounded up to a whole number of batches per worker.
    """
    workers = data.loader.num_workers
    in_turn = data.batch * max(workers, 1)  # workers deliver in turn
    batches = -(-items // in_turn) * max(workers, 1)
    # Until the queues have been emptied once, batches come from the time before: workers start and work ahead.
    warm_up = 1 + workers * (data.loader.prefetch_factor or 0)
    source = data.batches(Place())
    try:
        for _ in range(warm_up):
            next(source)
        start, cpu_start = time.perf_counter(), cpu_seconds()
        for _ in range(batches):
            next(source)
        seconds, cpu_stop = time.perf_counter() - start, cpu_seconds()
    finally:
        source.close()
    count = batches * data.batch
    known = None not in (cpu_start, cpu_stop) and cpu_stop > cpu_start
    return LoaderSpeed(workers, count, count / seconds, count / (cpu_stop - cpu_start) if known else None)


def cpu_seconds() -> float | None:
    """CPU time so far of this process and its children, running and ended; None where the system cannot say.

    The running ones are read from Linux's /proc, to a hundredth of a second.
    """
    running = multiprocessing.active_children()  # also moves those that have ended into our own account
    used = sum(os.times()[:4])
    for child in running:
        try:
            # proc(5): utime and stime, fields 14 and 15; counted behind the name in brackets, which may hold blanks
            fields = Path(f'/proc/{child.pid}/stat').read_text().rpartition(')')[2].split()
        except OSError:
            return None
        used += (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')
    return used


def _endless_indices(data: TrainData) -> Iterator[int]:
    for epoch in itertools.count():
        data.sampler.set_epoch(epoch)
        yield from data.sampler


def _timed_batch(data: TrainData, indices: Iterator[int], clock: StageClock) -> float:
    """Seconds of one batch, made as the loader makes it."""
    start, samples = time.perf_counter(), []
    for index in itertools.islice(indices, data.batch):
        clock.start()
        samples.append(data.dataset[index])
    clock.start()
    data.loader.collate_fn(samples)
    clock.lap('collate')
    return time.perf_counter() - start
