"""Loaders of a run: endless training batches with a known place in the epoch, and validation images.

The YAML's keys are BasicSR's. Workers live for the whole run: no import storm each epoch.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from basicsr.data import build_dataset
from basicsr.utils import get_root_logger
from torch.utils.data import DataLoader

from moeisr_basicsr.data.reading import DAMAGED, ReplaceDamaged
from moeisr_basicsr.data.repeatable import EnlargedSampler, RepeatableDataset, SeededDataset, reason_of
from moeisr_basicsr.errors import UserError
from moeisr_basicsr.options.registered import is_basicsr, registered

from .distributed import Ranks
from .signals import shield_worker

EPOCH_SEED_STRIDE = 1_000_003  # a prime: the workers' seeds of (run, epoch, rank) stay apart

MOST_DAMAGED = 100  # images, and 1 % of them, that `on_damaged: skip` leaves out


class Place(NamedTuple):
    """A place in the training data."""

    epoch: int = 0
    samples: int = 0  # already taken of this epoch, by this rank


class TrainData:
    """The training set as endless batches.

    Args:
        opt: The whole options; reads `datasets: train` and `manual_seed`.
        ranks: This process among all.
        device: Where the model wants the batches.

    Raises:
        UserError: An epoch holds less than one batch.
    """

    def __init__(self, opt: dict, ranks: Ranks, device: torch.device):
        train_opt = opt['datasets']['train']
        self.seed = opt['manual_seed']
        self.ranks = ranks
        self.batch = int(train_opt['batch_size_per_gpu'])
        self.dataset = open_dataset({**train_opt, 'manual_seed': self.seed}, self.seed)
        self.damaged: set[str] = set()  # what was wrong with samples that others have replaced
        self.most_damaged = min(max(len(self.dataset) // 100, 1), MOST_DAMAGED)
        ratio = train_opt.get('dataset_enlarge_ratio', 1)
        self.sampler = EnlargedSampler(self.dataset, ranks.world_size, ranks.rank, ratio)
        self.batches_per_epoch = len(self.sampler) // self.batch
        if self.batches_per_epoch == 0:
            raise UserError(
                f'datasets: train: {len(self.dataset)} images x dataset_enlarge_ratio {ratio} / '
                f'{ranks.world_size} ranks make no batch of {self.batch}; raise dataset_enlarge_ratio.'
            )
        workers = int(train_opt.get('num_worker_per_gpu', 0))
        # BasicSR's prefetch_mode cuda copies on a stream of its own. A batch of queries is about 1 MB: from pinned
        # memory its copy takes a tenth of a millisecond and waits for nothing.
        pinned = bool(train_opt.get('pin_memory', False)) or train_opt.get('prefetch_mode') == 'cuda'
        self.generator = torch.Generator()  # worker seeds: drawing them must not disturb torch's own generator
        self.loader = DataLoader(
            ReplaceDamaged(self.dataset) if train_opt.get('on_damaged') == 'skip' else self.dataset,
            self.batch,
            sampler=self.sampler,
            drop_last=True,
            num_workers=workers,
            pin_memory=pinned and device.type == 'cuda',
            persistent_workers=workers > 0 and bool(train_opt.get('persistent_workers', True)),
            worker_init_fn=shield_worker,
            generator=self.generator,
            prefetch_factor=max(2, train_opt.get('num_prefetch_queue', 2)) if workers > 0 else None,
        )

    def batches(self, place: Place) -> Iterator[tuple[Place, dict]]:
        """(the place after this batch, the batch), from `place` on, epoch after epoch.

        Raises:
            ImageError: An image cannot be used, and `on_damaged` is stop.
            UserError: More images than allowed cannot be used.
        """
        while True:
            self.sampler.set_epoch(place.epoch)
            self.sampler.start = place.samples
            self.generator.manual_seed((self.seed + EPOCH_SEED_STRIDE * place.epoch + self.ranks.rank) % 2**63)
            for data in self.loader:
                self._note_damaged(data.pop(DAMAGED, []))
                place = Place(place.epoch, place.samples + self.batch)
                yield place, data
            place = Place(place.epoch + 1)

    def _note_damaged(self, problems: list[str]) -> None:
        """Name every image that was replaced, once, and count them."""
        for problem in '\n'.join(filter(None, problems)).splitlines():
            if problem not in self.damaged:
                self.damaged.add(problem)
                count = f'{len(self.damaged)} of at most {self.most_damaged} unusable images'
                # an error, for other ranks than 0 log nothing less
                get_root_logger().error(f'{problem} Another sample takes its place ({count}).')
        if len(self.damaged) > self.most_damaged:
            raise UserError(
                f'datasets: train: on_damaged: skip leaves out at most {self.most_damaged} of {len(self.dataset)} '
                f'images, and {len(self.damaged)} cannot be used; `basicsr check` lists all. The last one: {problem}'
            )

    def place_from(self, state: dict) -> tuple[Place, list[str]]:
        """The place that a checkpoint names, and what is not exact about it.

        With another number of ranks the epoch goes on after the samples that all ranks together have taken.
        """
        if 'place' not in state:  # BasicSR's own
            note = 'the checkpoint does not know its place in the epoch: the epoch starts again'
            return Place(int(state.get('epoch', 0))), [note]
        epoch, samples, world_size = (state['place'][key] for key in ('epoch', 'samples', 'world_size'))
        if world_size == self.ranks.world_size:
            return Place(epoch, samples), []
        note = (
            f'the checkpoint is of {world_size} ranks, this run has {self.ranks.world_size}: weights, optimizer, EMA, '
            'schedule and best metrics are exact, the order of samples and all random draws are equal in distribution '
            'only, and the batch of all ranks is another unless batch_size_per_gpu makes up for it'
        )
        return Place(epoch, samples * world_size // self.ranks.world_size), [note]


def open_dataset(opt: dict, seed: int = 0) -> RepeatableDataset:
    """The dataset of one section; one of others than this package is made repeatable and readable.

    Raises:
        UserError: Its options or folders do not fit.
    """
    where, kind = f'dataset {opt.get("name", "")}: {opt["type"]}', registered('DATASET').get(opt['type'])
    if kind is not None and is_basicsr(kind):
        if many := [key for key in ('dataroot_gt', 'dataroot_lq') if isinstance(opt.get(key), list)]:
            raise UserError(f'{where} takes one folder as {many[0]}; ArbitraryScalePairedDataset takes several.')
        gt_size, scale = opt.get('gt_size'), opt.get('scale')
        if isinstance(gt_size, int) and isinstance(scale, int) and gt_size % scale:
            raise UserError(f'{where}: gt_size must be a multiple of the scale, {scale}; got {gt_size}.')
    try:
        dataset = build_dataset(opt)
    except UserError:
        raise
    except Exception as error:
        if kind is None or not is_basicsr(kind):
            raise
        raise UserError(f'{where} cannot be opened: {reason_of(error)}') from error
    return dataset if hasattr(dataset, 'set_epoch') else SeededDataset(dataset, seed)


def evaluation_loaders(opt: dict, phases: tuple[str, ...]) -> list[DataLoader]:
    """One loader of single images per dataset whose section is `<phase>` or `<phase>_<anything>`, in YAML order."""
    return [
        DataLoader(
            open_dataset(dataset_opt),
            batch_size=1,
            num_workers=int(dataset_opt.get('num_worker_per_gpu', 0)),
            pin_memory=bool(dataset_opt.get('pin_memory', False)),
            worker_init_fn=shield_worker,
            generator=torch.Generator(),  # as above
        )
        for section, dataset_opt in opt['datasets'].items()
        if section.split('_')[0] in phases
    ]
