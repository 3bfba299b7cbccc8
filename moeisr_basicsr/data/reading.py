"""Reads that fail: tried again after a pause, and replaced by other samples where the options say so."""

import time
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch.utils.data import Dataset

from moeisr_basicsr.errors import ImageError

PAUSES_S = (1.0, 2.0, 4.0)  # a share that restarts or a cable that is put back; a damaged file costs them once
DAMAGED = 'damaged'  # key of an item: why other samples were left out for it, one line each
REPLACEMENTS = 10  # for one item; a share that is gone for good must end the run
REPEATS = 1_000_000  # more than an epoch can have of one image: replacements share no draws with its samples
T = TypeVar('T')


def retried(read: Callable[[], T], name: Hashable, failed: set) -> T:
    """What `read` returns, tried again after each of `PAUSES_S` where it raises an ImageError.

    Args:
        read: Reads something.
        name: What.
        failed: Names that no pause has helped; they are tried once.

    Raises:
        ImageError: The last attempt's.
    """
    for pause in () if name in failed else PAUSES_S:
        try:
            return read()
        except ImageError:
            time.sleep(pause)
    failed.add(name)
    result = read()
    failed.discard(name)
    return result


class ReplaceDamaged(Dataset):
    """A training dataset whose unusable samples are replaced by others.

    Which sample stands in depends on the index alone: resumed and distributed runs see the same ones as long as the
    same files are damaged. Items get the key `damaged`.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # torch's Dataset has no __len__ to be seen

    def __getitem__(self, index: int) -> dict[str, Any]:
        problems: list[str] = []
        while True:
            try:
                item = self.dataset[index + len(problems) * (REPEATS * len(self) + 1)]
                return {**item, DAMAGED: '\n'.join(problems)}
            except ImageError as error:
                problems.append(str(error))
                if len(problems) > REPLACEMENTS:
                    raise
