"""Where a dataset's images come from: a folder, or an LMDB, which BasicSR's FileClient reads."""

import os
from pathlib import Path

import lmdb
import numpy as np
from basicsr.utils import FileClient

from moeisr_basicsr.errors import UserError, did_you_mean

from .image_reader import SUFFIXES, ImageHeader, is_image_name, read_header, read_image

CLIENT_KEY = 'images'
_clients: dict[Path, FileClient] = {}  # shared by all datasets: a process may open an LMDB only once


class ImageSource:
    """The images of one folder or LMDB, by name.

    Args:
        root: Folder, or LMDB folder with its meta_info.txt.
        option: The option that gave `root`, for errors.
        is_lmdb: Whether it is one.
        meta_info_file: Text file; the first word of each line names an image below `root`, or an LMDB record with or
            without its suffix. Without it: every image of the folder itself, or every record.

    Attributes:
        names: File names below `root`, or LMDB keys.

    Raises:
        UserError: A missing folder, file or record list, or no image.
    """

    def __init__(self, root: str, option: str, is_lmdb: bool = False, meta_info_file: str | None = None):
        self.root = Path(root).expanduser()
        self.is_lmdb, self.database = is_lmdb, self.root.resolve()
        if not self.root.is_dir():
            raise UserError(f'{option}: {root} is not a folder.')
        _clients.pop(self.database, None)  # an LMDB may have been made anew since
        self.names = self._records(option) if is_lmdb else self._files(option)
        if meta_info_file is not None:
            known, listed = set(self.names), _first_words(meta_info_file, 'meta_info_file', is_lmdb)
            for name in listed:
                if name not in known and (is_lmdb or not (self.root / name).is_file()):
                    raise UserError(f'{meta_info_file}: {name} is not in {self.root}.{did_you_mean(name, known)}')
            self.names = listed

    def _files(self, option: str) -> list[str]:
        entries = (entry for entry in os.scandir(self.root) if is_image_name(entry.name) and entry.is_file())
        names = sorted(entry.name for entry in entries if not entry.name.startswith('.'))
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
        return _first_words(own_list, option, is_lmdb=True)

    def path(self, name: str) -> str:
        """What items call an image: its file, or its record's key inside the LMDB's folder."""
        return str(self.root / name)

    def stem(self, name: str) -> str:
        """File name without folder and suffix, or the record's key."""
        return name if self.is_lmdb else Path(name).stem

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
        if not self.is_lmdb:
            return self.path(name), self.path(name)
        label = f'{self.root}: record {name}'
        try:
            if self.database not in _clients:
                _clients[self.database] = FileClient('lmdb', db_paths=str(self.database), client_keys=CLIENT_KEY)
            data = _clients[self.database].get(name, CLIENT_KEY)
        except (lmdb.Error, UnicodeError) as error:
            raise UserError(f'{label}: cannot be read ({error}).') from error
        if data is None:
            raise UserError(f'{label}: the LMDB has no such record, although its meta_info.txt lists it.')
        return data, label


def _close_clients() -> None:
    """In a forked worker: what the parent opened must be neither used nor left open, or it cannot be opened again."""
    for client in _clients.values():
        client.client._client[CLIENT_KEY].close()
    _clients.clear()


if hasattr(os, 'register_at_fork'):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_close_clients)


def _first_words(path: str | os.PathLike, option: str, is_lmdb: bool) -> list[str]:
    """The first word of every line that is not empty; keys have no suffix."""
    try:
        lines = Path(path).expanduser().read_text(encoding='utf-8').splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, 'strerror', None) or 'not a text file'
        raise UserError(f'{option}: {path} cannot be read ({reason}).') from error
    words = [line.split()[0] for line in lines if line.strip()]
    if not words:
        raise UserError(f'{option}: {path} lists no image.')
    return [os.path.splitext(word)[0] for word in words] if is_lmdb else words
