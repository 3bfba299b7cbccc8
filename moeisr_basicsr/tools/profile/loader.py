"""Speed of the training loader: items per second by number of workers, and the time of one item stage by stage."""

import contextlib
import copy
import itertools
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console

from moeisr_basicsr.analysis.measure import StageClock
from moeisr_basicsr.engine.data_loading import Place, TrainData
from moeisr_basicsr.engine.distributed import Ranks

from .stages import show_table

# Stages of an item, the first four as far as the dataset tells them apart -> their name for people
STAGES = {
    'read': 'read, decode',
    'resize': 'crop, shrink to LR',
    'queries': 'augment, draw queries',
    'tensor': 'LR patch to tensor',
    'collate': 'collate',
    'other': 'other',
}
CPU = torch.device('cpu')


def profile_loader(opt: dict, workers: Sequence[int], items: int, step_ms: float | None) -> list[dict]:
    """Rows of a results document (see `analysis.schema`): one item in stages, then the loader of each `workers`.

    Args:
        opt: Training options.
        workers: Numbers of processes besides this one; 0 loads in this process.
        items: Behind each figure, rounded up to whole batches.
        step_ms: Of a training step, to know what it needs.

    Raises:
        UserError: The training data or an image of it is wrong.
    """
    name, data = opt['datasets']['train']['name'], open_loader(opt, workers=0)
    batches = -(-items // data.batch)
    stages = {'dataset': name, 'count': batches * data.batch, 'time_ms': stage_times(data, batches)}
    rows = [{'case': 'data-stages', **stages}]
    needed = None if step_ms is None else 1e3 * data.batch / step_ms
    for count in dict.fromkeys(workers):
        in_turn = max(count, 1)  # workers deliver in turn: the same number of batches for each
        batches = -(-items // (data.batch * in_turn)) * in_turn
        speed = loader_speed(open_loader(opt, count), batches)
        speed |= {'workers': count, 'batch_size': data.batch, 'needed_items_per_second': needed}
        rows.append({'case': f'data-workers-{count}', 'dataset': name, 'count': batches * data.batch, 'data': speed})
    return rows


def open_loader(opt: dict, workers: int) -> TrainData:
    """The loader that training builds, with another number of workers; batches stay in the host's memory."""
    opt = {**opt, 'manual_seed': opt.get('manual_seed') or 0, 'datasets': copy.deepcopy(opt['datasets'])}
    opt['datasets']['train']['num_worker_per_gpu'] = workers
    return TrainData(opt, Ranks(), CPU)


def stage_times(data: TrainData, batches: int) -> dict[str, float]:
    """Mean milliseconds of one item's stages and their total, made in this process as the loader makes it."""
    clock, indices = StageClock(CPU), _endless_indices(data)
    if hasattr(data.dataset, 'lap'):  # of this package
        data.dataset.lap = clock.lap
    for number in range(batches + 1):
        clock.lap(None)
        samples = []
        for index in itertools.islice(indices, data.batch):
            samples.append(data.dataset[index])
            clock.lap('other')
        data.loader.collate_fn(samples)
        clock.lap('collate')
        if number == 0:  # it opened files and filled the library's caches
            clock.times.clear()
    times = {stage: clock.times[stage] / (batches * data.batch) for stage in STAGES if stage in clock.times}
    return {**times, 'total': sum(times.values())}


def loader_speed(data: TrainData, batches: int) -> dict[str, float | None]:
    """Items per second, of the clock's and of all processes' CPU time, where nobody does anything but wait for them."""
    # Until the queues have been emptied once, batches come from the time before: workers start and work ahead.
    warm_up = 1 + data.loader.num_workers * (data.loader.prefetch_factor or 0)
    with contextlib.closing(data.batches(Place())) as source:  # type: ignore[type-var]  # a generator
        for _ in range(warm_up):
            next(source)
        start, cpu_start = time.perf_counter(), cpu_seconds()
        for _ in range(batches):
            next(source)
        seconds, cpu_stop = time.perf_counter() - start, cpu_seconds()
    items, cpu = batches * data.batch, cpu_start and cpu_stop and cpu_stop - cpu_start
    return {'items_per_second': items / seconds, 'items_per_cpu_second': items / cpu if cpu else None}


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


def show_loader(console: Console, rows: list[dict]) -> None:
    """One item, and all worker counts."""
    times, speeds = rows[0]['time_ms'], [row['data'] for row in rows[1:]]
    cells = [(STAGES.get(stage, stage), f'{ms:.2f}') for stage, ms in times.items()]
    show_table(console, 'One item, without workers', ('stage', 'ms'), cells)
    needed, lines = speeds[0]['needed_items_per_second'], []
    for speed in speeds:
        workers, rate, per_cpu = speed['workers'], speed['items_per_second'], speed['items_per_cpu_second']
        line = [str(workers), f'{rate:.1f}', f'{rate / max(workers, 1):.1f}', f'{per_cpu:.1f}' if per_cpu else '-']
        lines.append(line if needed is None else [*line, f'{"yes" if rate >= needed else "no"}, {rate / needed:.2f}x'])
    columns = ['workers', 'items/s', 'per worker', 'per CPU second'] + ['keeps up'] * (needed is not None)
    show_table(console, f'Training loader, batches of {speeds[0]["batch_size"]}', columns, lines)
    if needed is not None:
        console.print(f'For that step time each process needs {needed:.1f} items/s.')
