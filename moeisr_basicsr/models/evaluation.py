"""Validation work: which rank takes which image, and what the rows of all images add up to.

A job is one image of one dataset, and a dataset has one scale. Jobs of all datasets are dealt out to the ranks in
turn, every record goes to every rank, and means do not depend on the order: the results are those of one process.

J experts.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from os import path as osp
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from moeisr_basicsr.analysis.schema import scale_label
from moeisr_basicsr.errors import ImageError, printable

# Keys of a results row (see `analysis.schema`) that are of one image, and those that a dataset has means of.
OF_IMAGE = ('case', 'image', 'lq_size', 'size', 'pictures')
AVERAGED = ('metrics', 'time_ms', 'peak_mib', 'macs', 'routing')


class Record(NamedTuple):
    """What one image gives."""

    place: int  # of the image in its dataset
    row: dict  # of a results document; its case is 'failed' where the image could not be used
    pictures: dict[str, np.ndarray]  # for TensorBoard, (R, S, 3) uint8 BGR by the suffix of their names


class Journal(Protocol):
    """What was measured before, and is measured now, image by image."""

    def known(self, dataset: str, image: str, files: list[str]) -> dict | None:
        """The row of an image that need not be measured again."""

    def add(self, row: dict, files: list[str]) -> None:
        """An image is measured."""

    def done(self, result: 'Evaluated') -> None:
        """A dataset is done."""


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
    failed: dict[str, str]  # images that could not be used, and why; the means are over the others


class Tolerant(Dataset):
    """Some images of a dataset; what cannot be used is an item with an `error`."""

    def __init__(self, dataset: Dataset, indices: list[int]):
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> dict:
        try:
            return self.dataset[self.indices[place]]
        except ImageError as error:
            return {'error': str(error)}


def my_jobs(sizes: list[int], rank: int, world_size: int) -> list[list[int]]:
    """Indices of the images that this rank takes, per dataset; `sizes` are the datasets' lengths."""
    jobs = [(dataset, index) for dataset, size in enumerate(sizes) for index in range(size)][rank::world_size]
    return [[index for owner, index in jobs if owner == dataset] for dataset in range(len(sizes))]


def iterate_jobs(loader: DataLoader, indices: list[int]) -> Iterator[tuple[int, dict]]:
    """(index, batch of one) of the images `indices` of the loader's dataset, read by workers as the loader's are; a
    batch with an `error` in place of one that cannot be used."""
    mine = DataLoader(
        Tolerant(loader.dataset, indices),
        batch_size=1,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        generator=torch.Generator(),  # seeding the workers must not draw from torch's own
    )
    return zip(indices, mine)


def summarize(records: list[dict]) -> Evaluated:
    """Means over the images of one dataset; each expert's share is a mean over images, as the metrics are.

    Args:
        records: The row of every image, at least one.
    """
    rows = [row for row in records if row['case'] != 'failed']
    failed = {row['image']: row['notes'] for row in records if row['case'] == 'failed'}
    means = mean_row(rows) if rows else {**records[0], 'metrics': {}}
    routing = means.get('routing', {'shares': [], 'mean_cost': None})
    return Evaluated(
        dataset=means['dataset'],
        scale=scale_label(means['scale']),
        count=len(rows),
        metrics=means['metrics'],
        shares=routing['shares'],
        mean_cost=routing['mean_cost'],
        rows=rows,
        failed=failed,
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


def image_name(path: str, root: str | list[str] | None) -> str:
    """File name without its extension, behind its folders below the dataset's `root`: 'a__1' for a/1.png. Where a
    dataset has several roots, those below what the roots have in common. Printable."""
    roots = [root] if isinstance(root, str) else root or []
    file = Path(path).absolute()
    if roots:
        above = osp.commonpath([Path(folder).expanduser().absolute() for folder in roots])
        if file.is_relative_to(above):
            return printable(osp.splitext('__'.join(file.relative_to(above).parts))[0])
    return printable(osp.splitext(file.name)[0])


def files_of(dataset: Any, index: int) -> list[str]:
    """The LR and the HR file of an image; none where the dataset does not tell."""
    paths = getattr(dataset, 'paths', None)
    if paths is None or len(paths) != len(dataset):
        return []
    entry = paths[index]
    return [entry] if isinstance(entry, str) else list(entry.values() if isinstance(entry, dict) else entry)


def image_names(dataset: Any) -> list[str]:
    """A name for every image of a dataset, no two alike: pictures and rows are called by it.

    Those that differ in their extension only keep it; what is then still alike is numbered.
    """
    root = dataset.opt.get('dataroot_lq') or dataset.opt.get('dataroot_gt')
    files = [(files_of(dataset, index) or [str(index)])[0] for index in range(len(dataset))]
    stems = [image_name(file, root) for file in files]
    counts = Counter(stems)
    names = [stem + printable(osp.splitext(file)[1]) if counts[stem] > 1 else stem for stem, file in zip(stems, files)]
    seen: Counter[str] = Counter()
    for place, name in enumerate(names):
        seen[name] += 1
        if seen[name] > 1:
            names[place] = f'{name}__{seen[name]}'
    return names
