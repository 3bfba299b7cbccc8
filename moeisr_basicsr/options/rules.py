"""What the keys of an options file must be together; each key by itself is checked against the tables.

A rule yields (keys, message) for each problem. It looks only at values that are sound by themselves, because the rest
is reported already.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from moeisr_basicsr.core.decoder import FAMILIES
from moeisr_basicsr.errors import did_you_mean

from .reader import KeyPath
from .schema import DATASET_OURS
from .typed import is_known, registered, signature_keys

Problems = Iterator[tuple[KeyPath, str]]
TRAIN_PHASES = re.compile(r'train|val(_.+)?')
TEST_PHASES = re.compile(r'(test|val)(_.+)?')
SUM_TOLERANCE = 1e-6  # of shares that add up to 1


def section(data: Any, *keys: str) -> Mapping:
    """The section at `keys`; an empty one where there is none."""
    for key in keys:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data if isinstance(data, Mapping) else {}


def numbers(values: Any, length: int | None = None) -> bool:
    """Whether `values` is a list of numbers."""
    return (
        isinstance(values, list)
        and (length is None or len(values) == length)
        and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    )


def check_together(data: dict, is_train: bool) -> Problems:
    """All rules."""
    yield from phases(data, is_train)
    for name, dataset in section(data, 'datasets').items():
        if isinstance(dataset, Mapping):
            yield from folders(dataset, ('datasets', name))
            if isinstance(dataset.get('type'), str) and dataset['type'] in DATASET_OURS:
                yield from patches(dataset, ('datasets', name), data)
    yield from network(section(data, 'network_g'), ('network_g',))
    yield from training(data, is_train)
    val = section(data, 'val')
    if val.get('budget') is not None and val.get('cost_weight') is not None:
        yield ('val', 'cost_weight'), 'give either budget or cost_weight, not both.'


def phases(data: dict, is_train: bool) -> Problems:
    """Training has one `train` dataset and `val` ones; testing has `test` or `val` ones; names differ."""
    datasets = data.get('datasets')
    if not isinstance(datasets, Mapping):
        return
    allowed = TRAIN_PHASES if is_train else TEST_PHASES
    words = 'train, val, val_2, ... in training' if is_train else 'test, test_2, ... (or val, ...) in testing'
    names: dict[str, str] = {}
    for phase, dataset in datasets.items():
        if not allowed.fullmatch(phase):
            near = did_you_mean(phase, ('train', 'val', 'val_2') if is_train else ('test', 'test_2', 'val'))
            yield ('datasets', phase), f'a dataset must be called {words}.{near}'
        name = section(dataset).get('name')
        if phase != 'train' and isinstance(name, str):
            if name in names:
                yield (
                    ('datasets', phase, 'name'),
                    (f"'{name}' is also the name of {names[name]}: their results would overwrite each other."),
                )
            names.setdefault(name, phase)
    if is_train and 'train' not in datasets:
        yield ('datasets',), "the key 'train' is missing."
    if not is_train and not datasets:
        yield ('datasets',), "a test needs at least one dataset, called 'test'."


def folders(dataset: Mapping, at: KeyPath) -> Problems:
    """What BasicSR's datasets ask of their folders."""
    kind = dataset.get('type')
    entry = registered('DATASET', kind) if isinstance(kind, str) else None
    if entry is None or not is_known(entry) or kind in DATASET_OURS:
        return
    roots = {name: dataset.get(name) for name in ('dataroot_gt', 'dataroot_lq')}
    if not any(roots.values()):
        yield at, 'a dataset needs dataroot_gt or dataroot_lq.'
    is_lmdb = section(dataset, 'io_backend').get('type') == 'lmdb'
    for name, root in roots.items():
        if is_lmdb and isinstance(root, str) and not root.endswith('.lmdb'):
            yield (*at, name), f"the name of an LMDB folder must end in '.lmdb'; got {root!r}."


def patches(dataset: Mapping, at: KeyPath, data: dict) -> Problems:
    """Arbitrary-scale datasets: patches that hold the queries, factors that rise, a factor to evaluate at."""
    lq_size, sample_q = dataset.get('lq_size', 48), dataset.get('sample_q', 2304)
    if all(isinstance(value, int) and value > 0 for value in (lq_size, sample_q)) and sample_q > lq_size**2:
        yield (
            (*at, 'sample_q'),
            (
                f'must be at most lq_size squared, {lq_size**2}: at a factor of 1 an HR patch has no '
                f'more pixels; got {sample_q}.'
            ),
        )
    limits = dataset.get('scale_range')
    if numbers(limits, 2) and limits[0] > limits[1]:
        yield (*at, 'scale_range'), f'must rise; got {limits}.'
    scale = dataset.get('scale', data.get('scale'))
    if at[1] != 'train' and dataset['type'] == 'ArbitraryScaleImageDataset' and scale is None:
        yield at, "the key 'scale' is missing: the factor to evaluate at, or [rows, columns]."


