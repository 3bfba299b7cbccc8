"""What happens when a loss or a gradient is not finite."""

import math

import torch
from basicsr.utils import get_root_logger
from mmengine.dist import all_gather_object
from torch import Tensor

from moeisr_basicsr.errors import UserError, did_you_mean

from .batch import Batch

ACTIONS = ('stop', 'skip')
# Skipped steps of a run. A damaged batch now and then is harmless; where every step fails, the weights or the data are
# at fault, and a run that never ends would hide it.
MOST_SKIPPED = 100


class NonFiniteLossError(RuntimeError):
    """Training met a loss or gradient that is not finite; the weights are those before this iteration."""


class NonFiniteGuard:
    """Stops training, or skips the step and counts.

    Args:
        train_opt: Reads `non_finite` (stop | skip).

    Raises:
        UserError: An unknown action.
    """

    def __init__(self, train_opt: dict):
        self.action = train_opt.get('non_finite', 'stop')
        if self.action not in ACTIONS:
            raise UserError(
                f'train: non_finite must be one of {", ".join(ACTIONS)}; got {self.action!r}.'
                f'{did_you_mean(self.action, ACTIONS)}'
            )
        self.skipped = 0

    def accept(self, local: dict[str, Tensor], averaged: dict[str, float], batch: Batch, iteration: int) -> bool:
        """Whether to take this step.

        Args:
            local: This rank's watched values.
            averaged: Means over all ranks: not finite as soon as one rank's value is not, so that all ranks agree.
            batch: This rank's batch, for the report.
            iteration: Training iteration.

        Raises:
            NonFiniteLossError: The action is 'stop', or too many steps were skipped.
        """
        if all(math.isfinite(averaged[name]) for name in local):
            return True
        mine = [f'{name} = {float(value)}' for name, value in local.items() if not torch.isfinite(value)]
        reports = all_gather_object(f'{", ".join(mine)}, batch: {"; ".join(batch.describe())}' if mine else '')
        ranks = [f'rank {rank}: {report}' for rank, report in enumerate(reports) if report]
        message = f'Not finite at iteration {iteration}, {" | ".join(ranks)}'
        if self.action == 'stop':
            raise NonFiniteLossError(message)
        self.skipped += 1
        if self.skipped > MOST_SKIPPED:
            raise NonFiniteLossError(f'{message}. {MOST_SKIPPED} steps were skipped before')
        get_root_logger().warning(f'{message}. Step skipped ({self.skipped} of at most {MOST_SKIPPED}).')
        return False
