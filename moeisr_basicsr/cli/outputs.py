"""Files that profiles, reports and benchmarks write: checked before any work; only their own are replaced."""

import json
from collections.abc import Callable
from os import PathLike
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from moeisr_basicsr.analysis import schema
from moeisr_basicsr.atomic_file import write_atomic
from moeisr_basicsr.errors import UserError

SOFTWARE = 'moeisr_basicsr profile'  # of the pictures; a keyword that PNG itself defines


def check_output(option: str, name: str, suffix: str, is_earlier: Callable[[bytes], bool]) -> None:
    """Reject a file that cannot be written, or that something else wrote.

    Args:
        option: The option that named the file, for messages.
        name: The file.
        suffix: Its only suffix that is allowed.
        is_earlier: Whether the content of a file is an earlier output of the same kind, which may be replaced.
    """
    path = Path(name)
    if path.suffix.lower() != suffix:
        raise UserError(f"{option} {name}: the name must end in '{suffix}'.")
    if not path.parent.is_dir():
        raise UserError(f'{option} {name}: the folder {path.parent} does not exist; make it first.')
    if path.is_dir():
        raise UserError(f'{option} {name} is a folder; give the name of a file.')
    if path.exists() and (content := path.read_bytes()) and not is_earlier(content):  # an empty file loses nothing
        advice = 'give another name, or delete it first'
        raise UserError(f'{option} {name}: this file exists, and it is not an earlier output of this option; {advice}.')


def is_results_of(command: str, content: bytes) -> bool:
    """Whether this is a results document, of any version, that `command` wrote; a test's takes long to make anew."""
    try:
        results = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(results, dict) and results.get('format') == schema.FORMAT and results.get('command') == command


def is_picture(content: bytes) -> bool:
    """Whether `save_picture` wrote this."""
    return content.startswith(b'\x89PNG\r\n\x1a\n') and f'tEXtSoftware\0{SOFTWARE}'.encode() in content


def save_picture(path: str | PathLike, picture: Image.Image) -> None:
    """Write a PNG that says where it comes from: complete or not at all."""
    info = PngInfo()
    info.add_text('Software', SOFTWARE)
    write_atomic(path, lambda file: picture.save(file, 'PNG', pnginfo=info))
