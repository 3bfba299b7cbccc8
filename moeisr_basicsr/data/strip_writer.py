"""PNG and TIFF files written strip by strip: the image is never held as a whole, in memory or half finished on disk.

Both formats are simple enough to write by hand: filtered or differenced rows, deflated. Pillow and OpenCV want the
whole image, and neither writes every kind: 16-bit colour, grey with alpha.

Shapes: strips are (R, W, C) with R rows; C is 1 (grey), 2 (grey and alpha), 3 (RGB) or 4 (RGB and alpha).
"""

import contextlib
import os
import struct
import zlib
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from moeisr_basicsr.atomic_file import temporary_path
from moeisr_basicsr.errors import UserError

from .exif import PREFIX

FORMATS = {'.png': 'png', '.tif': 'tiff', '.tiff': 'tiff'}
LEVEL = 4  # of zlib; level 6 takes twice the time and saves 8 % on photographs
PNG_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
PNG_FILTERS = (1, 2, 4)  # Sub, Up, Paeth
PNG_LIMIT = 2**31 - 1
BLOCK_BYTES = 1 << 20  # of rows that are filtered at once; a strip of a TIFF file
TIFF_CLASSIC_LIMIT = 4_000_000_000  # offsets have 32 bits; deflate adds at most 0.1 % to what does not compress


class AtomicFile:
    """A file that appears under its name complete, or not at all, and stays open as long as the caller computes.

    Attributes:
        file: The open temporary file, in the folder of `path`.

    Raises:
        UserError: It cannot be created, with the system's reason.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.temporary = temporary_path(self.path)
        with self.naming():
            self.file: BinaryIO = open(self.temporary, 'wb')

    @contextlib.contextmanager
    def naming(self):
        try:
            yield
        except OSError as error:
            raise UserError(f'{self.path}: cannot be written ({error.strerror or error}).') from error

    def commit(self) -> None:
        """Put the finished file in its place."""
        with self.naming():
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            os.replace(self.temporary, self.path)

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # a full disk: closing flushes once more
            self.file.close()
        self.temporary.unlink(missing_ok=True)


class StripWriter:
    """Writes an image from top to bottom. `close`, or the end of a `with` block, puts the file in its place.

    With an error inside the `with` block, or rows missing, no file appears and an older one of that name stays.

    Args:
        path: Ends in .png, .tif or .tiff. A TIFF of more than about 4 GB becomes a BigTIFF.
        height: Rows of the whole image.
        width: Columns.
        channels: C.
        bit_depth: 8 or 16.
        icc_profile: Colour profile to embed.
        exif: As `kept_exif` returns it; TIFF files are written without.

    Raises:
        UserError: Another suffix, a size that the format cannot hold, or the file cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        height: int,
        width: int,
        channels: int = 3,
        bit_depth: int = 8,
        icc_profile: bytes | None = None,
        exif: bytes | None = None,
    ):
        kind = FORMATS.get(Path(path).suffix.lower())
        if kind is None:
            raise UserError(f'{path}: strips can be written to {", ".join(FORMATS)} only.')
        assert channels in PNG_COLOUR_TYPES and bit_depth in (8, 16), (channels, bit_depth)
        if not (1 <= height <= PNG_LIMIT and 1 <= width <= PNG_LIMIT):
            raise UserError(f'{path}: an image of {height} x {width} pixels cannot be written.')
        self.shape = (height, width, channels)
        self.dtype = np.dtype(np.uint8 if bit_depth == 8 else np.uint16)
        self.rows_written = 0
        self.output = AtomicFile(path)
        try:
            with self.output.naming():
                self.encoder = (
                    _Png(self.output.file, self.shape, bit_depth, icc_profile, exif)
                    if kind == 'png'
                    else _Tiff(self.output.file, self.shape, bit_depth, icc_profile)
                )
        except BaseException:
            self.output.discard()
            raise

    def write(self, rows: np.ndarray) -> None:
        """Append rows.

        Args:
            rows: (R, W, C), or (R, W) where C is 1; uint8 or uint16 as the bit depth says.

        Raises:
            ValueError: Another width, number of channels or type, or more rows than the image has.
            UserError: The disk is full or fails.
        """
        if rows.ndim == 2:
            rows = rows[..., None]
        if rows.ndim != 3 or rows.shape[1:] != self.shape[1:] or rows.dtype != self.dtype:
            raise ValueError(
                f'A strip must be (rows, {self.shape[1]}, {self.shape[2]}) {self.dtype}; got {rows.shape} {rows.dtype}.'
            )
        if self.rows_written + len(rows) > self.shape[0]:
            raise ValueError(f'The image has {self.shape[0]} rows; got {self.rows_written + len(rows)}.')
        self.rows_written += len(rows)
        with self.output.naming():
            self.encoder.write(rows)

    def close(self) -> None:
        """Finish the file.

        Raises:
            ValueError: Rows are missing; nothing is left behind.
            UserError: The disk is full or fails.
        """
        try:
            if self.rows_written != self.shape[0]:
                raise ValueError(f'{self.output.path}: {self.rows_written} of {self.shape[0]} rows were written.')
            with self.output.naming():
                self.encoder.finish()
            self.output.commit()
        except BaseException:
            self.output.discard()
            raise

    def __enter__(self) -> 'StripWriter':
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.output.discard()


