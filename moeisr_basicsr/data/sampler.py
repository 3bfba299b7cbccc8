"""Order of training samples: BasicSR's EnlargedSampler, with one index per repeat and a place to start from."""

from collections.abc import Iterator

import torch
from basicsr.data.data_sampler import EnlargedSampler as BasicSREnlargedSampler
from torch.utils.data import Dataset


class EnlargedSampler(BasicSREnlargedSampler):
    """BasicSR's sampler: the same order on every rank. For datasets with `set_epoch` (see `RepeatableDataset`) it also

    - yields an index of its own for every repeat of an image (BasicSR takes it modulo the number of images), so that
      repeats differ in their draws;
    - tells the dataset the epoch, which its draws depend on.

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
