"""The Gumbel temperature as a pure function of the iteration, so that a resumed run needs no state for it."""

import math

from moeisr_basicsr.errors import UserError, did_you_mean

SCHEDULES = ('constant', 'linear', 'exponential', 'cosine')


def check_temperature(options: dict) -> None:
    """Validate `train: temperature`.

    Args:
        options: `type` (one of `SCHEDULES`), `start`, and for all but `constant` also `end` and `total_iter`.

    Raises:
        UserError: An unknown type, a missing key, or a value out of range.
    """
    kind = options.get('type', 'constant')
    if kind not in SCHEDULES:
        raise UserError(
            f'train: temperature: type must be one of {", ".join(SCHEDULES)}; got {kind!r}.'
            f'{did_you_mean(kind, SCHEDULES)}'
        )
    for key in ('start',) if kind == 'constant' else ('start', 'end', 'total_iter'):
        value = options.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise UserError(f'train: temperature: {key} must be a number above 0; got {value!r}.')


def temperature_at(options: dict, iteration: int) -> float:
    """The temperature at `iteration` (the first is 1); `end` from iteration `total_iter` on.

    Args:
        options: As `check_temperature` accepts them.
        iteration: Training iteration.
    """
    kind = options.get('type', 'constant')
    start = float(options['start'])
    if kind == 'constant':
        return start
    end = float(options['end'])
    done = min(max(iteration - 1, 0) / max(options['total_iter'] - 1, 1), 1.0)
    if kind == 'linear':
        return start + (end - start) * done
    if kind == 'exponential':
        return start * (end / start) ** done
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))
