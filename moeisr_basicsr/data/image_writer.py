"""Writing images with everything they have: alpha, 16 bits, grey, colour profile, EXIF.

PNG and TIFF files are written strip by strip: a large image never lies in memory as a whole. Every file appears
complete, or not at all.

Shapes: (H, W, 3) RGB images, (H, W) alpha; strips are (R, W, C) with R rows; C is 1 (grey), 2 (grey and alpha), 3 (RGB)
or 4 (RGB and alpha).
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from moeisr_basicsr.atomic_file import open_atomic
from moeisr_basicsr.errors import UserError, did_you_mean

from .image_reader import to_float
from .strip_encoders import ENCODERS, pillow_encoder

LUMA_WEIGHTS = (0.299, 0.587, 0.114)  # BT.601; the three channels of a grey image hardly differ after upscaling
BMP_BYTES = 2**32 - 2**20  # its header counts bytes in 32 bits

# suffix -> Pillow's name, longest side in pixels, whether it holds 16 bits, whether transparency
FORMATS = {
    '.png': ('PNG', 2**31 - 1, True, True),
    '.jpg': ('JPEG', 65535, False, False),
    '.jpeg': ('JPEG', 65535, False, False),
    '.tif': ('TIFF', 2**31 - 1, True, True),
    '.tiff': ('TIFF', 2**31 - 1, True, True),
    '.webp': ('WEBP', 16383, False, True),
    '.bmp': ('BMP', 2**31 - 1, False, False),
}


def check_writable(path: str | os.PathLike, size: tuple[int, int], bit_depth: int = 8, has_alpha: bool = False) -> None:
    """Whether an image of `size` (rows, columns) can be written to `path` without loss; before any work is done.

    Raises:
        UserError: An unknown suffix, a missing folder, or a format that has no 16 bits, transparency or such a size.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise UserError(
            f"{path}: '{suffix}' is not a format that can be written; there are {', '.join(FORMATS)}."
            f'{did_you_mean(suffix, FORMATS)}'
        )
    if not Path(path).absolute().parent.is_dir():
        raise UserError(f'{path}: the folder {Path(path).parent} does not exist.')
    name, longest, holds_16_bits, holds_alpha = FORMATS[suffix]
    for lacks, what in (
        (bit_depth == 16 and not holds_16_bits, '16 bits'),
        (has_alpha and not holds_alpha, 'transparency'),
        (max(size) > longest, f'{size[0]} x {size[1]} pixels'),
        (name == 'BMP' and 3 * math.prod(size) > BMP_BYTES, f'{size[0]} x {size[1]} pixels'),
    ):
        if lacks:
            raise UserError(f'{path}: {name} cannot hold {what}; write .png or .tif.')


def join_channels(rgb: np.ndarray, alpha: np.ndarray | None, bit_depth: int, grey: bool) -> np.ndarray:
    """(H, W, C) uint8 or uint16 as it is stored.

    Args:
        rgb: (H, W, 3) float in [0, 1], uint8 or uint16.
        alpha: (H, W), of the same kinds.
        bit_depth: 8 or 16.
        grey: Store one channel, the luma of `rgb`.
    """
    if grey:
        floats = rgb if rgb.dtype.kind == 'f' else to_float(rgb)
        rgb = (floats @ np.array(LUMA_WEIGHTS, floats.dtype))[..., None]  # (H, W, 1)
    pixels = to_unsigned(rgb, bit_depth)
    if alpha is None:
        return pixels
    return np.concatenate([pixels, to_unsigned(alpha, bit_depth)[..., None]], axis=2)


def to_unsigned(image: np.ndarray, bit_depth: int = 8) -> np.ndarray:
    """Float in [0, 1] -> uint8 or uint16, clipped and rounded; unsigned images change depth only. The same shape."""
    dtype = np.dtype(f'uint{bit_depth}')
    if image.dtype == dtype:
        return image
    if image.dtype.kind == 'u':
        image = image / np.iinfo(image.dtype).max
    return np.rint(np.clip(image, 0, 1) * np.iinfo(dtype).max).astype(dtype)


@contextlib.contextmanager
def strip_writer(
    path: str | os.PathLike,
    height: int,
    width: int,
    channels: int = 3,
    bit_depth: int = 8,
    icc_profile: bytes | None = None,
    exif: bytes | None = None,
) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that appends a strip to an image, from top to bottom. The end of the `with` block puts the file in
    its place; with an error inside the block no file appears, and an older one of that name stays.

    Args:
        path: Its suffix is one of `FORMATS`.
        height, width, channels: (H, W, C) of the whole image.
        bit_depth: 8 or 16.
        icc_profile: Colour profile to embed; left out where it does not fit a grey or colour image.
        exif: As `ImageData` has it; BMP and TIFF files are written without.

    Raises:
        UserError: As `check_writable`.
        SaveError: The disk is full or fails.
    """
    check_writable(path, (height, width), bit_depth, channels in (2, 4))
    if icc_profile is not None and (icc_profile[16:20] == b'GRAY') != (channels < 3):
        icc_profile = None
    shape, dtype = (height, width, channels), np.dtype(f'uint{bit_depth}')
    kind, row = FORMATS[Path(path).suffix.lower()][0], 0

    def write(rows: np.ndarray) -> None:
        nonlocal row
        assert rows.shape[1:] == shape[1:] and rows.dtype == dtype and row + len(rows) <= height, (rows.shape, shape)
        row += len(rows)
        encode(np.ascontiguousarray(rows))

    encoder = ENCODERS.get(kind, pillow_encoder)
    with open_atomic(path) as file, encoder(file, kind, shape, dtype, icc_profile, exif) as encode:
        yield write
        assert row == height, (row, height)
