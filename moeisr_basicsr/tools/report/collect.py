"""From results files to runs."""

import json
import re
import statistics
from collections.abc import Iterable
from os import PathLike
from pathlib import Path

from moeisr_basicsr.analysis import schema
from moeisr_basicsr.analysis.schema import scale_label
from moeisr_basicsr.errors import UserError

from .notes import comparability, without_duplicates
from .runs import (
    BICUBIC,
    Column,
    Entry,
    Measured,
    Metric,
    Report,
    Run,
    Source,
    group_by,
    mean_known,
    mean_list,
    with_decoder,
)

RESULTS_FILE = 'results.json'
CONTROL = re.compile(r'(.+)[_-](?:b|budget|k|kappa|cost_weight)[_-]?(-?\d+(?:\.\d+)?)')


def read_sources(paths: Iterable[str | PathLike]) -> list[Source]:
    """Read results files, or folders that hold a `results.json`.

    Raises:
        UserError: A file is missing or no results file, or is given twice.
    """
    sources: list[Source] = []
    seen: set[Path] = set()
    environments: list[dict] = []
    for given in map(str, paths):
        path = Path(given)
        if path.is_dir():
            path /= RESULTS_FILE
            if not path.is_file():
                raise UserError(
                    f'{given}: this folder holds no {RESULTS_FILE}; give a folder of `basicsr test`, or a file.'
                )
        if path.resolve() in seen:
            raise UserError(f'{given}: these results are given twice.')
        seen.add(path.resolve())
        results = schema.load(path)
        if results['environment'] not in environments:
            environments.append(results['environment'])
        where = f'E{environments.index(results["environment"]) + 1}'
        sources.append(Source(len(sources) + 1, given, path.parent, results, where))
    return sources


def collect(sources: list[Source]) -> Report:
    """Group the rows of all sources.

    Raises:
        UserError: There is nothing to report on.
    """
    runs: list[Run] = []
    profiles, notes = [], []
    for source in sources:
        rows = [row for row in source.results['rows'] if row['case'] != 'mean']  # the images give the means
        known = [row for row in rows if 'scale' in row]
        tests = [row for row in known if row['case'] == 'test' and row.get('dataset')]
        profiled = [(source, entry_of(source, row), row) for row in known if row['case'] == 'profile']
        failed = [row for row in rows if row['case'] == 'failed']
        for name, of_dataset in group_by(failed, lambda row: row.get('dataset')).items():
            images = ', '.join(str(row.get('image')) for row in of_dataset)
            notes.append(f'{source.path}: {name} is without {len(of_dataset)} images that could not be used: {images}.')
        others = len(rows) - len(tests) - len(profiled) - len(failed)
        if others:
            notes.append(f'{source.path}: {others} rows are not shown: neither tests nor profiles of upscaling.')
        profiles += profiled
        groups = group_by(tests, lambda row: (entry_of(source, row), row['dataset'], tuple(row['scale'])))
        runs += [run_of(source, entry, images, notes) for (entry, _, _), images in groups.items()]
    if not runs and not profiles:
        raise UserError(
            f'{", ".join(source.path for source in sources)}: there are no rows of `basicsr test` or '
            '`basicsr profile` to report on.'
        )
    runs = without_duplicates(runs, notes)
    groups = group_by(runs, lambda run: (run.entry, run.column))
    measured = [Measured(entry, column, seeds) for (entry, column), seeds in groups.items()]
    labels = distinct_labels([run.entry for run in runs] + [entry for _, entry, _ in profiles])
    if len({source.environment for source in sources}) > 1:
        notes.append('The files were measured in different environments: times and memory compare within one only.')
    return Report(sources, measured, profiles, labels, notes + comparability(runs))


def entry_of(source: Source, row: dict) -> Entry:
    """The row of the tables that a row of a file belongs to."""
    name, _ = source.name_and_seed()
    budget, cost_weight = row.get('budget'), row.get('cost_weight') or None
    match = CONTROL.fullmatch(name)
    if match and float(match[2]) in (budget, cost_weight):
        name = match[1]
    network = json.dumps(source.model.get('network_g'), sort_keys=True)
    return Entry(name, network, budget, cost_weight, row.get('precision') or 'fp32', bool(row.get('shuffle_experts')))


def run_of(source: Source, entry: Entry, rows: list[dict], notes: list[str]) -> Run:
    """Means over the images of one dataset and scale."""
    first = rows[0]
    scale = tuple(first['scale'])
    dataset = first['dataset'].removesuffix(f'_{scale_label(scale)}') or first['dataset']
    inputs = first.get('protocol') or 'origin of the LR images not recorded'
    images = tuple(sorted(str(row.get('image')) for row in rows))
    means = metric_means(source, rows, notes)
    protocols = first.get('metric_protocols', {})
    metrics = {name: Metric(name, protocols.get(name, 'protocol not recorded')) for name in means}
    enlarged = {name: f'{BICUBIC}_{name}' for name in means if f'{BICUBIC}_{name}' in means}
    macs = [row['macs'] for row in rows if row.get('macs')]
    parts = [part for part in (macs[0] if macs else ()) if part != 'each_expert']
    routing = [row['routing'] for row in rows if row.get('routing', {}).get('shares')]
    times, peaks = ([row.get(key, {}).get('total') for row in rows] for key in ('time_ms', 'peak_mib'))
    return Run(
        source=source,
        entry=entry,
        seed=source.name_and_seed()[1],
        column=Column(dataset, scale, inputs, images),
        metrics={metric: means[name] for name, metric in metrics.items() if name not in enlarged.values()},
        bicubic={metrics[name]: means[baseline] for name, baseline in enlarged.items()},
        macs=with_decoder({part: mean_known(one.get(part) for one in macs) for part in parts}),
        expert_macs=macs[0].get('each_expert') if macs else None,
        time_ms=None if None in times else statistics.median(times),
        peak_mib=None if None in peaks else max(peaks),
        shares=mean_list([one['shares'] for one in routing]),
        correlation=mean_known(one.get('texture_correlation') for one in routing),
        rows=rows,
    )


def metric_means(source: Source, rows: list[dict], notes: list[str]) -> dict[str, float | None]:
    """Of each metric; None, and a note, where an image lacks it."""
    means: dict[str, float | None] = {}
    for name in dict.fromkeys(name for row in rows for name in row.get('metrics', {})):
        values = [row.get('metrics', {}).get(name) for row in rows]
        means[name] = None if None in values else statistics.fmean(values)
        if None in values:
            notes.append(
                f'{source.path}, {rows[0]["dataset"]}: {name} is missing or not finite for {values.count(None)} of '
                f'{len(rows)} images, so there is no mean.'
            )
    return means


def distinct_labels(entries: Iterable[Entry]) -> dict[Entry, str]:
    """A label for each entry, numbered where networks of one name differ; that of bicubic's own row is taken."""
    labels: dict[Entry, str] = {}
    for label, same in group_by(dict.fromkeys(entries), Entry.label).items():
        first = 1 if label == BICUBIC else 0
        labels |= {entry: f'{label} ({place + 1})' if place else label for place, entry in enumerate(same, first)}
    return labels
