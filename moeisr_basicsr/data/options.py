"""The options of the arbitrary-scale datasets: what they may be, what they mean, their defaults.

The check of an options file reads these models (class attribute `Options` of a dataset) beside what the loaders read of
every dataset.
"""

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from moeisr_basicsr.errors import UserError, did_you_mean
from moeisr_basicsr.options.values import FactorPair, Factors, Folder, Key, Positive, Section, Text

BACKENDS = ('disk', 'lmdb')
Size = Positive | Annotated[list[Positive], Field(min_length=2, max_length=2)]


class ArbitraryScaleOptions(Section):
    """What both datasets read."""

    phase: Literal['train', 'val', 'test'] = Key("set from the section's name", 'train')
    dataroot_gt: Folder = Key('folder or LMDB of the HR images')
    meta_info_file: Text = Key('text file that lists the images', None)
    recursive: bool = Key('also take the images of the folders below', False)
    grey: bool = Key('one channel, the luma of colours; for networks with in_channels and out_channels 1', False)
    scale: Factors = Key('fixed factor, or [rows, columns]', None)
    cache: Literal['none', 'memory'] = Key('memory keeps the decoded images, for all workers at once', 'none')
    lq_size: Size = Key('side of the LR training patch, or [rows, columns]', 48)
    sample_q: Positive = Key('queries per training item, at most the pixels of the LR patch', 2304)
    use_flip: bool = Key('random flips', True)
    use_rot: bool = Key('random transposition, for square patches only (default: where they are square)', None)

    @field_validator('sample_q')
    @classmethod
    def _no_more_than_pixels(cls, value: int, info: ValidationInfo) -> int:
        most = math.prod(rows_cols(info.data.get('lq_size', value)))
        if value > most:
            reason = 'at a factor of 1 an HR patch has no more pixels'
            raise ValueError(f'must be at most the {most} pixels of the LR patch: {reason}; got {value}.')
        return value

    @field_validator('use_rot')
    @classmethod
    def _keeps_the_shape(cls, value: bool | None, info: ValidationInfo) -> bool | None:
        rows, cols = rows_cols(info.data.get('lq_size', 1))
        if value and rows != cols:
            raise ValueError(
                f'must be false with patches of {rows} x {cols}: transposed ones fit in no batch with them.'
            )
        return value


class ImageOptions(ArbitraryScaleOptions):
    """Of ArbitraryScaleImageDataset."""

    downsample: Literal['matlab', 'pil'] = Key(
        'bicubic that makes the LR image (default: pil in training, matlab in validation)', None
    )
    scale_range: FactorPair = Key('smallest and largest factor in training; [1, 4] where no scale is given', None)
    asymmetric: bool = Key('draw a factor for the rows and another for the columns', False)

    @field_validator('scale_range')
    @classmethod
    def _rises(cls, value: list[float] | None) -> list[float] | None:
        if value is not None and value[0] > value[1]:
            raise ValueError(f'must rise; got {value}.')
        return value

    @model_validator(mode='after')
    def _has_scale(self) -> Any:
        if self.phase != 'train' and self.scale is None:
            raise ValueError("the key 'scale' is missing: the factor to evaluate at, or [rows, columns].")
        return self


class PairedOptions(ArbitraryScaleOptions):
    """Of ArbitraryScalePairedDataset."""

    dataroot_lq: Folder = Key('folder or LMDB of the LR images')
    filename_tmpl: Text = Key('name of the LR image, with {} for that of its HR image', '{}')


def read_options(opt: Mapping[str, Any], model: type[ArbitraryScaleOptions]) -> Any:
    """The options of one dataset with defaults; `scale` and `lq_size` as pairs, `downsample`, `use_rot` and `seed`
    decided, and `backend`.

    Raises:
        UserError: A value is not allowed. The message names the dataset, the key, the value, and what is allowed.
    """
    from moeisr_basicsr.options.check import message_of  # which knows all registered classes

    given = {key: opt[key] for key in model.model_fields if opt.get(key) is not None}
    try:
        options = model(**given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = first['loc'][:1]
        words = message_of(first, key, model, given)
        raise fail(opt, ' '.join([*map(str, key), words]) if first['type'] != 'missing' else words) from None
    backend = (opt.get('io_backend') or {}).get('type', 'disk')
    if backend not in BACKENDS:
        hint = did_you_mean(backend, BACKENDS)
        raise fail(opt, f'io_backend: type must be one of {", ".join(BACKENDS)}; got {backend!r}.{hint}')
    lq_size = rows_cols(options.lq_size)
    decided = {
        'backend': backend,
        'seed': opt.get('manual_seed') or 0,
        'scale': None if options.scale is None else rows_cols(options.scale),
        'lq_size': lq_size,
        'use_rot': lq_size[0] == lq_size[1] if options.use_rot is None else options.use_rot,
    }
    if isinstance(options, ImageOptions):  # as the published protocols
        decided['downsample'] = options.downsample or ('pil' if options.phase == 'train' else 'matlab')
    return SimpleNamespace(**dict(options) | decided)


def rows_cols(value: Any) -> tuple:
    """A value for both axes, or one for each, as a pair."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value, value)


def fail(opt: Mapping[str, Any], message: str) -> UserError:
    return UserError(f'dataset {opt.get("name", opt.get("type", ""))}: {message}')
