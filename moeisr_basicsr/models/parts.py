"""Parts of a network by name."""

from collections.abc import Sequence


def is_in(name: str, parts: Sequence[str]) -> bool:
    """Whether `name` is a parameter of one of `parts`, which name parameters or modules."""
    return any(name == part or name.startswith(f'{part}.') for part in parts)
