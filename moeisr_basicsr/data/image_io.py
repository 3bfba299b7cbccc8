"""Reading images of every kind that people have, and writing what was read: alpha, 16 bit, grey and colour profile.

Pillow decodes 8-bit files: it knows palettes, CMYK and transparency, and says so when a file is truncated or damaged,
where OpenCV returns what it has. It would silently cut 16-bit colour to 8 bit, so OpenCV reads that.

Shapes: (H, W, 3) RGB images, (H, W) alpha.
"""

import contextlib
import io
import os
import threading
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageCms

from moeisr_basicsr.errors import UserError, did_you_mean

from .exif import kept_exif
from .strip_writer import FORMATS, AtomicFile, StripWriter

SUFFIXES = ('.png', '.jpg', '.jpeg', '.tif', '.tiff', '.webp', '.bmp')
MAX_PIXELS = 1 << 30  # OpenCV's own limit; a few bytes of a hostile file could ask for more memory than there is
TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_PLANAR, TIFF_EXTRA, ORIENTATION = 258, 262, 284, 338, 274  # tag numbers
TIFF_STARTS = (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')  # little and big endian; with '+' a BigTIFF
GREY_MODES = ('1', 'L', 'LA', 'La', 'I;16', 'I;16B', 'I;16L', 'I;16N')
ALPHA_MODES = ('LA', 'La', 'PA', 'RGBA', 'RGBa')
COLOUR_MODES = ('P', 'RGB', 'RGBX', 'CMYK', 'YCbCr', 'HSV')
# EXIF orientation -> (transpose, flip rows, flip columns), applied in this order
ORIENTATIONS = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
# What other formats than PNG and TIFF can hold: longest side in pixels, transparency. None holds 16 bits.
PILLOW_FORMATS = {
    '.jpg': ('JPEG', 65535, False),
    '.jpeg': ('JPEG', 65535, False),
    '.webp': ('WEBP', 16383, True),
    '.bmp': ('BMP', 2**31 - 1, False),
}
LUMA_WEIGHTS = (0.299, 0.587, 0.114)  # BT.601; the three channels of a grey image hardly differ after upscaling


class _PillowLimit:
    """Turns Pillow's limit on the size of images off while any thread reads: it is global, and `MAX_PIXELS` is ours."""

    def __init__(self):
        self.lock = threading.Lock()
        self.readers = 0
        self.limit = None

    def __enter__(self) -> None:
        with self.lock:
            if self.readers == 0:
                self.limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self.readers += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.readers -= 1
            if self.readers == 0:
                Image.MAX_IMAGE_PIXELS = self.limit


_pillow_limit = _PillowLimit()


class ImageHeader(NamedTuple):
    """What a file says before it is decoded."""

    height: int  # rows, upright
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


def read_image(source: str | os.PathLike | bytes, name: str | None = None) -> ImageData:
    """Decode a PNG, JPEG, TIFF, WebP or BMP file.

    EXIF orientation is applied. CMYK becomes sRGB through the file's own profile where it has one. Palette and 1-bit
    images become 8-bit. 16-bit images stay 16-bit.

    Args:
        source: A path, or the bytes of a file.
        name: What errors call the image; the path by default.

    Raises:
        UserError: The file is missing, empty, damaged, no image, or of a kind that is not supported (32-bit or float).
    """
    name = str(name if name is not None else source if not isinstance(source, bytes) else 'image')
    data = source if isinstance(source, bytes) else _read_bytes(source)
    with _naming(name), _open(data, name) as image:
        if _bit_depth(image) == 16:
            return _read_16_bit(image, data, name)
        return _read_8_bit(image, name)


def read_header(source: str | os.PathLike | bytes, name: str | None = None) -> ImageHeader:
    """Size and bit depth without decoding. EXIF data behind the pixels of a PNG file, which is rare, is not seen.

    Raises:
        UserError: As `read_image`, as far as it can be told from the header.
    """
    name = str(name if name is not None else source if not isinstance(source, bytes) else 'image')
    with contextlib.ExitStack() as stack:
        file = source if isinstance(source, bytes) else stack.enter_context(_open_file(source))
        stack.enter_context(_naming(name))
        image = stack.enter_context(_open(file, name))
        width, height = image.size
        bit_depth = _bit_depth(image)
        # Pillow gives the upright size of a TIFF file, and decodes a whole PNG file to look for EXIF data behind it.
        known = image.format != 'TIFF' and (image.format != 'PNG' or 'exif' in image.info)
        if known and ORIENTATIONS.get(image.getexif().get(ORIENTATION, 1), (False,))[0]:
            width, height = height, width
        return ImageHeader(height, width, bit_depth)


def to_float(image: np.ndarray) -> np.ndarray:
    """uint8 or uint16 -> float32 in [0, 1]; the same shape."""
    return image.astype(np.float32) / np.float32(np.iinfo(image.dtype).max)


def to_unsigned(image: np.ndarray, bit_depth: int = 8) -> np.ndarray:
    """Float in [0, 1] -> uint8 or uint16, clipped and rounded; unsigned images change depth only. The same shape."""
    dtype = np.dtype(np.uint8 if bit_depth == 8 else np.uint16)
    if image.dtype == dtype:
        return image
    if image.dtype.kind == 'u':
        if dtype == np.uint16:
            return image.astype(np.uint16) * np.uint16(257)  # 255 becomes 65535
        return ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return np.rint(np.clip(image, 0, 1) * np.iinfo(dtype).max).astype(dtype)


def check_writable(path: str | os.PathLike, size: tuple[int, int], bit_depth: int = 8, has_alpha: bool = False) -> None:
    """Whether an image of this kind can be written to `path` without loss of what it has; before any work is done.

    Args:
        path: The file; its suffix says the format.
        size: (rows, columns).

    Raises:
        UserError: An unknown suffix, a missing folder, or a format that has no 16 bits, transparency or such a size.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(
            f"{path}: '{suffix}' is not a format that can be written; there are {', '.join(SUFFIXES)}."
            f'{did_you_mean(suffix, SUFFIXES)}'
        )
    if not Path(path).absolute().parent.is_dir():
        raise UserError(f'{path}: the folder {Path(path).parent} does not exist.')
    if suffix in FORMATS:
        return
    name, longest, holds_alpha = PILLOW_FORMATS[suffix]
    for lacks, what in (
        (bit_depth > 8, '16 bits'),
        (has_alpha and not holds_alpha, 'transparency'),
        (max(size) > longest, f'{size[0]} x {size[1]} pixels'),
    ):
        if lacks:
            raise UserError(f'{path}: {name} cannot hold {what}; write .png or .tif.')


def write_image(
    path: str | os.PathLike,
    rgb: np.ndarray,
    alpha: np.ndarray | None = None,
    bit_depth: int = 8,
    grey: bool = False,
    icc_profile: bytes | None = None,
    exif: bytes | None = None,
    quality: int = 95,
) -> None:
    """Write an image with everything it has. The file appears complete or not at all; an existing one is replaced.

    Args:
        path: Ends in one of `SUFFIXES`; its folder exists.
        rgb: (H, W, 3) float in [0, 1], uint8 or uint16.
        alpha: (H, W), of the same kinds.
        bit_depth: 8 or 16.
        grey: Write one channel, the luma of `rgb`.
        icc_profile: Colour profile to embed; left out where it does not fit a grey or colour image.
        exif: As `ImageData` has it; BMP and TIFF files are written without.
        quality: Of JPEG and WebP, 1 to 100.

    Raises:
        UserError: As `check_writable`, or the disk is full or fails.
    """
    check_writable(path, rgb.shape[:2], bit_depth, alpha is not None)
    pixels = join_channels(rgb, alpha, bit_depth, grey)
    if icc_profile is not None and (icc_profile[16:20] == b'GRAY') != grey:
        icc_profile = None
    height, width, channels = pixels.shape
    if Path(path).suffix.lower() in FORMATS:
        with StripWriter(path, height, width, channels, bit_depth, icc_profile, exif) as writer:
            writer.write(pixels)
        return
    output = AtomicFile(path)
    try:
        with output.naming():
            extras = {'icc_profile': icc_profile, 'exif': exif}
            options = {name: value for name, value in extras.items() if value is not None}
            if channels == 2:  # WebP has no grey
                pixels = np.concatenate([pixels[..., :1].repeat(3, axis=2), pixels[..., 1:]], axis=2)
            image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
            image.save(output.file, PILLOW_FORMATS[Path(path).suffix.lower()][0], quality=quality, **options)
        output.commit()
    except BaseException:
        output.discard()
        raise


def join_channels(rgb: np.ndarray, alpha: np.ndarray | None, bit_depth: int, grey: bool) -> np.ndarray:
    """(H, W, C) uint8 or uint16 as it is stored: grey, grey and alpha, RGB, or RGB and alpha.

    Args:
        rgb: (H, W, 3) float in [0, 1], uint8 or uint16; `alpha`: (H, W) or None, of the same kinds.
        bit_depth: 8 or 16.
        grey: Reduce `rgb` to its luma.
    """
    if grey:
        floats = rgb if rgb.dtype.kind == 'f' else to_float(rgb)
        rgb = (floats @ np.array(LUMA_WEIGHTS, floats.dtype))[..., None]  # (H, W, 1)
    pixels = to_unsigned(rgb, bit_depth)
    if alpha is None:
        return np.ascontiguousarray(pixels)
    return np.concatenate([pixels, to_unsigned(alpha, bit_depth)[..., None]], axis=2)


def is_image_name(name: str | os.PathLike) -> bool:
    """Whether the suffix is one that `read_image` knows."""
    return Path(name).suffix.lower() in SUFFIXES


def _read_bytes(path: str | os.PathLike) -> bytes:
    with _open_file(path) as file:
        return file.read()


def _open_file(path: str | os.PathLike) -> io.BufferedReader:
    try:
        return open(path, 'rb')
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror}).') from error


@contextlib.contextmanager
def _naming(name: str):
    """Every error of a decoder names the file: a damaged file can end in almost any exception."""
    try:
        with _pillow_limit:
            yield
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f'{name}: not enough memory to decode this image.') from error
    except Exception as error:
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise UserError(f'{name}: the image is damaged or of an unsupported kind ({reason:.120}).') from error


def _open(data: bytes | io.BufferedReader, name: str) -> Image.Image:
    """Pillow's image, not decoded yet."""
    start = data[:4] if isinstance(data, bytes) else data.peek(4)[:4]
    if not start:
        raise UserError(f'{name}: the file is empty.')
    try:
        image = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
    except Image.UnidentifiedImageError:
        if start in TIFF_STARTS:
            raise UserError(
                f'{name}: a TIFF file whose beginning is damaged, or of an unsupported kind: 32-bit and '
                'float images are not supported; store it with 8 or 16 bits.'
            ) from None
        raise UserError(
            f'{name}: not an image that can be read, or its beginning is damaged; '
            f'{", ".join(suffix[1:] for suffix in SUFFIXES)} can be read.'
        ) from None
    if image.width * image.height > MAX_PIXELS:
        raise UserError(f'{name}: {image.height} x {image.width} pixels are more than the limit of {MAX_PIXELS}.')
    return image


def _bit_depth(image: Image.Image) -> int:
    """8 or 16; smaller depths count as 8."""
    if image.mode.startswith('I;16'):
        return 16
    if image.format == 'TIFF':
        return 16 if max(image.tag_v2.get(TIFF_BITS, (8,))) == 16 else 8
    if image.format == 'PNG':
        # Pillow's mode does not tell it: the raw mode of its decoder does, 'RGB;16B'.
        return 16 if any('16' in str(tile[3]) for tile in image.tile) else 8
    return 8


def _read_8_bit(image: Image.Image, name: str) -> ImageData:
    image.load()
    if image.mode not in (*GREY_MODES, *ALPHA_MODES, *COLOUR_MODES):
        raise UserError(f"{name}: images of mode '{image.mode}' are not supported; store it with 8 or 16 bits.")
    profile, exif = image.info.get('icc_profile') or None, kept_exif(image)
    has_alpha = image.mode in ALPHA_MODES or 'transparency' in image.info
    was_grey = image.mode in GREY_MODES
    orientation = image.getexif().get(ORIENTATION, 1)
    num_frames = getattr(image, 'n_frames', 1)
    if image.mode == 'CMYK' and profile is not None:
        image, profile = _cmyk_to_srgb(image, profile), None
    target = ('LA' if has_alpha else 'L') if was_grey else ('RGBA' if has_alpha else 'RGB')
    if image.mode == '1' and has_alpha:
        image = image.convert('RGBA')  # Pillow has no way from 1-bit to LA
        was_grey, target = True, 'RGBA'
    pixels = np.asarray(image if image.mode == target else image.convert(target))
    pixels = _upright(pixels, orientation)
    alpha = np.ascontiguousarray(pixels[..., -1]) if has_alpha else None
    colours = pixels[..., :-1] if has_alpha else pixels
    return ImageData(_three_channels(colours), alpha, 8, was_grey, profile, num_frames, exif)


def _cmyk_to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile('sRGB'), outputMode='RGB')
    except (ImageCms.PyCMSError, OSError):  # a broken or wrong profile: as if there were none
        return image.convert('RGB')


