"""The tables of cost and routing: multiply-adds as routed, time, memory, shares of the experts."""

import json
import statistics

from .collect import Column, Entry, Report, Run, columns_of, over_seeds, scale_label
from .markup import MISSING, Markup, head_row, number, row, table, tag, text, words
from .overview import environment_of, shape

PARTS = {'encoder': 'encoder', 'mapper': 'mapper', 'tables': 'LR tables', 'experts': 'experts'}
DECODER = ('mapper', 'tables', 'experts')
STAGES = {
    'encode': 'encode',
    'map': 'map',
    'decode': 'decode',
    'total': 'all',
    'dense_folded': 'dense folded',
    'dense_plain': 'dense plain',
}


def decoder_macs(macs: dict) -> float | None:
    """Mapper, LR tables and experts per output pixel."""
    parts = [macs.get(part) for part in DECODER]
    return None if None in parts else sum(parts)


def share(part: float | None, whole: float | None) -> float | None:
    """Per cent."""
    return None if part is None or not whole else 100 * part / whole


def macs_cells(macs: dict, dense: dict) -> list[str]:
    """Thousand multiply-adds by part, and the decoder's share of the dense ones; `dense` as `macs`, of the baseline."""
    decoder = decoder_macs(macs)
    return [
        *(number(macs.get(part), 1, 1e-3) for part in PARTS),
        number(decoder, 1, 1e-3),
        number(share(decoder, dense.get('dense_plain')), 1),
        number(share(decoder, dense.get('dense_folded')), 1),
        number(macs.get('total'), 1, 1e-3),
    ]


MACS_HEAD = (*PARTS.values(), 'decoder', '% of dense plain', '% of dense folded', 'all')


def cost_tables(report: Report, baseline: str) -> list[Markup]:
    """One table per dataset that has costs, its scales below each other; shares are of the baseline's dense decoder."""
    tables = []
    for dataset, runs in report.datasets().items():
        costly = [run for run in runs if run.macs or run.time_ms is not None]
        if costly:
            bodies = [column_rows(report, column, costly, baseline) for column in columns_of(costly)]
            caption = [
                tag('b', dataset),
                ': thousand multiply-adds per output pixel, milliseconds, MiB. Means over '
                'the images; time is the median over the images of one run each, memory the largest.',
            ]
            head = head_row(*words('model'), *MACS_HEAD, 'ms', 'peak MiB', *words('environment'))
            tables.append(table(caption, [head], *bodies))
    return tables


def column_rows(report: Report, column: Column, runs: list[Run], baseline: str) -> list[Markup]:
    """A scale's heading and rows."""
    dense = mean_macs([run for run in runs if run.column == column and report.labels[run.entry] == baseline])
    heading = tag('tr', tag('th', scale_label(column.scale), colspan=len(MACS_HEAD) + 4, cls='group'))
    rows = []
    for entry in dict.fromkeys(run.entry for run in runs if run.column == column):
        found = [run for run in runs if run.entry == entry and run.column == column]
        rows.append(
            row(
                report.labels[entry],
                *macs_cells(mean_macs(found), dense),
                seeds_text([run.time_ms for run in found]),
                seeds_text([run.peak_mib for run in found]),
                text(' '.join(sorted({environment_of(report, run.source) for run in found}))),
            )
        )
    return [heading, *rows]


def mean_macs(runs: list[Run]) -> dict:
    """Means over the seeds; `each_expert` is left out."""
    keys = [key for key in (runs[0].macs if runs else ()) if key != 'each_expert']
    means = {key: over_seeds(run.macs.get(key) for run in runs) for key in keys}
    return {key: value.mean for key, value in means.items() if value is not None}


def seeds_text(values: list[float | None]) -> str:
    """The mean over the seeds."""
    value = over_seeds(values)
    return number(None if value is None else value.mean, 1)


def profile_table(report: Report) -> Markup | None:
    """What `basicsr profile` measured."""
    rows = []
    for place, entry, measured in report.profiles:
        times, peaks, macs = (measured.get(key) or {} for key in ('time_ms', 'peak_mib', 'macs'))
        sizes = [' x '.join(map(str, measured[key])) if key in measured else MISSING for key in ('lq_size', 'size')]
        rows.append(
            row(
                report.labels[entry],
                scale_label(tuple(measured['scale'])),
                ' to '.join(sizes),
                *macs_cells(macs, macs),
                *(number(times.get(stage), 1) for stage in STAGES),
                number(peaks.get('total'), 1),
                text(environment_of(report, place)),
                text(f'[{place + 1}]'),
            )
        )
    if not rows:
        return None
    head = head_row(
        *words('model'),
        'scale',
        'size',
        *MACS_HEAD,
        *(f'{name}, ms' for name in STAGES.values()),
        'peak MiB',
        *words('environment', 'file'),
    )
    return table(
        'Profiles: thousand multiply-adds per output pixel, median milliseconds by stage, peak MiB.', [head], rows
    )


def correlation_table(report: Report) -> Markup | None:
    """Whether depth follows texture, per model, dataset and scale."""
    columns = [
        column
        for runs in report.datasets().values()
        for column in columns_of(run for run in runs if run.correlation is not None)
    ]
    if not columns:
        return None
    rows = []
    for entry in report.labels:
        found = [over_seeds(run.correlation for run in report.runs_in(entry, column)) for column in columns]
        if any(found):
            rows.append(row(report.labels[entry], *(number(value and value.mean, 2) for value in found)))
    head = head_row(*words('model'), *(f'{column.dataset} {scale_label(column.scale)}' for column in columns))
    return table(
        "Texture correlation: Spearman's rank correlation of the chosen expert's depth with the local "
        'gradient energy of the truth (of the output where there is none), over the pixels of an image; mean '
        'over the images.',
        [head],
        rows,
    )


def mean_loads(runs: list[Run]) -> list[float]:
    """Shares of the experts over the seeds; empty where there are none."""
    loads = [run.loads for run in runs if run.loads]
    if not loads or len({len(entry) for entry in loads}) > 1:
        return []
    return [statistics.fmean(column) for column in zip(*loads)]


def expert_costs(runs: list[Run]) -> list[float] | None:
    """Multiply-adds of each expert, None where they are not recorded."""
    return next((run.macs['each_expert'] for run in runs if run.macs.get('each_expert')), None)


def expert_names(entry: Entry, count: int) -> list[str]:
    """'expert 1: 2 x 256' and so on, in the network's order."""
    hidden = (json.loads(entry.network) or {}).get('experts') or []
    return [f'expert {j + 1}' + (f': {shape(hidden[j])}' if len(hidden) == count else '') for j in range(count)]
