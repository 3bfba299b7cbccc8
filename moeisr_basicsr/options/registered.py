"""Sections whose `type` names a class: their other keys are that class's own options.

For networks, losses, metrics, optimizers and schedulers these are the arguments of the constructor (or function), with
the ranges that its annotations state. Where they are sound, the class is built once without memory, so that what its
constructor refuses counts as a mistake in the file. A dataset, whose constructor takes one dictionary, declares a
pydantic model as its class attribute `Options`; without one its own keys pass unchecked.
"""

import functools
import importlib
import inspect
import logging
import re
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, WithJsonSchema, create_model
from pydantic_core import CoreSchema, core_schema

from .reader import KeyPath
from .values import OWN_CLASS, Free, Key, NoText, Positive, PositiveNumber, Section, listing, opened

# LBFGS needs a closure that evaluates the loss again, SparseAdam needs sparse gradients: neither fits a training step.
# The schedulers take functions, other schedulers or a metric, which a YAML file cannot give.
UNFIT: tuple[str, ...] = (
    'Optimizer',
    'LBFGS',
    'SparseAdam',
    'LRScheduler',
    'LambdaLR',
    'MultiplicativeLR',
    'SequentialLR',
)
UNFIT += ('ChainedScheduler', 'ReduceLROnPlateau')


def registered(name: str) -> dict[str, Any]:
    """What one of BasicSR's registries holds ('ARCH', 'DATASET', 'LOSS', 'METRIC', 'MODEL'), BasicSR's own last."""
    for package in ('archs', 'data', 'losses', 'metrics', 'models'):  # the registries fill up on import
        importlib.import_module(f'basicsr.{package}')
    registry = getattr(importlib.import_module('basicsr.utils.registry'), f'{name}_REGISTRY')
    entries: dict[str, Any] = {}
    for key, entry in sorted(registry, key=lambda item: is_basicsr(item[1])):
        entries.setdefault(key.removesuffix('_basicsr'), entry)  # the suffix gives way to somebody's class of that name
    return entries


def is_basicsr(entry: Any) -> bool:
    """Whether BasicSR itself defines a class or function."""
    return entry.__module__.split('.')[0] == 'basicsr'


def _classes(module: object, base: type) -> dict[str, type]:
    classes = {
        name: entry for name, entry in vars(module).items() if inspect.isclass(entry) and issubclass(entry, base)
    }
    return {name: entry for name, entry in classes.items() if not name.startswith('_') and name not in UNFIT}


def optimizer_classes() -> dict[str, type]:
    """Every class of torch.optim that a training step can drive, by name."""
    return _classes(torch.optim, torch.optim.Optimizer)


def scheduler_classes() -> dict[str, type]:
    """BasicSR's schedulers by BasicSR's names, and those of torch.optim.lr_scheduler that numbers describe."""
    from basicsr.models import lr_scheduler

    return {
        **_classes(torch.optim.lr_scheduler, torch.optim.lr_scheduler.LRScheduler),
        'MultiStepLR': lr_scheduler.MultiStepRestartLR,
        'MultiStepRestartLR': lr_scheduler.MultiStepRestartLR,
        'CosineAnnealingRestartLR': lr_scheduler.CosineAnnealingRestartLR,
    }


class Arguments(Section):
    """The arguments of what `type` names."""

    fills_defaults: ClassVar[bool] = False
    type: str = Key('class')


class NestedArguments(Arguments):
    """Of a network in a network, which is given the channels of the image."""

    num_in_ch: Positive = Key('channels of the image', 3)


class OptimizerArguments(Arguments):
    lr: PositiveNumber = Key('learning rate')


class MetricArguments(Arguments):
    better: Literal['higher', 'lower'] = Key('which value is the best one', 'higher')


