"""What sections of an options file must be together; each section by itself is checked against `keys`.

A rule yields (keys, message) for each problem. It looks only at values that are sound by themselves, because the rest
is reported already.
"""

import re
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from moeisr_basicsr.errors import did_you_mean

from .reader import KeyPath

Problems = Iterator[tuple[KeyPath, str]]
NEEDS_LOSS = ('SRModel', 'ArbitraryScaleModel', 'MoEISRModel')


def section(data: Any, *keys: str) -> Mapping:
    """The section at `keys`; an empty one where there is none."""
    for key in keys:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data if isinstance(data, Mapping) else {}


def phases(data: dict, is_train: bool) -> Problems:
    """Training has one `train` dataset and `val` ones; testing has `test` or `val` ones; names differ."""
    datasets = data.get('datasets')
    if not isinstance(datasets, Mapping):
        return
    words, usual = ('train, val, val_2, ... in training', ('train', 'val', 'val_2'))
    if not is_train:
        words, usual = ('test, test_2, ... (or val, ...) in testing', ('test', 'test_2', 'val'))
    names: dict[str, str] = {}
    for phase in datasets:
        if not re.fullmatch(r'train|val(_.+)?' if is_train else r'(test|val)(_.+)?', phase):
            yield ('datasets', phase), f'a dataset must be called {words}.{did_you_mean(phase, usual)}'
        name = section(datasets, phase).get('name')
        if phase != 'train' and isinstance(name, str) and names.setdefault(name, phase) != phase:
            message = f"'{name}' is also the name of {names[name]}: their results would overwrite each other."
            yield ('datasets', phase, 'name'), message
    if usual[0] not in datasets and (is_train or not datasets):
        yield ('datasets',), f"the key '{usual[0]}' is missing."


def training(data: dict) -> Problems:
    """What only training needs."""
    train, dataset, val = section(data, 'train'), section(data, 'datasets', 'train'), section(data, 'val')
    if data.get('train') is None:
        yield (), "the key 'train' is missing (training)."
    elif train and data.get('model_type') in NEEDS_LOSS and not (train.get('pixel_opt') or train.get('perceptual_opt')):
        yield ('train',), "a loss is missing: the key 'pixel_opt'."
    for key in ('batch_size_per_gpu', 'num_worker_per_gpu'):
        if dataset and dataset.get(key) is None:
            yield ('datasets', 'train'), f"the key '{key}' is missing."
    if val and val.get('val_freq') is None:
        yield ('val',), "the key 'val_freq' is missing (iterations between two validations)."


def testing(data: dict) -> Problems:
    """A network without weights would be measured as it was drawn at random."""
    path, val = section(data, 'path'), section(data, 'val')
    if path.get('pretrain_network_g') is None and val.get('needs_weights') is not False:
        message = (
            "the key 'pretrain_network_g' is missing: a network without weights would be tested. One that needs no "
        )
        yield ('path',), f'{message}file is tested with val: needs_weights: false.'


def routing(data: dict) -> Problems:
    """The balance loss has a share for every expert, and one thing decides what a test may cost."""
    val, experts = section(data, 'val'), section(data, 'network_g').get('experts')
    target = section(data, 'train', 'balance_opt').get('target')
    if not isinstance(experts, list) or not all(isinstance(entry, (list, dict)) for entry in experts):
        experts = target
    if isinstance(target, list) and isinstance(experts, list) and len(target) != len(experts):
        message = f'must have a share for each of the {len(experts)} experts; got {len(target)}.'
        yield ('train', 'balance_opt', 'target'), message
    if None not in (val.get('budget'), val.get('cost_weight')):
        yield ('val', 'cost_weight'), 'give either budget or cost_weight, not both.'


def channels(data: dict) -> Problems:
    """The network takes as many channels as each dataset gives, as far as both are known."""
    network = section(data, 'network_g')
    wanted = network.get('in_channels', 3)
    for name in section(data, 'datasets') if network.get('type') in ('MoEISR', 'LIIF', 'LTE') else ():
        dataset = section(data, 'datasets', name)
        if str(dataset.get('type')).startswith('ArbitraryScale'):
            given, advice = 1 if dataset.get('grey') else 3, 'grey: true of a dataset gives 1, without it there are 3'
        elif dataset.get('type') in ('PairedImageDataset', 'SingleImageDataset'):
            given, advice = 1 if dataset.get('color') == 'y' else 3, 'color: y gives 1, without it there are 3'
        else:
            continue
        if isinstance(wanted, int) and wanted != given:
            yield ('datasets', name), f'gives {given} channels, and network_g: in_channels is {wanted}; {advice}.'


def check_together(data: dict, is_train: bool) -> Problems:
    """All rules."""
    phase = training(data) if is_train else testing(data)
    return chain(phases(data, is_train), phase, routing(data), channels(data))
