"""Training that can be repeated: the order of samples, and items that are functions of (seed, epoch, index) alone."""

import random
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import torch
from basicsr.data.data_sampler import EnlargedSampler as BasicSREnlargedSampler
from torch.utils.data import Dataset

from moeisr_basicsr.errors import ImageError, UserError

from .reading import retried


def item_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of one training item; numpy's seed sequence mixes the three numbers."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, index])))


class RepeatableDataset(Dataset):
    """Base: whichever worker or rank makes an item, and after any resume, it is the same.

    The index may be larger than the dataset: every repeat of an image has an index, and so draws, of its own.
    """

    def __init__(self, seed: int):
        self.seed = seed
        # In shared memory: workers that live for several epochs see every change.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        """Number of images."""
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        """The epoch that later items are drawn for."""
        self.epoch.fill_(epoch)

    def generator(self, index: int) -> np.random.Generator:
        return item_generator(self.seed, int(self.epoch), index)


class SeededDataset(RepeatableDataset):
    """Makes a dataset of others repeatable, which draws from the generators of python, numpy and torch, as BasicSR's
    own do. They are left as they were.

    Reads that fail are tried again, and what BasicSR's own datasets raise becomes one line that names the files.
    """

    def __init__(self, dataset: Dataset, seed: int):
        super().__init__(seed)
        self.dataset = dataset
        self.opt = getattr(dataset, 'opt', {})
        self.paths = getattr(dataset, 'paths', None)
        self.failed: set[int] = set()  # images that could not be read

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # torch's Dataset has no __len__ to be seen

    def __getitem__(self, index: int) -> Any:
        position = index % len(self)
        return retried(lambda: self._draw(index, position), position, self.failed)

    def _draw(self, index: int, position: int) -> Any:
        before = random.getstate(), np.random.get_state(), torch.get_rng_state()
        seeds = self.generator(index).integers(2**32, size=3).tolist()
        random.seed(seeds[0])
        np.random.seed(seeds[1])
        torch.random.default_generator.manual_seed(seeds[2])  # torch.manual_seed would reach for the GPU too
        try:
            return self.dataset[position]
        except (UserError, MemoryError):
            raise
        except Exception as error:
            is_own = type(self.dataset).__module__.startswith('basicsr.')
            entry = f'image {position}' if self.paths is None else self.paths[position]
            files = ' and '.join(map(str, entry.values())) if isinstance(entry, dict) else str(entry)
            # OpenCV gives None for what it cannot decode, and BasicSR goes on with it.
            if isinstance(error, OSError) or (is_own and isinstance(error, (AttributeError, TypeError, cv2.error))):
                raise ImageError(f'{files}: missing, damaged or no image ({reason_of(error)}).') from error
            if not is_own:
                raise
            raise UserError(f'dataset {self.opt.get("name", "")}: {files}: {reason_of(error)}') from error
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])


def reason_of(error: Exception) -> str:
    """What an exception says, on one line."""
    if isinstance(error, KeyError):
        return f'the key {error} is missing'
    if isinstance(error, OSError) and error.strerror:
        return f'{error.filename}: {error.strerror}' if error.filename else error.strerror
    return ' '.join(' '.join(map(str, error.args)).split()) or type(error).__name__


class EnlargedSampler(BasicSREnlargedSampler):
    """BasicSR's sampler: the same order on every rank. A dataset with `set_epoch` is told the
    epoch, and gets an index of its own for every repeat of an image (BasicSR takes it modulo the number of images), so
    that repeats differ in their draws.

    Attributes:
        start: Samples of this rank to leave out at the beginning of the next epoch, for a resumed run; `set_epoch`
            resets it to 0.
    """

    def __init__(self, dataset: Dataset, num_replicas: int | None, rank: int | None, ratio: float = 1):
        super().__init__(dataset, num_replicas or 1, rank or 0, ratio)
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator()
        generator.manual_seed(self.epoch)
        order = torch.randperm(self.total_size, generator=generator)[self.rank :: self.num_replicas]
        if not hasattr(self.dataset, 'set_epoch'):
            order = order % len(self.dataset)
        return iter(order[self.start :].tolist())

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of `epoch`, from its beginning."""
        super().set_epoch(epoch)
        self.start = 0
        if hasattr(self.dataset, 'set_epoch'):
            self.dataset.set_epoch(epoch)
