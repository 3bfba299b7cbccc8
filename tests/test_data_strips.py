"""Files that are written strip by strip: equal through independent readers, complete or not there at all."""

import re
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import shared_data, write_image
from PIL import Image

from moeisr_basicsr.atomic_file import SaveError
from moeisr_basicsr.data import strip_encoders
from moeisr_basicsr.data.image_reader import read_image
from moeisr_basicsr.data.image_writer import strip_writer
from moeisr_basicsr.errors import UserError


def noise(*shape, depth=8, seed=0):
    return np.random.default_rng(seed).integers(0, 2**depth, shape, dtype=np.uint8 if depth == 8 else np.uint16)


def check_strips(path, pixels, strip_rows):
    height, width, channels = pixels.shape
    with strip_writer(path, height, width, channels, pixels.dtype.itemsize * 8) as write:
        buffer = np.empty((strip_rows, width, channels), pixels.dtype)
        for start in range(0, height, strip_rows):
            part = buffer[: min(strip_rows, height - start)]
            part[...] = pixels[start : start + strip_rows]
            write(part)  # the buffer is used again: the writer must have taken what it needs


@pytest.mark.parametrize('depth', [8, 16])
@pytest.mark.parametrize('channels', [1, 2, 3, 4])
@pytest.mark.parametrize('size', [(1, 1), (1, 50), (50, 1), (301, 1203)])
@pytest.mark.parametrize('suffix', ['.png', '.tif'])
def test_strips_through_an_independent_reader(tmp_path, suffix, size, channels, depth):
    pixels = noise(*size, channels, depth=depth, seed=channels)
    pixels[size[0] // 2 :] //= 8  # both filters and differences that overflow, and small ones
    path = tmp_path / f'strips{suffix}'
    check_strips(path, pixels, 7)
    if depth == 8:
        np.testing.assert_array_equal(np.asarray(Image.open(path)).reshape(pixels.shape), pixels)
    elif suffix == '.png' or channels != 2:  # no other reader knows 16-bit TIFF of grey and alpha
        other = np.atleast_3d(cv2.imread(str(path), cv2.IMREAD_UNCHANGED))
        order = {1: [0], 2: [0, 3], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[channels]
        np.testing.assert_array_equal(other[..., order], pixels)


def test_a_photograph_in_strips_is_smaller_than_its_pixels_and_correct(tmp_path):
    pixels = read_image(shared_data('Kodak24', '05.png')).rgb
    for suffix in ('.png', '.tif'):
        path = tmp_path / f'photo{suffix}'
        check_strips(path, pixels, 100)
        np.testing.assert_array_equal(cv2.imread(str(path))[..., ::-1], pixels)
        assert path.stat().st_size < 0.75 * pixels.size


def resident_mib():
    """Memory of this process that is no file's."""
    return int(re.search(r'RssAnon:\s+(\d+)', Path('/proc/self/status').read_text()).group(1)) / 1024


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='reads the memory from Linux')
@pytest.mark.parametrize('suffix', ['.png', '.tif'])
def test_a_large_image_needs_little_memory(tmp_path, suffix, monkeypatch):
    height, strip = 3000, noise(250, 5000, 3) // 16  # 45 MB
    peak, compress = [], zlib.compress
    monkeypatch.setattr(zlib, 'compress', lambda *args: (peak.append(resident_mib()), compress(*args))[1])
    start = resident_mib()
    with strip_writer(tmp_path / f'large{suffix}', height, strip.shape[1]) as write:
        for _ in range(height // len(strip)):
            write(strip)
            peak.append(resident_mib())
    assert max(peak) - start < 20
    with Image.open(tmp_path / f'large{suffix}') as image:
        assert image.size == (5000, height)
        np.testing.assert_array_equal(image.crop((0, 2750, 5000, 3000)), strip)


def test_no_half_finished_file(tmp_path):
    path = tmp_path / 'image.png'
    path.write_bytes(b'old')
    with pytest.raises(RuntimeError), strip_writer(path, 4, 4) as write:
        write(noise(2, 4, 3))
        raise RuntimeError
    with pytest.raises(AssertionError), strip_writer(path, 4, 4) as write:
        write(noise(2, 4, 3))  # and no more
    for wrong in (noise(4, 5, 3), noise(4, 4, 4), noise(4, 4, 3, depth=16), noise(5, 4, 3)):
        with pytest.raises(AssertionError), strip_writer(path, 4, 4) as write:
            write(wrong)
    assert path.read_bytes() == b'old'
    write_image(path, noise(4, 4, 3))
    assert path.read_bytes() != b'old' and len(list(tmp_path.iterdir())) == 1


def test_the_longest_name_that_a_folder_holds(tmp_path):
    path, other_path = (tmp_path / f'{"x" * 251}{suffix}' for suffix in ('.png', '.tif'))  # 255 bytes
    with strip_writer(path, 4, 4) as write, strip_writer(other_path, 4, 4) as other:
        for each in (write, other):
            each(noise(4, 4, 3))
    assert sorted(tmp_path.iterdir()) == [path, other_path]


@pytest.mark.parametrize('suffix', ['.png', '.tif', '.jpg'])
def test_a_failing_disk_is_a_clear_error(tmp_path, suffix):
    resource = pytest.importorskip('resource')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # bytes; Python ignores the signal
    try:
        with pytest.raises(SaveError, match=f'File too large: cannot write .*image{suffix}'):
            write_image(tmp_path / f'image{suffix}', noise(600, 600, 3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_written(tmp_path):
    for name, words in (('none/image.png', 'the folder .*none does not exist'), ('image.gif', 'there are .png')):
        with pytest.raises(UserError, match=words), strip_writer(tmp_path / name, 2, 2):
            pass


def test_a_tiff_file_beyond_4_gb_has_offsets_of_64_bits(tmp_path, monkeypatch):
    """Chosen by the bytes of the pixels: those of the file are known too late."""
    pixels = noise(40, 30, 3)
    monkeypatch.setattr(strip_encoders, 'CLASSIC_TIFF', pixels.nbytes - 1)
    for name, rows, version in (('big.tif', 40, 43), ('classic.tif', 39, 42)):
        with strip_writer(tmp_path / name, rows, 30) as write:
            write(pixels[:rows])
        assert int.from_bytes((tmp_path / name).read_bytes()[2:4], 'little') == version
        np.testing.assert_array_equal(cv2.imread(str(tmp_path / name))[..., ::-1], pixels[:rows])
        np.testing.assert_array_equal(read_image(tmp_path / name).rgb, pixels[:rows])
