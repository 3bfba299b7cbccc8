"""The one exception for mistakes that the user can fix."""

import difflib
from collections.abc import Callable, Iterable
from pathlib import Path


class UserError(ValueError):
    """Bad input. Its message is one line: what is wrong, the file, key or value, and what is allowed.

    The command line prints the message without a traceback and exits with code 2.
    """


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
