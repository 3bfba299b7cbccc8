"""The tables of PSNR, SSIM and other metrics: a row per model and control, a column per scale."""

from typing import NamedTuple

from moeisr_basicsr.errors import UserError, did_you_mean

from .collect import (
    BICUBIC,
    Column,
    Report,
    Run,
    Value,
    columns_of,
    is_psnr,
    metric_names,
    over_seeds,
    protocol_of,
    scale_label,
)
from .markup import MISSING, Markup, head_row, join, row, table, tag, text

BICUBIC_LABEL = 'bicubic'


class Line(NamedTuple):
    """One row before it is drawn."""

    label: str
    values: list[Value | None]  # per column
    files: str


def decimals_of(metric: str) -> int:
    """Decimals that publications print."""
    return 2 if is_psnr(metric) else 4


def choose_baseline(report: Report, name: str | None) -> str:
    """The label of the row that differences refer to: the one of that name, or the first.

    Raises:
        UserError: No row has this name.
    """
    known = [*report.labels.values(), BICUBIC_LABEL]
    if name is not None and name not in known:
        raise UserError(
            f"--baseline: no row has the name '{name}'; there are {'; '.join(known)}.{did_you_mean(name, known)}"
        )
    return name or known[0]


def quality_tables(report: Report, baseline: str) -> list[Markup]:
    """Every metric of every dataset, under each protocol its own table."""
    tables = []
    for dataset, runs in report.datasets().items():
        for metric in metric_names(runs):
            for protocol in dict.fromkeys(protocol_of(run, metric) for run in runs if metric in run.metrics):
                chosen = [run for run in runs if metric in run.metrics and protocol_of(run, metric) == protocol]
                tables.append(quality_table(report, dataset, metric, protocol, chosen, baseline))
    return tables


def quality_table(report: Report, dataset: str, metric: str, protocol: str, runs: list[Run], baseline: str) -> Markup:
    """One metric under one protocol."""
    columns = columns_of(runs)
    lines = [
        model_line(report.labels[entry], [run for run in runs if run.entry == entry], columns, metric)
        for entry in dict.fromkeys(run.entry for run in runs)
    ]
    models = [entry.values for entry in lines]
    reference = bicubic_line(runs, columns, metric)
    if reference is not None:
        lines.insert(0, reference)
    base = next((entry.values for entry in lines if entry.label == baseline), [None] * len(columns))
    decimals = decimals_of(metric)
    best = [best_text(metric, [values[place] for values in models]) for place in range(len(columns))]
    rows = [draw_line(entry, base, best, decimals, entry.label == baseline) for entry in lines]
    unit = ' in dB' if is_psnr(metric) else ''
    settings = dict.fromkeys(map(setting, columns))
    shared = next(iter(settings)) if len(settings) == 1 else None
    caption = join([tag('b', dataset), f': {metric}{unit}. ', '. '.join(filter(None, (protocol, shared))), '.'])
    scales = [
        tag(
            'th',
            scale_label(column.scale),
            None if shared else tag('small', setting(column)),
            colspan=2,
            scope='colgroup',
        )
        for column in columns
    ]
    heads = [
        tag(
            'tr',
            tag('th', 'model', rowspan=2, scope='col', cls='text'),
            scales,
            tag('th', 'files', rowspan=2, scope='col', cls='text'),
        ),
        head_row(*[metric, 'diff.'] * len(columns)),
    ]
    return table(caption, heads, rows)


def draw_line(line: Line, base: list[Value | None], best: list[str | None], decimals: int, is_base: bool) -> Markup:
    """A row: for each column the value and its difference to the baseline."""
    cells = []
    for value, other, top in zip(line.values, base, best):
        wins = line.label != BICUBIC_LABEL and value is not None and f'{value.mean:.{decimals}f}' == top
        cells += [
            tag('td', value_text(value, decimals), cls='best' if wins else None),
            tag('td', difference_text(value, other, is_base, decimals), cls='diff'),
        ]
    return row(line.label, *cells, text(line.files))


def setting(column: Column) -> str:
    """What a column's figures are of, beside its scale."""
    count = f'{column.count} image{"" if column.count == 1 else "s"}' if column.count else 'images not counted'
    return f'{column.inputs}; {count}'


def model_line(label: str, runs: list[Run], columns: list[Column], metric: str) -> Line:
    """A model's row: each value over its seeds."""
    values = [over_seeds(run.metrics[metric] for run in runs if run.column == column) for column in columns]
    return Line(label, values, file_numbers(runs))


def bicubic_line(runs: list[Run], columns: list[Column], metric: str) -> Line | None:
    """The row of bicubic interpolation: the same images by whichever model it was measured beside."""
    measured = [run for run in runs if run.metrics.get(BICUBIC + metric) is not None]
    if not measured:
        return None
    first = {run.column: run for run in reversed(measured)}
    values = [Value(first[column].metrics[BICUBIC + metric], 0.0, 1) if column in first else None for column in columns]
    return Line(BICUBIC_LABEL, values, file_numbers(list(first.values())))


def file_numbers(runs: list[Run]) -> str:
    """'[1] [3]': where the figures are from."""
    return '\N{NO-BREAK SPACE}'.join(f'[{place + 1}]' for place in sorted({run.source for run in runs}))


def best_text(metric: str, values: list[Value | None]) -> str | None:
    """The highest value as printed: equal ones are all the best. None where nothing is known of what is better."""
    known = [value.mean for value in values if value is not None]
    if len(known) < 2 or not any(kind in metric.lower() for kind in ('psnr', 'ssim')):
        return None
    return f'{max(known):.{decimals_of(metric)}f}'


def value_text(value: Value | None, decimals: int) -> str:
    """The mean, with half the range where there are several seeds."""
    if value is None:
        return MISSING
    spread = f' ± {value.half_range:.{decimals}f} ({value.seeds})' if value.seeds > 1 else ''
    return f'{value.mean:.{decimals}f}{spread}'


def difference_text(value: Value | None, base: Value | None, is_base: bool, decimals: int) -> str:
    """The distance to the baseline, with its sign."""
    if is_base:
        return 'base' if value is not None else MISSING
    if value is None or base is None:
        return MISSING
    return f'{round(value.mean - base.mean, decimals) + 0.0:+.{decimals}f}'  # + 0.0 makes a negative zero positive
