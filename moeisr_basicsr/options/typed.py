"""Sections whose keys depend on a name: what a `type` or a `model_type` may be, and which keys come with it.

Classes of BasicSR and of this package have tables or signatures that are known to be complete. What other packages
register keeps its freedom: unknown keys of their datasets and models pass, and so do those of a network that takes
**kwargs.
"""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from moeisr_basicsr.core.decoder import FAMILIES
from moeisr_basicsr.core.mapper import GRANULARITIES, Mapper
from moeisr_basicsr.core.skip import SKIPS

from .kinds import AnyOf, Choice, Int, Kind, ListOf, Number, kind_of
from .schema import (
    BASICSR_DATASET,
    BASICSR_TOP,
    BASICSR_TRAIN,
    BASICSR_VAL,
    COUNT,
    DATASET,
    DATASET_OURS,
    DATASET_TRAIN,
    FACTOR,
    IMAGES,
    LOGGER,
    PATH,
    POSITIVE,
    TOP,
    TRAIN,
    TRAIN_MOEISR,
    TRAIN_OURS,
    VAL,
    VAL_OURS,
    Key,
    Section,
    Table,
    Typed,
)

KNOWN_PACKAGES = ('basicsr', 'moeisr_basicsr')
WIDTHS = ListOf(POSITIVE)
SHARE = Number(least=0, most=1)

# Limits of this package's constructors that an annotation cannot say; they hold in `moeisr_basicsr` only.
LIMITS: dict[str, Kind] = {
    **dict.fromkeys(
        (
            'num_in_ch',
            'num_feat',
            'num_block',
            'num_conv',
            'growth',
            'in_channels',
            'out_channels',
            'embed_dim',
            'window_size',
            'img_size',
            'hidden',
        ),
        POSITIVE,
    ),
    **dict.fromkeys(('hidden_list', 'depths', 'num_heads'), WIDTHS),
    'experts': ListOf(WIDTHS),
    'encoder': Typed('encoder'),
    'decoder': Choice(tuple(FAMILIES)),
    'skip': Choice(SKIPS),
    'config': Choice(('A', 'B')),
    'resi_connection': Choice(('1conv', '3conv')),
    'num_layers': Int(1, 5),
    'granularity': Choice(GRANULARITIES),
    'scale': FACTOR,
    'tau': Number(above=0),
    'sample_rate': Number(above=0, most=1),
    'cell_scale_max': Number(least=0),
    'hidden_dim': Int(least=2),
    'shared_layers': Int(least=0),
    'loss_weight': Number(least=0),
    'routing_weight': Number(least=0),
    'depth_emphasis': Number(least=0),
    'fit_temperature': Number(above=0),
    'scale_bounds': ListOf(Number(above=1)),
    'target': AnyOf((Choice(('uniform',)), Number(above=0, most=1), ListOf(SHARE), ListOf(ListOf(SHARE)))),
    'protocol': Choice(('benchmark', 'div2k')),
}

# LBFGS needs a closure that evaluates the loss again, SparseAdam needs sparse gradients: neither fits a training step.
UNFIT_OPTIMIZERS = ('Optimizer', 'LBFGS', 'SparseAdam')
# These take functions, other schedulers or a metric, which a YAML file cannot give.
UNFIT_SCHEDULERS = (
    'LRScheduler',
    'LambdaLR',
    'MultiplicativeLR',
    'SequentialLR',
    'ChainedScheduler',
    'ReduceLROnPlateau',
)


class Resolved(NamedTuple):
    """The keys of a section."""

    table: Table
    open: bool = False  # whether unknown keys pass
    elsewhere: Mapping[str, str] = MappingProxyType({})  # keys that are unknown here, and the type that has them
    item: Key | None = None  # what any further key is, where users choose the names


OWN_CLASS = ' A class of your own is known with --import FILE.py.'


class Type(NamedTuple):
    """One sort of sections with a `type`."""

    noun: str  # for messages
    names: Callable[[], list[str]]
    keys: Callable[[str, str], Resolved]  # of a valid `type`; the second argument is the section's own name


def registry(name: str) -> Any:
    """One of BasicSR's registries, filled: 'ARCH', 'DATASET', 'LOSS', 'METRIC', 'MODEL'."""
    import importlib

    for package in ('archs', 'data', 'losses', 'metrics', 'models'):
        importlib.import_module(f'basicsr.{package}')
    return getattr(importlib.import_module('basicsr.utils.registry'), f'{name}_REGISTRY')


def registered(name: str, entry: str) -> Any:
    """The class that BasicSR would take for `entry`, or None."""
    entries = dict(iter(registry(name)))
    return entries.get(entry, entries.get(f'{entry}_basicsr'))


