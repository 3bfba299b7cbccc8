"""Where a dataset's images come from: a folder, a list in a meta_info file, or an LMDB, by BasicSR's FileClient."""

import os
import weakref
from pathlib import Path

import numpy as np
from basicsr.utils import FileClient

from moeisr_basicsr.errors import UserError, did_you_mean

from .image_io import SUFFIXES, ImageHeader, is_image_name, read_header, read_image

CLIENT_KEY = 'images'
# One client for all datasets that read the same LMDB: a process may open it only once.
_clients: 'weakref.WeakValueDictionary[str, FileClient]' = weakref.WeakValueDictionary()
_clients_pid = os.getpid()


class ImageSource:
    """The images of one folder or LMDB, by name, in sorted order.

    It travels to worker processes: the FileClient is opened in the process that reads.

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
        backend = dict(io_backend or {'type': 'disk'})
        self.backend = backend.pop('type', 'disk')
        self.backend_options = backend
        if self.backend not in FileClient._backends:
            known = sorted(FileClient._backends)
            raise UserError(
                f"io_backend: type '{self.backend}' is not one of {', '.join(known)}."
                f'{did_you_mean(self.backend, known)}'
            )
        if not self.root.is_dir():
            raise UserError(f'{option}: {root} is not a folder.')
        if self.backend == 'lmdb':
            self.names = self._list_records(option, meta_info_file)
        else:
            self.names = self._list_files(option, meta_info_file)
        self._client, self._client_pid = None, None

    def _list_files(self, option: str, meta_info_file: str | None) -> list[str]:
        if meta_info_file is None:
            names = sorted(
                entry.name
                for entry in os.scandir(self.root)
                if is_image_name(entry.name) and not entry.name.startswith('.') and entry.is_file()
            )
            if not names:
                kinds = ', '.join(suffix[1:] for suffix in SUFFIXES)
                raise UserError(f'{option}: {self.root} has no image directly in it ({kinds}).')
            return names
        names = _first_words(meta_info_file, 'meta_info_file')
        if self.backend == 'disk':
            missing = next((name for name in names if not (self.root / name).is_file()), None)
            if missing is not None:
                raise UserError(f'{meta_info_file}: {missing} is not in {self.root}.')
        return names

    def _list_records(self, option: str, meta_info_file: str | None) -> list[str]:
        own_list = self.root / 'meta_info.txt'
        if not own_list.is_file() or not (self.root / 'data.mdb').is_file():
            raise UserError(
                f'{option}: {self.root} is not an LMDB with a meta_info.txt; scripts/create_lmdb.py makes one.'
            )
        names = [os.path.splitext(word)[0] for word in _first_words(own_list, option)]
        if meta_info_file is None:
            return names
        chosen = [os.path.splitext(word)[0] for word in _first_words(meta_info_file, 'meta_info_file')]
        known = set(names)
        missing = next((name for name in chosen if name not in known), None)
        if missing is not None:
            raise UserError(
                f'{meta_info_file}: there is no record {missing} in {self.root}.{did_you_mean(missing, names)}'
            )
        return chosen

    def __len__(self) -> int:
        return len(self.names)

    def path(self, name: str) -> str:
        """What items and errors call an image: its file, or its record's key inside the LMDB's folder."""
        return str(self.root / name)

    def rgb(self, name: str) -> np.ndarray:
        """(H, W, 3) uint8 or uint16. Transparency is left out: training and evaluation compare colours.

        Raises:
            UserError: The image is missing or damaged; the message has its path or record.
        """
        return read_image(self._bytes(name), self._label(name)).rgb

    def header(self, name: str) -> ImageHeader:
        """Size and bit depth of one image, without decoding it; errors as `rgb`."""
        if self.backend == 'disk':
            return read_header(self.root / name)
        return read_header(self._bytes(name), self._label(name))

    def _label(self, name: str) -> str:
        return f'{self.root}: record {name}' if self.backend == 'lmdb' else self.path(name)

    def _bytes(self, name: str) -> bytes:
        key = name if self.backend == 'lmdb' else self.path(name)
        try:
            data = self._open_client().get(key, CLIENT_KEY)
        except UserError:
            raise
        except Exception as error:  # the backends let through whatever their library raises
            reason = getattr(error, 'strerror', None) or ' '.join(str(error).split())
            raise UserError(f'{self._label(name)}: cannot be read ({reason}).') from error
        if data is None:
            raise UserError(f'{self._label(name)}: the LMDB has no such record, although its meta_info.txt lists it.')
        return bytes(data)

    def _open_client(self) -> FileClient:
        if self._client is None or self._client_pid != os.getpid():
            options = dict(self.backend_options)
            if self.backend == 'lmdb':
                options.update(db_paths=[str(self.root.resolve())], client_keys=[CLIENT_KEY])
            self._client, self._client_pid = _shared_client(self.backend, options), os.getpid()
        return self._client

    def __getstate__(self) -> dict:
        return {**self.__dict__, '_client': None, '_client_pid': None}


def _shared_client(backend: str, options: dict) -> FileClient:
    global _clients_pid
    if _clients_pid != os.getpid():
        # A forked worker: what the parent opened must be neither used nor left open, or it cannot be opened again.
        for client in list(_clients.values()):
            if client.backend == 'lmdb':
                for environment in client.client._client.values():
                    environment.close()
        _clients.clear()
        _clients_pid = os.getpid()
    key = f'{backend} {sorted(options.items())}'
    client = _clients.get(key)
    if client is None:
        client = _clients[key] = FileClient(backend, **options)
    return client


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