class _Png:
    """PNG (ISO 15948): one zlib stream over filtered rows, cut into IDAT chunks."""

    def __init__(
        self, file: BinaryIO, shape: tuple[int, int, int], bit_depth: int, icc_profile: bytes | None, exif: bytes | None
    ):
        height, width, channels = shape
        self.file = file
        self.pixel_bytes = channels * bit_depth // 8
        self.row_bytes = width * self.pixel_bytes
        self.above = np.zeros((1, self.row_bytes), np.uint8)
        self.stream = zlib.compressobj(LEVEL, strategy=zlib.Z_FILTERED)
        file.write(b'\x89PNG\r\n\x1a\n')
        self.chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, bit_depth, PNG_COLOUR_TYPES[channels], 0, 0, 0))
        if icc_profile is not None:
            self.chunk(b'iCCP', b'ICC profile\0\0' + zlib.compress(icc_profile))
        if exif is not None:
            self.chunk(b'eXIf', exif.removeprefix(PREFIX))

    def chunk(self, kind: bytes, data: bytes) -> None:
        if data or kind == b'IEND':
            self.file.write(struct.pack('>I', len(data)) + kind)
            self.file.write(data)
            self.file.write(struct.pack('>I', zlib.crc32(data, zlib.crc32(kind))))

    def write(self, rows: np.ndarray) -> None:
        step = max(BLOCK_BYTES // self.row_bytes, 1)  # bounds the temporaries of a tall strip
        for start in range(0, len(rows), step):
            part = np.ascontiguousarray(rows[start : start + step])
            part = part.astype(part.dtype.newbyteorder('>')).view(np.uint8).reshape(len(part), -1)  # (R, row bytes)
            self.chunk(b'IDAT', self.stream.compress(self.filter(part)))

    def filter(self, rows: np.ndarray) -> bytes:
        """Each row by the filter whose output is smallest in sum, the usual guess at what deflates best."""
        padded = np.concatenate([self.above, rows])
        self.above = padded[-1:].copy()
        up = padded[:-1]
        left = _shifted(rows, self.pixel_bytes)
        corner = _shifted(up, self.pixel_bytes)
        filtered = np.stack([rows - left, rows - up, rows - _paeth(left, up, corner)])  # (3, R, row bytes)
        magnitude = np.abs(filtered.view(np.int8)).view(np.uint8).sum(axis=2, dtype=np.int64)
        best = magnitude.argmin(axis=0)  # (R,)
        result = np.empty((len(rows), self.row_bytes + 1), np.uint8)
        result[:, 0] = np.array(PNG_FILTERS, np.uint8)[best]
        result[:, 1:] = filtered[best, np.arange(len(rows))]
        return result.tobytes()

    def finish(self) -> None:
        self.chunk(b'IDAT', self.stream.flush())
        self.chunk(b'IEND', b'')


def _shifted(rows: np.ndarray, count: int) -> np.ndarray:
    """Rows moved right by `count` bytes, zeros at the left."""
    moved = np.zeros_like(rows)
    moved[:, count:] = rows[:, :-count]
    return moved


def _paeth(left: np.ndarray, up: np.ndarray, corner: np.ndarray) -> np.ndarray:
    """PNG's Paeth predictor: of the three neighbours the one nearest to left + up - corner."""
    # left + up - corner misses left by up - corner, and up by left - corner.
    from_up, from_left = (neighbour.astype(np.int16) for neighbour in (left, up))
    from_up -= corner
    from_left -= corner
    from_corner = np.abs(from_up + from_left)
    np.abs(from_up, out=from_up)
    np.abs(from_left, out=from_left)
    nearest = np.where(from_up <= from_corner, up, corner)
    np.copyto(nearest, left, where=(from_left <= from_up) & (from_left <= from_corner))
    return nearest


class _Tiff:
    """TIFF 6.0, or BigTIFF: deflated strips with horizontal differencing, the directory at the end of the file."""

    def __init__(self, file: BinaryIO, shape: tuple[int, int, int], bit_depth: int, icc_profile: bytes | None):
        self.file = file
        self.shape = shape
        self.bit_depth = bit_depth
        self.icc_profile = icc_profile
        row_bytes = shape[1] * shape[2] * bit_depth // 8
        self.big = shape[0] * row_bytes > TIFF_CLASSIC_LIMIT
        self.strip_rows = min(max(BLOCK_BYTES // row_bytes, 1), shape[0])
        self.waiting: list[np.ndarray] = []
        self.offsets, self.lengths = [], []
        # The place of the directory is not known yet: it is filled in at the end.
        file.write(struct.pack('<2sHHHQ', b'II', 43, 8, 0, 0) if self.big else struct.pack('<2sHI', b'II', 42, 0))

    def write(self, rows: np.ndarray) -> None:
        self.waiting.append(rows)
        if sum(map(len, self.waiting)) < self.strip_rows:
            self.waiting[-1] = rows.copy()  # the caller may use its buffer again
            return
        rows = np.concatenate(self.waiting)
        whole = len(rows) // self.strip_rows * self.strip_rows
        for start in range(0, whole, self.strip_rows):
            self.strip(rows[start : start + self.strip_rows])
        self.waiting = [rows[whole:].copy()] if whole < len(rows) else []

    def strip(self, rows: np.ndarray) -> None:
        differences = np.concatenate([rows[:, :1], rows[:, 1:] - rows[:, :-1]], axis=1)  # modulo 2^bits
        data = zlib.compress(differences.astype(differences.dtype.newbyteorder('<')).tobytes(), LEVEL)
        self.offsets.append(self.file.tell())
        self.lengths.append(len(data))
        self.file.write(data)

    def finish(self) -> None:
        if self.waiting:
            self.strip(np.concatenate(self.waiting))
        height, width, channels = self.shape
        word = 'Q' if self.big else 'I'
        entries = [
            (256, 'I', [width]),
            (257, 'I', [height]),
            (258, 'H', [self.bit_depth] * channels),
            (259, 'H', [8]),
            (262, 'H', [2 if channels > 2 else 1]),
            (273, word, self.offsets),
            (274, 'H', [1]),
            (277, 'H', [channels]),
            (278, 'I', [self.strip_rows]),
            (279, word, self.lengths),
            (284, 'H', [1]),
            (317, 'H', [2]),
        ]
        if channels in (2, 4):
            entries.append((338, 'H', [2]))  # alpha that is not multiplied into the colours
        if self.icc_profile is not None:
            entries.append((34675, 'B', list(self.icc_profile)))
        self.directory(entries)

    def directory(self, entries: list[tuple[int, str, list[int]]]) -> None:
        """(tag, struct code, values) in rising order of tags; long values go before the directory."""
        kinds = {'B': 7, 'H': 3, 'I': 4, 'Q': 16}
        size_code, room = ('Q', 8) if self.big else ('I', 4)
        rows = []
        for tag, code, values in entries:
            data = struct.pack(f'<{len(values)}{code}', *values)
            if len(data) > room:
                data, place = struct.pack(f'<{size_code}', self.aligned()), data
                self.file.write(place)
            rows.append(struct.pack(f'<HH{size_code}', tag, kinds[code], len(values)) + data.ljust(room, b'\0'))
        start = self.aligned()
        self.file.write(struct.pack('<Q' if self.big else '<H', len(rows)) + b''.join(rows) + bytes(room))
        self.file.seek(8 if self.big else 4)
        self.file.write(struct.pack(f'<{size_code}', start))
        self.file.seek(0, os.SEEK_END)

    def aligned(self) -> int:
        """The next even place in the file, as TIFF wants them."""
        if self.file.tell() % 2:
            self.file.write(b'\0')
        return self.file.tell()
