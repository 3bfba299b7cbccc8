"""The one exception for mistakes that the user can mend."""
import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. Its message is one line: what is wrong, the file, key or value, and what is allowed.

    The command line prints the message without a traceback and exits with code 2.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint such as `` Did you mean 'scale'?`` for an unknown name; an empty string if nothing is near."""
    near = difflib.get_close_matches(str(name), [str(entry) for entry in known], n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ''
