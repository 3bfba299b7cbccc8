"""MATLAB's and Pillow's bicubic: against published images, a slow twin, and the libraries themselves."""

import hashlib
import math

import numpy as np
import pytest
from helpers import shared_data
from PIL import Image

from moeisr_basicsr.data.resize import imresize, pil_resize, resize

SET5 = ('baby', 'bird', 'butterfly', 'head', 'woman')
# SHA-256 of the pixels (RGB, 8 bit, row-major) of the x2 images that the SwinIR repository publishes.
PUBLISHED_X2 = {
    'baby': 'd8d0583de473dd4ab67751b9924bcf614bc3bda6b90f44dc96d72c33dddd83f2',
    'bird': '45d30e8107deff8d3ea3a706d57b3e39814ee0fad3eec73d99c0fffffa69e26b',
    'butterfly': 'b42608efcaf94b7bb1904aec780ea834a09fb0b09938c3fa0d5f3932f1c4766f',
    'head': 'aff0698c7274d8f36e0de0a84f6072e0f48478aa7d1998d126546d5e82470367',
    'woman': 'aee68638085cecddf69e9cca1d237c5d4dc54d1991045e91f996222d58e1a82d',
}


def load(*parts):
    return np.asarray(Image.open(shared_data(*parts)).convert('RGB'))


