"""Validation work: which rank takes which image, what one image gives, and what the records of all ranks add up to.

A job is one image of one dataset, and a dataset has one scale. Jobs of all datasets are dealt out to the ranks in
turn, every record goes to every rank, and sums run in the order of the single process: the results are the same.

J experts.
"""

import math
from collections.abc import Iterator
from os import path as osp
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Subset

from .worker_errors import clear_worker_errors

# Keys of a results row (see `analysis.schema`): what all images of a dataset share, and what there are means of.
SHARED = (
    'dataset',
    'protocol',
    'metric_protocols',
    'scale',
    'precision',
    'budget',
    'cost_weight',
    'shuffle_experts',
    'repeats',
)
AVERAGED = ('metrics', 'time_ms', 'peak_mib', 'macs', 'routing')


class Evaluated(NamedTuple):
    """The mean results of one dataset."""

    dataset: str
    scale: str  # as it appears in file names, for example 'x2' or 'x2x3.5'
    count: int  # number of images
    metrics: dict[str, float]  # means; bicubic's beside the model's as 'bicubic_<metric>'
    loads: list[float]  # share of the output pixels of each expert; empty for a dense network
    mean_cost: float | None  # mean relative cost of an output pixel; None for a dense network
    rows: list[dict]  # of a results document, one per image, in the dataset's order; empty in training


def my_jobs(sizes: list[int], rank: int, world_size: int) -> list[list[int]]:
    """Indices of the images that this rank takes, per dataset; `sizes` are the datasets' lengths."""
    starts = [sum(sizes[:position]) for position in range(len(sizes))]
    return [
        [index for index in range(size) if (start + index) % world_size == rank] for start, size in zip(starts, sizes)
    ]


def iterate_jobs(loader: DataLoader, indices: list[int]) -> Iterator[tuple[int, dict]]:
    """(index, batch of one) of the images `indices` of the loader's dataset, read by the loader's workers."""
    if len(indices) < len(loader.dataset):
        loader = DataLoader(
            Subset(loader.dataset, indices),
            batch_size=1,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            worker_init_fn=loader.worker_init_fn,
            generator=torch.Generator(),
        )
    with clear_worker_errors():
        yield from zip(indices, loader)


def gather_records(records: list[dict]) -> list[dict]:
    """The records of all ranks in the order of the single process, on every rank."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, records)
        records = [record for part in parts for record in part]
    return sorted(records, key=lambda record: (record['loader'], record['index']))


def summarize(records: list[dict]) -> Evaluated:
    """Means over the images of one dataset; each expert's share is a mean over images, as the metrics are."""
    first = records[0]
    metrics = {name: mean([record['metrics'][name] for record in records]) for name in first['metrics']}
    loads = [mean([record['loads'][j] for record in records]) for j in range(len(first['loads']))]
    mean_cost = None if first['mean_cost'] is None else mean([record['mean_cost'] for record in records])
    return Evaluated(
        first['dataset'],
        first['scale'],
        len(records),
        metrics,
        loads,
        mean_cost,
        [record['row'] for record in records if 'row' in record],
    )


def mean(values: list[float]) -> float:
    """The exactly rounded mean: it does not depend on the order in which ranks finish."""
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else sum(values) / len(values)


def mean_row(rows: list[dict]) -> dict:
    """One dataset's row of a results document, from the rows of its images."""
    first = rows[0]
    return {
        'case': 'mean',
        'count': len(rows),
        **{key: first[key] for key in SHARED if key in first},
        **{key: mean_of([row[key] for row in rows]) for key in AVERAGED if key in first},
    }


def mean_of(values: list[Any]) -> Any:
    """The mean of numbers, of lists entry by entry, of dictionaries key by key; None is left out."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    if isinstance(known[0], dict):
        return {key: mean_of([value[key] for value in known]) for key in known[0]}
    if isinstance(known[0], list):
        return [mean_of(list(column)) for column in zip(*known)]
    return mean(known)


def scale_label(scale: tuple[float, float]) -> str:
    """'x2', 'x3.3', or 'x2x3.5' for (rows, columns) that differ."""
    rows, cols = (f'{factor:.4g}' for factor in scale)
    return f'x{rows}' if rows == cols else f'x{rows}x{cols}'


def factor_pair(
    nominal: float | list[float] | None, lq_size: tuple[int, int], size: tuple[int, int]
) -> tuple[float, float]:
    """(row factor, column factor): the nominal ones, or those of the sizes where there are none."""
    if nominal is None:
        return size[0] / lq_size[0], size[1] / lq_size[1]
    return tuple(map(float, nominal)) if isinstance(nominal, (list, tuple)) else (float(nominal), float(nominal))


def image_name(path: str, root: str | None) -> str:
    """File name without its extension, behind its folders below the dataset's `root`: 'a__1' for a/1.png."""
    folders = Path(path).parent.parts
    above = Path(root).expanduser().parts if isinstance(root, str) else folders  # some datasets take several
    below = folders[len(above) :] if folders[: len(above)] == above else ()
    return osp.splitext('__'.join([*below, osp.basename(path)]))[0]
