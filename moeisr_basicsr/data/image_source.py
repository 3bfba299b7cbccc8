"""Where a dataset's images come from: folders, or LMDBs, which BasicSR's FileClient reads."""

import os
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TypeVar

import lmdb
import numpy as np
from basicsr.utils import FileClient

from moeisr_basicsr.errors import ImageError, UserError, did_you_mean

from .image_reader import SUFFIXES, ImageHeader, is_image_name, read_header, read_image
from .reading import retried

CLIENT_KEY = 'images'
SIZE_AND_LEVEL = re.compile(r'\s+\([\d,\s]*\)(\s+\d+)?\s*$')  # what BasicSR writes behind a name: (h,w,c), compression
T = TypeVar('T')
_clients: dict[Path, FileClient] = {}  # shared by all datasets: a process may open an LMDB only once


class ImageSource:
    """The images of folders or LMDBs, by their paths.

    Args:
        roots: Folders, or LMDB folders with their meta_info.txt.
        option: The option that gave them, for errors.
        is_lmdb: Whether they are LMDBs.
        meta_info_file: Text file whose lines name images below the only root, or LMDB records with or without their
            suffix; BasicSR's '(h,w,c)' may follow. Without it: every image of the folders themselves, or every record.
        recursive: Also the images of folders below the roots.

    Attributes:
        names: Paths, of LMDB records with their key in place of a file.

    Raises:
        UserError: A missing folder, file or record list, or no image.
    """

    def __init__(
        self,
        roots: list[str],
        option: str,
        is_lmdb: bool = False,
        meta_info_file: str | None = None,
        recursive: bool = False,
    ):
        self.roots = [Path(root).expanduser() for root in roots]
        self.is_lmdb, self.recursive = is_lmdb, recursive
        self.names: list[str] = []
        self.failed: set[str] = set()  # names that could not be read
        self._places: dict[str, tuple[int, str]] = {}  # name -> number of its root, name below it
        if meta_info_file is not None and len(roots) > 1:
            raise UserError(f'{option}: meta_info_file lists the images of one folder; got {len(roots)} folders.')
        for number, root in enumerate(self.roots):
            if not root.is_dir():
                raise UserError(f'{option}: {root} is not a folder.')
            _clients.pop(root.resolve(), None)  # an LMDB may have been made anew since
            below = self._records(root, option) if is_lmdb else self._files(root, option)
            if meta_info_file is not None:
                below = self._listed(root, below, meta_info_file)
            self._places |= {str(root / name): (number, name) for name in below}
            self.names += [str(root / name) for name in below]

    def _files(self, root: Path, option: str) -> list[str]:
        names = sorted(_image_files(root, self.recursive))
        if not names:
            if (root / 'data.mdb').is_file():
                raise UserError(f'{option}: {root} is an LMDB: set io_backend: {{type: lmdb}} of this dataset.')
            kinds = ', '.join(suffix[1:] for suffix in SUFFIXES)
            where = 'in it or below' if self.recursive else 'directly in it'
            deeper = not self.recursive and any(is_image_name(entry) for entry in islice(root.glob('*/*'), 1000))
            hint = ' The folders below it have some: set recursive: true.' if deeper else ''
            raise UserError(f'{option}: {root} has no image {where} ({kinds}).{hint}')
        return names

    def _records(self, root: Path, option: str) -> list[str]:
        own_list = root / 'meta_info.txt'
        if not own_list.is_file() or not (root / 'data.mdb').is_file():
            raise UserError(f'{option}: {root} is not an LMDB with a meta_info.txt; scripts/create_lmdb.py makes one.')
        return [os.path.splitext(SIZE_AND_LEVEL.sub('', line))[0] for line in _lines(own_list, option)]

    def _listed(self, root: Path, names: list[str], meta_info_file: str) -> list[str]:
        """The names in `meta_info_file`, which may have blanks; sizes or a partner may follow."""
        known = set(names)

        def find(line: str) -> str:
            candidates = [line, SIZE_AND_LEVEL.sub('', line), line.partition(',')[0], line.split()[0]]
            if self.is_lmdb:
                candidates += [os.path.splitext(name)[0] for name in candidates]
            for name in candidates:
                if name in known or (not self.is_lmdb and (root / name).is_file()):
                    return name
            missing = candidates[1]
            raise UserError(f'{meta_info_file}: {missing} is not in {root}.{did_you_mean(missing, known)}')

        return [find(line) for line in _lines(meta_info_file, 'meta_info_file')]

    def key(self, name: str) -> tuple[int, str]:
        """By which partners find each other: the number of the root, and the file name without suffix (the record's
        key), with `recursive` behind its folders."""
        number, below = self._places[name]
        if self.is_lmdb:
            return number, below
        return number, Path(below).with_suffix('').as_posix() if self.recursive else Path(below).stem

    def rgb(self, name: str) -> np.ndarray:
        """(H, W, 3) uint8 or uint16. Transparency is left out: training and evaluation compare colours.

        A read that fails is tried again, see `reading.retried`.

        Raises:
            ImageError: The image is missing or damaged; the message has its path or record.
        """
        return retried(lambda: self.decoded(name), name, self.failed)

    def decoded(self, name: str) -> np.ndarray:
        """`rgb`, tried once."""
        return _reading(lambda: read_image(*self._read(name)).rgb)

    def header(self, name: str) -> ImageHeader:
        """Size and bit depth of one image, without decoding it; errors as `decoded`."""
        return _reading(lambda: read_header(*self._read(name)))

    def _read(self, name: str) -> tuple[bytes | str, str]:
        """The path or the bytes of an image, and its name in errors."""
        if not self.is_lmdb:
            return name, name
        number, record = self._places[name]
        label, database = f'{self.roots[number]}: record {record}', self.roots[number].resolve()
        try:
            if database not in _clients:
                _clients[database] = FileClient('lmdb', db_paths=str(database), client_keys=CLIENT_KEY)
            data = _clients[database].get(record, CLIENT_KEY)
        except (lmdb.Error, OSError, UnicodeError) as error:
            _close_clients(database)  # the next attempt opens it anew
            raise UserError(f'{label}: cannot be read ({error}).') from error
        if data is None:
            raise UserError(f'{label}: the LMDB has no such record, although its meta_info.txt lists it.')
        return data, label


