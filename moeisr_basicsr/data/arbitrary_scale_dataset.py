"""Datasets for any scale: HR images alone, or own pairs of LR and HR images.

Items, both datasets (RGB, with `grey` one channel; fp32, [0, 1]; row before column):
    training    lq (3, h, w), gt (Q, 3), coord (Q, 2), cell (Q, 2), scale (2,), lq_path, gt_path
    validation  lq (3, h, w), gt (3, H, W), scale (2,), lq_path, gt_path
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress

import numpy as np
import torch
from basicsr.utils import get_root_logger
from basicsr.utils.registry import DATASET_REGISTRY
from torch import Tensor

from moeisr_basicsr.errors import ImageError

from .base import ArbitraryScaleDataset, to_tensor, too_small
from .image_source import ImageSource
from .options import ImageOptions, PairedOptions, fail
from .pairs import FolderRule, Pair, PairsError, align_pair, count_factors, find_pairs, patch_axis
from .resize import resize
from .sampling import draw_augmentation, draw_crop, draw_queries, draw_scale, round_half_up

EPS_FLOOR = 1e-9  # LIIF, SRImplicitDownsampled: H / s may fall short of a whole number by rounding

HEADERS = 1000  # pairs whose sizes are compared at the start; the others when they are read
SHOWN_FACTORS = 6  # in the log


@DATASET_REGISTRY.register()
class ArbitraryScaleImageDataset(ArbitraryScaleDataset):
    """HR images; the LR image is made on the fly by bicubic shrinking.

    Training follows LIIF: a factor s is drawn, an HR patch of round(lq_size * s) is cut out at random and shrunk to
    lq_size with 8 (or 16) bits, both are flipped and transposed, and `sample_q` of the HR patch's pixels become
    queries. An HR image that is smaller than the patch gets the largest factor that it allows; smaller than lq_size
    times the least factor is an error that names it.

    Validation takes the whole image at the fixed `scale`: the LR size is floor(HR / s), the HR image is cropped to
    round(LR * s); for a whole s that is floor(HR / s) * s.

    Options: see `options`; `dataroot_gt` is required, `scale` to validate.

    Raises:
        UserError: An option is missing or not allowed, or an image is damaged or too small.
    """

    Options = ImageOptions

    def __init__(self, opt: dict):
        super().__init__(opt)
        options = self.options
        if not self.training and options.scale is None:
            raise fail(opt, "the key 'scale' is missing: a factor, or [rows, columns], to validate at.")
        # A scale_range is about training alone, so it wins over the `scale` that a run gives to all its datasets.
        self.draws_scale = self.training and (options.scale_range is not None or options.scale is None)
        self.scale_range = options.scale_range or (1.0, 4.0)
        self.source = self.open_source('dataroot_gt', options.meta_info_file)
        self.names = self.paths = self.source.names
        self.images = self.open_cache(self.source, self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        path = self.names[self.position(index, len(self.names))]
        image = self.pixels(self.images, path)
        self.lap('read')
        item = self.train_item(image, path, index) if self.training else self.val_item(image, path)
        return {**item, 'lq_path': path, 'gt_path': path}

    def files(self) -> Iterator[tuple[ImageSource, str]]:
        """Every image by its source and name."""
        return ((self.source, name) for name in self.names)

    def check_sizes(self, sizes: Mapping[str, tuple[int, int]]) -> Iterator[ImageError]:
        """What is wrong with images of known (rows, columns), by name."""
        for name in dict.fromkeys(self.names):
            if name in sizes:
                try:
                    if self.training:
                        self.crop_size(self.least_scale(), sizes[name], name)
                    else:
                        self.val_sizes(sizes[name], name)
                except ImageError as error:
                    yield error

    def train_item(self, image: np.ndarray, path: str, index: int) -> dict[str, Tensor]:
        rng = self.generator(index)
        options, scale = self.options, self.options.scale
        if self.draws_scale:
            scale = draw_scale(rng, self.scale_range, options.asymmetric)
        rows, cols = self.crop_size(scale, image.shape[:2], path)
        top, left = draw_crop(rng, image.shape, (rows, cols))
        hr_patch = image[top : top + rows, left : left + cols]  # (R, S, 3)
        lq_patch = resize(np.ascontiguousarray(hr_patch), self.lq_size, options.downsample)
        self.lap('resize')
        augment = draw_augmentation(rng, options.use_flip, options.use_rot)
        hr_patch, lq_patch = augment(hr_patch), augment(lq_patch)
        queries = draw_queries(rng, hr_patch, options.sample_q)
        self.lap('queries')
        factors = torch.tensor(hr_patch.shape[:2], dtype=torch.float32) / torch.tensor(self.lq_size)
        item = {'lq': to_tensor(lq_patch), **queries, 'scale': factors}
        self.lap('tensor')
        return item

    def least_scale(self) -> tuple[float, float]:
        """The factors that every training image must allow."""
        return (self.scale_range[0], self.scale_range[0]) if self.draws_scale else self.options.scale

    def crop_size(self, scale: tuple[float, float], size: tuple[int, ...], path: str) -> tuple[int, ...]:
        """(rows, columns) of the HR patch; a drawn factor that `size` does not allow is lowered, on both axes if they
        are to be equal."""
        largest = [n / low for n, low in zip(size, self.lq_size)]
        if self.draws_scale and not self.options.asymmetric:
            largest = [min(largest)] * 2
        least = self.least_scale()
        lowered = [min(s, most) for s, most in zip(scale, largest)]
        if any(s < needed for s, needed in zip(lowered, least)):
            rows, cols = (round_half_up(low * s) for low, s in zip(self.lq_size, least))
            patch = ' x '.join(dict.fromkeys(map(str, self.lq_size)))
            raise too_small(path, size, f'lq_size {patch} and the least factor need {rows} x {cols}')
        return tuple(round_half_up(low * s) for low, s in zip(self.lq_size, lowered))

    def val_sizes(self, size: tuple[int, ...], path: str) -> tuple[tuple[int, int], tuple[int, int]]:
        """(rows, columns) of the LR image, and of the HR image that it shows."""
        scale = self.options.scale
        low = tuple(math.floor(n / s + EPS_FLOOR) for n, s in zip(size, scale))
        if min(low) < 1:
            raise too_small(path, size, f'scale {self.opt["scale"]} leaves no LR pixel')
        rows, cols = (min(round_half_up(n * s), most) for n, s, most in zip(low, scale, size))
        return (low[0], low[1]), (rows, cols)

    def val_item(self, image: np.ndarray, path: str) -> dict[str, Tensor]:
        lq_size, (rows, cols) = self.val_sizes(image.shape[:2], path)
        gt = np.ascontiguousarray(image[:rows, :cols])
        lq = resize(gt, lq_size, self.options.downsample)
        return {'lq': to_tensor(lq), 'gt': to_tensor(gt), 'scale': torch.tensor([rows / lq_size[0], cols / lq_size[1]])}


@DATASET_REGISTRY.register()
class ArbitraryScalePairedDataset(ArbitraryScaleDataset):
    """Own pairs of LR and HR images; the factor follows from their sizes, per axis.

    LR and HR image must show the same area. Where HR / LR is a whole number n except for a rest of less than n rows or
    columns (as in many published sets), the rest is cut off; `scale` says what the factor is where that guess is wrong.

    Training cuts out an LR patch of lq_size at random; the queries are drawn from the HR pixels whose centres lie
    inside it, at any real factor. Validation takes whole images.

    Options: see `options`; `dataroot_lq` and `dataroot_gt` are required, `meta_info_file` lists HR images.

    Raises:
        UserError: An option is missing or not allowed, an image has no partner, or an image is damaged, too small, or
            does not fit its partner.
    """

    Options = PairedOptions

    def __init__(self, opt: dict):
        super().__init__(opt)
        options = self.options
        if '{}' not in options.filename_tmpl:
            raise fail(opt, f"filename_tmpl must hold '{{}}', the HR image's name; got '{options.filename_tmpl}'.")
        self.gt_source = self.open_source('dataroot_gt', options.meta_info_file)
        self.lq_source = self.open_source('dataroot_lq')
        if len(self.lq_source.roots) != len(self.gt_source.roots):
            counts = f'{len(self.lq_source.roots)} and {len(self.gt_source.roots)}'
            raise fail(opt, f'dataroot_lq and dataroot_gt must list as many folders; got {counts}.')
        try:
            self.pairs = self.paths = find_pairs(self.lq_source, self.gt_source, options.filename_tmpl)
        except PairsError as error:
            error.sources = self.lq_source, self.gt_source
            raise
        self.gt_images = self.open_cache(self.gt_source, [gt for _, gt in self.pairs])
        self.lq_images = self.open_cache(self.lq_source, [lq for lq, _ in self.pairs])
        self.rules = self.folder_rules(list(self.headers()))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        lq_name, gt_name = self.pairs[self.position(index, len(self.pairs))]
        paths = {'lq_path': lq_name, 'gt_path': gt_name}
        lq, gt = self.pixels(self.lq_images, lq_name), self.pixels(self.gt_images, gt_name)
        self.lap('read')
        rows, cols = self.check_pair(Pair(lq.shape[:2], gt.shape[:2], **paths))
        gt = gt[:rows, :cols]
        if self.training:
            return {**self.train_item(lq, gt, index), **paths}
        scale = torch.tensor([rows / lq.shape[0], cols / lq.shape[1]])
        return {'lq': to_tensor(lq), 'gt': to_tensor(gt), 'scale': scale, **paths}

    def headers(self) -> Iterator[Pair]:
        """Sizes of at most HEADERS pairs, evenly spaced; those that cannot be read fail when they are asked for."""
        for lq, gt in self.pairs[:: -(-len(self.pairs) // HEADERS)]:
            with suppress(ImageError):
                sizes = (self.lq_source.header(lq)[:2], self.gt_source.header(gt)[:2])
                yield Pair(*sizes, lq, gt)

    def folder_rules(self, pairs: list[Pair]) -> list[FolderRule]:
        """What the pairs of each folder have in common; the log hears of all factors.

        Raises:
            PairsError: A pair breaks the rule of its folder.
        """
        by_folder: list[list[Pair]] = [[] for _ in self.gt_source.roots]
        for pair in pairs:
            by_folder[self.gt_source.key(pair.gt_path)[0]].append(pair)
        rules = [FolderRule.of(of_folder, self.options.scale) for of_folder in by_folder]
        counts = count_factors(pairs).most_common(SHOWN_FACTORS)
        counted = ', '.join(f'{count} of factor {factors}' for factors, count in counts)
        get_root_logger().info(f'Dataset {self.opt.get("name", "")}: {len(self.pairs)} pairs; {counted}.')
        problems = []
        for rule, of_folder in zip(rules, by_folder):
            for pair in of_folder:
                try:
                    rule.check(pair)
                except ImageError as error:
                    problems.append(str(error))
        if problems and self.opt.get('on_damaged') != 'skip':
            more = f' {len(problems) - 1} more: `basicsr check` lists them.' if len(problems) > 1 else ''
            raise PairsError(problems[0] + more, problems)
        return rules

    def check_pair(self, pair: Pair) -> tuple[int, ...]:
        """(rows, columns) of the HR image that the LR image shows.

        Raises:
            ImageError: The two do not fit, or are too small to train on.
        """
        self.rules[self.gt_source.key(pair.gt_path)[0]].check(pair)
        paths = {'lq_path': pair.lq_path, 'gt_path': pair.gt_path}
        shown = align_pair(pair.lq_size, pair.gt_size, self.options.scale, paths)
        if self.training and any(n < needed for n, needed in zip(pair.lq_size, self.lq_size)):
            patch = ' x '.join(dict.fromkeys(map(str, self.lq_size)))
            raise too_small(pair.lq_path, pair.lq_size, f'lq_size is {patch}')
        return shown

    def files(self) -> Iterator[tuple[ImageSource, str]]:
        """Every image by its source and name."""
        for lq, gt in self.pairs:
            yield self.lq_source, lq
            yield self.gt_source, gt

    def check_sizes(self, sizes: Mapping[str, tuple[int, int]]) -> Iterator[ImageError]:
        """What is wrong with images of known (rows, columns), by name."""
        for lq, gt in dict.fromkeys(self.pairs):
            if lq in sizes and gt in sizes:
                try:
                    self.check_pair(Pair(sizes[lq], sizes[gt], lq, gt))
                except ImageError as error:
                    yield error

    def train_item(self, lq: np.ndarray, gt: np.ndarray, index: int) -> dict[str, Tensor]:
        rng, size = self.generator(index), self.lq_size
        top, left = draw_crop(rng, lq.shape, size)
        augment = draw_augmentation(rng, self.options.use_flip, self.options.use_rot)
        rows = patch_axis(top, size[0], lq.shape[0], gt.shape[0], augment.flip_rows)
        cols = patch_axis(left, size[1], lq.shape[1], gt.shape[1], augment.flip_cols)
        lq_patch = augment(lq[top : top + size[0], left : left + size[1]])
        gt_patch = augment(gt[rows.start : rows.stop, cols.start : cols.stop])
        scale = [gt.shape[0] / lq.shape[0], gt.shape[1] / lq.shape[1]]
        if augment.transpose:
            rows, cols, scale = cols, rows, scale[::-1]
        cell = torch.tensor([rows.cell, cols.cell])
        queries = draw_queries(rng, gt_patch, self.options.sample_q, (rows.coord, cols.coord), cell)
        self.lap('queries')
        item = {'lq': to_tensor(lq_patch), **queries, 'scale': torch.tensor(scale)}
        self.lap('tensor')
        return item
