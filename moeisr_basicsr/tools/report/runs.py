"""What a report compares: files, runs, and the figures of an entry in a column.

A *run* is one network under one control of its routing, on one dataset at one scale, in one file. An *entry* (a row of
the tables) is a network under one control; its seeds are averaged. Runs share a *column* only if dataset, scale, LR
images and test images agree, and a table only if their metrics compare the same: figures of two protocols never meet.
"""

import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from moeisr_basicsr.analysis.schema import scale_label

BICUBIC = 'bicubic'  # its row; its metrics are bicubic_NAME
SEED = re.compile(r'(.+)_seed(\d+)((?:[_-].+)?)')  # a control may follow
Item = TypeVar('Item')


class Source(NamedTuple):
    """One results file."""

    number: int  # names it in the tables
    path: str  # as given
    folder: Path  # its pictures are relative to it
    results: dict
    environment: str  # E1, E2, ...: times compare within one only

    @property
    def model(self) -> dict:
        """Empty for a network of another package."""
        return self.results.get('model') or {}

    def name_and_seed(self) -> tuple[str, str]:
        """The model's name without its seed, and the seed."""
        name = self.model.get('name') or self.folder.resolve().name
        match = SEED.fullmatch(name)
        return (match[1] + match[3], match[2]) if match else (name, '')


class Entry(NamedTuple):
    """A row of the tables: a network under one control."""

    name: str  # without seed, and without a control that the name repeats
    network: str  # its options as JSON: networks of one name may differ
    budget: float | None
    cost_weight: float | None
    precision: str
    shuffled: bool

    def label(self) -> str:
        """For people; `Report.labels` tells equal ones apart."""
        parts = [
            self.name,
            self.budget is not None and f'budget {self.budget:g}',
            self.cost_weight is not None and f'cost weight {self.cost_weight:g}',
            self.precision != 'fp32' and self.precision,
            self.shuffled and 'shuffled experts',
        ]
        return ', '.join(part for part in parts if part)


class Column(NamedTuple):
    """What figures must share to be compared."""

    dataset: str  # without its scale
    scale: tuple[float, float]  # (rows, columns)
    inputs: str  # how the LR images were made
    images: tuple[str, ...]

    @property
    def label(self) -> str:
        """The scale."""
        return scale_label(self.scale)

    @property
    def setting(self) -> str:
        """What the figures are of, beside the scale."""
        return f'{self.inputs}; {len(self.images)} image{"" if len(self.images) == 1 else "s"}'


class Metric(NamedTuple):
    """A metric and what it compares: one table."""

    name: str
    protocol: str

    @property
    def is_psnr(self) -> bool:
        """Whether it is in dB."""
        return 'psnr' in self.name.lower()

    @property
    def decimals(self) -> int:
        """As publications print them."""
        return 2 if self.is_psnr else 4


class Run(NamedTuple):
    """Means over the images of one column, of one seed; None where any image has no value."""

    source: Source
    entry: Entry
    seed: str
    column: Column
    metrics: dict[Metric, float | None]
    bicubic: dict[Metric, float | None]  # the same of bicubic interpolation
    macs: dict[str, float | None]  # per output pixel, by part
    expert_macs: list[float] | None
    time_ms: float | None  # median over the images
    peak_mib: float | None  # the largest
    shares: list[float]  # each expert's share of the output pixels
    correlation: float | None  # of expert depth with texture
    rows: list[dict]  # the images


class Value(NamedTuple):
    """One figure over the seeds."""

    mean: float
    half_range: float
    seeds: int


class Measured(NamedTuple):
    """One entry in one column: a run per seed."""

    entry: Entry
    column: Column
    runs: list[Run]

    def metric(self, metric: Metric) -> Value | None:
        """Mean and spread of the seeds that have the metric."""
        known = [value for run in self.runs if (value := run.metrics.get(metric)) is not None]
        return Value(statistics.fmean(known), (max(known) - min(known)) / 2, len(known)) if known else None

    def mean(self, figure: str) -> float | None:
        """Of a run's figure."""
        return mean_known(getattr(run, figure) for run in self.runs)

    @property
    def macs(self) -> dict[str, float | None]:
        """Multiply-adds per output pixel, by part."""
        parts = dict.fromkeys(part for run in self.runs for part in run.macs)
        return {part: mean_known(run.macs.get(part) for run in self.runs) for part in parts}

    @property
    def shares(self) -> list[float]:
        """Shares of the experts."""
        return mean_list([run.shares for run in self.runs])

    def by_environment(self) -> dict[str, 'Measured']:
        """The runs of each environment apart, for times."""
        groups = group_by(self.runs, lambda run: run.source.environment)
        return {environment: self._replace(runs=runs) for environment, runs in sorted(groups.items())}


class Report(NamedTuple):
    """Everything that the page shows."""

    sources: list[Source]
    measured: list[Measured]
    profiles: list[tuple[Source, Entry, dict]]  # rows of `basicsr profile`
    labels: dict[Entry, str]  # in order of appearance; all different
    notes: list[str]  # what a reader must know

    def datasets(self) -> dict[str, dict[Column, list[Measured]]]:
        """Each dataset's columns, by rising scale."""
        ordered = sorted(self.measured, key=lambda one: one.column.scale[0] * one.column.scale[1])
        groups = group_by(ordered, lambda one: one.column.dataset)
        return {dataset: group_by(found, lambda one: one.column) for dataset, found in groups.items()}

    def models(self) -> dict[tuple[str, str], dict]:
        """Networks, each once: seeds and controls share one."""
        held = [(run.entry, run.source) for one in self.measured for run in one.runs]
        held += [(entry, source) for source, entry, _ in self.profiles]
        groups = group_by(held, lambda pair: (pair[0].name, pair[0].network))
        return {key: pairs[0][1].model for key, pairs in groups.items() if pairs[0][1].model}


def group_by(items: Iterable[Item], key: Callable[[Item], Any]) -> dict[Any, list[Item]]:
    """Items of equal keys, in order of appearance."""
    groups: dict[Any, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def mean_known(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are known; None where none is."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def mean_list(lists: list[list[float]]) -> list[float]:
    """The mean entry by entry; empty where the lists differ in length."""
    return [statistics.fmean(column) for column in zip(*lists)] if len(set(map(len, lists))) == 1 else []


def with_decoder(macs: dict[str, Any]) -> dict[str, Any]:
    """Multiply-adds with the sum of the decoder's parts."""
    parts = [macs.get(part) for part in ('mapper', 'tables', 'experts')]
    return {**macs, 'decoder': None if None in parts else sum(parts)}


def main_metric(measured: Iterable[Measured]) -> Metric | None:
    """The metric of charts and crops of one dataset: its first PSNR, of DIV2K that of its own protocol."""
    runs = [run for one in measured for run in one.runs]
    found = list(dict.fromkeys(metric for run in runs for metric in run.metrics if metric.is_psnr))
    if any('div2k' in run.column.dataset.lower() for run in runs):
        found.sort(key=lambda metric: not metric.protocol.startswith('div2k'))
    return found[0] if found else None