def network(options: Mapping, at: KeyPath) -> Problems:
    """What this package's constructors would refuse."""
    entry = registered('ARCH', options['type']) if isinstance(options.get('type'), str) else None
    if entry is None or not entry.__module__.startswith('moeisr_basicsr.'):
        return
    if options['type'] == 'MoEISR' and options.get('hidden_dim') is not None and options.get('decoder') != 'lte':
        yield (*at, 'hidden_dim'), "belongs to the decoder 'lte'."
    if options['type'] == 'MoEISR':
        yield from shared_layers(options, at)
    if isinstance(options.get('hidden_dim'), int) and options['hidden_dim'] % 2:
        yield (*at, 'hidden_dim'), f'must be even; got {options["hidden_dim"]}.'
    channels = [options.get(key, 3) for key in ('in_channels', 'out_channels')]
    skip = options.get('skip', 'bilinear' if options['type'] == 'LTE' else 'none')
    if skip != 'none' and channels[0] != channels[1]:
        yield (*at, 'skip'), f"'{skip}' needs in_channels = out_channels; got {channels[0]} and {channels[1]}."
    encoder = section(options, 'encoder')
    if encoder.get('type') == 'SwinIREncoder':
        yield from swinir(encoder, (*at, 'encoder'))


def swinir(options: Mapping, at: KeyPath) -> Problems:
    """SwinIR's sizes fit together."""
    entry = registered('ARCH', options['type'])
    arguments, keys = inspect.signature(entry).parameters, signature_keys(entry).table
    sizes = {name: options.get(name, arguments[name].default) for name in inspect.signature(entry.unfit).parameters}
    if all(keys[name].kind.accepts(size) for name, size in sizes.items()) and (problem := entry.unfit(**sizes)):
        yield at, problem


def shared_layers(options: Mapping, at: KeyPath) -> Problems:
    """`shared_layers` fits the decoder and the experts."""
    family = FAMILIES.get(str(options.get('decoder', 'liif')))
    count, experts = options.get('shared_layers', 0), options.get('experts')
    sound = isinstance(count, int) and count >= 0 and isinstance(experts, list) and all(map(numbers, experts))
    if family and sound and experts and (problem := family.unshareable(experts, count)):
        yield (*at, 'shared_layers'), problem


def experts_loss(data: dict) -> Problems:
    """`experts_opt` is a loss of experts, and gets the answers of all of them."""
    loss, network = section(data, 'train', 'experts_opt'), section(data, 'network_g')
    if not loss or not network:
        return
    entry = registered('LOSS', loss['type']) if isinstance(loss.get('type'), str) else None
    if entry is not None and is_known(entry) and loss['type'] != 'MoEExpertLoss':
        yield ('train', 'experts_opt', 'type'), f'must be MoEExpertLoss, or a loss of your own; got {loss["type"]}.'
    if loss.get('fit_temperature') is not None and not loss.get('routing_weight'):
        yield ('train', 'experts_opt', 'fit_temperature'), 'needs a routing_weight above 0, the weight of the fit.'
    if loss.get('fit_temperature') is not None and section(data, 'train', 'temperature'):
        yield (
            ('train', 'temperature'),
            ('has no part in a fitted routing (experts_opt: fit_temperature): it has no noise.'),
        )
    kind, experts, shared = (network.get(key) for key in ('expert_grad', 'experts', 'shared_layers'))
    deepest = max(map(len, experts), default=0) if isinstance(experts, list) and all(map(numbers, experts)) else 4
    if kind != 'naive' and (kind == 'sampled' or not isinstance(shared, int) or shared < deepest):
        yield (
            ('train', 'experts_opt'),
            (
                'needs training that runs every expert on every query: network_g: expert_grad '
                f'naive, or exact with shared_layers: {deepest}.'
            ),
        )


def balance_loss(data: dict) -> Problems:
    """Groups of scale factors, and a target that fits them and the experts."""
    options = section(section(data, 'train'), 'balance_opt')
    bounds, target = options.get('scale_bounds') or [], options.get('target')
    if numbers(bounds) and bounds != sorted(set(bounds)):
        yield ('train', 'balance_opt', 'scale_bounds'), f'must rise; got {bounds}.'
    experts = section(data, 'network_g').get('experts')
    key = ('train', 'balance_opt', 'target')
    by_group = isinstance(target, list) and bool(target) and all(map(numbers, target))
    if by_group and numbers(bounds) and len(target) != len(bounds) + 1:
        yield key, f'must be shares for each of the {len(bounds) + 1} groups of scale_bounds; got {len(target)} lists.'
        return
    for shares in target if by_group else [target] if numbers(target) else []:
        if isinstance(experts, list) and all(map(numbers, experts)) and len(shares) != len(experts):
            yield key, f'must have a share for each of the {len(experts)} experts; got {len(shares)}.'
        elif abs(sum(shares) - 1) > SUM_TOLERANCE:
            yield key, f'must be shares that add up to 1; got {shares}.'


def training(data: dict, is_train: bool) -> Problems:
    """Losses and schedules that fit the network."""
    train = section(data, 'train')
    ours = data.get('model_type') in ('ArbitraryScaleModel', 'MoEISRModel')
    if (
        is_train
        and train
        and (ours or data.get('model_type') == 'SRModel')
        and not any(train.get(key) for key in ('pixel_opt', 'perceptual_opt'))
    ):
        yield ('train',), "a loss is missing: the key 'pixel_opt'."
    temperature = section(train, 'temperature')
    if temperature.get('type', 'constant') != 'constant':
        for name in ('end', 'total_iter'):
            if name not in temperature:
                yield ('train', 'temperature'), f"the key '{name}' is missing; {temperature['type']} needs it."
    yield from experts_loss(data)
    yield from balance_loss(data)
