"""Stages of a piece of work: measured over several rounds, and shown as a table."""

import statistics
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table

from moeisr_basicsr.analysis.measure import PeakMeter, StageClock

Times = dict[str, float]  # stage -> median milliseconds
Peaks = dict[str, float | None]  # stage -> MiB beyond what was in use before the whole; None: the system cannot say


def measure_stages(run: Callable[[StageClock], object], device: torch.device, repeats: int) -> tuple[Times, Peaks]:
    """Run it once to warm up, once under the memory meter, and `repeats` times under the clock."""
    run(StageClock(device))
    metered = StageClock(device, PeakMeter(device))
    run(metered)
    rounds = []
    for _ in range(repeats):
        rounds.append(clock := StageClock(device))
        run(clock)
    times = {stage: statistics.median(clock.times[stage] for clock in rounds) for stage in metered.times}
    return times, metered.peaks


def show_table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """One table: its first column left, the others right, a line before a total or mean."""
    table = Table(title=title, title_justify='left')
    for place, column in enumerate(columns):
        table.add_column(column, justify='right' if place else 'left')
    for row in rows:
        if row[0] in ('total', 'mean'):
            table.add_section()
        table.add_row(*row)
    console.print(table)


def mib_text(peak: float | None) -> str:
    """A peak for people."""
    return '-' if peak is None else f'{peak:.1f}'
