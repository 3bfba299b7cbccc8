"""Training items that can be made again: each is a function of (seed, epoch, index) alone."""

import random
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset


def item_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of one training item; numpy's seed sequence mixes the three numbers."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, index])))


class RepeatableDataset(Dataset):
    """Base: whichever worker or rank makes an item, and after any resume, it is the same.

    The index may be larger than the dataset: every repeat of an image has an index, and so draws, of its own.

    Args:
        seed: Of the run.
    """

    def __init__(self, seed: int):
        self.seed = seed
        # In shared memory: workers that live for several epochs see every change.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """The epoch that later items are drawn for."""
        self.epoch.fill_(epoch)

    def generator(self, index: int) -> np.random.Generator:
        return item_generator(self.seed, int(self.epoch), index)


class SeededDataset(RepeatableDataset):
    """Makes a dataset repeatable that draws from the generators of python, numpy and torch, as BasicSR's own do.

    The generators of the process are left as they were.
    """

    def __init__(self, dataset: Dataset, seed: int):
        super().__init__(seed)
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # torch's Dataset has no __len__ to be seen

    def __getitem__(self, index: int) -> Any:
        before = random.getstate(), np.random.get_state(), torch.get_rng_state()
        seeds = self.generator(index).integers(2**32, size=3).tolist()
        random.seed(seeds[0])
        np.random.seed(seeds[1])
        torch.random.default_generator.manual_seed(seeds[2])  # torch.manual_seed would reach for the GPU too
        try:
            return self.dataset[index % len(self)]
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])