def slow_cubic(x):
    x = abs(x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x <= 2 else 0.0


def slow_line(line, m, scale):
    """One line of MATLAB's imresize, term by term, from the definition: mirrored input, normalised cubic weights."""
    n, stretch = len(line), min(scale, 1.0)
    result = []
    for position in range(1, m + 1):
        centre = position / scale + 0.5 * (1 - 1 / scale)
        reach = 2 / stretch
        terms = []
        for at in range(math.floor(centre - reach) - 1, math.ceil(centre + reach) + 2):
            mirrored = (at - 1) % (2 * n)
            mirrored = mirrored if mirrored < n else 2 * n - 1 - mirrored
            terms.append((slow_cubic(stretch * (centre - at)), line[mirrored]))
        total = sum(weight for weight, _ in terms)
        result.append(sum(weight * value for weight, value in terms) / total)
    return result


def slow_imresize(image, size, scales):
    """Rows first where the row factor is not the greater one; rounded and clipped after each pass if it is uint8."""
    values = image.astype(np.float64)
    for axis in (0, 1) if scales[0] <= scales[1] else (1, 0):
        values = np.apply_along_axis(slow_line, axis, values, size[axis], scales[axis])
        if image.dtype == np.uint8:
            values = np.clip(np.floor(values + 0.5), 0, 255)
    return values


@pytest.mark.parametrize('name', SET5)
def test_reproduces_the_published_images_bit_for_bit(name):
    hr = load('Set5', f'{name}.png')
    hr = hr[: hr.shape[0] // 2 * 2, : hr.shape[1] // 2 * 2]
    lq = imresize(hr, (hr.shape[0] // 2, hr.shape[1] // 2))
    np.testing.assert_array_equal(lq, load('Set5_LRx2_reference', f'{name}x2.png'))
    assert hashlib.sha256(lq.tobytes()).hexdigest() == PUBLISHED_X2[name]


@pytest.mark.parametrize('scale, published', [(2, 33.66), (3, 30.39), (4, 28.42)])
def test_bicubic_baseline_of_set5(scale, published):
    luma, values = np.array([65.738, 129.057, 25.064]) / 256, []
    for name in SET5:
        hr = load('Set5', f'{name}.png')
        hr = hr[: hr.shape[0] // scale * scale, : hr.shape[1] // scale * scale]
        lq = imresize(hr, (hr.shape[0] // scale, hr.shape[1] // scale))
        up = imresize(lq, hr.shape[:2])
        difference = ((up.astype(float) - hr) @ luma)[scale:-scale, scale:-scale]
        values.append(10 * np.log10(255**2 / np.mean(difference**2)))
    assert abs(np.mean(values) - published) < 0.02


@pytest.mark.parametrize(
    'size, out',
    [
        ((17, 23), (8, 11)),
        ((17, 23), (34, 46)),
        ((20, 31), (7, 29)),
        ((20, 31), (29, 7)),
        ((9, 9), (9, 4)),
        ((5, 4), (1, 1)),
        ((1, 1), (3, 2)),
        ((1, 12), (1, 5)),
        ((3, 2), (40, 41)),
        ((40, 30), (2, 3)),
    ],
)
@pytest.mark.parametrize('dtype', [np.uint8, np.float64])
def test_equals_the_slow_twin(size, out, dtype):
    rng = np.random.default_rng(size[0] * 100 + out[1])
    image = rng.integers(0, 256, (*size, 3)).astype(dtype)
    scales = (out[0] / size[0], out[1] / size[1])
    expected = slow_imresize(image, out, scales)
    if dtype == np.uint8:
        np.testing.assert_array_equal(imresize(image, size=out), expected)
    else:
        np.testing.assert_allclose(imresize(image, size=out), expected, atol=1e-9)


def test_halves_stay_rounded_as_they_are():
    """Reduced by 1.5, many sums lie on a half, and the last bit of the kernel decides: training items depend on it."""
    image = np.random.default_rng(7).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    digest = hashlib.sha256(imresize(image, (40, 60)).tobytes()).hexdigest()
    assert digest == '4511d6ecbdeec639e20a126ca983896cf165629a372bc145617910726f1d7f80'


def test_the_axis_with_the_smaller_factor_goes_first():
    """MATLAB saves work that way, and with rounding in between it shows in the pixels."""
    image = np.random.default_rng(4).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    turned = imresize(image.swapaxes(0, 1), size=(11, 20)).swapaxes(0, 1)
    np.testing.assert_array_equal(imresize(image, size=(20, 11)), turned)
    np.testing.assert_array_equal(
        imresize(image, size=(20, 11)), imresize(imresize(image, size=(30, 11)), size=(20, 11))
    )
    assert (imresize(image, size=(20, 11)) != imresize(imresize(image, size=(20, 40)), size=(20, 11))).any()


def test_types_shapes_and_large_images_in_blocks():
    rng = np.random.default_rng(5)
    image = rng.random((700, 300, 3))
    whole = imresize(image, size=(350, 171))
    for column in (0, 57, 170):  # each output column depends on all blocks of rows
        np.testing.assert_allclose(
            whole[:, column],
            np.stack(
                [np.ascontiguousarray(imresize(image[..., c], size=(350, 171)))[:, column] for c in range(3)], axis=-1
            ),
        )
    np.testing.assert_allclose(imresize(image.astype(np.float32), size=(350, 171)), whole, atol=1e-6)
    assert imresize(image.astype(np.float32), size=(3, 4)).dtype == np.float32
    sixteen = (image * 30000 + 15000).astype(np.uint16)  # away from 0 and 65535, where each pass clips
    np.testing.assert_allclose(imresize(sixteen, size=(350, 171)), whole * 30000 + 15000, atol=2)
    strided = image[::2, ::-3]
    np.testing.assert_array_equal(imresize(strided, size=(50, 60)), imresize(strided.copy(), size=(50, 60)))


def test_the_input_is_never_changed_or_shared():
    image = np.random.default_rng(6).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    before = image.copy()
    same = imresize(image, size=(6, 6))
    same += 1
    imresize(image, size=(3, 12))
    np.testing.assert_array_equal(image, before)


def test_pil_is_pillow():
    image = load('Set5', 'bird.png')
    expected = np.asarray(Image.fromarray(image).resize((71, 100), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(resize(image, (100, 71), 'pil'), expected)
    grey = np.asarray(Image.fromarray(image[..., 1]).resize((71, 100), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(pil_resize(image[..., 1], (100, 71)), grey)
    sixteen = pil_resize(image.astype(np.uint16) * 257, (100, 71))
    assert sixteen.dtype == np.uint16
    assert np.abs(sixteen / 257 - expected).max() < 1.5  # Pillow rounds 8-bit images between its passes
    np.testing.assert_allclose(pil_resize(image / 255.0, (100, 71)), sixteen / 65535, atol=0.02)


@pytest.mark.parametrize(
    'image, size, words',
    [
        (np.zeros((4, 4, 3), np.uint8), (0, 3), 'cannot be resized'),
        (np.zeros((0, 4, 3), np.uint8), (2, 2), 'cannot be resized'),
        (np.zeros((4, 4, 3), np.int64), (2, 2), 'int64 cannot be resized'),
    ],
)
def test_wrong_arguments(image, size, words):
    with pytest.raises(ValueError, match=words):
        imresize(image, size)
