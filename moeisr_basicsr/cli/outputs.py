"""Files that profiles, reports and benchmarks write: checked before any work."""

import argparse
import os
from pathlib import Path

from moeisr_basicsr.errors import UserError


def add_overwrite(parser: argparse._ActionsContainer) -> None:
    """`--overwrite`, which `check_output` asks for."""
    parser.add_argument('--overwrite', action='store_true', help='replace output files that exist')


def check_output(option: str, name: str, suffix: str, overwrite: bool) -> None:
    """Reject a file that cannot be written, or that exists.

    Args:
        option: The option that named the file, for messages.
        name: The file.
        suffix: Its only suffix that is allowed.
        overwrite: Whether it may exist.
    """
    path = Path(name)
    if path.suffix.lower() != suffix:
        raise UserError(f"{option} {name}: the name must end in '{suffix}'.")
    if not path.parent.is_dir():
        raise UserError(f'{option} {name}: the folder {path.parent} does not exist; make it first.')
    if path.is_dir():
        raise UserError(f'{option} {name} is a folder; give the name of a file.')
    if os.path.lexists(path) and not overwrite:
        raise UserError(f'{option} {name}: this file exists; give --overwrite to replace it, or another name.')