def _read_16_bit(image: Image.Image, data: bytes, name: str) -> ImageData:
    """Pillow checks the file and knows what it is; the pixels come from OpenCV."""
    tags = getattr(image, 'tag_v2', {})
    was_grey = image.mode in GREY_MODES or _png_colour_type(image, data) in (0, 4)
    if image.format == 'TIFF' and not was_grey and tags.get(TIFF_PLANAR, 1) != 1:
        raise UserError(f'{name}: 16-bit TIFF with separate colour planes is not supported; store it interleaved.')
    orientation = 1 if image.format == 'TIFF' else image.getexif().get(ORIENTATION, 1)  # OpenCV turns TIFF by itself
    num_frames = getattr(image, 'n_frames', 1)
    profile, exif = image.info.get('icc_profile') or None, kept_exif(image)
    image.load()  # raises where the file is damaged; OpenCV would return half a picture
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16 or (pixels.ndim == 3 and pixels.shape[2] not in (3, 4)):
        raise UserError(f'{name}: this kind of 16-bit image is not supported; store it as plain 16-bit PNG.')
    pixels = _upright(pixels, orientation)
    has_alpha = pixels.ndim == 3 and pixels.shape[2] == 4
    alpha = np.ascontiguousarray(pixels[..., 3]) if has_alpha else None
    if pixels.ndim == 2 and 'transparency' in image.info:  # one grey level; OpenCV makes alpha of an RGB colour only
        alpha = np.where(pixels == image.info['transparency'], 0, 65535).astype(np.uint16)
    rgb = _three_channels(pixels[..., 2::-1] if pixels.ndim == 3 else pixels)  # OpenCV's order is blue, green, red
    if tags.get(TIFF_PHOTOMETRIC) == 0:
        rgb = 65535 - rgb  # white is 0
    if has_alpha and tags.get(TIFF_EXTRA, (2,))[0] == 1:
        rgb = _divide_by_alpha(rgb, alpha)
    return ImageData(rgb, alpha, 16, was_grey, profile, num_frames, exif)


def _png_colour_type(image: Image.Image, data: bytes) -> int | None:
    return data[25] if image.format == 'PNG' else None  # signature, length, 'IHDR', width, height, depth, colour type


def _divide_by_alpha(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Undo TIFF's associated alpha."""
    weight = np.maximum(alpha, 1).astype(np.float64)[..., None] / 65535
    return np.minimum(np.rint(rgb / weight), 65535).astype(np.uint16)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    transpose, flip_rows, flip_cols = ORIENTATIONS.get(orientation, ORIENTATIONS[1])
    if transpose:
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: -1 if flip_rows else 1, :: -1 if flip_cols else 1]


def _three_channels(pixels: np.ndarray) -> np.ndarray:
    """(H, W), (H, W, 1) or (H, W, 3) -> contiguous (H, W, 3)."""
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
