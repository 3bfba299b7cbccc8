"""Files of images that come in blocks of rows. PNG is written by hand: Pillow and OpenCV want the whole image.

Each encoder is a context that yields the function to call with the next block. Shapes: the image is (H, W, C), a block
(R, W, C); C is 1 (grey), 2 (grey and alpha), 3 (RGB) or 4 (RGB and alpha).
"""

import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tifffile
from PIL import Image

from .exif import PREFIX

LEVEL = 4  # of zlib; level 6 takes twice the time and saves 3 % on photographs
PNG_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
CLASSIC_TIFF = 2**32 - 2**25  # its offsets have 32 bits; tifffile by itself takes compressed pixels to be smaller
SUB = 1  # as OpenCV; choosing the best filter for each row, as libpng does, saves 3 % on photographs

Shape = tuple[int, int, int]
Write = Callable[[np.ndarray], Any]


@contextmanager
def png_encoder(
    file: BinaryIO, kind: str, shape: Shape, dtype: np.dtype, icc_profile: bytes | None, exif: bytes | None
) -> Iterator[Write]:
    """PNG (ISO 15948): one zlib stream over filtered rows, cut into IDAT chunks."""
    height, width, channels = shape
    offset = channels * dtype.itemsize  # bytes of a pixel
    stream = zlib.compressobj(LEVEL, strategy=zlib.Z_FILTERED)

    def chunk(kind: bytes, data: bytes) -> None:
        checksum = zlib.crc32(data, zlib.crc32(kind))
        file.write(struct.pack('>I', len(data)) + kind + data + struct.pack('>I', checksum))

    def write(rows: np.ndarray) -> None:
        values = rows.astype(dtype.newbyteorder('>')).view(np.uint8).reshape(len(rows), -1)  # (R, bytes of a row)
        filtered = np.pad(values, ((0, 0), (1, 0)), constant_values=SUB)
        filtered[:, 1 + offset :] -= values[:, :-offset]
        if data := stream.compress(filtered.tobytes()):
            chunk(b'IDAT', data)

    file.write(b'\x89PNG\r\n\x1a\n')
    colour_type = PNG_COLOUR_TYPES[channels]
    chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8 * dtype.itemsize, colour_type, 0, 0, 0))
    if icc_profile is not None:
        chunk(b'iCCP', b'ICC profile\0\0' + zlib.compress(icc_profile))
    if exif is not None:
        chunk(b'eXIf', exif.removeprefix(PREFIX))
    yield write
    chunk(b'IDAT', stream.flush())
    chunk(b'IEND', b'')


@contextmanager
def tiff_encoder(
    file: BinaryIO, kind: str, shape: Shape, dtype: np.dtype, icc_profile: bytes | None, exif: bytes | None
) -> Iterator[Write]:
    """TIFF, BigTIFF above 4 GB. tifffile takes all rows at once, so they wait on the disk as they are."""
    grey, has_alpha = shape[2] < 3, shape[2] in (2, 4)
    with tempfile.TemporaryFile(dir=Path(file.name).parent) as waiting:
        yield lambda rows: waiting.write(rows.data)
        waiting.flush()
        pixels = np.memmap(waiting, dtype, 'r', shape=shape)
        tifffile.imwrite(
            file,
            pixels if shape[2] > 1 else pixels[..., 0],
            photometric='minisblack' if grey else 'rgb',
            planarconfig='contig' if shape[2] > 1 else None,
            extrasamples=['unassalpha'] if has_alpha else None,
            compression='zlib',
            compressionargs={'level': LEVEL},
            predictor=True,
            bigtiff=pixels.nbytes > CLASSIC_TIFF,
            iccprofile=icc_profile,
            metadata=None,
            software=False,
        )


@contextmanager
def pillow_encoder(
    file: BinaryIO, kind: str, shape: Shape, dtype: np.dtype, icc_profile: bytes | None, exif: bytes | None
) -> Iterator[Write]:
    """Other formats, of 8 bits: Pillow needs the whole image. `kind` is its name of the format."""
    blocks: list[np.ndarray] = []
    yield lambda rows: blocks.append(rows.copy())
    pixels = np.concatenate(blocks)
    if shape[2] == 2:  # WebP has no grey
        pixels = pixels[..., [0, 0, 0, 1]]
    extras = {'icc_profile': icc_profile, 'exif': exif}
    extras = {name: value for name, value in extras.items() if value is not None}
    Image.fromarray(pixels[..., 0] if shape[2] == 1 else pixels).save(file, kind, quality=95, **extras)


ENCODERS = {'PNG': png_encoder, 'TIFF': tiff_encoder}  # the rest: `pillow_encoder`
