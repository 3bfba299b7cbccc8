"""Files that are either complete or absent: temporary file, fsync, rename, fsync of the folder."""

import errno
import io
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch

TEMPORARY_SUFFIX = '.tmp'


class SaveError(OSError):
    """A file could not be written. The files that were there before are untouched."""


@contextmanager
def open_atomic(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file to write, which takes the place of `path` at the end of the `with` block: readers see the old file
    or the whole new one, after an error the old one. The folder must exist.

    Raises:
        SaveError: The disk is full, read-only or failing; the message names the file and the system's reason.
    """
    path = Path(path)
    temporary = temporary_path(path)
    try:
        with open(temporary, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise SaveError(
            error.errno or errno.EIO, f'{reason}: cannot write {path}; earlier files are untouched'
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: str | os.PathLike, write: Callable[[BinaryIO], object]) -> Path:
    """`open_atomic`, with what `write` writes to the file object that it gets."""
    with open_atomic(path) as file:
        write(file)
    return Path(path)


def save_atomic(data: object, path: str | os.PathLike) -> Path:
    """torch.save through `write_atomic`.

    The bytes are made in memory first: torch's own writer hides the system's reason behind its own error.
    """
    buffer = io.BytesIO()
    torch.save(data, buffer)
    return write_atomic(path, lambda file: file.write(buffer.getbuffer()))


def link_or_copy(source: str | os.PathLike, path: str | os.PathLike) -> Path:
    """A second name for a finished file, without its bytes where the file system can link.

    Raises:
        SaveError: As `write_atomic`.
    """
    path = Path(path)
    temporary = temporary_path(path)
    try:
        os.link(source, temporary)
        os.replace(temporary, path)
    except OSError:
        with open(source, 'rb') as origin:
            return write_atomic(path, lambda file: shutil.copyfileobj(origin, file))
    finally:
        temporary.unlink(missing_ok=True)  # rename() keeps both names where they already were the same file
    return path


def temporary_path(path: Path) -> Path:
    """A new hidden name beside `path`; short, because a name may be as long as the file system allows."""
    return path.with_name(f'.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}')


def remove_temporaries(folder: str | os.PathLike) -> None:
    """Delete what a killed process left behind in `folder`."""
    for leftover in Path(folder).glob(f'.*{TEMPORARY_SUFFIX}'):
        leftover.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    if os.name == 'nt':
        return  # Windows cannot open a folder
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
