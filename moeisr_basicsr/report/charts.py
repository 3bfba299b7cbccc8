"""SVG charts: quality against cost, and the experts' shares."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from moeisr_basicsr.analysis.pictures import expert_colours
from moeisr_basicsr.tools.profile.chart import nice_step

from .collect import Column, Entry, Report, Run, columns_of, main_metric, over_seeds, protocol_of, scale_label
from .costs import expert_costs, expert_names, mean_loads
from .markup import Markup, join, tag
from .overview import environment_of
from .quality import decimals_of

WIDTH, HEIGHT = 290, 225  # of a chart, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 60, 18, 10, 40  # margins of its axes
COLOURS = 8  # classes s0 to s7 of the page's style
SHAPES = ('M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z', 'M-4,-4h8v8h-8z', 'M0,-5l5,9h-10z', 'M0,-5.5l5,5.5l-5,5.5l-5,-5.5z')
BAR_LEFT, BAR_WIDTH, BAR, GAP = 270, 420, 16, 6  # of the stacked bars


class Point(NamedTuple):
    """One entry in a chart."""

    entry: Entry
    across: float
    up: float


class Series(NamedTuple):
    """The entries that a line connects: one network under several controls."""

    place: int
    name: str


class Axis(NamedTuple):
    """A span of values on a span of the drawing."""

    low: float
    high: float
    step: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Where a value lies."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def marks(self) -> list[float]:
        """Values with a line and a number."""
        first, last = math.ceil(self.low / self.step - 1e-9), math.floor(self.high / self.step + 1e-9)
        return [place * self.step for place in range(first, last + 1)]


def series_of(report: Report) -> dict[Entry, Series]:
    """The line that each entry is on: entries of the same weights, or without weights files of the same name."""
    series: dict[tuple, Series] = {}
    found = {}
    for entry in dict.fromkeys(run.entry for run in report.runs):
        files = {
            (report.sources[run.source].results.get('model') or {}).get('file')
            for run in report.runs
            if run.entry == entry
        }
        identity = entry.name if None in files else tuple(sorted(files))
        key = identity, entry.network, entry.control.precision, entry.control.shuffled
        plain = entry._replace(control=entry.control._replace(budget=None, cost_weight=None))
        found[entry] = series.setdefault(key, Series(len(series), plain.label()))
    return found


def legend(series: dict[Entry, Series]) -> Markup:
    """Mark and name of every line."""
    marks = [
        tag(
            'span',
            tag('svg', tag('path', d=shape_of(one), cls=colour_of(one)), viewBox='-7 -7 14 14', width=14, height=14),
            one.name,
            cls='key',
        )
        for one in dict.fromkeys(series.values())
    ]
    return tag('p', marks, cls='legend')


def colour_of(series: Series) -> str:
    """Its class in the page's style."""
    return f's{series.place % COLOURS}'


def shape_of(series: Series) -> str:
    """Its mark: with the colour, and without colour on paper."""
    return SHAPES[series.place % len(SHAPES)]


def trade_offs(report: Report, series: dict[Entry, Series]) -> list[Markup]:
    """PSNR against multiply-adds and against time, a figure for every dataset and scale."""
    figures = []
    for dataset, runs in report.datasets().items():
        metric, protocol = main_metric(runs) or ('', '')
        chosen = [run for run in runs if metric in run.metrics and protocol_of(run, metric) == protocol]
        for column in columns_of(chosen):
            charts = charts_of(report, [run for run in chosen if run.column == column], metric, series)
            if charts:
                title = tag('b', f'{dataset} {scale_label(column.scale)}')
                caption = tag('figcaption', title, f', {metric}, {protocol}')
                figures.append(tag('figure', caption, tag('div', charts, cls='charts')))
    return figures