def _close_clients(*databases: Path) -> None:
    """Close LMDBs, by default all: what the parent of a forked worker opened must be neither used nor left open."""
    for database in databases or list(_clients):
        if database in _clients:
            _clients.pop(database).client._client[CLIENT_KEY].close()


if hasattr(os, 'register_at_fork'):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_close_clients)


def _reading(read: Callable[[], T]) -> T:
    """What `read` returns; its UserErrors concern one image."""
    try:
        return read()
    except UserError as error:
        raise ImageError(str(error)) from error


def _image_files(root: Path, recursive: bool) -> Iterator[str]:
    """Names below `root`; hidden files and folders are left out."""

    def fail(error: OSError) -> None:
        raise error  # `walk` by itself passes over folders that cannot be read

    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=fail):
        seen.add(os.path.realpath(folder))
        folders[:] = [name for name in folders if recursive and not name.startswith('.')]
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(folder, name)) not in seen]
        for name in files:
            if is_image_name(name) and not name.startswith('.'):
                yield (Path(folder) / name).relative_to(root).as_posix()


def _lines(path: str | os.PathLike, option: str) -> list[str]:
    """The lines that are not empty."""
    try:
        lines = Path(path).expanduser().read_text(encoding='utf-8').splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, 'strerror', None) or 'not a text file'
        raise UserError(f'{option}: {path} cannot be read ({reason}).') from error
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise UserError(f'{option}: {path} lists no image.')
    return lines
