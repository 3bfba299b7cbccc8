"""What a photograph's EXIF data says of the picture stays with its copy; what no longer holds does not."""

import io
import random

import numpy as np
import pytest
from helpers import write_image
from PIL import Image
from PIL.TiffImagePlugin import IFDRational

from moeisr_basicsr.data.exif import LONGEST, PREFIX, kept_exif
from moeisr_basicsr.data.image_reader import read_image

MAKE, ORIENTATION, DATE, ARTIST, WIDTH = 271, 274, 306, 315, 256
EXIF, EXPOSURE, TAKEN, PIXEL_X, CAMERA_NOTES = 0x8769, 33434, 36867, 40962, 37500
GPS, LATITUDE = 0x8825, 2


def photograph(kind='JPEG', orientation=6, notes=b'notes', artist='A. Nobody'):
    """A file of 6 rows and 8 columns as stored."""
    exif = Image.Exif()
    exif.update({MAKE: 'Camera', ORIENTATION: orientation, DATE: '2026:11:22 10:11:12', ARTIST: artist})
    exif[EXIF] = {EXPOSURE: IFDRational(1, 250), TAKEN: '2026:11:22 10:11:11', PIXEL_X: 8, CAMERA_NOTES: notes}
    exif[GPS] = {LATITUDE: (IFDRational(47), IFDRational(22), IFDRational(30))}
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(pixels).save(file, kind, exif=exif.tobytes())
    return file.getvalue()


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'TIFF'])
@pytest.mark.parametrize('suffix', ['.jpg', '.png', '.webp'])
def test_what_holds_is_kept(tmp_path, kind, suffix):
    image = read_image(photograph(kind))
    path = tmp_path / f'copy{suffix}'
    write_image(path, image.rgb.repeat(2, axis=0).repeat(2, axis=1), exif=image.exif)
    with Image.open(path) as copy:
        found = copy.getexif()
        assert {tag: found[tag] for tag in (MAKE, DATE, ARTIST)} == {
            MAKE: 'Camera',
            DATE: '2026:11:22 10:11:12',
            ARTIST: 'A. Nobody',
        }
        camera, place = found.get_ifd(EXIF), found.get_ifd(GPS)
        assert float(camera[EXPOSURE]) == 1 / 250 and camera[TAKEN] == '2026:11:22 10:11:11'
        assert [float(part) for part in place[LATITUDE]] == [47, 22, 30]
        assert not {ORIENTATION, WIDTH} & set(found) and not {PIXEL_X, CAMERA_NOTES} & set(camera)
        assert copy.size == (image.rgb.shape[1] * 2, image.rgb.shape[0] * 2)
    assert read_image(path).rgb.shape[:2] == (image.rgb.shape[0] * 2, image.rgb.shape[1] * 2)  # not turned again


@pytest.mark.parametrize('suffix', ['.tif', '.bmp'])
def test_formats_without(tmp_path, suffix):
    image = read_image(photograph())
    write_image(tmp_path / f'copy{suffix}', image.rgb, exif=image.exif)
    np.testing.assert_array_equal(read_image(tmp_path / f'copy{suffix}').rgb, image.rgb)


def test_nothing_to_keep():
    file = io.BytesIO()
    Image.new('RGB', (4, 4)).save(file, 'PNG')
    assert read_image(file.getvalue()).exif is None
    assert read_image(photograph()).exif.startswith(PREFIX)


def test_too_long_for_a_jpeg_file():
    assert kept_exif(Image.open(io.BytesIO(photograph('PNG', artist='x' * (LONGEST + 1))))) is None
    assert kept_exif(Image.open(io.BytesIO(photograph('PNG', notes=b'x' * (LONGEST + 1))))) is not None


@pytest.mark.filterwarnings('ignore')  # Pillow's, about the damage
def test_damage_costs_the_exif_data_at_most(tmp_path):
    whole, draw = photograph('JPEG', orientation=1), random.Random(0)
    start, stop = whole.index(PREFIX) + len(PREFIX), whole.index(b'\xff\xdb')  # up to the quantization tables
    expected = read_image(whole).rgb
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 8)):
            data[draw.randrange(start, stop)] = draw.randrange(256)
        image = read_image(bytes(data))
        assert sorted(image.rgb.shape) == sorted(expected.shape)  # the orientation may be hit
        write_image(tmp_path / 'copy.jpg', image.rgb, exif=image.exif)
        write_image(tmp_path / 'copy.png', image.rgb, exif=image.exif)
        assert read_image(tmp_path / 'copy.png').rgb.shape == image.rgb.shape
