"""Images of every kind people have: the right pixels, or one error that names the file."""

import io
import struct
import threading
import zlib

import cv2
import numpy as np
import pytest
from helpers import shared_data, write_image
from PIL import Image, ImageCms

from moeisr_basicsr.data.image_reader import read_header, read_image, to_float
from moeisr_basicsr.data.image_writer import check_writable, to_unsigned
from moeisr_basicsr.errors import UserError

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()


def noise(*shape, depth=8, seed=0):
    return np.random.default_rng(seed).integers(0, 2**depth, shape, dtype=np.uint8 if depth == 8 else np.uint16)


def smooth(height=40, width=56):
    """A colour picture that JPEG keeps to a few grey levels."""
    row, col = np.mgrid[0:height, 0:width]
    return np.stack([row * 4, col * 4, (row + col) * 2], axis=-1).astype(np.uint8)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def raw_png(pixels, colour_type, depth, transparent=None):
    """A PNG written from its definition, without filters."""

    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    rows = b''.join(b'\0' + row.astype('>u2' if depth == 16 else np.uint8).tobytes() for row in pixels)
    header = struct.pack('>IIBBBBB', pixels.shape[1], pixels.shape[0], depth, colour_type, 0, 0, 0)
    colour = b'' if transparent is None else chunk(b'tRNS', transparent.astype('>u2').tobytes())
    return (
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', header)
        + colour
        + chunk(b'IDAT', zlib.compress(rows))
        + chunk(b'IEND', b'')
    )


def raw_tiff(pixels, tags=()):
    """An uncompressed little-endian TIFF of one strip, written from its definition."""
    height, width, channels = pixels.shape
    data = pixels.astype(pixels.dtype.newbyteorder('<')).tobytes()
    depth = pixels.dtype.itemsize * 8
    bits = struct.pack(f'<{channels}H', *[depth] * channels)
    bits_at = 8 + len(data)
    entries = {
        256: (4, 1, width),
        257: (4, 1, height),
        259: (3, 1, 1),
        262: (3, 1, 2 if channels > 2 else 1),
        258: (3, channels, bits_at if channels > 2 else int.from_bytes(bits, 'little')),
        273: (4, 1, 8),
        277: (3, 1, channels),
        278: (4, 1, height),
        279: (4, 1, len(data)),
    }
    entries.update({tag: (3, 1, value) for tag, value in tags})
    directory = (
        struct.pack('<H', len(entries))
        + b''.join(struct.pack('<HHII', tag, *entries[tag]) for tag in sorted(entries))
        + bytes(4)
    )
    return struct.pack('<2sHI', b'II', 42, bits_at + len(bits)) + data + bits + directory


@pytest.mark.parametrize('size', [(1, 1), (1, 7), (9, 1), (23, 31)])
@pytest.mark.parametrize('kind', ['PNG', 'TIFF', 'BMP'])
def test_rgb_of_lossless_formats(kind, size):
    pixels = noise(*size, 3)
    image = read_image(encoded(Image.fromarray(pixels), kind))
    np.testing.assert_array_equal(image.rgb, pixels)
    assert (image.alpha, image.bit_depth, image.was_grey, image.num_frames) == (None, 8, False, 1)
    assert image.rgb.flags.c_contiguous


def test_jpeg_and_webp_are_what_opencv_decodes():
    for kind in ('JPEG', 'WEBP'):
        data = encoded(Image.fromarray(smooth()), kind, quality=95)
        other = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        assert np.abs(read_image(data).rgb.astype(int) - other).max() <= 3


def test_a_real_grey_image():
    path = shared_data('Set14', 'bridge.png')
    image = read_image(path)
    assert image.was_grey and image.rgb.shape == (512, 512, 3)
    np.testing.assert_array_equal(image.rgb, np.asarray(Image.open(path))[..., None].repeat(3, axis=2))


def test_grey_with_alpha_and_rgba():
    pixels = noise(5, 6, 4)
    image = read_image(encoded(Image.fromarray(pixels), 'PNG'))
    np.testing.assert_array_equal(np.dstack([image.rgb, image.alpha]), pixels)
    assert not image.was_grey
    image = read_image(encoded(Image.fromarray(pixels[..., :2], 'LA'), 'PNG'))
    np.testing.assert_array_equal(image.rgb, pixels[..., :1].repeat(3, axis=2))
    np.testing.assert_array_equal(image.alpha, pixels[..., 1])
    assert image.was_grey


def test_palette_with_and_without_transparency():
    index = np.arange(12, dtype=np.uint8).reshape(3, 4) % 3
    palette = np.array([[255, 0, 0], [0, 200, 0], [10, 20, 30]], np.uint8)
    picture = Image.fromarray(index)
    picture.putpalette(palette.tobytes())
    np.testing.assert_array_equal(read_image(encoded(picture, 'PNG')).rgb, palette[index])
    image = read_image(encoded(picture, 'PNG', transparency=bytes([255, 0, 77])))
    np.testing.assert_array_equal(image.rgb, palette[index])
    np.testing.assert_array_equal(image.alpha, np.array([255, 0, 77], np.uint8)[index])


