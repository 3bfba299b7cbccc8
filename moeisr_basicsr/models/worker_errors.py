"""Errors from loader workers, as the dataset raised them."""

from collections.abc import Iterator
from contextlib import contextmanager

from moeisr_basicsr.errors import UserError


@contextmanager
def clear_worker_errors() -> Iterator[None]:
    """Turn a UserError that torch has wrapped in the worker's traceback back into its one line."""
    try:
        yield
    except UserError as error:
        lines = str(error).strip().splitlines()
        if len(lines) == 1:
            raise
        raise UserError(lines[-1].split('UserError: ', 1)[-1]) from error
