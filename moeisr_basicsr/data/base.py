"""What the arbitrary-scale datasets share: options, images, the epoch, and items as tensors."""

from copy import deepcopy

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from moeisr_basicsr.errors import UserError

from .cache import MODES, SharedImages
from .dataset_options import DatasetOptions
from .image_io import to_float
from .image_source import ImageSource
from .sampling import Augmentation, draw_augmentation, item_generator


class ArbitraryScaleDataset(Dataset):
    """Base of the arbitrary-scale datasets.

    A training item is a function of (seed, epoch, index) alone: whichever worker or rank makes it, it is the same. The
    index may be larger than the dataset: every repeat of an image has an index, and so draws, of its own.

    Args:
        opt: The dataset's options; not changed.

    Raises:
        UserError: An option is missing or not allowed.
    """

    def __init__(self, opt: dict):
        self.opt = deepcopy(dict(opt))
        options = self.options = DatasetOptions(self.opt)
        self.phase = options.phase()
        self.seed = options.seed()
        self.repeat = options.whole('repeat', 1, least=1)
        self.lq_size = options.whole('lq_size', 48, least=1)
        self.sample_q = options.whole('sample_q', 2304, least=1)
        if self.sample_q > self.lq_size**2:
            raise options.fail(
                f'sample_q must be at most lq_size squared, {self.lq_size**2}: at a factor of 1 an HR '
                f'patch has no more pixels; got {self.sample_q}.'
            )
        self.use_flip = options.flag('use_flip', True)
        self.use_rot = options.flag('use_rot', True)
        self.cache = options.choice('cache', MODES, 'none')
        # In shared memory: workers that live for several epochs see every change.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """The epoch that later items are drawn for."""
        self.epoch.fill_(epoch)

    def open_source(self, root_key: str, meta_info_file: str | None) -> ImageSource:
        """The images below the folder or LMDB that the option `root_key` names."""
        return ImageSource(
            self.options.required(root_key),
            f'dataset {self.options.name}: {root_key}',
            self.opt.get('io_backend'),
            meta_info_file,
        )

    def open_cache(self, source: ImageSource, names: list[str]) -> SharedImages | ImageSource:
        """`source` itself, or with `cache: memory` the same images from memory."""
        return SharedImages(source, names) if self.cache == 'memory' else source

    def generator(self, index: int) -> np.random.Generator:
        return item_generator(self.seed, int(self.epoch), index)

    def augmentation(self, rng: np.random.Generator) -> Augmentation:
        return draw_augmentation(rng, self.use_flip, self.use_rot)

    def lap(self, stage: str) -> None:
        """Called at the end of each stage of a training item; does nothing. `basicsr profile --data` puts a clock here.

        Args:
            stage: 'read' (read and decode), 'resize' (crop, shrink to LR), 'queries' (augment, draw queries and their
                coordinates) or 'tensor' (the LR patch as a tensor). Pairs are cut out and drawn in 'queries'.
        """

    def position(self, index: int, count: int) -> int:
        """Which of `count` images `index` means.

        Raises:
            IndexError: Below 0, or beyond the end in validation, where items do not repeat.
        """
        if index < 0 or (self.phase != 'train' and index >= len(self)):
            raise IndexError(f'index {index} of {len(self)}')
        return index % count


def to_tensor(image: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 or uint16 -> (3, H, W) fp32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(to_float(image).transpose(2, 0, 1)))


def too_small(path: str, size: tuple[int, int], needed: str) -> UserError:
    return UserError(f'{path}: {size[0]} x {size[1]} pixels (rows x columns) are too small; {needed}.')