def test_a_transparent_colour_becomes_alpha():
    pixels = noise(4, 4, 3)
    image = read_image(encoded(Image.fromarray(pixels), 'PNG', transparency=tuple(map(int, pixels[1, 2]))))
    expected = np.full((4, 4), 255)
    expected[1, 2] = 0
    np.testing.assert_array_equal(image.alpha, expected)
    grey = read_image(encoded(Image.fromarray(pixels[..., 0]), 'PNG', transparency=int(pixels[1, 2, 0])))
    assert grey.was_grey and grey.alpha[1, 2] == 0 and grey.alpha.max() == 255


def test_one_bit_images():
    bits = noise(8, 9) > 127
    image = read_image(encoded(Image.fromarray(bits), 'PNG'))
    np.testing.assert_array_equal(image.rgb, (bits * np.uint8(255))[..., None].repeat(3, axis=2))
    assert image.was_grey


def test_cmyk_with_and_without_a_profile():
    pixels = noise(6, 6, 4)
    picture = Image.fromarray(pixels, 'CMYK')
    expected = (255 - pixels[..., :3].astype(int)) * (255 - pixels[..., 3:].astype(int)) / 255
    image = read_image(encoded(picture, 'TIFF'))
    assert np.abs(image.rgb - expected).max() <= 1
    # A profile of another colour space cannot be used; the image is read as without one.
    np.testing.assert_array_equal(read_image(encoded(picture, 'TIFF', icc_profile=SRGB)).rgb, image.rgb)
    assert read_image(encoded(picture, 'JPEG', quality=100)).rgb.shape == (6, 6, 3)


@pytest.mark.parametrize('channels, colour_type', [(1, 0), (2, 4), (3, 2), (4, 6)])
def test_16_bit_png_keeps_every_bit(channels, colour_type):
    pixels = noise(7, 5, channels, depth=16)
    image = read_image(raw_png(pixels, colour_type, 16))
    colours = pixels[..., :-1] if channels in (2, 4) else pixels
    np.testing.assert_array_equal(image.rgb, np.broadcast_to(colours, (7, 5, 3)))
    assert image.rgb.dtype == np.uint16 and image.bit_depth == 16 and image.was_grey == (channels < 3)
    if channels in (2, 4):
        np.testing.assert_array_equal(image.alpha, pixels[..., -1])
    else:
        assert image.alpha is None


@pytest.mark.parametrize('channels, colour_type', [(1, 0), (3, 2)])
def test_a_transparent_16_bit_colour_becomes_alpha(channels, colour_type):
    pixels = noise(7, 5, channels, depth=16)
    pixels[0, 0] = pixels[1, 2] ^ 1  # another colour, but for the last bit
    image = read_image(raw_png(pixels, colour_type, 16, transparent=pixels[1, 2]))
    expected = np.full((7, 5), 65535, np.uint16)
    expected[1, 2] = 0
    np.testing.assert_array_equal(image.alpha, expected, strict=True)
    np.testing.assert_array_equal(image.rgb, np.broadcast_to(pixels, (7, 5, 3)))
    assert image.was_grey == (channels == 1)


def test_16_bit_tiff():
    pixels = noise(7, 5, 4, depth=16)
    np.testing.assert_array_equal(read_image(raw_tiff(pixels[..., :3])).rgb, pixels[..., :3])
    np.testing.assert_array_equal(read_image(raw_tiff(pixels[..., :1])).rgb, pixels[..., :1].repeat(3, axis=2))
    straight = read_image(raw_tiff(pixels, [(338, 2)]))
    np.testing.assert_array_equal(np.dstack([straight.rgb, straight.alpha]), pixels)
    inverted = read_image(raw_tiff(pixels[..., :1], [(262, 0)]))
    np.testing.assert_array_equal(inverted.rgb[..., 0], 65535 - pixels[..., 0])
    alpha = np.full((7, 5, 1), 30000, np.uint16)
    premultiplied = np.concatenate([np.minimum(pixels[..., :3], 30000), alpha], axis=2)
    associated = read_image(raw_tiff(premultiplied, [(338, 1)]))
    np.testing.assert_allclose(associated.rgb * (30000 / 65535), premultiplied[..., :3], atol=1)
    with pytest.raises(UserError, match='planes.tif: .*separate colour planes'):
        read_image(raw_tiff(pixels[..., :3], [(284, 2)]), 'planes.tif')


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation(orientation):
    """Stored so that turning it upright gives the same picture each time; Pillow's transposes are the reference."""
    upright = smooth()
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # Image.Transpose
    stored = Image.fromarray(upright) if undo is None else Image.fromarray(upright).transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[274] = orientation
    for kind, tolerance in (('JPEG', 12), ('PNG', 0), ('TIFF', 0), ('WEBP', 12)):
        data = encoded(stored, kind, exif=exif)
        assert np.abs(read_image(data).rgb.astype(int) - upright).max() <= tolerance, kind
        assert read_header(data)[:2] == upright.shape[:2], kind
    deep = np.asarray(stored).astype(np.uint16) * 257
    data = raw_tiff(deep, [(274, orientation)])
    np.testing.assert_array_equal(read_image(data).rgb, upright.astype(np.uint16) * 257)
    assert read_header(data).bit_depth == 16


