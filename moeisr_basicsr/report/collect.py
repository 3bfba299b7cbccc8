"""From results documents to what a report compares.

A *run* is one network under one control of its routing, on one dataset at one scale, in one file. Runs of one *entry*
(a row of the tables) differ in dataset, scale and seed. Runs share a *column* only if dataset, scale, LR images and
test images agree, and a table only if their metrics compare the same: figures of two protocols never meet.
"""

import json
import re
import statistics
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from moeisr_basicsr.analysis import schema
from moeisr_basicsr.errors import UserError

RESULTS_FILE = 'results.json'
UNKNOWN = 'protocol not recorded'
BICUBIC = 'bicubic_'  # prefix of the baseline's metrics
SEED = re.compile(r'(.+)_seed(\d+)((?:[_-].+)?)')  # a control may follow
CONTROL = re.compile(r'(.+)[_-](?:b|budget|k|kappa|cost_weight)[_-]?(-?\d+(?:\.\d+)?)')
SAME = 1e-6  # bicubic's figures on the same images differ by rounding at most


class Source(NamedTuple):
    """One results file."""

    path: str  # as given
    file: Path
    results: dict

    @property
    def folder(self) -> Path:
        """What its pictures are relative to."""
        return self.file.parent


class Control(NamedTuple):
    """How a network was run."""

    budget: float | None
    cost_weight: float | None
    precision: str
    shuffled: bool


class Entry(NamedTuple):
    """A row of the tables: a network and its control."""

    name: str  # without seed, and without a control that the name repeats
    control: Control
    network: str  # its options as JSON: networks of one name may differ

    def label(self) -> str:
        """For people; `Report.labels` tells equal ones apart."""
        control = self.control
        parts = [
            self.name,
            control.budget is not None and f'budget {control.budget:g}',
            control.cost_weight is not None and f'cost weight {control.cost_weight:g}',
            control.precision != 'fp32' and control.precision,
            control.shuffled and 'shuffled experts',
        ]
        return ', '.join(part for part in parts if part)


class Column(NamedTuple):
    """What figures must share to be compared."""

    dataset: str  # without its scale
    scale: tuple[float, float]  # (rows, columns)
    inputs: str  # how the LR images were made
    images: tuple[str, ...] | int  # their names, or their number where the file does not name them

    @property
    def count(self) -> int:
        """Number of images."""
        return self.images if isinstance(self.images, int) else len(self.images)


class Run(NamedTuple):
    """The means over the images of one column."""

    source: int  # place among the sources
    entry: Entry
    seed: str
    column: Column
    metrics: dict[str, float | None]  # None where no image or not every image has a finite value
    protocols: dict[str, str]  # of the metrics
    macs: dict[str, Any]  # per output pixel, means; `each_expert` a list
    time_ms: float | None  # median over the images
    peak_mib: float | None  # the largest
    loads: list[float]
    correlation: float | None
    images: list[dict]  # the rows behind it


class Value(NamedTuple):
    """One figure of an entry in a column, over its seeds."""

    mean: float
    half_range: float
    seeds: int


class Report(NamedTuple):
    """Everything that the page shows."""

    sources: list[Source]
    runs: list[Run]
    labels: dict[Entry, str]  # in order of appearance; all different
    profiles: list[tuple[int, Entry, dict]]  # (source, entry, row of `basicsr profile`)
    notes: list[str]  # what a reader must know

    def runs_in(self, entry: Entry, column: Column) -> list[Run]:
        """The seeds of an entry in a column."""
        return [run for run in self.runs if run.entry == entry and run.column == column]

    def datasets(self) -> dict[str, list[Run]]:
        """The runs of each dataset."""
        found: dict[str, list[Run]] = {}
        for run in self.runs:
            found.setdefault(run.column.dataset, []).append(run)
        return found


def read_sources(paths: Iterable[str | PathLike]) -> list[Source]:
    """Read results files, or folders that hold a `results.json`.

    Raises:
        UserError: A file is missing or no results file, or is given twice.
    """
    sources, seen = [], {}
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
        seen[path.resolve()] = given
        sources.append(Source(given, path, schema.finite(schema.load(path))))
    return sources


def collect(sources: list[Source]) -> Report:
    """Group the rows of all sources.

    Raises:
        UserError: There is nothing to report on.
    """
    runs, profiles, notes = [], [], []
    for place, source in enumerate(sources):
        rows = [row for row in source.results['rows'] if 'scale' in row]
        found = [(place, make_entry(source, row), row) for row in rows if row['case'] == 'profile']
        tests = [row for row in rows if row['case'] in ('test', 'mean') and row.get('dataset')]
        others = len(source.results['rows']) - len(found) - len(tests)
        if others:
            notes.append(
                f'{source.path}: {others} rows are not shown, of other kinds than tests and profiles of '
                'upscaling, or without dataset or scale.'
            )
        profiles += found
        runs += runs_of(place, source, tests, notes)
    runs = without_duplicates(runs, sources, notes)
    if not runs and not profiles:
        raise UserError(
            f'{", ".join(source.path for source in sources)}: there are no rows of `basicsr test` or '
            '`basicsr profile` to report on.'
        )
    entries = dict.fromkeys([run.entry for run in runs] + [entry for _, entry, _ in profiles])
    return Report(sources, runs, distinct_labels(entries), profiles, notes + comparability(runs))


