"""Time and memory of a piece of work, on CPU and CUDA."""

import ctypes
import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

MIB = 1 << 20
STATUS, CLEAR = Path('/proc/self/status'), Path('/proc/self/clear_refs')
RESET_PEAK = '5'  # proc(5): forget the highest resident size so far


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


class PeakMeter:
    """Highest memory beyond what was in use at construction, MiB.

    On CUDA what PyTorch allocated, on the CPU the process's resident size. There the C library may serve small requests
    from memory that it had kept, which does not count.

    Attributes:
        works: Whether the system can say; for the CPU it takes Linux.
    """

    def __init__(self, device: torch.device):
        self.device, self.works, self.before = device, True, 0.0
        try:
            self.start()
            self.before = self._now()
        except OSError:
            self.works = False

    def start(self) -> None:
        """Forget the peak so far, keep the baseline."""
        if self.device.type == 'cuda':
            synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.works:
            give_back()
            CLEAR.write_text(RESET_PEAK)

    def read(self) -> float | None:
        """The peak since `start`; None where the system cannot say."""
        if self.device.type == 'cuda':
            synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) / MIB - self.before
        return max(_resident('VmHWM') - self.before, 0.0) if self.works else None

    def _now(self) -> float:
        return torch.cuda.memory_allocated(self.device) / MIB if self.device.type == 'cuda' else _resident('VmRSS')


class StageClock:
    """Milliseconds of named stages, added up; a stage inside another counts for itself only. A `core.render.Clock`.

    Args:
        device: Waited for at both ends of every stage, so that stages add up but cannot overlap.
        meter: Notes each stage's highest memory too.
    """

    def __init__(self, device: torch.device, meter: PeakMeter | None = None):
        self.device, self.meter = device, meter
        self.times: dict[str, float] = {}
        self.peaks: dict[str, float | None] = {}
        self._open: list[str] = []
        self._since = time.perf_counter()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """The time of the block belongs to `stage`."""
        self.lap(self._open[-1] if self._open else None)
        self._open.append(stage)
        try:
            yield
        finally:
            self.lap(self._open.pop())

    def lap(self, stage: str | None) -> None:
        """The time since the last change of stages belongs to `stage`; None: to no stage."""
        synchronize(self.device)
        if stage is not None:
            self.times[stage] = self.times.get(stage, 0.0) + (time.perf_counter() - self._since) * 1e3
        if self.meter is not None:
            if stage is not None:
                peak = self.meter.read()
                self.peaks[stage] = peak and max(self.peaks.get(stage) or 0.0, peak)
            self.meter.start()
        self._since = time.perf_counter()


def give_back() -> None:
    """Return unused memory to the system, so that what comes next shows in the resident size."""
    gc.collect()
    if sys.platform == 'linux' and (trim := getattr(ctypes.CDLL(None), 'malloc_trim', None)):  # glibc only
        trim(ctypes.c_size_t(0))


def _resident(key: str) -> float:
    """VmRSS (now) or VmHWM (highest), MiB."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(key + ':'):
            return int(line.split()[1]) / 1024
    raise OSError(f'{STATUS} has no {key}.')