def test_profile_and_frames():
    picture = Image.fromarray(smooth())
    assert read_image(encoded(picture, 'PNG', icc_profile=SRGB)).icc_profile == SRGB
    animation = encoded(
        picture, 'WEBP', save_all=True, append_images=[Image.fromarray(smooth()[::-1].copy())], lossless=True
    )
    assert read_image(animation).num_frames == 2
    np.testing.assert_array_equal(read_image(animation).rgb, smooth())


@pytest.mark.parametrize('kind', ['PNG', 'JPEG', 'TIFF', 'WEBP', 'BMP'])
def test_truncated_files_name_themselves(kind, tmp_path):
    data = encoded(Image.fromarray(noise(64, 64, 3)), kind)
    for part in (0, 1, 7, 30, len(data) // 3, len(data) * 9 // 10):
        path = tmp_path / f'cut_{part}.{kind.lower()}'
        path.write_bytes(data[:part])
        with pytest.raises(UserError, match=f'cut_{part}') as caught:
            read_image(path)
        assert '\n' not in str(caught.value)


@pytest.mark.parametrize('depth', [8, 16])
def test_a_flipped_bit_in_a_png_is_noticed(depth):
    data = bytearray(raw_png(noise(64, 64, 3, depth=depth), 2, depth))
    for position in range(60, len(data) - 30, len(data) // 20):
        damaged = bytearray(data)
        damaged[position] ^= 0x10
        with pytest.raises(UserError, match='flipped.png'):
            read_image(bytes(damaged), 'flipped.png')


def test_truncated_16_bit_files():
    for data in (raw_png(noise(64, 64, 3, depth=16), 2, 16), raw_tiff(noise(64, 64, 3, depth=16))):
        for part in (50, len(data) // 2, len(data) * 9 // 10):
            with pytest.raises(UserError, match='half'):
                read_image(data[:part], 'half')


def test_what_is_no_image_or_not_there(tmp_path):
    (tmp_path / 'text.png').write_text('hello')
    for name, words in (('text.png', 'not an image'), ('none.png', 'No such file'), ('.', 'directory')):
        with pytest.raises(UserError, match=words) as caught:
            read_image(tmp_path / name)
        assert str(tmp_path) in str(caught.value)
        with pytest.raises(UserError, match=words):
            read_header(tmp_path / name)
    with pytest.raises(UserError, match="mode 'F'"):
        read_image(encoded(Image.fromarray(np.zeros((3, 3), np.float32)), 'TIFF'), 'float.tif')
    for read in (read_image, read_header):
        with pytest.raises(UserError, match='float.tif: not an image that can be read.* of 8 or 16 bits'):
            read(raw_tiff(np.zeros((3, 3, 3), np.float32), [(339, 3)]), 'float.tif')


def test_a_hundred_megapixels_and_a_decompression_bomb(recwarn):
    height, width = 8_000, 12_600  # above 10^8 pixels
    data = encoded(Image.new('L', (width, height), 77), 'PNG', compress_level=1)
    assert tuple(read_header(data)) == (height, width, 8)
    image = read_image(data)
    assert image.rgb.shape == (height, width, 3) and image.rgb[-1, -1].tolist() == [77] * 3
    assert not [warning for warning in recwarn if 'ompression' in str(warning.message)]
    bomb = bytearray(raw_png(noise(1, 1, 3), 2, 8))
    bomb[16:24] = struct.pack('>II', 100_000, 100_000)
    bomb[29:33] = struct.pack('>I', zlib.crc32(bomb[12:29]))
    with pytest.raises(UserError, match='bomb.png.*more than the limit'):
        read_image(bytes(bomb), 'bomb.png')


@pytest.mark.parametrize('kind', ['PNG', 'TIFF', 'WEBP'])
def test_images_above_pillows_own_limit(monkeypatch, kind):
    data = encoded(Image.fromarray(smooth()), kind, lossless=True)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)  # 40 x 56 pixels are more than the double, an error to Pillow
    assert tuple(read_header(data)) == (40, 56, 8)
    np.testing.assert_array_equal(read_image(data).rgb, smooth())
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_pillows_limit_survives_reading_in_threads():
    data, before = encoded(Image.fromarray(smooth()), 'PNG'), Image.MAX_IMAGE_PIXELS
    threads = [threading.Thread(target=lambda: [read_image(data) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert before == Image.MAX_IMAGE_PIXELS


def test_depth_conversions_are_exact_and_rounded():
    eight, sixteen = np.arange(256, dtype=np.uint8), np.arange(65536, dtype=np.uint16)
    np.testing.assert_array_equal(to_unsigned(to_float(eight), 8), eight)
    np.testing.assert_array_equal(to_unsigned(to_float(sixteen), 16), sixteen)
    np.testing.assert_array_equal(to_unsigned(to_unsigned(eight, 16), 8), eight)
    np.testing.assert_array_equal(to_unsigned(sixteen, 8), np.rint(sixteen / 65535 * 255))
    np.testing.assert_array_equal(to_unsigned(np.array([-0.1, 0.5, 1.2]), 8), [0, 128, 255])


@pytest.mark.parametrize('suffix', ['.png', '.tif', '.tiff'])
@pytest.mark.parametrize('depth', [8, 16])
@pytest.mark.parametrize('grey', [False, True])
@pytest.mark.parametrize('with_alpha', [False, True])
def test_what_was_read_is_what_was_written(tmp_path, suffix, depth, grey, with_alpha):
    pixels = noise(13, 17, 4, depth=depth, seed=depth)
    rgb = np.ascontiguousarray(np.broadcast_to(pixels[..., :1], (13, 17, 3))) if grey else pixels[..., :3]
    alpha = pixels[..., 3] if with_alpha else None
    path = tmp_path / f'image{suffix}'
    write_image(path, rgb, alpha, depth, grey, icc_profile=None if grey else SRGB)
    if suffix != '.png' and grey and with_alpha and depth == 16:  # Pillow does not know this kind of TIFF
        other = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert other is None or other.shape[:2] == (13, 17)
        return
    image = read_image(path)
    np.testing.assert_array_equal(image.rgb, rgb)
    assert image.bit_depth == depth and image.was_grey == grey and (image.alpha is not None) == with_alpha
    if with_alpha:
        np.testing.assert_array_equal(image.alpha, alpha)
    assert image.icc_profile == (None if grey else SRGB)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize('suffix, tolerance', [('.jpg', 6), ('.webp', 12), ('.bmp', 0)])
def test_other_formats(tmp_path, suffix, tolerance):
    path = tmp_path / f'image{suffix}'
    write_image(path, to_float(smooth()))
    assert np.abs(read_image(path).rgb.astype(int) - smooth()).max() <= tolerance
    write_image(path, smooth(), grey=True)  # replaces
    if suffix != '.webp':  # which has no grey
        assert read_image(path).was_grey
    if suffix == '.webp':
        write_image(path, smooth(), alpha=smooth()[..., 0], grey=True)
        assert read_image(path).alpha is not None


@pytest.mark.parametrize(
    'name, options, words',
    [
        ('a.jpg', {'bit_depth': 16}, 'JPEG cannot hold 16 bits; write .png'),
        ('a.webp', {'bit_depth': 16}, 'WEBP cannot hold 16 bits'),
        ('a.jpg', {'has_alpha': True}, 'JPEG cannot hold transparency'),
        ('a.bmp', {'has_alpha': True}, 'BMP cannot hold transparency'),
        ('a.webp', {'size': (20000, 10)}, '20000 x 10'),
        ('a.pgn', {}, "Did you mean '.png'"),
        ('a', {}, 'not a format'),
        ('none/a.png', {}, 'does not exist'),
    ],
)
def test_nothing_is_dropped_in_silence(tmp_path, name, options, words):
    with pytest.raises(UserError, match=words):
        check_writable(tmp_path / name, **{'size': (4, 4), **options})


@pytest.mark.parametrize('suffix', ['.png', '.jpg', '.tif', '.bmp', '.webp'])
def test_a_disguised_eps_is_not_handed_to_ghostscript(tmp_path, monkeypatch, suffix):
    path = tmp_path / f'photo{suffix}'
    Image.fromarray(smooth()).save(path, 'EPS')
    monkeypatch.setattr('subprocess.check_call', lambda *args, **kwargs: pytest.fail('a program was started'))
    monkeypatch.setattr('PIL.EpsImagePlugin.has_ghostscript', lambda: True)
    monkeypatch.setattr('PIL.EpsImagePlugin.gs_binary', 'gs')
    for read in (read_image, read_header):
        with pytest.raises(UserError, match=f'photo{suffix}: not an image that can be read'):
            read(path)
