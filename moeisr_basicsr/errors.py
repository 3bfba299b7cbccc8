"""The one exception for mistakes that the user can fix, and the exit codes of the commands."""

import difflib
from collections.abc import Callable, Iterable
from enum import IntEnum
from pathlib import Path


class ExitCode(IntEnum):
    """What the commands return to schedulers and scripts; after another signal, 128 and its number, as shells do."""

    OK = 0
    SAVE_FAILED = 1  # a checkpoint could not be written
    USER_ERROR = 2  # wrong options or files
    NON_FINITE = 3  # a loss or gradient was not finite
    IMAGES_FAILED = 4  # some images could not be used; `test` has measured the others
    INTERRUPTED = 130  # Ctrl-C; `train` has saved its state after the running step
    TERMINATED = 143  # SIGTERM, for example of a scheduler; as above


class UserError(ValueError):
    """Bad input. Its message is one line: what is wrong, the file, key or value, and what is allowed.

    The command line prints the message without a traceback and exits with `ExitCode.USER_ERROR`.
    """

    def __init__(self, message: str):
        name = type(self).__name__
        if message.startswith(f'Caught {name} in DataLoader worker'):
            # torch raises a worker's error anew, with the worker's traceback as its message; its last line is ours.
            message = message.rstrip().splitlines()[-1].partition(f'{name}: ')[2]
        super().__init__(message)


class ImageError(UserError):
    """One image (or pair) cannot be used: missing, damaged, too small; the others may be fine."""


def printable(name: str) -> str:
    """A name of a file for logs, results and tables: what is no UTF-8, and what would move the cursor, as escapes."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in name)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint such as `` Did you mean 'scale'?`` for an unknown name; an empty string if nothing is near.

    Slips of the pen come first, then the beginning of a name (RDN for RDNEncoder), then what is less alike.
    """
    name, known = str(name), [str(entry) for entry in known]
    begins = sorted((entry for entry in known if len(name) > 2 and entry.lower().startswith(name.lower())), key=len)
    near = (
        difflib.get_close_matches(name, known, n=1, cutoff=0.75)
        or begins
        or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    )
    return f" Did you mean '{near[0]}'?" if near else ''


def did_you_mean_file(path: Path, accepts: Callable[[Path], bool] = lambda entry: True) -> str:
    """A hint such as `` Did you mean 'photo.jpg'?`` for a missing file or folder; an empty string if nothing is near.

    Names are compared without their suffixes: any two short names that end in .png are alike.

    Args:
        path: What is missing.
        accepts: Which entries of its folder may be meant.
    """
    try:
        names = {entry.stem: entry.name for entry in sorted(path.parent.iterdir()) if accepts(entry)}
    except OSError:
        return ''
    near = difflib.get_close_matches(path.stem, list(names), n=1, cutoff=0.6)
    return f" Did you mean '{names[near[0]]}'?" if near else ''