def is_known(entry: Any) -> bool:
    """Whether a class or function belongs to BasicSR or to this package."""
    return entry.__module__.split('.')[0] in KNOWN_PACKAGES


def signature_keys(function: Any, leave_out: tuple[str, ...] = (), closed: bool = False) -> Resolved:
    """The arguments of a class or function as keys.

    Args:
        function: What `type` names.
        leave_out: Arguments that no file gives.
        closed: Whether unknown keys are mistakes although the function takes **kwargs.
    """
    ours = function.__module__.split('.')[0] == 'moeisr_basicsr'
    signature = inspect.signature(function)
    target = function.__init__ if inspect.isclass(function) else function
    annotations = inspect.get_annotations(target, eval_str=True) if ours else {}
    table, takes_any = {}, False
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            takes_any = True
        elif parameter.kind is not parameter.VAR_POSITIONAL and name not in leave_out:
            kind = kind_of(parameter, annotations.get(name, parameter.empty))
            null = parameter.default is None or kind.accepts(None)
            if ours:
                kind = LIMITS.get(name, kind)
                if name == 'mapper':
                    kind = Section(signature_keys(Mapper, ('in_channels', 'num_experts')).table)
            table[name] = Key(kind, '', required=parameter.default is parameter.empty, null=null)
    return Resolved(table, takes_any and not closed)


def _classes(module: object, base: type, unfit: tuple[str, ...]) -> dict[str, type]:
    return {
        name: entry
        for name, entry in vars(module).items()
        if inspect.isclass(entry) and issubclass(entry, base) and not name.startswith('_') and name not in unfit
    }


def optimizer_classes() -> dict[str, type[Optimizer]]:
    """Every class of torch.optim that a training step can drive, by name."""
    return _classes(torch.optim, Optimizer, UNFIT_OPTIMIZERS)


def basicsr_schedulers() -> dict[str, type[LRScheduler]]:
    """The schedulers that BasicSR's models build, by BasicSR's names."""
    from basicsr.models import lr_scheduler

    return {
        'MultiStepLR': lr_scheduler.MultiStepRestartLR,
        'MultiStepRestartLR': lr_scheduler.MultiStepRestartLR,
        'CosineAnnealingRestartLR': lr_scheduler.CosineAnnealingRestartLR,
    }


def scheduler_classes() -> dict[str, type[LRScheduler]]:
    """BasicSR's schedulers, and those of torch.optim.lr_scheduler that numbers describe; BasicSR's win a name."""
    return {**_classes(torch.optim.lr_scheduler, LRScheduler, UNFIT_SCHEDULERS), **basicsr_schedulers()}


def _optimizer_keys(name: str, _: str) -> Resolved:
    table = signature_keys(optimizer_classes()[name], ('params',)).table
    table['lr'] = Key(Number(above=0), 'learning rate', required=True)
    if 'betas' in table:
        table['betas'] = Key(ListOf(Number(0, 1)), 'decay of the averages')
    if 'weight_decay' in table:
        table['weight_decay'] = Key(Number(least=0), 'weight decay')
    return Resolved(table)


def _scheduler_keys(name: str, _: str) -> Resolved:
    table = signature_keys(scheduler_classes()[name], ('optimizer',)).table
    for key, kind in (
        ('milestones', ListOf(POSITIVE)),
        ('periods', ListOf(POSITIVE)),
        ('gamma', Number(above=0)),
        ('restarts', ListOf(COUNT)),
        ('eta_min', Number(least=0)),
        ('T_max', POSITIVE),
    ):
        if key in table:
            table[key] = Key(kind, '', required=table[key].required)
    return Resolved(table)


def _class_keys(name: str) -> Callable[[str, str], Resolved]:
    return lambda entry, _: signature_keys(registered(name, entry))


def _metric_keys(entry: str, _: str) -> Resolved:
    function = registered('METRIC', entry)
    # BasicSR's metrics take **kwargs only because it hands them `better` as well.
    keys = signature_keys(function, ('img', 'img2', 'scale'), closed=is_known(function))
    better = Key(Choice(('higher', 'lower')), 'which value is the best one')
    return keys._replace(table={**keys.table, 'better': better})


def _dataset_keys(entry: str, phase: str) -> Resolved:
    dataset = registered('DATASET', entry)
    in_train = {} if phase.split('_')[0] == 'train' else {'required': False}
    table = {**DATASET, **{key: Key(**{**vars(row), **in_train}) for key, row in DATASET_TRAIN.items()}}
    if entry in DATASET_OURS:
        elsewhere = {key: other for other, rows in DATASET_OURS.items() for key in rows}
        return Resolved({**table, **DATASET_OURS[entry]}, elsewhere=elsewhere)
    if is_known(dataset):
        return Resolved({**table, **IMAGES, **BASICSR_DATASET})
    # A class of somebody else may mean something else by `dataroot_gt`: only what the loader reads is checked.
    return Resolved(table, open=True)


