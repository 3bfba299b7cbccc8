"""What `benchmark_decode.py` times, how long it may take, and its remarks."""

import statistics
import time
from collections.abc import Callable

from moeisr_basicsr.core.render import Backend


class Case:
    """One thing to time.

    Args:
        name: As printed.
        work: Runs it once.
        fraction: Which part of the whole `work` does; its time is scaled up.
        loads: Name of its expert map; None for a dense decoder.
        backend: What decodes; None for cases that are not compared with the plain algorithm.
        precision: Of encoder and experts.
        guess: At most this part of the whole plain algorithm's time, to know whether there is time for it.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[], object],
        fraction: float = 1.0,
        loads: str | None = None,
        backend: Backend | None = None,
        precision: str = 'fp32',
        guess: float = 0.0,
    ):
        self.name, self.work, self.fraction, self.guess = name, work, fraction, guess
        self.loads, self.backend, self.precision = loads, backend, precision
        self.times: list[float] = []
        self.difference: float | None = None

    @property
    def ms(self) -> float:
        """Median milliseconds."""
        return statistics.median(self.times)


class Clock:
    """The time that is left.

    Args:
        start: `time.perf_counter()` when it began to run.
        limit: Seconds in all.
    """

    def __init__(self, start: float, limit: float):
        self.start, self.limit = start, limit

    def fits(self, seconds: float = 0.0) -> bool:
        """Whether that much time is left."""
        return time.perf_counter() - self.start + seconds <= self.limit


def note(line: str) -> None:
    """A line that is no result."""
    print(f'# {line}', flush=True)
