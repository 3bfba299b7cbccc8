"""Validation work: which rank takes which image, and what the rows of all images add up to.

A job is one image of one dataset, and a dataset has one scale. Jobs of all datasets are dealt out to the ranks in
turn, every record goes to every rank, and means do not depend on the order: the results are those of one process.

J experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from os import path as osp
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from moeisr_basicsr.analysis.schema import scale_label
from moeisr_basicsr.errors import printable

# Keys of a results row (see `analysis.schema`) that are of one image, and those that a dataset has means of.
OF_IMAGE = ('case', 'image', 'lq_size', 'size', 'pictures')
AVERAGED = ('metrics', 'time_ms', 'peak_mib', 'macs', 'routing')


class Record(NamedTuple):
    """What one image gives."""

    dataset: int  # its number
    place: int  # of the image in it
    row: dict  # of a results document
    pictures: dict[str, np.ndarray]  # for TensorBoard, (R, S, 3) uint8 BGR by the suffix of their names


@dataclass(frozen=True)
class Evaluated:
    """The mean results of one dataset."""

    dataset: str
    scale: str  # as it appears in file names, for example 'x2' or 'x2x3.5'
    count: int  # number of images
    metrics: dict[str, float]  # means; bicubic's beside the model's as 'bicubic_<metric>'
    shares: list[float]  # share of the output pixels of each expert; empty for a dense network
    mean_cost: float | None  # mean relative cost of an output pixel; None for a dense network
    rows: list[dict]  # of a results document, one per image


def my_jobs(sizes: list[int], rank: int, world_size: int) -> list[list[int]]:
    """Indices of the images that this rank takes, per dataset; `sizes` are the datasets' lengths."""
    jobs = [(dataset, index) for dataset, size in enumerate(sizes) for index in range(size)][rank::world_size]
    return [[index for owner, index in jobs if owner == dataset] for dataset in range(len(sizes))]


def iterate_jobs(loader: DataLoader, indices: list[int]) -> Iterator[tuple[int, dict]]:
    """(index, batch of one) of the images `indices` of the loader's dataset, read by workers as the loader's are."""
    mine = DataLoader(
        Subset(loader.dataset, indices),
        batch_size=1,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        generator=torch.Generator(),  # seeding the workers must not draw from torch's own
    )
    return zip(indices, mine)


def summarize(rows: list[dict]) -> Evaluated:
    """Means over the images of one dataset; each expert's share is a mean over images, as the metrics are."""
    means = mean_row(rows)
    routing = means.get('routing', {'shares': [], 'mean_cost': None})
    label = scale_label(means['scale'])
    return Evaluated(
        means['dataset'], label, len(rows), means['metrics'], routing['shares'], routing['mean_cost'], rows
    )


def mean_row(rows: list[dict]) -> dict:
    """One dataset's row of a results document, from the rows of its images."""
    means = {
        key: mean_of([row[key] for row in rows]) if key in AVERAGED else value
        for key, value in rows[0].items()
        if key not in OF_IMAGE
    }
    return {'case': 'mean', 'count': len(rows), **means}


def mean_of(values: list[Any]) -> Any:
    """The mean of numbers, of lists entry by entry, of dictionaries key by key; None is left out.

    It is rounded once, at the end: the order of the images, and with it the number of ranks, changes no bit.
    """
    known = [value for value in values if value is not None]
    if not known:
        return None
    if isinstance(known[0], dict):
        return {key: mean_of([value[key] for value in known]) for key in known[0]}
    if isinstance(known[0], list):
        return [mean_of(list(column)) for column in zip(*known)]
    return fmean(known)


def image_name(path: str, root: str | None) -> str:
    """File name without its extension, behind its folders below the dataset's `root`: 'a__1' for a/1.png; printable."""
    folders = Path(path).parent.parts
    above = Path(root).expanduser().parts if isinstance(root, str) else folders  # some datasets take several
    below = folders[len(above) :] if folders[: len(above)] == above else ()
    return printable(osp.splitext('__'.join([*below, osp.basename(path)]))[0])
