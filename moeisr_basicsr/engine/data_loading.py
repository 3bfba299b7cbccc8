"""Loaders of a run: endless training batches with a known place in the epoch, and validation images.

The YAML's keys are BasicSR's. Workers live for the whole run: no import storm each epoch.
"""

import random
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from basicsr.data import build_dataset
from torch.utils.data import DataLoader, get_worker_info

from moeisr_basicsr.data.repeatable import EnlargedSampler, SeededDataset
from moeisr_basicsr.errors import UserError
from moeisr_basicsr.models.worker_errors import clear_worker_errors

from .distributed import Ranks
from .signals import shield_worker

EPOCH_SEED_STRIDE = 1_000_003  # a prime: seeds of (run, epoch, rank) stay apart


class Place(NamedTuple):
    """A place in the training data."""

    epoch: int = 0
    samples: int = 0  # already taken of this epoch, by this rank

    def state(self, ranks: Ranks) -> dict:
        """As a checkpoint keeps it."""
        return {'epoch': self.epoch, 'samples': self.samples, 'world_size': ranks.world_size}


class TrainData:
    """The training set as endless batches.

    Args:
        opt: The whole options; reads `datasets: train` and `manual_seed`.
        ranks: This process among all.
        device: Where batches go.

    Raises:
        UserError: An epoch holds less than one batch.
    """

    def __init__(self, opt: dict, ranks: Ranks, device: torch.device):
        train_opt = opt['datasets']['train']
        self.seed = opt['manual_seed']
        self.ranks = ranks
        self.device = device
        self.batch = int(train_opt['batch_size_per_gpu'])
        self.dataset = build_dataset({**train_opt, 'manual_seed': self.seed})
        if not hasattr(self.dataset, 'set_epoch'):
            self.dataset = SeededDataset(self.dataset, self.seed)
        ratio = train_opt.get('dataset_enlarge_ratio', 1)
        self.sampler = EnlargedSampler(self.dataset, ranks.world_size, ranks.rank, ratio)
        self.batches_per_epoch = len(self.sampler) // self.batch
        if self.batches_per_epoch == 0:
            raise UserError(
                f'datasets: train: {len(self.dataset)} images x dataset_enlarge_ratio {ratio} / '
                f'{ranks.world_size} ranks make no batch of {self.batch}; raise dataset_enlarge_ratio.'
            )
        workers = int(train_opt.get('num_worker_per_gpu', 0))
        self.prefetch = train_opt.get('prefetch_mode') == 'cuda' and device.type == 'cuda'
        self.generator = torch.Generator()  # worker seeds: drawing them must not disturb torch's own generator
        self.loader = DataLoader(
            self.dataset,
            self.batch,
            sampler=self.sampler,
            drop_last=True,
            num_workers=workers,
            pin_memory=bool(train_opt.get('pin_memory', False)) and device.type == 'cuda',
            persistent_workers=workers > 0 and bool(train_opt.get('persistent_workers', True)),
            worker_init_fn=start_worker,
            generator=self.generator,
            prefetch_factor=max(2, train_opt.get('num_prefetch_queue', 2)) if workers > 0 else None,
        )

    def batches(self, place: Place) -> Iterator[tuple[Place, dict]]:
        """(the place after this batch, the batch), from `place` on, epoch after epoch."""
        while True:
            self.sampler.set_epoch(place.epoch)
            self.sampler.start = place.samples
            self.generator.manual_seed((self.seed + EPOCH_SEED_STRIDE * place.epoch + self.ranks.rank) % 2**63)
            source = iter(self.loader)
            if self.prefetch:
                source = prefetch_to_device(source, self.device)
            with clear_worker_errors():
                for data in source:
                    place = Place(place.epoch, place.samples + self.batch)
                    yield place, data
            place = Place(place.epoch + 1)

    def place_from(self, state: dict) -> tuple[Place, list[str]]:
        """The place that a checkpoint names, and what is not exact about it.

        With another number of ranks the epoch goes on after the samples that all ranks together have taken.
        """
        if 'place' not in state:  # BasicSR's own
            return Place(int(state.get('epoch', 0))), [
                'the checkpoint does not know its place in the epoch: the epoch starts again'
            ]
        saved = state['place']
        place = Place(saved['epoch'], saved['samples'])
        if saved['world_size'] == self.ranks.world_size:
            return place, []
        samples = saved['samples'] * saved['world_size'] // self.ranks.world_size
        return Place(place.epoch, samples), [
            f'the checkpoint is of {saved["world_size"]} ranks, this run has {self.ranks.world_size}: weights, '
            'optimizer, EMA, schedule and best metrics are exact, the order of samples and all random draws are '
            'equal in distribution only, and the batch of all ranks is another unless batch_size_per_gpu makes up '
            'for it'
        ]


def start_worker(worker: int) -> None:
    """Seed python and numpy of a loader worker from torch's seed, which differs by rank and worker.

    No item of ours depends on it; a dataset with a `set_epoch` of its own may.
    """
    shield_worker()
    seed = torch.initial_seed()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    assert get_worker_info().id == worker


def prefetch_to_device(source: Iterator[dict], device: torch.device) -> Iterator[dict]:
    """Copy the next batch to the GPU on a stream of its own while the current one is used."""
    stream = torch.cuda.Stream(device)
    waiting = None
    for data in source:
        with torch.cuda.stream(stream):
            data = {
                key: value.to(device, non_blocking=True) if torch.is_tensor(value) and key != 'scale' else value
                for key, value in data.items()
            }
        waiting, copied = (data, stream.record_event()), waiting
        if copied is not None:
            yield _arrive(*copied)
    if waiting is not None:
        yield _arrive(*waiting)


def _arrive(data: dict, copied: 'torch.cuda.Event') -> dict:
    current = torch.cuda.current_stream()
    current.wait_event(copied)
    for value in data.values():
        if torch.is_tensor(value) and value.is_cuda:
            value.record_stream(current)  # made on the other stream: not to be reused before this one is done
    return data


def evaluation_loaders(opt: dict, phases: tuple[str, ...]) -> list[DataLoader]:
    """One loader of single images per dataset whose section is `<phase>` or `<phase>_<anything>`, in YAML order.

    Args:
        opt: The whole options; reads `datasets`.
        phases: Such as ('val',).
    """
    loaders = []
    for section, dataset_opt in opt['datasets'].items():
        if section.split('_')[0] in phases:
            workers = int(dataset_opt.get('num_worker_per_gpu', 0))
            loaders.append(
                DataLoader(
                    build_dataset(dataset_opt),
                    batch_size=1,
                    num_workers=workers,
                    pin_memory=bool(dataset_opt.get('pin_memory', False)),
                    worker_init_fn=start_worker,
                    generator=torch.Generator(),
                )
            )
    return loaders
