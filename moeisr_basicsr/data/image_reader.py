"""Reading images of every kind that people have, with alpha, 16 bits and colour profile.

Pillow decodes 8-bit files: it knows palettes, CMYK and transparency, and says so when a file is truncated or damaged,
where OpenCV returns what it has. It would silently cut 16-bit colour to 8 bits, so OpenCV decodes that.

Shapes: (H, W, 3) RGB images, (H, W) alpha.
"""

import contextlib
import io
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from moeisr_basicsr.errors import UserError

from .exif import ORIENTATION, kept_exif, upright

SUFFIXES = ('.png', '.jpg', '.jpeg', '.jfif', '.tif', '.tiff', '.webp', '.bmp', '.gif', '.jp2', '.avif')
# Of Pillow's many; it hands an EPS, whatever its name, to Ghostscript
FORMATS = ('PNG', 'JPEG', 'TIFF', 'WEBP', 'BMP', 'GIF', 'JPEG2000', 'AVIF')
MAX_PIXELS = 1 << 30  # OpenCV's own limit; a few bytes of a hostile file could ask for more memory than there is
TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_PLANAR, TIFF_EXTRA = 258, 262, 284, 338  # tag numbers
HEAD_BYTES = 1 << 16  # hold a file's boxes
# Where the bits per channel stand: in the SIZ marker of a JPEG 2000 codestream, less one; in AVIF's `pixi` box.
DEPTH = {'JPEG2000': b'\xff\x4f\xff\x51.{38}(.)', 'AVIF': b'pixi.{5}(.)'}
_pillow_lock = threading.Lock()
if hasattr(os, 'register_at_fork'):  # a forked worker must not get a lock that another thread holds
    _unlock = _pillow_lock.release
    os.register_at_fork(before=_pillow_lock.acquire, after_in_parent=_unlock, after_in_child=_unlock)


class ImageHeader(NamedTuple):
    """What a file says before it is decoded."""

    height: int  # rows of the upright image
    width: int
    bit_depth: int  # 8 or 16


class ImageData(NamedTuple):
    """A decoded image, upright."""

    rgb: np.ndarray  # (H, W, 3) uint8 or uint16; a grey image has three equal channels
    alpha: np.ndarray | None  # (H, W), same type; straight, not multiplied into the colours
    bit_depth: int  # 8 or 16
    was_grey: bool  # the file holds no colours
    icc_profile: bytes | None
    num_frames: int  # pages or animation frames in the file; only the first is read
    exif: bytes | None  # of the camera, as `kept_exif` returns it


def is_image_name(name: str | os.PathLike) -> bool:
    """Whether the suffix is one that `read_image` knows."""
    return Path(name).suffix.lower() in SUFFIXES


def read_image(source: str | os.PathLike | bytes, name: str | None = None) -> ImageData:
    """Decode a PNG, JPEG, TIFF, WebP, BMP, GIF, JPEG 2000 or AVIF file.

    EXIF orientation is applied. CMYK becomes sRGB through the file's own profile where it has one. Palette and 1-bit
    images become 8-bit. 16-bit images stay 16-bit.

    Args:
        source: A path, or the bytes of a file.
        name: What errors call the image; the path by default.

    Raises:
        UserError: The file is missing, empty, damaged, no image, or of a kind that is not supported (32-bit or float;
            JPEG 2000 and AVIF of more than 8 bits).
        MemoryError: There is not enough to decode it.
    """
    with _opened(source, name) as (image, name):
        bit_depth = _bit_depth(image)
        was_grey = image.mode[0] in '1LI' or 'LA;16B' in str(image.tile)  # the latter's mode is RGBA
        image.load()  # raises where the file is damaged
        profile, exif = image.info.get('icc_profile') or None, kept_exif(image)
        orientation = image.getexif().get(ORIENTATION, 1)  # gone from a TIFF file, which Pillow and OpenCV turn
        num_frames = getattr(image, 'n_frames', 1)
        if bit_depth == 16:
            pixels = _decode_16_bit(image, source if isinstance(source, bytes) else Path(source).read_bytes(), name)
        else:
            pixels = _decode_8_bit(image, profile, name)
            profile = None if image.mode == 'CMYK' else profile
        pixels = upright(pixels, orientation)
    alpha = np.ascontiguousarray(pixels[..., 3]) if pixels.shape[2] == 4 else None
    return ImageData(np.ascontiguousarray(pixels[..., :3]), alpha, bit_depth, was_grey, profile, num_frames, exif)


def read_header(source: str | os.PathLike | bytes, name: str | None = None) -> ImageHeader:
    """Size and bit depth without decoding.

    Raises:
        UserError: As `read_image`, as far as it can be told from the header.
    """
    with _opened(source, name) as (image, _):
        # Pillow turns a TIFF file's size by itself, and would decode a whole PNG in search of EXIF data.
        exif = image.getexif() if image.format != 'TIFF' and 'exif' in image.info else {}
        height, width = (
            (image.width, image.height) if exif.get(ORIENTATION) in (5, 6, 7, 8) else (image.height, image.width)
        )
        return ImageHeader(height, width, _bit_depth(image))


def to_float(image: np.ndarray) -> np.ndarray:
    """uint8 or uint16 -> float32 in [0, 1]; the same shape."""
    return image.astype(np.float32) / np.float32(np.iinfo(image.dtype).max)


