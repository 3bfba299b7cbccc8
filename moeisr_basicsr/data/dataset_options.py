"""Checked reading of a dataset's options. Every error names the dataset, the key, the value, and what is allowed."""

import math
from typing import Any

from moeisr_basicsr.errors import UserError, did_you_mean

PHASES = ('train', 'val', 'test')


class DatasetOptions:
    """The `datasets: <section>` mapping of one dataset; it is read, never changed.

    Args:
        opt: The mapping.
    """

    def __init__(self, opt: dict):
        self.opt = opt
        self.name = opt.get('name', opt.get('type', 'dataset'))

    def fail(self, message: str) -> UserError:
        return UserError(f'dataset {self.name}: {message}')

    def required(self, key: str) -> Any:
        """The value of a key that must be there.

        Raises:
            UserError: It is missing.
        """
        if self.opt.get(key) is None:
            raise self.fail(f"the key '{key}' is missing.")
        return self.opt[key]

    def choice(self, key: str, allowed: tuple[str, ...], default: str) -> str:
        value = self.opt.get(key, default)
        if value not in allowed:
            raise self.fail(f"{key} must be one of {', '.join(allowed)}; got '{value}'.{did_you_mean(value, allowed)}")
        return value

    def whole(self, key: str, default: int, least: int) -> int:
        """A whole number."""
        value = self.opt.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.fail(f'{key} must be a whole number of at least {least}; got {value}.')
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.opt.get(key, default)
        if not isinstance(value, bool):
            raise self.fail(f'{key} must be true or false; got {value}.')
        return value

    def text(self, key: str, default: str | None = None) -> str | None:
        value = self.opt.get(key)
        return default if value is None else str(value)

    def phase(self) -> str:
        return self.choice('phase', PHASES, 'train')

    def seed(self) -> int:
        """`seed`; or `manual_seed` of the run, which the training loop hands on; or 0."""
        seed = self.opt.get('seed')
        if seed is None:
            seed = self.opt.get('manual_seed') or 0
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise self.fail(f'seed must be a whole number of at least 0; got {seed}.')
        return seed

    def scale_range(self, default: tuple[float, float]) -> tuple[float, float]:
        """`scale_range: [least, greatest]` of the factors to draw."""
        value = self.opt.get('scale_range')
        if value is None:
            return default
        if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(map(_is_factor, value)):
            raise self.fail(f'scale_range must be [least, greatest], two factors of at least 1; got {value}.')
        if value[0] > value[1]:
            raise self.fail(f'scale_range must rise: [{value[1]}, {value[0]}] instead of {list(value)}.')
        return float(value[0]), float(value[1])

    def scale(self) -> tuple[float, float] | None:
        """The fixed `scale`, one factor or [rows, columns], as a pair; None without one."""
        value = self.opt.get('scale')
        if value is None:
            return None
        pair = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
        if len(pair) != 2 or not all(map(_is_factor, pair)):
            raise self.fail(f'scale must be a factor of at least 1, or two of them [rows, columns]; got {value}.')
        return float(pair[0]), float(pair[1])


def _is_factor(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 1
