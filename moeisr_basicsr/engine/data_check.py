"""Every image of every dataset of an options file, decoded once before a long run."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset

from moeisr_basicsr.data import reading
from moeisr_basicsr.data.image_reader import is_image_name, read_image
from moeisr_basicsr.errors import UserError
from moeisr_basicsr.models.evaluation import files_of

from .data_loading import open_dataset
from .signals import shield_worker

MOST_WORKERS = 16
Size = tuple[int, int]  # (rows, columns)
Job = tuple[Any, Any]  # what has `decoded`, and the name that it takes


class Checked(NamedTuple):
    """What was found in one dataset."""

    section: str  # of the options
    images: int  # files, or items of a dataset of others
    problems: list[str]


class Decoded(Dataset):
    """(number of the job, size or None, what is wrong or None)."""

    def __init__(self, jobs: list[Job]):
        self.jobs = jobs

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, number: int) -> tuple[int, Size | None, str | None]:
        source, name = self.jobs[number]
        try:
            height, width = source.decoded(name).shape[:2]
            return number, (height, width), None
        except UserError as error:
            return number, None, str(error)
        except MemoryError:
            return number, None, f'{name}: not enough memory.'


class ItemsOfOthers:
    """The items of a dataset that is not of this package: its files as this package reads them, which finds cut off
    ones, and the item as training gets it."""

    def __init__(self, dataset: Any):
        self.dataset = dataset
        self.dataset.failed.update(range(len(dataset)))  # no pauses

    def decoded(self, index: int) -> np.ndarray:
        """A picture of no size; errors as the two have them."""
        for file in files_of(self.dataset, index):
            if is_image_name(file) and Path(file).is_file():
                read_image(file)
        self.dataset[index]
        return np.empty((0, 0))


def check_datasets(opt: dict, track: Callable[[Iterable, int], Iterable] = lambda items, total: items) -> list[Checked]:
    """Decode all images in parallel, those that fail once more after a pause, and compare sizes.

    Args:
        opt: The whole options.
        track: Passes an iterable of so many items on, and shows how far it has come.
    """
    opened: dict[str, tuple[Any, list[Job], list[str]]] = {}
    for section, dataset_opt in opt['datasets'].items():
        dataset, jobs, problems = None, list[Job](), list[str]()
        try:
            # `skip` leaves what is wrong with single images for later
            dataset = open_dataset({**dataset_opt, 'on_damaged': 'skip', 'cache': 'none'})
            if hasattr(dataset, 'files'):
                jobs = list(dataset.files())
            else:
                items = ItemsOfOthers(dataset)
                jobs = [(items, index) for index in range(len(dataset))]
        except UserError as error:
            problems = getattr(error, 'each', None) or [str(error)]
            jobs = [(source, name) for source in getattr(error, 'sources', ()) for name in source.names]
        opened[section] = dataset, jobs, problems
    # One file serves several datasets, at several factors.
    jobs = list({key_of(job): job for _, of_dataset, _ in opened.values() for job in of_dataset}.values())
    sizes, wrong = decode(jobs, track)
    found = []
    for section, (dataset, of_dataset, problems) in opened.items():
        keys = list(dict.fromkeys(map(key_of, of_dataset)))
        problems += [wrong[key] for key in keys if key in wrong]
        if hasattr(dataset, 'check_sizes'):
            problems += map(str, dataset.check_sizes(sizes))
        found.append(Checked(section, len(keys), problems))
    return found


def key_of(job: Job) -> Any:
    """What is the same for two jobs that decode the same."""
    source, name = job
    return (id(source), name) if isinstance(source, ItemsOfOthers) else name


def decode(jobs: list[Job], track: Callable[[Iterable, int], Iterable]) -> tuple[dict[Any, Size], dict[Any, str]]:
    """Sizes of the images, and what is wrong with others, by `key_of`."""
    sizes: dict[Any, Size] = {}
    left, wrong = jobs, dict[Any, str]()
    for attempt in range(2):
        if attempt and left:
            time.sleep(reading.PAUSES_S[-1])
        wrong = {}
        for number, size, problem in track(decoded_in_parallel(left), len(left)):
            if size is None:
                wrong[key_of(left[number])] = problem
            else:
                sizes[key_of(left[number])] = size
        left = [job for job in left if key_of(job) in wrong]
    return sizes, wrong


def decoded_in_parallel(jobs: list[Job]) -> Iterator[tuple[int, Size | None, str | None]]:
    workers = min(os.cpu_count() or 1, MOST_WORKERS, len(jobs) // 2)
    loader = DataLoader(Decoded(jobs), batch_size=None, num_workers=workers, worker_init_fn=shield_worker)
    return iter(loader)
