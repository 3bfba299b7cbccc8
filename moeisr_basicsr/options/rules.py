"""What sections of an options file must be together; each section by itself is checked against `keys`.

A rule yields (keys, message) for each problem. It looks only at values that are sound by themselves, because the rest
is reported already.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from moeisr_basicsr.errors import did_you_mean

from .reader import KeyPath

Problems = Iterator[tuple[KeyPath, str]]
TRAIN_PHASES = re.compile(r'train|val(_.+)?')
TEST_PHASES = re.compile(r'(test|val)(_.+)?')
NEEDS_LOSS = ('SRModel', 'ArbitraryScaleModel', 'MoEISRModel')


def section(data: Any, *keys: str) -> Mapping:
    """The section at `keys`; an empty one where there is none."""
    for key in keys:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data if isinstance(data, Mapping) else {}


def check_together(data: dict, is_train: bool) -> Problems:
    """All rules."""
    yield from phases(data, is_train)
    if is_train:
        yield from training(data)
    yield from balance(data)


def phases(data: dict, is_train: bool) -> Problems:
    """Training has one `train` dataset and `val` ones; testing has `test` or `val` ones; names differ."""
    datasets = data.get('datasets')
    if not isinstance(datasets, Mapping):
        return
    allowed = TRAIN_PHASES if is_train else TEST_PHASES
    words = 'train, val, val_2, ... in training' if is_train else 'test, test_2, ... (or val, ...) in testing'
    names: dict[str, str] = {}
    for phase in datasets:
        if not allowed.fullmatch(phase):
            near = did_you_mean(phase, ('train', 'val', 'val_2') if is_train else ('test', 'test_2', 'val'))
            yield ('datasets', phase), f'a dataset must be called {words}.{near}'
        name = section(datasets, phase).get('name')
        if phase != 'train' and isinstance(name, str):
            if name in names:
                message = f"'{name}' is also the name of {names[name]}: their results would overwrite each other."
                yield ('datasets', phase, 'name'), message
            names.setdefault(name, phase)
    if is_train and 'train' not in datasets:
        yield ('datasets',), "the key 'train' is missing."
    if not is_train and not datasets:
        yield ('datasets',), "a test needs at least one dataset, called 'test'."


def training(data: dict) -> Problems:
    """What only training needs."""
    train, dataset, val = section(data, 'train'), section(data, 'datasets', 'train'), section(data, 'val')
    if data.get('train') is None:
        yield (), "the key 'train' is missing (training)."
    elif (
        train
        and data.get('model_type') in NEEDS_LOSS
        and not train.get('pixel_opt')
        and not train.get('perceptual_opt')
    ):
        yield ('train',), "a loss is missing: the key 'pixel_opt'."
    for key in ('batch_size_per_gpu', 'num_worker_per_gpu') if dataset else ():
        if dataset.get(key) is None:
            yield ('datasets', 'train'), f"the key '{key}' is missing."
    if val and val.get('val_freq') is None:
        yield ('val',), "the key 'val_freq' is missing (iterations between two validations)."


def balance(data: dict) -> Problems:
    """The balance loss has a share for every expert."""
    target = section(data, 'train', 'balance_opt').get('target')
    experts = section(data, 'network_g').get('experts')
    if not (
        isinstance(target, list) and isinstance(experts, list) and all(isinstance(hidden, list) for hidden in experts)
    ):
        return
    if len(target) != len(experts):
        message = f'must have a share for each of the {len(experts)} experts; got {len(target)}.'
        yield ('train', 'balance_opt', 'target'), message
