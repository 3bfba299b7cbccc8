"""The charts of quality against cost."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from moeisr_basicsr.tools.profile.chart import nice_step

from .runs import Column, Entry, Measured, Metric, Report, group_by, main_metric

LEFT, RIGHT, TOP, BOTTOM = 60, 272, 10, 185  # ends of a chart's axes, in SVG units
MARKS = ('M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z', 'M-4,-4h8v8h-8z', 'M0,-5l5,9h-10z', 'M0,-5.5l5,5.5l-5,5.5l-5,-5.5z')
COLOURS = 8  # classes s0 to s7 of the page's style


class Series(NamedTuple):
    """The entries that a line connects: one network under several controls."""

    name: str
    colour: str  # class in the page's style
    mark: str  # path; tells it apart on paper without colour


class Axis(NamedTuple):
    """A span of values on a span of the drawing."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Where a value lies."""
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 2)

    def ticks(self) -> list[tuple[float, str]]:
        """Places of round values, and their texts."""
        step = nice_step(self.high - self.low)
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [(self.at(place * step), f'{place * step:,.{decimals}f}') for place in range(first, last + 1)]


class Point(NamedTuple):
    """One entry in a chart, with its means over the seeds."""

    entry: Entry
    cost: float
    quality: float

    @property
    def control(self) -> float | None:
        """Budget or cost weight."""
        return self.entry.cost_weight if self.entry.budget is None else self.entry.budget


class Chart(NamedTuple):
    """A mark per entry, a line per series; the horizontal axis starts at 0."""

    cost: str
    quality: str
    across: Axis
    up: Axis
    lines: dict[Series, list[Point]]


def series_of(report: Report) -> dict[Entry, Series]:
    """The line that each entry is on: entries of the same weights, or without weights files of the same name."""
    series: dict[tuple, Series] = {}
    found = {}
    runs = [run for one in report.measured for run in one.runs]
    for entry, seeds in group_by(runs, lambda run: run.entry).items():
        files = {run.source.model.get('file') or '' for run in seeds}
        identity = entry.name if '' in files else tuple(sorted(files))
        key = identity, entry.network, entry.precision, entry.shuffled
        place, name = len(series), entry._replace(budget=None, cost_weight=None).label()
        new = Series(name, f's{place % COLOURS}', MARKS[place % len(MARKS)])
        found[entry] = series.setdefault(key, new)
    return found


def trade_offs(report: Report, series: dict[Entry, Series]) -> list[tuple[Column, Metric, list[Chart]]]:
    """The charts of every dataset and scale."""
    figures = []
    for columns in report.datasets().values():
        metric = main_metric(one for entries in columns.values() for one in entries)
        if metric is None:
            continue
        for column, entries in columns.items():
            points = [point for one in entries for point in points_of(one, metric)]
            charts = [
                chart_of(cost, metric, [point for _, point in pairs], series)
                for cost, pairs in group_by(points, lambda pair: pair[0]).items()
            ]
            if charts:
                figures.append((column, metric, charts))
    return figures


def points_of(measured: Measured, metric: Metric) -> Iterator[tuple[str, Point]]:
    """(cost, point) against multiply-adds, and against time in each environment by itself."""
    quality, total = measured.metric(metric), measured.macs.get('total')
    if quality is not None and total is not None:
        yield 'thousand multiply-adds per output pixel', Point(measured.entry, total / 1e3, quality.mean)
    for environment, there in measured.by_environment().items():
        quality, time = there.metric(metric), there.mean('time_ms')
        if quality is not None and time is not None:
            yield f'ms per image, environment {environment}', Point(measured.entry, time, quality.mean)


def chart_of(cost: str, metric: Metric, points: list[Point], series: dict[Entry, Series]) -> Chart:
    """Axes that hold the points."""
    points = sorted(points, key=lambda point: point.cost)
    values = [point.quality for point in points]
    room = max((max(values) - min(values)) * 0.12, abs(values[0]) * 1e-6, 0.02)
    return Chart(
        cost,
        f'{metric.name}, dB',
        Axis(0.0, points[-1].cost * 1.05 or 1.0, LEFT, RIGHT),
        Axis(min(values) - room, max(values) + room, BOTTOM, TOP),
        group_by(points, lambda point: series[point.entry]),
    )