@functools.lru_cache(maxsize=256)
def signature_model(
    function: Any, base: type[Section] = Arguments, leave_out: tuple[str, ...] = (), passes_on: Any = None
) -> type[Section]:
    """The arguments of a class or function as a model; one with **kwargs also takes unknown keys.

    A section with a `type` in the arguments of a network, such as `encoder`, is a network too.

    Args:
        function: What `type` names.
        base: The keys that every such section has.
        leave_out: Arguments that no file gives.
        passes_on: The class or function that gets its **kwargs; then there are no unknown keys.
    """
    try:
        hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function, include_extras=True)
    except (AttributeError, NameError, TypeError):  # names that exist for a type checker only
        hints = {}
    about = described_arguments(function)
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD and passes_on is not None:
            for key, field in signature_model(passes_on, base).model_fields.items():
                fields.setdefault(key, (field.annotation, field))
        elif parameter.kind is parameter.VAR_KEYWORD:
            if base is not MetricArguments or not is_basicsr(function):  # its metrics take `better` that way
                base = opened(base)
        elif parameter.kind is not parameter.VAR_POSITIONAL and name not in (*leave_out, *base.model_fields):
            is_number = isinstance(parameter.default, (int, float)) and not isinstance(parameter.default, bool)
            hint = hints.get(name, NoText if is_number else Any)
            declared = (mark for mark in getattr(hint, '__metadata__', ()) if inspect.isclass(mark))
            hint = next((mark for mark in declared if issubclass(mark, Section)), hint)  # Annotated[dict, OptionsModel]
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[name] = (Annotated[dict, NESTED] if hint is dict else hint, Key(about.get(name, ''), default))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # arguments called `copy` or `json` hide methods of the model; none is called
        return create_model(function.__name__, __base__=base, **fields)


def described_arguments(function: Any) -> dict[str, str]:
    """The meanings under 'Args:' of a Google docstring."""
    _, _, section = (inspect.getdoc(function) or '').partition('\nArgs:\n')
    section = re.split(r'^\S', section, maxsplit=1, flags=re.MULTILINE)[0]
    entries = re.split(r'^    (\w+)(?: \(.*?\))?: ', section, flags=re.MULTILINE)[1:]
    return {name: ' '.join(meaning.split()) for name, meaning in zip(entries[::2], entries[1::2])}


@dataclass(frozen=True)
class Typed:
    """Annotation of a section with a `type`.

    Args:
        noun: What `type` names, for messages.
        entries: The names that there are, with their classes or functions.
        model: The keys of the section, of a class or function.
        before: Arguments that come before those of the file when the class is built; None: it is not built.
        is_nested: Whether a section without `type` is allowed, with any keys.
    """

    noun: str
    entries: Callable[[], Mapping[str, Any]]
    model: Callable[..., type[Section]] = signature_model
    before: Callable[[], tuple] | None = None
    is_nested: bool = False

    def words(self) -> str:
        """The names that there are, for messages."""
        return f'the name of {self.noun}: {listing(list(self.entries()))}'

    def model_of(self, value: Any) -> type[Section]:
        """The keys of the section `value`."""
        entries = self.entries()
        name = value.get('type') if isinstance(value, dict) else None
        if isinstance(name, str) and name in entries:
            more = getattr(entries[name], 'passes_on', None)
            return self.model(entries[name]) if more is None else self.model(entries[name], passes_on=more(value))
        if self.is_nested and name is None:
            return Free
        advice = OWN_CLASS if 'registered' in self.noun else ''
        schema = WithJsonSchema({'words': self.words(), 'enum': list(entries), 'advice': advice})
        known = Annotated[Literal[tuple(entries)], schema]  # type: ignore[valid-type]  # known at run time only
        fields: dict[str, Any] = {'type': (known, Key('class'))}
        return create_model('Unknown', __base__=opened(Arguments), **fields)

    def check(self, value: Any) -> dict[str, Any]:
        """The checked section."""
        assert isinstance(value, dict)
        options = self.model_of(value).model_validate(value).as_dict(value)
        if check_ready := getattr(self.entries().get(value.get('type', '')), 'check_ready', None):
            check_ready()  # that what it needs is installed, before a long run
        arguments = {name: argument for name, argument in options.items() if name != 'type'}
        if self.before is not None and (reason := refusal(self.entries()[value['type']], self.before, arguments)):
            raise ValueError(f'{value["type"]} cannot be built from these options: {" ".join(reason.split())}')
        return options

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: Any) -> dict[str, Any]:
        return {'words': f'a section whose `type` is {self.words()}'}