def charts_of(report: Report, runs: list[Run], metric: str, series: dict[Entry, Series]) -> list[Markup]:
    """The charts of one column: multiply-adds, then the time in each environment by itself."""
    costs = [('thousand multiply-adds per output pixel', runs, thousand_macs)]
    for place in sorted({environment_of(report, run.source) for run in runs}):
        there = [run for run in runs if environment_of(report, run.source) == place]
        costs.append((f'ms per image, environment {place}', there, lambda run: run.time_ms))
    drawn = [(points_of(shown, metric, cost), unit) for unit, shown, cost in costs]
    return [scatter(points, series, report.labels, unit, f'{metric}, dB') for points, unit in drawn if points]


def thousand_macs(run: Run) -> float | None:
    """Encoder and decoder per output pixel."""
    total = run.macs.get('total')
    return None if total is None else total / 1e3


def points_of(runs: list[Run], metric: str, cost: Callable[[Run], float | None]) -> list[Point]:
    """Means over the seeds of entries that have both figures."""
    points = []
    for entry in dict.fromkeys(run.entry for run in runs):
        seeds = [run for run in runs if run.entry == entry]
        across, up = over_seeds(map(cost, seeds)), over_seeds(run.metrics.get(metric) for run in seeds)
        if across is not None and up is not None:
            points.append(Point(entry, across.mean, up.mean))
    return points


def scatter(
    points: list[Point], series: dict[Entry, Series], labels: dict[Entry, str], across_unit: str, up_unit: str
) -> Markup:
    """A mark per entry, a line per series; the horizontal axis starts at 0."""
    across = axis(0.0, max(point.across for point in points), LEFT, WIDTH - RIGHT)
    values = [point.up for point in points]
    room = max((max(values) - min(values)) * 0.12, 0.02)
    up = axis(min(values) - room, max(values) + room, HEIGHT - BOTTOM, TOP)
    drawn = [
        *grid(across, up),
        tag('text', across_unit, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6, cls='mid'),
        tag(
            'text',
            up_unit,
            x=12,
            y=(HEIGHT - BOTTOM + TOP) / 2,
            cls='mid',
            transform=f'rotate(-90 12 {coordinate((HEIGHT - BOTTOM + TOP) / 2)})',
        ),
    ]
    for one in dict.fromkeys(series[point.entry] for point in points):
        line = sorted((point for point in points if series[point.entry] == one), key=lambda point: point.across)
        places = [(across.at(point.across), up.at(point.up)) for point in line]
        if len(line) > 1:
            path = ' '.join(f'{coordinate(x)},{coordinate(y)}' for x, y in places)
            drawn.append(tag('polyline', points=path, cls=f'line {colour_of(one)}'))
        for point, (x, y) in zip(line, places):
            drawn.append(mark(point, one, labels[point.entry], x, y, (across_unit, up_unit)))
    return tag(
        'svg',
        drawn,
        viewBox=f'0 0 {WIDTH} {HEIGHT}',
        role='img',
        aria_label=f'{up_unit} against {across_unit}',
        cls='chart',
    )


def mark(point: Point, series: Series, label: str, x: float, y: float, units: tuple[str, str]) -> Markup:
    """A point, with its figures where the mouse rests on it and its budget or cost weight below it."""
    control = point.entry.control
    value = control.budget if control.budget is not None else control.cost_weight
    below = None if value is None else tag('text', f'{value:g}', x=coordinate(x), y=coordinate(y + 16), cls='mid')
    told = f'{label}: {point.up:.{decimals_of(units[1])}f} ({units[1]}), {point.across:,.1f} ({units[0]})'
    place = f'translate({coordinate(x)} {coordinate(y)})'
    return join([tag('path', tag('title', told), d=shape_of(series), transform=place, cls=colour_of(series)), below])


def axis(low: float, high: float, start: float, end: float) -> Axis:
    """An axis of a few marks."""
    high = high if high > low else low + 1.0
    step = nice_step(high - low)
    return Axis(low, high if low else math.ceil(high / step - 1e-9) * step, step, start, end)