def _names(name: str) -> Callable[[], list[str]]:
    """Ours first: messages show the first few."""

    def names() -> list[str]:
        entries = sorted(registry(name), key=lambda entry: entry[1].__module__.split('.')[0] != 'moeisr_basicsr')
        return [key.removesuffix('_basicsr') for key, _ in entries]

    return names


def _encoder_names() -> list[str]:
    """This package's encoders, and the networks of other packages."""
    return [name for name in _names('ARCH')() if name.endswith('Encoder') or not is_known(registered('ARCH', name))]


TYPES: dict[str, Type] = {
    'network': Type('a registered network', _names('ARCH'), _class_keys('ARCH')),
    'encoder': Type('a registered encoder', _encoder_names, _class_keys('ARCH')),
    'loss': Type('a registered loss', _names('LOSS'), _class_keys('LOSS')),
    'metric': Type('a registered metric', _names('METRIC'), _metric_keys),
    'dataset': Type('a registered dataset', _names('DATASET'), _dataset_keys),
    'optimizer': Type('an optimizer', lambda: list(optimizer_classes()), _optimizer_keys),
    'scheduler': Type('a scheduler', lambda: list(scheduler_classes()), _scheduler_keys),
    # BasicSR's own models build no others
    'optimizer of BasicSR': Type('an optimizer', lambda: ['Adam'], _optimizer_keys),
    'scheduler of BasicSR': Type('a scheduler', lambda: list(basicsr_schedulers()), _scheduler_keys),
}


def root_keys(data: dict, is_train: bool) -> Resolved:
    """The keys of a whole file, as its `model_type` decides."""
    name = data.get('model_type')
    model = registered('MODEL', name) if isinstance(name, str) else None
    parents = [] if model is None else [parent.__name__ for parent in inspect.getmro(model)]
    ours = model is None or 'ArbitraryScaleModel' in parents
    basicsr = model is None or (is_known(model) and not ours)
    foreign = model is not None and not is_known(model)

    top, train, val = dict(TOP), dict(TRAIN), dict(VAL)
    if ours:
        train.update(TRAIN_OURS)
        val.update(VAL_OURS)
    if model is None or 'MoEISRModel' in parents:
        train.update(TRAIN_MOEISR)
    if basicsr or foreign:
        top.update(BASICSR_TOP)
        train.update(BASICSR_TRAIN)
        val.update(BASICSR_VAL)
    if basicsr and model is not None:
        for table in (train,):
            for key, row in table.items():
                if isinstance(row.kind, Typed) and row.kind.what in ('optimizer', 'scheduler'):
                    table[key] = Key(Typed(f'{row.kind.what} of BasicSR'), row.about, row.required, row.null)

    path = dict(PATH)
    for network in [key for key in data if isinstance(key, str) and key.startswith('network_') and key not in top]:
        if basicsr or foreign:
            top[network] = Key(Typed('network'), 'a further network')
        label = network.removeprefix('network_')
        for key, like in (('pretrain_network', 'g'), ('strict_load', 'g'), ('param_key', 'g')):
            path[f'{key}_{label}'] = PATH[f'{key}_{like}']
    val['val_freq'] = Key(val['val_freq'].kind, val['val_freq'].about, required=is_train)
    top['path'] = Key(Section(path, open=foreign), 'files to start from', null=True)
    top['val'] = Key(Section(val, open=foreign), 'validation', null=True)
    top['train'] = Key(Section(train, open=foreign), 'training', required=is_train, null=not is_train)
    top['logger'] = Key(Section(LOGGER), 'logging', null=True)
    return Resolved(top, open=foreign)


def section_keys(kind: Kind, value: Any, name: str) -> Resolved:
    """The keys of the section `value`, which stands under `name`."""
    if isinstance(kind, Section):
        return Resolved(kind.table, kind.open)
    if isinstance(kind, Typed):
        entry = TYPES[kind.what]
        chosen = value.get('type')
        advice = OWN_CLASS if entry.noun.startswith('a registered') else ''
        choice = Choice(entry.names, noun=f'the name of {entry.noun}:', advice=advice)
        table = {'type': Key(choice, 'class', required=True)}
        if not isinstance(chosen, str) or chosen not in entry.names():
            return Resolved(table, open=True)  # the name is reported; what its keys may be is not known
        keys = entry.keys(chosen, name)
        return keys._replace(table={**keys.table, **table})
    return Resolved({}, open=True)