def locate(annotation: Any, value: Any, loc: Sequence[str | int]) -> tuple[KeyPath, type[BaseModel] | None, Any]:
    """Follow a location of pydantic's, or the keys of `--force_yml`, through options.

    Args:
        annotation: The type of `value`, first a model.
        value: The options.
        loc: Keys; places in a list and members of a union may follow.

    Returns:
        The keys, the model that declares the last of them (None: the user chooses the names), the section it is in.
    """
    keys: KeyPath = ()
    owner, section = None, value
    for name in loc:
        marker = next((mark for mark in getattr(annotation, '__metadata__', ()) if isinstance(mark, Typed)), None)
        model = annotation if marker is None else marker.model_of(value)
        item = typing.get_args(annotation)[1:] if typing.get_origin(annotation) is dict else ()
        if not item and not (inspect.isclass(model) and issubclass(model, BaseModel)):
            break
        keys, owner, section = (*keys, name), None if item else model, value
        value = value.get(name) if isinstance(value, Mapping) else None
        if item:
            annotation = item[0]
        else:
            field = model.model_fields.get(str(name))
            annotation = None if field is None else field.annotation
            if field is not None and field.metadata:
                annotation = Annotated[(annotation, *field.metadata)]
    return keys, owner, section


@contextmanager
def quiet() -> Iterator[None]:
    """Without the lines that BasicSR logs of each network it builds: this one is thrown away."""
    logger = logging.getLogger('basicsr')
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


def refusal(entry: Any, before: Callable[[], tuple], arguments: Mapping[str, Any]) -> str | None:
    """What a constructor has against its arguments, or None. Other errors are left to the real construction."""
    for device in ('meta', 'cpu'):  # some constructors read values back, which `meta` does not have
        try:
            with quiet(), torch.device(device), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter('ignore')
                entry(*before(), **arguments)
            return None
        except (ValueError, AssertionError) as error:
            return str(error)
        except TypeError as error:
            if 'argument' in str(error):
                return str(error)
        except Exception:  # whatever a constructor of the user's raises
            continue
    return None


def model_with(base: type[Section], *leave_out: str) -> Callable[..., type[Section]]:
    return functools.partial(signature_model, base=base, leave_out=leave_out)


def registry(name: str) -> Callable[[], dict[str, Any]]:
    return functools.partial(registered, name)


def one_parameter() -> tuple[list[torch.nn.Parameter]]:
    return ([torch.nn.Parameter(torch.zeros(1))],)


def one_optimizer() -> tuple[torch.optim.Optimizer]:
    return (torch.optim.SGD(*one_parameter(), lr=1.0),)


metric_model = model_with(MetricArguments, 'img', 'img2', 'scale')
NESTED = Typed('a registered network', registry('ARCH'), model_with(NestedArguments), is_nested=True)
Network = Annotated[dict, Typed('a registered network', registry('ARCH'), before=tuple)]
Loss = Annotated[dict, Typed('a registered loss', registry('LOSS'), before=tuple)]
PerceptualLoss = Annotated[dict, Typed('a registered loss', registry('LOSS'))]  # building it fetches a network
Metric = Annotated[dict, Typed('a registered metric', registry('METRIC'), metric_model)]
OptimizerSection = Annotated[
    dict, Typed('an optimizer', optimizer_classes, model_with(OptimizerArguments, 'params'), one_parameter)
]
SchedulerSection = Annotated[
    dict, Typed('a scheduler', scheduler_classes, model_with(Arguments, 'optimizer'), one_optimizer)
]
