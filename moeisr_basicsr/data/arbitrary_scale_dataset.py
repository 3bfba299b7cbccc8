"""Datasets for any scale: HR images alone, or own pairs of LR and HR images.

Items, both datasets (RGB, fp32, [0, 1]; row before column):
    training    lq (3, h, h), gt (Q, 3), coord (Q, 2), cell (Q, 2), scale (2,), lq_path, gt_path
    validation  lq (3, h, w), gt (3, H, W), scale (2,), lq_path, gt_path
"""

import difflib
import math
import os

import numpy as np
import torch
from basicsr.utils.registry import DATASET_REGISTRY
from torch import Tensor

from .base import ArbitraryScaleDataset, to_tensor, too_small
from .options import ImageOptions, PairedOptions
from .pairs import align_pair, draw_pair_patch
from .resize import METHODS, resize
from .sampling import draw_crop, draw_queries, draw_scale, round_half_up

EPS_FLOOR = 1e-9  # LIIF, SRImplicitDownsampled: H / s may fall short of a whole number by rounding


@DATASET_REGISTRY.register()
class ArbitraryScaleImageDataset(ArbitraryScaleDataset):
    """HR images; the LR image is made on the fly by bicubic shrinking.

    Training follows LIIF: a factor s is drawn, an HR patch of round(lq_size * s) is cut out at random and shrunk to
    lq_size with 8 (or 16) bits, both are flipped and transposed, and `sample_q` of the HR patch's pixels become
    queries. An HR image that is smaller than the patch gets the largest factor that it allows; smaller than lq_size
    times the least factor is an error that names it.

    Validation takes the whole image at the fixed `scale`: the LR size is floor(HR / s), the HR image is cropped to
    round(LR * s); for a whole s that is floor(HR / s) * s.

    Args:
        opt: `dataroot_gt` (required); `io_backend`; `meta_info_file`; `downsample`: matlab or pil (default: pil in
            training, matlab in validation, as the published protocols); `seed`, `repeat`, `cache`: none or memory.
            Training: `scale_range` [least, greatest] (default [1, 4], or the fixed `scale`); `asymmetric`: rows and
            columns get factors of their own; `lq_size` 48; `sample_q` 2304; `use_flip`, `use_rot`: true.
            Validation: `scale`, a factor or [rows, columns] (required).

    Raises:
        UserError: An option is missing or not allowed, or an image is damaged or too small.
    """

    Options = ImageOptions

    def __init__(self, opt: dict):
        super().__init__(opt)
        options = self.options
        training = self.phase == 'train'
        self.downsample = options.choice('downsample', METHODS, 'pil' if training else 'matlab')
        self.asymmetric = options.flag('asymmetric', False)
        self.scale = options.scale()
        if not training and self.scale is None:
            raise options.fail("the key 'scale' is missing: a factor, or [rows, columns], to validate at.")
        self.scale_range = options.scale_range(default=(1.0, 4.0))
        # A scale_range is about training alone, so it wins over the `scale` that a run gives to all its datasets.
        self.draws_scale = training and ('scale_range' in self.opt or self.scale is None)
        self.source = self.open_source('dataroot_gt', options.text('meta_info_file'))
        self.names = self.source.names
        self.images = self.open_cache(self.source, self.names)

    def __len__(self) -> int:
        return len(self.names) * self.repeat

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        name = self.names[self.position(index, len(self.names))]
        path = self.source.path(name)
        image = self.images.rgb(name)
        self.lap('read')
        item = self.train_item(image, path, index) if self.phase == 'train' else self.val_item(image, path)
        return {**item, 'lq_path': path, 'gt_path': path}

    def train_item(self, image: np.ndarray, path: str, index: int) -> dict[str, Tensor]:
        rng = self.generator(index)
        crop = self.crop_size(self.draw_factors(rng), image.shape[:2], path)
        top, left = draw_crop(rng, image.shape[:2], crop)
        hr_patch = image[top : top + crop[0], left : left + crop[1]]  # (R, S, 3)
        lq_patch = resize(np.ascontiguousarray(hr_patch), (self.lq_size, self.lq_size), self.downsample)
        self.lap('resize')
        augment = self.augmentation(rng)
        hr_patch, lq_patch = augment(hr_patch), augment(lq_patch)
        queries = draw_queries(rng, hr_patch, self.sample_q)
        self.lap('queries')
        scale = torch.tensor(hr_patch.shape[:2], dtype=torch.float32) / self.lq_size
        item = {'lq': to_tensor(lq_patch), **queries._asdict(), 'scale': scale}
        self.lap('tensor')
        return item

    def draw_factors(self, rng: np.random.Generator) -> tuple[float, float]:
        return draw_scale(rng, self.scale_range, self.asymmetric) if self.draws_scale else self.scale

    def crop_size(self, scale: tuple[float, float], size: tuple[int, int], path: str) -> tuple[int, int]:
        """(rows, columns) of the HR patch; a factor that `size` does not allow is lowered, on both axes if they are to
        be equal."""
        largest = [n / self.lq_size for n in size]
        if self.draws_scale:
            if not self.asymmetric:
                largest = [min(largest)] * 2
            lowered = [min(s, most) for s, most in zip(scale, largest)]
            least = [self.scale_range[0]] * 2
        else:
            lowered = least = scale
        if any(factor < at_least or factor > most for factor, at_least, most in zip(lowered, least, largest)):
            rows, cols = (round_half_up(self.lq_size * factor) for factor in least)
            raise too_small(path, size, f'lq_size {self.lq_size} and the least factor need {rows} x {cols}')
        return tuple(round_half_up(self.lq_size * factor) for factor in lowered)

    def val_item(self, image: np.ndarray, path: str) -> dict[str, Tensor]:
        lq_size = tuple(math.floor(n / s + EPS_FLOOR) for n, s in zip(image.shape[:2], self.scale))
        if min(lq_size) < 1:
            raise too_small(path, image.shape[:2], f'scale {self.opt["scale"]} leaves no LR pixel')
        rows, cols = (min(round_half_up(n * s), most) for n, s, most in zip(lq_size, self.scale, image.shape[:2]))
        gt = np.ascontiguousarray(image[:rows, :cols])
        lq = resize(gt, lq_size, self.downsample)
        return {'lq': to_tensor(lq), 'gt': to_tensor(gt), 'scale': torch.tensor([rows / lq_size[0], cols / lq_size[1]])}


