"""Time and memory of a piece of work, on CPU and CUDA."""

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

MIB = 1 << 20
_STATUS = Path('/proc/self/status')
_CLEAR = Path('/proc/self/clear_refs')
_RESET_PEAK = '5'  # proc(5): forget the highest resident size so far


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked for."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def time_ms(work: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one run."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3


class StageClock:
    """Milliseconds of the stages of one run, added up over their pieces; a `core.render.Clock`."""

    def __init__(self, device: torch.device):
        self.device = device
        self.times: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time one piece of `stage`."""
        synchronize(self.device)
        start = time.perf_counter()
        yield
        synchronize(self.device)
        self.times[stage] = self.times.get(stage, 0.0) + (time.perf_counter() - start) * 1e3


def interleaved_ms(
    cases: dict[str, Callable[[], object]], repeats: int, device: torch.device, warm_up: bool = True
) -> dict[str, float]:
    """Median milliseconds of several cases that take turns, so that a busy moment of the machine hits all of them.

    Args:
        cases: Name -> work.
        repeats: Timed rounds.
        warm_up: Run each case once untimed before.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    if warm_up:
        for work in cases.values():
            work()
    for _ in range(repeats):
        for name, work in cases.items():
            times[name].append(time_ms(work, device))
    return {name: statistics.median(values) for name, values in times.items()}


def peak_mib(work: Callable[[], object], device: torch.device) -> float | None:
    """Highest memory in use during `work` beyond what was in use before it, in MiB.

    On CUDA what PyTorch allocated. On the CPU the process's resident size; None where the system cannot be asked
    (it takes Linux). There the C library may serve small requests from memory that it had kept, which does not count.
    """
    meter = PeakMeter(device)
    if not meter.works:
        return None
    work()
    return meter.read()


class PeakMeter:
    """The peak since construction, or since `start`."""

    def __init__(self, device: torch.device):
        self.device = device
        self.works = device.type == 'cuda' or _can_reset_peak()
        self.before = 0.0
        if self.works:
            give_back()
            self.start()
            self.before = self._now()

    def start(self) -> None:
        """Forget the peak so far, keep the baseline."""
        if self.device.type == 'cuda':
            synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            _CLEAR.write_text(_RESET_PEAK)

    def read(self) -> float:
        """Peak in MiB beyond the baseline."""
        if self.device.type == 'cuda':
            synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) / MIB - self.before
        return max(_resident('VmHWM') - self.before, 0.0)

    def _now(self) -> float:
        return torch.cuda.memory_allocated(self.device) / MIB if self.device.type == 'cuda' else _resident('VmRSS')


def give_back() -> None:
    """Return unused memory to the system, so that what comes next shows in the resident size."""
    gc.collect()
    if sys.platform == 'linux':
        trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)  # glibc only
        if trim is not None:
            trim(ctypes.c_size_t(0))


def _resident(key: str) -> float:
    """VmRSS (now) or VmHWM (highest), MiB."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(key + ':'):
            return int(line.split()[1]) / 1024
    raise OSError(f'{_STATUS} has no {key}.')


def _can_reset_peak() -> bool:
    try:
        _CLEAR.write_text(_RESET_PEAK)
        return _resident('VmHWM') > 0
    except OSError:
        return False


def medians(rounds: Iterable[dict[str, float]]) -> dict[str, float]:
    """Median of each key over several dictionaries."""
    values: dict[str, list[float]] = {}
    for entry in rounds:
        for key, value in entry.items():
            values.setdefault(key, []).append(value)
    return {key: statistics.median(entries) for key, entries in values.items()}
