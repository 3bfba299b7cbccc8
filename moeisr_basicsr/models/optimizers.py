"""Optimizers and learning-rate schedulers from their options. The names that there are: see `options.registered`."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from moeisr_basicsr.errors import UserError, did_you_mean
from moeisr_basicsr.options.registered import optimizer_classes, scheduler_classes


def build(where: str, options: dict, classes: dict[str, type], first: Any) -> Any:
    """The class that `type` names, made of `first` and of the other options.

    Raises:
        UserError: An unknown `type`, or options that the class does not take.
    """
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    name = str(arguments.pop('type', None))
    if name not in classes:
        raise UserError(
            f'{where}: type must be one of {", ".join(sorted(classes))}; got {name!r}.{did_you_mean(name, classes)}'
        )
    try:
        return classes[name](first, **arguments)
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f'{where}: {name} does not take these options: {error}') from error


def build_optimizer(options: dict, params: Iterable[nn.Parameter] | list[dict]) -> Optimizer:
    """An optimizer from `{'type': 'AdamW', 'lr': 1e-4, ...}`; errors as `build`."""
    return build('train: optim_g', options, optimizer_classes(), params)


def build_scheduler(options: dict, optimizer: Optimizer, total_iter: int = 0) -> LRScheduler:
    """A scheduler from `{'type': 'MultiStepLR', 'milestones': [...], ...}`, stepped once per iteration.

    Args:
        options: `type` and its arguments.
        optimizer: Whose learning rates it sets.
        total_iter: Iterations that it has to last for.

    Raises:
        UserError: As `build`; or a schedule that ends before the run, in the middle of which it would fail.
    """
    scheduler = build('train: scheduler', options, scheduler_classes(), optimizer)
    periods = getattr(scheduler, 'periods', None)  # of CosineAnnealingRestartLR
    end = getattr(scheduler, 'total_steps', total_iter) if periods is None else sum(periods)  # of OneCycleLR
    if end < total_iter:
        raise UserError(f'train: scheduler: {options["type"]} ends after {end} iterations; total_iter is {total_iter}.')
    return scheduler


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
