"""What the arbitrary-scale datasets share: options, images, the epoch, and items as tensors."""

from copy import deepcopy

import numpy as np
import torch
from torch import Tensor

from moeisr_basicsr.errors import ImageError

from .cache import SharedImages
from .image_reader import to_float
from .image_source import ImageSource
from .options import ArbitraryScaleOptions, fail, read_options
from .repeatable import RepeatableDataset

LUMA = (0.299, 0.587, 0.114)  # BT.601, of full range; equal channels keep their value


class ArbitraryScaleDataset(RepeatableDataset):
    """Base of the arbitrary-scale datasets."""

    Options: type[ArbitraryScaleOptions]  # names, ranges, meanings and defaults of the keys of its YAML section

    def __init__(self, opt: dict):
        self.opt = deepcopy(dict(opt))
        self.options = read_options(self.opt, self.Options)
        super().__init__(self.options.seed)
        self.training = self.options.phase == 'train'
        self.lq_size: tuple[int, int] = self.options.lq_size

    def open_source(self, root_key: str, meta_info_file: str | None = None) -> ImageSource:
        """The images below the folders or LMDBs that the option `root_key` names."""
        roots = self.opt.get(root_key)
        if not roots:
            raise fail(self.opt, f"the key '{root_key}' is missing.")
        where, is_lmdb = str(fail(self.opt, root_key)), self.options.backend == 'lmdb'
        roots = [roots] if isinstance(roots, str) else roots
        return ImageSource(roots, where, is_lmdb, meta_info_file, self.options.recursive)

    def open_cache(self, source: ImageSource, names: list[str]) -> SharedImages | ImageSource:
        """`source` itself, or with `cache: memory` the same images from memory."""
        if self.options.cache == 'none':
            return source
        return SharedImages(source, names, keeps_damaged=self.opt.get('on_damaged') == 'skip')

    def pixels(self, images: SharedImages | ImageSource, name: str) -> np.ndarray:
        """(H, W, 3) uint8 or uint16 RGB, or with `grey` (H, W, 1)."""
        rgb = images.rgb(name)
        return np.rint(rgb @ np.array(LUMA)[:, None]).astype(rgb.dtype) if self.options.grey else rgb

    def lap(self, stage: str) -> None:
        """Called at the end of each stage of a training item: 'read', 'resize', 'queries', 'tensor'. Does nothing;
        `basicsr profile --data` puts a clock here."""

    def position(self, index: int, count: int) -> int:
        """Which of `count` images `index` means; in training beyond the end too, see `RepeatableDataset`."""
        if index < 0 or (not self.training and index >= count):
            raise IndexError(f'index {index} of {count}')
        return index % count


def to_tensor(image: np.ndarray) -> Tensor:
    """(H, W, C) uint8 or uint16 -> (C, H, W) fp32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(to_float(image).transpose(2, 0, 1)))


def too_small(path: str, size: tuple[int, ...], needed: str) -> ImageError:
    return ImageError(f'{path}: {size[0]} x {size[1]} pixels (rows x columns) are too small; {needed}.')