@contextlib.contextmanager
def _opened(source: str | os.PathLike | bytes, name: str | None) -> Iterator[tuple[ImageFile, str]]:
    """Pillow's image, not decoded yet, and its name, which every error inside gets.

    Pillow's own limit on the size of images is global; it is off as long as this one is open, one at a time.
    """
    name = str(name if name is not None else 'image' if isinstance(source, bytes) else source)
    if not isinstance(source, bytes) and Path(source).is_fifo():  # opening it would wait for ever
        raise UserError(f'{name}: a named pipe, not a file.')
    try:
        with _pillow_lock, io.BytesIO(source) if isinstance(source, bytes) else open(source, 'rb') as file:
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                if file.seek(0, os.SEEK_END) == 0:
                    raise UserError(f'{name}: the file is empty.')
                file.seek(0)
                with Image.open(file, formats=FORMATS) as image:
                    if image.width * image.height > MAX_PIXELS:
                        raise UserError(
                            f'{name}: {image.height} x {image.width} pixels are more than the limit of {MAX_PIXELS}.'
                        )
                    yield image, name
            finally:
                Image.MAX_IMAGE_PIXELS = limit
    except (UserError, MemoryError):
        raise
    except UnidentifiedImageError:
        kinds = ', '.join(suffix[1:] for suffix in SUFFIXES)
        raise UserError(
            f'{name}: not an image that can be read, or its beginning is damaged; {kinds} of 8 or 16 bits can be.'
        ) from None
    except Exception as error:  # a damaged file can end in almost any exception
        if isinstance(error, OSError) and error.strerror is not None:
            raise UserError(f'{name}: cannot be read ({error.strerror}).') from error
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise UserError(f'{name}: the image is damaged or of an unsupported kind ({reason:.120}).') from error


def _bit_depth(image: ImageFile) -> int:
    """8 or 16; smaller depths count as 8."""
    if image.format == 'TIFF':
        return 16 if max(getattr(image, 'tag_v2', {}).get(TIFF_BITS, (8,))) == 16 else 8
    if image.format in DEPTH and (depth := _stored_depth(image)) > 8:
        raise ValueError(f'{image.format} of {depth} bits; PNG and TIFF may have 16')
    # Pillow's mode does not tell it: the raw mode of its PNG decoder does, 'RGB;16B'.
    return 16 if image.format == 'PNG' and any('16' in str(tile[3]) for tile in image.tile) else 8


def _stored_depth(image: ImageFile) -> int:
    """Bits per channel, which Pillow would silently cut to 8."""
    assert image.fp is not None
    place = image.fp.tell()
    image.fp.seek(0)
    found = re.search(DEPTH[image.format or ''], image.fp.read(HEAD_BYTES), re.DOTALL)
    image.fp.seek(place)
    return 8 if found is None else (found[1][0] & 0x7F) + (image.format == 'JPEG2000')


def _decode_8_bit(image: Image.Image, profile: bytes | None, name: str) -> np.ndarray:
    """(H, W, 3) or (H, W, 4) uint8; `profile` is that of a CMYK image."""
    if image.mode in ('I', 'F', 'LAB'):
        raise UserError(f"{name}: images of mode '{image.mode}' are not supported; store it with 8 or 16 bits.")
    if image.mode == 'CMYK' and profile is not None:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            image = ImageCms.profileToProfile(image, source, ImageCms.createProfile('sRGB'), outputMode='RGB') or image
        except (ImageCms.PyCMSError, OSError):
            pass  # a broken or wrong profile: as if there were none
    has_alpha = image.mode.endswith(('A', 'a')) or 'transparency' in image.info
    return np.asarray(image.convert('RGBA' if has_alpha else 'RGB'))


def _decode_16_bit(image: Image.Image, data: bytes, name: str) -> np.ndarray:
    """(H, W, 3) or (H, W, 4) uint16. OpenCV decodes; Pillow knows what the file is and whether it is whole."""
    tags = getattr(image, 'tag_v2', {})
    if tags.get(TIFF_PLANAR, 1) != 1 and image.mode.startswith('RGB'):
        raise UserError(f'{name}: 16-bit TIFF with separate colour planes is not supported; store it interleaved.')
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16 or (pixels.ndim == 3 and pixels.shape[2] not in (3, 4)):
        raise UserError(f'{name}: this kind of 16-bit image is not supported; store it as plain 16-bit PNG.')
    if pixels.ndim == 3:
        pixels = pixels[..., [2, 1, 0, 3][: pixels.shape[2]]]  # OpenCV's order is blue, green, red
    else:
        if tags.get(TIFF_PHOTOMETRIC) == 0:
            pixels = 65535 - pixels  # white is 0
        planes = [pixels] * 3
        if 'transparency' in image.info:  # one grey level; OpenCV makes alpha of an RGB colour only
            planes.append(np.where(pixels == image.info['transparency'], 0, 65535).astype(np.uint16))
        pixels = np.stack(planes, axis=-1)
    if tags.get(TIFF_EXTRA, (2,))[0] == 1 and pixels.shape[2] == 4:  # alpha is multiplied into the colours: undo it
        weight = np.maximum(pixels[..., 3:], 1) / 65535
        pixels[..., :3] = np.minimum(np.rint(pixels[..., :3] / weight), 65535)
    return pixels
