"""The options of the datasets: their defaults, and checks for datasets that are built without an options file.

The types of a file's values are checked where it is read, in `moeisr_basicsr.options`.
"""

import math
from types import SimpleNamespace
from typing import Any

from moeisr_basicsr.errors import UserError, did_you_mean

from .resize import METHODS

DEFAULTS: dict[str, Any] = {
    'phase': 'train',
    'io_backend': {},
    'meta_info_file': None,
    'cache': 'none',
    'lq_size': 48,
    'sample_q': 2304,
    'use_flip': True,
    'use_rot': True,
    'scale': None,
    'scale_range': None,  # [1, 4], or the fixed `scale`
    'asymmetric': False,
    'downsample': None,  # by phase, as the published protocols: pil in training, matlab in validation
    'filename_tmpl': '{}',
    'seed': None,  # `manual_seed` of the run, which the training loop hands on, or 0
    'manual_seed': None,
}
CHOICES = {
    'phase': ('train', 'val', 'test'),
    'backend': ('disk', 'lmdb'),
    'cache': ('none', 'memory'),
    'downsample': tuple(METHODS),
}


def read_options(opt: dict) -> SimpleNamespace:
    """The `datasets: <section>` mapping with defaults, and `scale` as a pair; `opt` is not changed.

    Raises:
        UserError: A value is not allowed. The message names the dataset, the key, the value, and what is allowed.
    """
    given = {key: value for key, value in opt.items() if value is not None}
    options = SimpleNamespace(**DEFAULTS | given)
    options.backend = options.io_backend.get('type', 'disk')
    options.downsample = options.downsample or ('pil' if options.phase == 'train' else 'matlab')
    options.seed = (options.manual_seed or 0) if options.seed is None else options.seed
    for key, allowed in CHOICES.items():
        value = getattr(options, key)
        if value not in allowed:
            raise fail(opt, f"{key} must be one of {', '.join(allowed)}; got '{value}'.{did_you_mean(value, allowed)}")
    for key, least in (('lq_size', 1), ('sample_q', 1), ('seed', 0)):
        value = getattr(options, key)
        if not isinstance(value, int) or value < least:
            raise fail(opt, f'{key} must be a whole number of at least {least}; got {value}.')
    if options.sample_q > options.lq_size**2:
        most = f'{options.lq_size**2}: at a factor of 1 an HR patch has no more pixels'
        raise fail(opt, f'sample_q must be at most lq_size squared, {most}; got {options.sample_q}.')
    if isinstance(options.scale, (int, float)):
        options.scale = [options.scale] * 2
    for key, pair in (('scale', 'a factor, or [rows, columns],'), ('scale_range', '[least, greatest]')):
        value = getattr(options, key)
        if value is not None and not (len(value) == 2 and 1 <= min(value) <= max(value) < math.inf):
            raise fail(opt, f'{key} must be {pair} of at least 1; got {given[key]}.')
    if options.scale_range is not None and options.scale_range[0] > options.scale_range[1]:
        raise fail(opt, f'scale_range must rise; got {options.scale_range}.')
    return options


def fail(opt: dict, message: str) -> UserError:
    return UserError(f'dataset {opt.get("name", opt.get("type", ""))}: {message}')