def model_name(source: Source) -> tuple[str, str]:
    """(name without seed, seed); a network of another package has the name of its results folder."""
    model = source.results.get('model')
    name = model['name'] if model else source.folder.resolve().name
    match = SEED.fullmatch(name)
    return (match[1] + match[3], match[2]) if match else (name, '')


def make_entry(source: Source, row: dict) -> Entry:
    """The row of the tables that a row of the file belongs to."""
    name, _ = model_name(source)
    control = Control(
        row.get('budget'),
        row.get('cost_weight') or None,
        row.get('precision') or 'fp32',
        bool(row.get('shuffle_experts')),
    )
    match = CONTROL.fullmatch(name)
    if match and float(match[2]) in (control.budget, control.cost_weight):
        name = match[1]
    network = (source.results.get('model') or {}).get('network_g')
    return Entry(name, control, json.dumps(network, sort_keys=True))


def runs_of(place: int, source: Source, rows: list[dict], notes: list[str]) -> list[Run]:
    """The runs of one source; the file's own means stand in for those whose images it does not hold."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if row['case'] == 'test':
            groups.setdefault((make_entry(source, row), row['dataset'], tuple(row['scale'])), []).append(row)
    runs = [
        make_run(place, source, entry, once_each(images, source, notes), notes)
        for (entry, _, _), images in groups.items()
    ]
    return runs + [
        make_run(place, source, make_entry(source, row), [row], notes)
        for row in rows
        if row['case'] == 'mean' and (make_entry(source, row), row['dataset'], tuple(row['scale'])) not in groups
    ]


def once_each(images: list[dict], source: Source, notes: list[str]) -> list[dict]:
    """The rows with the first of each image's."""
    first: dict[Any, dict] = {}
    for row in images:
        name = row.get('image')
        if name in first:
            notes.append(
                f'{source.path}: {row["dataset"]} holds {name or "an image without a name"} more than once; '
                'the first row counts.'
            )
        first.setdefault(name, row)
    return list(first.values())


def make_run(place: int, source: Source, entry: Entry, rows: list[dict], notes: list[str]) -> Run:
    """Means over the images of one dataset and scale, or the one row that holds the means."""
    first = rows[0]
    names = dict.fromkeys(name for row in rows for name in row.get('metrics') or {})
    values = {name: [(row.get('metrics') or {}).get(name) for row in rows] for name in names}
    for name, found in values.items():
        if None in found:
            notes.append(
                f'{source.path}, {first["dataset"]}: {name} is missing or not finite for {found.count(None)} '
                f'of {len(rows)} images, so there is no mean.'
            )
    macs = [row['macs'] for row in rows if row.get('macs')]
    routing = [row['routing'] for row in rows if (row.get('routing') or {}).get('loads')]
    correlations = [entry.get('texture_correlation') for entry in routing]
    times, peaks = ([(row.get(key) or {}).get('total') for row in rows] for key in ('time_ms', 'peak_mib'))
    return Run(
        place,
        entry,
        model_name(source)[1],
        make_column(rows),
        {name: mean(found) for name, found in values.items()},
        first.get('metric_protocols') or {},
        mean_macs(macs),
        None if None in times else statistics.median(times),
        None if None in peaks else max(peaks),
        mean_list([entry['loads'] for entry in routing]),
        mean([value for value in correlations if value is not None]),
        rows,
    )


def make_column(rows: list[dict]) -> Column:
    """What the rows of one dataset and scale were measured on."""
    first = rows[0]
    scale = tuple(first['scale'])
    dataset = first['dataset'].removesuffix(f'_{scale_label(scale)}') or first['dataset']
    images = first.get('count', 0) if first['case'] == 'mean' else tuple(sorted(str(row.get('image')) for row in rows))
    return Column(dataset, scale, first.get('protocol') or 'origin of the LR images not recorded', images)


def mean_macs(macs: list[dict]) -> dict[str, Any]:
    """Mean multiply-adds part by part."""
    return {
        key: (mean_list if key == 'each_expert' else mean)([entry.get(key) for entry in macs])
        for key in (macs[0] if macs else ())
    }


def mean(values: list[float | None]) -> float | None:
    """The mean; None without values or where one is missing."""
    return None if not values or None in values else statistics.fmean(values)