def grid(across: Axis, up: Axis) -> list[Markup]:
    """Lines and numbers of both axes."""
    drawn = []
    for value in across.marks():
        x = coordinate(across.at(value))
        drawn += [
            tag('line', x1=x, x2=x, y1=up.end, y2=up.start, cls='grid'),
            tag('text', f'{value:,g}', x=x, y=up.start + 15, cls='mid'),
        ]
    decimals = max(0, -math.floor(math.log10(up.step) + 1e-9))
    for value in up.marks():
        y = up.at(value)
        drawn += [
            tag('line', x1=across.start, x2=across.end, y1=coordinate(y), y2=coordinate(y), cls='grid'),
            tag('text', f'{value:.{decimals}f}', x=across.start - 6, y=coordinate(y + 4), cls='end'),
        ]
    return drawn


def coordinate(value: float) -> str:
    """Short, and the same on every machine."""
    return f'{value:.2f}'


def share_charts(report: Report) -> list[Markup]:
    """Each expert's share of the output pixels: a chart per dataset and network, a bar per scale and control."""
    figures = []
    for dataset, runs in report.datasets().items():
        routed = [run for run in runs if len(run.loads) > 1]
        for name, network in dict.fromkeys((run.entry.name, run.entry.network) for run in routed):
            chosen = [run for run in routed if (run.entry.name, run.entry.network) == (name, network)]
            bars = [
                (f'{scale_label(column.scale)} {report.labels[entry]}', mean_loads(report.runs_in(entry, column)))
                for column, entry in by_scale(chosen)
            ]
            names = expert_names(chosen[0].entry, len(chosen[0].loads))
            colours = hex_colours(len(names), expert_costs(chosen))
            caption = tag('figcaption', tag('b', dataset), f', {name}: share of the output pixels')
            figures.append(tag('figure', caption, swatches(names, colours), stacked(bars, colours, names), cls='wide'))
    return figures


def by_scale(runs: list[Run]) -> list[tuple[Column, Entry]]:
    """Columns and entries of the bars, by rising scale."""
    return [
        pair
        for column in columns_of(runs)
        for pair in dict.fromkeys((run.column, run.entry) for run in runs if run.column == column)
    ]


def ink_on(colour: str) -> str:
    """The class of text on a filled part: dark on light colours, light on dark ones."""
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return 'dark' if 0.299 * red + 0.587 * green + 0.114 * blue > 115 else 'light'


def hex_colours(count: int, costs: list[float] | None) -> list[str]:
    """The experts' colours, those of the expert maps."""
    return ['#{2:02x}{1:02x}{0:02x}'.format(*colour) for colour in expert_colours(count, costs).tolist()]


def swatches(names: Sequence[str], colours: Sequence[str], network: str | None = None) -> Markup:
    """A legend of filled squares, after the network's name where one is given."""
    keys = [
        tag(
            'span',
            tag('svg', tag('rect', width=12, height=12, fill=colour), viewBox='0 0 12 12', width=12, height=12),
            name,
            cls='key',
        )
        for name, colour in zip(names, colours)
    ]
    return tag('p', tag('span', network, cls='key') if network else None, keys, cls='legend')


def stacked(bars: list[tuple[str, list[float]]], colours: list[str], names: list[str]) -> Markup:
    """Horizontal bars of parts that add up to 1."""
    drawn = []
    for place, (label, loads) in enumerate(bars):
        top, at = place * (BAR + GAP), float(BAR_LEFT)
        drawn.append(tag('text', label, x=BAR_LEFT - 8, y=top + 12, cls='end'))
        for name, colour, load in zip(names, colours, loads):
            width = load * BAR_WIDTH
            drawn.append(
                tag(
                    'rect',
                    tag('title', f'{name}: {load:.1%}'),
                    x=coordinate(at),
                    y=top,
                    width=coordinate(width),
                    height=BAR,
                    fill=colour,
                )
            )
            if width > 34:
                drawn.append(
                    tag('text', f'{load:.0%}', x=coordinate(at + width / 2), y=top + 12, cls=f'mid {ink_on(colour)}')
                )
            at += width
    height = len(bars) * (BAR + GAP)
    return tag(
        'svg',
        drawn,
        viewBox=f'0 0 {BAR_LEFT + BAR_WIDTH + 10} {height}',
        role='img',
        aria_label='shares of the experts',
        cls='bars',
    )
