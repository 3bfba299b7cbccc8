"""Optimizers and learning-rate schedulers from their options. The names that there are: see `options.registered`."""

import inspect
from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from moeisr_basicsr.errors import UserError, did_you_mean
from moeisr_basicsr.options.registered import optimizer_classes, scheduler_classes


def check_options(where: str, options: dict, classes: dict[str, type]) -> tuple[type, dict]:
    """The class named by `type`, and the other options as its keyword arguments.

    Raises:
        UserError: An unknown `type` or an option that the class does not have.
    """
    arguments = {key: value for key, value in options.items() if key != 'type'}
    name = options.get('type')
    if name not in classes:
        raise UserError(
            f'{where}: type must be one of {", ".join(sorted(classes))}; got {name!r}.{did_you_mean(name, classes)}'
        )
    known = [key for key in inspect.signature(classes[name]).parameters if key not in ('params', 'optimizer')]
    for key in arguments:
        if key not in known:
            raise UserError(
                f'{where}: {name} has no option {key!r}; it has {", ".join(known)}.{did_you_mean(key, known)}'
            )
    return classes[name], arguments


def build_optimizer(options: dict, params: Iterable[nn.Parameter]) -> Optimizer:
    """An optimizer from `{'type': 'AdamW', 'lr': 1e-4, ...}`.

    Raises:
        UserError: An unknown type or option, or a value that the optimizer refuses.
    """
    optimizer, arguments = check_options('train: optim_g', options, optimizer_classes())
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}  # betas
    try:
        return optimizer(params, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f'train: optim_g: {options["type"]} refuses its options: {error}') from error


def build_scheduler(options: dict, optimizer: Optimizer, total_iter: int = 0) -> LRScheduler:
    """A scheduler from `{'type': 'MultiStepLR', 'milestones': [...], ...}`, stepped once per iteration.

    Args:
        total_iter: Iterations that it has to last for.

    Raises:
        UserError: An unknown type or option, a value that the scheduler refuses, or a schedule that ends too early.
    """
    scheduler, arguments = check_options('train: scheduler', options, scheduler_classes())
    ends = {
        'CosineAnnealingRestartLR': ('periods', sum(arguments.get('periods', []))),
        'OneCycleLR': (
            'total_steps',
            arguments.get('total_steps') or (arguments.get('epochs') or 0) * (arguments.get('steps_per_epoch') or 0),
        ),
    }
    key, end = ends.get(options['type'], ('', total_iter))
    if end < total_iter:  # both fail in the middle of the run
        raise UserError(
            f'train: scheduler: {key} of {options["type"]} cover {end} iterations; total_iter is {total_iter}.'
        )
    try:
        return scheduler(optimizer, **arguments)
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f'train: scheduler: {options["type"]} refuses its options: {error}') from error


def step_schedulers(schedulers: list[LRScheduler], iteration: int, warmup_iter: int) -> None:
    """Move every scheduler to `iteration` and scale its rate by the linear warm-up.

    BasicSR writes the warm-up rate over the scheduler's, and MultiStepRestartLR goes on from whatever it finds: the
    rate then stays a little too low for ever. Here the scheduled rate is put back first, so that warm-up is a factor
    on top of any schedule.
    """
    for scheduler in schedulers:
        groups = scheduler.optimizer.param_groups
        if iteration > 1:
            for group, lr in zip(groups, scheduler.get_last_lr()):
                group['lr'] = lr
            scheduler.step()
        if iteration < warmup_iter:
            for group, lr in zip(groups, scheduler.get_last_lr()):
                group['lr'] = lr * iteration / warmup_iter