def mean_list(values: list[list[float] | None]) -> list[float]:
    """The mean entry by entry; empty where lists are missing or differ in length."""
    if None in values or len({len(value) for value in values}) != 1:
        return []
    return [statistics.fmean(column) for column in zip(*values)]


def over_seeds(values: Iterable[float | None]) -> Value | None:
    """Seeds that lack the value are left out; None where all do."""
    known = [value for value in values if value is not None]
    return Value(statistics.fmean(known), (max(known) - min(known)) / 2, len(known)) if known else None


def scale_label(scale: tuple[float, float]) -> str:
    """'x2', 'x3.3', or 'x2x3.5' for (rows, columns) that differ."""
    rows, cols = (f'{factor:.4g}' for factor in scale)
    return f'x{rows}' if rows == cols else f'x{rows}x{cols}'


def without_duplicates(runs: list[Run], sources: list[Source], notes: list[str]) -> list[Run]:
    """The first run of each entry, seed and column."""
    first: dict[tuple, Run] = {}
    for run in runs:
        kept = first.setdefault((run.entry, run.seed, run.column), run)
        if kept is not run:
            same = 'the same' if kept.metrics == run.metrics else 'other'
            notes.append(
                f'{run.entry.label()} on {run.column.dataset} {scale_label(run.column.scale)} is in '
                f'{sources[kept.source].path} and again in {sources[run.source].path}, with {same} figures; '
                'the first one counts.'
            )
    return list(first.values())


def distinct_labels(entries: Iterable[Entry]) -> dict[Entry, str]:
    """A label for each entry, numbered where networks of one name differ."""
    labels: dict[Entry, str] = {}
    for entry in entries:
        label, number = entry.label(), 1
        while label in labels.values():
            number += 1
            label = f'{entry.label()} ({number})'
        labels[entry] = label
    return labels


def comparability(runs: list[Run]) -> list[str]:
    """Notes on figures that look alike and must not be compared, and on images that cannot be the same."""
    notes = []
    for dataset in dict.fromkeys(run.column.dataset for run in runs):
        of_dataset = [run for run in runs if run.column.dataset == dataset]
        for metric in metric_names(of_dataset):
            found = dict.fromkeys(protocol_of(run, metric) for run in of_dataset if metric in run.metrics)
            if len(found) > 1:
                notes.append(
                    f'{metric} on {dataset} was measured under {len(found)} protocols ({"; ".join(found)}): '
                    'separate tables.'
                )
            notes += [
                f'{BICUBIC}{metric} on {dataset} {scale_label(column.scale)} differs between the files, from '
                f'{min(values):.4f} to {max(values):.4f}: their images are not the same.'
                for (column, _), values in bicubic_values(of_dataset, metric).items()
                if max(values) - min(values) > SAME
            ]
        for scale in dict.fromkeys(run.column.scale for run in of_dataset):
            columns = {run.column for run in of_dataset if run.column.scale == scale}
            if len(columns) > 1:
                notes.append(
                    f'{dataset} {scale_label(scale)} was measured on different LR images or test images: '
                    'separate columns.'
                )
    return notes


def bicubic_values(runs: list[Run], metric: str) -> dict[tuple[Column, str], list[float]]:
    """The baseline's figures of one metric under each protocol, one per run."""
    found: dict[tuple[Column, str], list[float]] = {}
    for run in runs:
        if run.metrics.get(BICUBIC + metric) is not None:
            found.setdefault((run.column, protocol_of(run, metric)), []).append(run.metrics[BICUBIC + metric])
    return found


def metric_names(runs: Iterable[Run]) -> list[str]:
    """Metrics of the models, in order of appearance."""
    names = dict.fromkeys(name for run in runs for name in run.metrics)
    return [name for name in names if not (name.startswith(BICUBIC) and name.removeprefix(BICUBIC) in names)]


def protocol_of(run: Run, metric: str) -> str:
    """What a metric of a run compares."""
    return run.protocols.get(metric, UNKNOWN)


def columns_of(runs: Iterable[Run]) -> list[Column]:
    """Columns by rising scale, then in order of appearance."""
    return sorted(dict.fromkeys(run.column for run in runs), key=lambda column: column.scale[0] * column.scale[1])


def is_psnr(metric: str) -> bool:
    """Whether a metric's name says PSNR."""
    return 'psnr' in metric.lower()


def main_metric(runs: Iterable[Run]) -> tuple[str, str] | None:
    """(metric, protocol) of the charts and crops of one dataset: its first PSNR, of DIV2K that of its own protocol."""
    found = list(
        dict.fromkeys((name, protocol_of(run, name)) for run in runs for name in metric_names([run]) if is_psnr(name))
    )
    own = [pair for pair in found if pair[1].startswith('div2k')]
    if own and any('div2k' in run.column.dataset.lower() for run in runs):
        return own[0]
    return found[0] if found else None
