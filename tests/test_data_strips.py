"""Files that are written strip by strip: equal through independent readers, complete or not there at all."""

import cv2
import numpy as np
import pytest
from helpers import shared_data
from PIL import Image

from moeisr_basicsr.data import strip_writer
from moeisr_basicsr.data.image_io import read_image
from moeisr_basicsr.data.strip_writer import StripWriter
from moeisr_basicsr.errors import UserError


def noise(*shape, depth=8, seed=0):
    return np.random.default_rng(seed).integers(0, 2**depth, shape, dtype=np.uint8 if depth == 8 else np.uint16)


def check_strips(path, pixels, strip_rows):
    height, width, channels = pixels.shape
    with StripWriter(path, height, width, channels, pixels.dtype.itemsize * 8) as writer:
        buffer = np.empty((strip_rows, width, channels), pixels.dtype)
        for start in range(0, height, strip_rows):
            part = buffer[: min(strip_rows, height - start)]
            part[...] = pixels[start : start + strip_rows]
            writer.write(part)  # the buffer is used again: the writer must have taken what it needs


@pytest.mark.parametrize('depth', [8, 16])
@pytest.mark.parametrize('channels', [1, 3, 4])
@pytest.mark.parametrize('size', [(1, 1), (1, 50), (50, 1), (301, 1203)])
@pytest.mark.parametrize('suffix', ['.png', '.tif'])
def test_strips_through_an_independent_reader(tmp_path, suffix, size, channels, depth):
    pixels = noise(*size, channels, depth=depth, seed=channels)
    pixels[size[0] // 2 :] //= 8  # both filters and differences that overflow, and small ones
    path = tmp_path / f'strips{suffix}'
    check_strips(path, pixels, 7)
    if depth == 8:
        np.testing.assert_array_equal(np.asarray(Image.open(path)).reshape(pixels.shape), pixels)
    else:
        other = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        if channels == 1:
            other = other[..., None]
        np.testing.assert_array_equal(other if channels == 1 else other[..., [2, 1, 0, 3][:channels]], pixels)


def test_a_photograph_in_strips_is_smaller_than_its_pixels_and_correct(tmp_path):
    pixels = read_image(shared_data('Kodak24', '05.png')).rgb
    for suffix in ('.png', '.tif'):
        path = tmp_path / f'photo{suffix}'
        check_strips(path, pixels, 100)
        np.testing.assert_array_equal(cv2.imread(str(path))[..., ::-1], pixels)
        assert path.stat().st_size < 0.75 * pixels.size


def test_big_tiff(tmp_path, monkeypatch):
    monkeypatch.setattr(strip_writer, 'TIFF_CLASSIC_LIMIT', 1000)
    monkeypatch.setattr(strip_writer, 'BLOCK_BYTES', 500)
    pixels = noise(60, 40, 3)
    check_strips(tmp_path / 'big.tif', pixels, 9)
    assert (tmp_path / 'big.tif').read_bytes()[:4] == b'II\x2b\x00'
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / 'big.tif')), pixels)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / 'big.tif'))[..., ::-1], pixels)


def test_no_half_finished_file(tmp_path):
    path = tmp_path / 'image.png'
    path.write_bytes(b'old')
    rows = noise(2, 4, 3)
    with pytest.raises(RuntimeError), StripWriter(path, 4, 4) as writer:
        writer.write(rows)
        raise RuntimeError
    writer = StripWriter(path, 4, 4)
    writer.write(rows)
    with pytest.raises(ValueError, match='2 of 4 rows'):
        writer.close()
    with StripWriter(path, 4, 4) as writer:
        for wrong in (noise(2, 5, 3), noise(2, 4, 4), noise(2, 4, 3, depth=16), noise(5, 4, 3)):
            with pytest.raises(ValueError, match='rows'):
                writer.write(wrong)
        assert path.read_bytes() == b'old'
        writer.write(noise(4, 4, 3))
    assert path.read_bytes() != b'old' and len(list(tmp_path.iterdir())) == 1


def test_the_longest_name_that_a_folder_holds(tmp_path):
    path, other_path = (tmp_path / f'{"x" * 251}{suffix}' for suffix in ('.png', '.tif'))  # 255 bytes
    with StripWriter(path, 4, 4) as writer, StripWriter(other_path, 4, 4) as other:
        for each in (writer, other):
            each.write(noise(4, 4, 3))
    assert sorted(tmp_path.iterdir()) == [path, other_path]


def test_a_full_disk_is_a_clear_error(tmp_path):
    full = '/dev/full'
    writer = StripWriter(tmp_path / 'image.png', 600, 600)
    writer.output.file.close()
    try:
        writer.output.file = writer.encoder.file = open(full, 'wb')
    except OSError:
        pytest.skip('this system has no /dev/full')
    with pytest.raises(UserError, match='image.png: cannot be written .No space left'):
        for _ in range(6):
            writer.write(noise(100, 600, 3))
        writer.close()
    writer.output.discard()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match='cannot be written'):
        StripWriter(tmp_path / 'none' / 'image.png', 2, 2)
    with pytest.raises(UserError, match='.png, .tif'):
        StripWriter(tmp_path / 'image.jpg', 2, 2)
