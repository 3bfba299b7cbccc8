"""What happens when a loss or a gradient is not finite."""

import math

import torch
import torch.distributed as dist
from basicsr.utils import get_root_logger
from torch import Tensor

from moeisr_basicsr.errors import UserError, did_you_mean

from .batch import Batch

ACTIONS = ('stop', 'skip')


class NonFiniteLossError(RuntimeError):
    """Training met a loss or gradient that is not finite; the weights are those before this iteration."""


class NonFiniteGuard:
    """Stops training, or skips the step and counts.

    Args:
        train_opt: Reads `non_finite` (stop | skip) and `non_finite_limit`, the number of skipped steps that are
            tolerated in a run.

    Raises:
        UserError: An unknown action or a negative limit.
    """

    def __init__(self, train_opt: dict):
        self.action = train_opt.get('non_finite', 'stop')
        if self.action not in ACTIONS:
            raise UserError(
                f'train: non_finite must be one of {", ".join(ACTIONS)}; got {self.action!r}.'
                f'{did_you_mean(self.action, ACTIONS)}'
            )
        self.limit = train_opt.get('non_finite_limit', 100)
        if isinstance(self.limit, bool) or not isinstance(self.limit, int) or self.limit < 0:
            raise UserError(f'train: non_finite_limit must be a whole number of at least 0; got {self.limit!r}.')
        self.skipped = 0

    def accept(self, local: dict[str, Tensor], averaged: dict[str, float], batch: Batch, iteration: int) -> bool:
        """Whether to take this step.

        Args:
            local: This rank's watched values.
            averaged: Means over all ranks: not finite as soon as one rank's value is not, so that all ranks agree.
            batch: This rank's batch, for the report.
            iteration: Training iteration.

        Raises:
            NonFiniteLossError: The action is 'stop', or the limit is passed.
        """
        bad = [name for name in local if not math.isfinite(averaged[name])]
        if not bad:
            return True
        message = self._describe(local, bad, batch, iteration)
        if self.action == 'stop':
            raise NonFiniteLossError(message)
        self.skipped += 1
        if self.skipped > self.limit:
            raise NonFiniteLossError(
                f'{message}. {self.skipped} steps were skipped; train: non_finite_limit allows {self.limit}'
            )
        get_root_logger().warning(f'{message}. Step skipped ({self.skipped} of at most {self.limit}).')
        return False

    def _describe(self, local: dict[str, Tensor], bad: list[str], batch: Batch, iteration: int) -> str:
        mine = [name for name in bad if not torch.isfinite(local[name]).all()]
        guilty = [(name, float(local[name])) for name in mine]
        report = (guilty, batch.describe() if mine else [])
        reports = [report]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            reports = [None] * dist.get_world_size()
            dist.all_gather_object(reports, report)
        parts = []
        for rank, (values, images) in enumerate(reports):
            if values:
                shown = ', '.join(f'{name} = {value}' for name, value in values)
                where = f' on rank {rank}' if len(reports) > 1 else ''
                parts.append(f'{shown}{where}, batch: {"; ".join(images)}')
        return f'Not finite at iteration {iteration}: ' + ' | '.join(parts)
