"""Where a dataset's images come from: a folder, a list in a meta_info file, or an LMDB, by BasicSR's FileClient."""

import os
from pathlib import Path

import numpy as np
from basicsr.utils import FileClient

from moeisr_basicsr.errors import UserError, did_you_mean

from .image_reader import SUFFIXES, ImageHeader, is_image_name, read_header, read_image

CLIENT_KEY = 'images'
_clients: dict[str, FileClient] = {}  # by their options, shared: a process may open an LMDB only once


class ImageSource:
    """The images of one folder or LMDB, by name, in sorted order.

    Args:
        root: Folder, or LMDB folder with its meta_info.txt.
        option: The option that gave `root`, for errors.
        io_backend: BasicSR's `io_backend` section; `type` is disk (default), lmdb or memcached.
        meta_info_file: Text file; the first word of each line names an image below `root`, or an LMDB record with or
            without its suffix. Without it: every image of the folder itself, or every record.

    Attributes:
        names: File names below `root`, or LMDB keys.

    Raises:
        UserError: A missing folder, file or record list, an unknown backend, or no image.
    """

    def __init__(self, root: str, option: str, io_backend: dict | None = None, meta_info_file: str | None = None):
        self.root = Path(root).expanduser()
        self.client_options = {'backend': 'disk', **(io_backend or {})}
        self.backend = self.client_options['backend'] = self.client_options.pop('type', 'disk')
        known = sorted(FileClient._backends)
        if self.backend not in known:
            raise UserError(
                f"io_backend: type '{self.backend}' is not one of {', '.join(known)}."
                f'{did_you_mean(self.backend, known)}'
            )
        if not self.root.is_dir():
            raise UserError(f'{option}: {root} is not a folder.')
        listed = None if meta_info_file is None else _first_words(meta_info_file, 'meta_info_file')
        if self.backend == 'lmdb':
            self.client_options.update(db_paths=[str(self.root.resolve())], client_keys=[CLIENT_KEY])
            _clients.pop(str(self.client_options), None)  # the LMDB may have been made anew since
            self.names = self._records(option)
            if listed is not None:
                listed = [os.path.splitext(name)[0] for name in listed]
                records = set(self.names)
                if missing := next((name for name in listed if name not in records), None):
                    raise UserError(
                        f'{meta_info_file}: there is no record {missing} in {self.root}.'
                        f'{did_you_mean(missing, self.names)}'
                    )
        elif listed is None:
            self.names = self._files(option)
        elif self.backend == 'disk' and (
            missing := next((name for name in listed if not (self.root / name).is_file()), None)
        ):
            raise UserError(f'{meta_info_file}: {missing} is not in {self.root}.')
        self.names = listed or self.names

    def _files(self, option: str) -> list[str]:
        names = sorted(
            entry.name
            for entry in os.scandir(self.root)
            if is_image_name(entry.name) and not entry.name.startswith('.') and entry.is_file()
        )
        if not names:
            kinds = ', '.join(suffix[1:] for suffix in SUFFIXES)
            raise UserError(f'{option}: {self.root} has no image directly in it ({kinds}).')
        return names

    def _records(self, option: str) -> list[str]:
        own_list = self.root / 'meta_info.txt'
        if not own_list.is_file() or not (self.root / 'data.mdb').is_file():
            raise UserError(
                f'{option}: {self.root} is not an LMDB with a meta_info.txt; scripts/create_lmdb.py makes one.'
            )
        return [os.path.splitext(name)[0] for name in _first_words(own_list, option)]

    def path(self, name: str) -> str:
        """What items call an image: its file, or its record's key inside the LMDB's folder."""
        return str(self.root / name)

    def stem(self, name: str) -> str:
        """File name without folder and suffix, or the record's key."""
        return name if self.backend == 'lmdb' else Path(name).stem

    def rgb(self, name: str) -> np.ndarray:
        """(H, W, 3) uint8 or uint16. Transparency is left out: training and evaluation compare colours.

        Raises:
            UserError: The image is missing or damaged; the message has its path or record.
        """
        return read_image(*self._read(name)).rgb

    def header(self, name: str) -> ImageHeader:
        """Size and bit depth of one image, without decoding it; errors as `rgb`."""
        return read_header(*self._read(name))

    def _read(self, name: str) -> tuple[bytes | str, str]:
        """The path or the bytes of an image, and its name in errors."""
        path = self.path(name)
        if self.backend == 'disk':
            return path, path
        label = f'{self.root}: record {name}' if self.backend == 'lmdb' else path
        key = str(self.client_options)
        if key not in _clients:
            _clients[key] = FileClient(**self.client_options)
        try:
            data = _clients[key].get(name if self.backend == 'lmdb' else path, CLIENT_KEY)
        except Exception as error:  # the backends let through whatever their library raises
            raise UserError(f'{label}: cannot be read ({" ".join(str(error).split())}).') from error
        if data is None:
            raise UserError(f'{label}: the LMDB has no such record, although its meta_info.txt lists it.')
        return bytes(data), label


def _close_clients() -> None:
    """In a forked worker: what the parent opened must be neither used nor left open, or it cannot be opened again."""
    for client in _clients.values():
        if client.backend == 'lmdb':
            for environment in client.client._client.values():
                environment.close()
    _clients.clear()


if hasattr(os, 'register_at_fork'):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_close_clients)


def _first_words(path: str | os.PathLike, option: str) -> list[str]:
    """The first word of every line that is not empty."""
    try:
        lines = Path(path).expanduser().read_text(encoding='utf-8').splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, 'strerror', None) or 'not a text file'
        raise UserError(f'{option}: {path} cannot be read ({reason}).') from error
    words = [line.split()[0] for line in lines if line.strip()]
    if not words:
        raise UserError(f'{option}: {path} lists no image.')
    return words
