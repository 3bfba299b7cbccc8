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
HEAD_BYTES = 4096  # of a picture: Pillow writes the text before the pixels


def check_output(option: str, name: str, suffix: str, is_earlier: Callable[[bytes], bool]) -> None:
    """Refuse a file that cannot be written, or that something else wrote.

    Args:
        option: That named the file.
        name: The file.
        suffix: What the name must end in.
        is_earlier: Whether the content of a file is an earlier output of the same kind, which may be replaced.

    Raises:
        UserError: The ending is another one, the folder is missing, or what lies there is not `is_earlier`.
        OSError: What lies there cannot be read.
    """
    path = Path(name)
    if path.suffix.lower() != suffix:
        raise UserError(f"{option} {name}: the name must end in '{suffix}'.")
    check_folder(path.parent)
    if not path.parent.is_dir():
        raise UserError(f'{name}: the folder {path.parent} does not exist; make it first.')
    if path.is_dir():
        raise UserError(f'{name} is a folder; give the name of a file.')
    if path.exists():
        content = path.read_bytes()
        if content and not is_earlier(content):  # an empty file loses nothing
            raise UserError(
                f'{option} {name}: this file exists, and it is not an earlier output of this option; give '
                'another name, or delete it first.'
            )


def check_folder(folder: Path) -> None:
    """Refuse a folder that can neither be there nor be made.

    Raises:
        UserError: It, or one above it, is a file.
    """
    for part in (folder, *folder.parents):
        if part.exists():
            if not part.is_dir():
                raise UserError(f'{part} is a file, not a folder.')
            return


def is_results_of(command: str, content: bytes) -> bool:
    """Whether this is a results document, of any version, that `command` wrote; a test's takes long to make anew."""
    try:
        results = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(results, dict) and results.get('format') == schema.FORMAT and results.get('command') == command


def is_picture(content: bytes) -> bool:
    """Whether `save_picture` wrote this."""
    return content.startswith(b'\x89PNG\r\n\x1a\n') and f'tEXtSoftware\0{SOFTWARE}'.encode() in content[:HEAD_BYTES]


def save_picture(path: str | PathLike, picture: Image.Image) -> None:
    """Write a PNG that says where it comes from: complete or not at all."""
    info = PngInfo()
    info.add_text('Software', SOFTWARE)
    write_atomic(path, lambda file: picture.save(file, 'PNG', pnginfo=info))
