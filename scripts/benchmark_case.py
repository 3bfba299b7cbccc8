"""What the benchmarks time, in turns, within the time that they have."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from moeisr_basicsr.analysis.measure import time_ms
from moeisr_basicsr.core import MoEDecoder
from moeisr_basicsr.core.render import Backend


@dataclass
class Case:
    """One thing to time."""

    name: str  # as printed
    work: Callable[[], object]
    part: float = 1.0  # of the whole that `work` does; its time is scaled up
    guess: float = 0.0  # at most this part of the whole first case's time, to know whether there is time for it
    expert_map: str | None = None  # name of its expert map; None for a dense decoder
    decoder: MoEDecoder | None = None
    backend: Backend | None = None  # what decodes; None for cases that are not compared with the plain algorithm
    precision: str = 'fp32'
    times: list[float] = field(default_factory=list)
    difference: float | None = None

    @property
    def ms(self) -> float:
        """Median milliseconds."""
        return statistics.median(self.times)


class Turns:
    """Times cases in turns until the rounds or the time are over.

    Args:
        start: `time.perf_counter()` when the program began.
        limit: Seconds in all.
        repeats: Rounds.
        device: Where the cases run.
    """

    def __init__(self, start: float, limit: float, repeats: int, device: torch.device):
        self.start, self.limit, self.repeats, self.device = start, limit, repeats, device

    def fits(self, seconds: float = 0.0) -> bool:
        """Whether that much time is left."""
        return time.perf_counter() - self.start + seconds <= self.limit

    def take(self, cases: list[Case], warm_up: Callable[[Case], object]) -> int:
        """Time the cases and return the number of rounds; a case that no longer fits has no times then."""
        for done in range(self.repeats):
            began = time.perf_counter()
            for case in [case for case in cases if case.times or done == 0]:
                if case is not cases[0] and done == 0 and not self.fits(case.guess * cases[0].ms / 1e3):
                    note(f'skipped {case.name}: no time left')
                    continue
                if done == 0:
                    warm_up(case)
                case.times.append(time_ms(case.work, self.device) / case.part)
            if not self.fits((time.perf_counter() - began) * 0.9):  # a later round does not warm up
                break
        return done + 1


def note(line: str) -> None:
    """A line that is no result."""
    print(f'# {line}', flush=True)
