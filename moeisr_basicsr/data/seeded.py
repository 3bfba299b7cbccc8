"""Repeatable items of datasets that draw from global generators, as BasicSR's own do."""

import random
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .sampling import item_generator


class SeededDataset(Dataset):
    """Makes an item a function of (seed, epoch, index), as those of the arbitrary-scale datasets are.

    Whichever worker makes it, and after any resume, it is the same. The index may be larger than the dataset: every
    repeat of an image has an index, and so draws, of its own. The generators of the process are left as they were.

    Args:
        dataset: Draws from the generators of python, numpy and torch.
        seed: Of the run.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset = dataset
        self.seed = seed
        # In shared memory: workers that live for several epochs see every change.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """The epoch that later items are drawn for."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        before = random.getstate(), np.random.get_state(), torch.get_rng_state()
        seeds = item_generator(self.seed, int(self.epoch), index).integers(2**32, size=3).tolist()
        random.seed(seeds[0])
        np.random.seed(seeds[1])
        torch.random.default_generator.manual_seed(seeds[2])  # torch.manual_seed would reach for the GPU too
        try:
            return self.dataset[index % len(self.dataset)]
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])