@DATASET_REGISTRY.register()
class ArbitraryScalePairedDataset(ArbitraryScaleDataset):
    """Own pairs of LR and HR images; the factor follows from their sizes, per axis.

    LR and HR image must show the same area. Where HR / LR is a whole number n except for a rest of less than n rows or
    columns (as in many published sets), the rest is cut off; `scale` says what the factor is where that guess is wrong.

    Training cuts out an LR patch of lq_size at random; the queries are drawn from the HR pixels whose centres lie
    inside it, at any real factor. Validation takes whole images.

    Args:
        opt: `dataroot_lq`, `dataroot_gt` (required); `filename_tmpl`: name of the LR image from that of its HR image,
            without suffix (default '{}'); `io_backend`; `meta_info_file`: lists the HR images; `scale`: factor or
            [rows, columns], HR images are cropped to round(LR * scale); `seed`, `repeat`, `cache`.
            Training: `lq_size` 48; `sample_q` 2304; `use_flip`, `use_rot`: true.

    Raises:
        UserError: An option is missing or not allowed, an image has no partner, or an image is damaged, too small, or
            does not fit its partner.
    """

    Options = PairedOptions

    def __init__(self, opt: dict):
        super().__init__(opt)
        options = self.options
        self.scale = options.scale()
        self.gt_source = self.open_source('dataroot_gt', options.text('meta_info_file'))
        self.lq_source = self.open_source('dataroot_lq', None)
        self.pairs = self.find_pairs(options.text('filename_tmpl', '{}'))
        self.gt_images = self.open_cache(self.gt_source, [gt for _, gt in self.pairs])
        self.lq_images = self.open_cache(self.lq_source, [lq for lq, _ in self.pairs])

    def find_pairs(self, template: str) -> list[tuple[str, str]]:
        """(LR name, HR name) for every HR image. Suffixes need not agree: a JPEG may have a PNG partner."""
        if '{}' not in template:
            raise self.options.fail(f"filename_tmpl must hold '{{}}', the HR image's name; got '{template}'.")
        by_stem = {}
        for name in self.lq_source.names:
            stem = self.stem(name)
            if stem in by_stem:
                raise self.options.fail(
                    f'{self.lq_source.path(name)} and {by_stem[stem]} could both be the partner of one HR image.'
                )
            by_stem[stem] = name
        pairs, taken = [], {}  # taken: LR name -> its HR image
        for name in self.gt_source.names:
            wanted = template.format(self.stem(name))
            if wanted not in by_stem:
                near = difflib.get_close_matches(wanted, by_stem, n=1)
                raise self.options.fail(
                    f'{self.gt_source.path(name)} has no partner {wanted} in {self.lq_source.root}.'
                    + (f" Nearest: '{by_stem[near[0]]}'; check filename_tmpl." if near else '')
                )
            partner = by_stem[wanted]
            if taken.setdefault(partner, name) != name:
                raise self.options.fail(
                    f'{self.gt_source.path(name)} and {taken[partner]} would both have the partner '
                    f'{self.lq_source.path(partner)}.'
                )
            pairs.append((partner, name))
        return pairs

    def stem(self, name: str) -> str:
        return name if self.gt_source.backend == 'lmdb' else os.path.splitext(os.path.basename(name))[0]

    def __len__(self) -> int:
        return len(self.pairs) * self.repeat

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        lq_name, gt_name = self.pairs[self.position(index, len(self.pairs))]
        paths = {'lq_path': self.lq_source.path(lq_name), 'gt_path': self.gt_source.path(gt_name)}
        lq, gt = self.lq_images.rgb(lq_name), self.gt_images.rgb(gt_name)
        self.lap('read')
        rows, cols = align_pair(lq.shape[:2], gt.shape[:2], self.scale, paths)
        gt = gt[:rows, :cols]
        if self.phase != 'train':
            scale = torch.tensor([rows / lq.shape[0], cols / lq.shape[1]])
            return {'lq': to_tensor(lq), 'gt': to_tensor(gt), 'scale': scale, **paths}
        if min(lq.shape[:2]) < self.lq_size:
            raise too_small(paths['lq_path'], lq.shape[:2], f'lq_size is {self.lq_size}')
        rng = self.generator(index)
        patch = draw_pair_patch(rng, lq, gt, self.lq_size, self.sample_q, self.augmentation)
        self.lap('queries')
        item = {'lq': to_tensor(patch.lq), **patch.queries._asdict(), 'scale': patch.scale, **paths}
        self.lap('tensor')
        return item
