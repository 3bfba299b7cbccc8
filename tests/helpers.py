"""What several test files need."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from moeisr_basicsr.data.image_writer import join_channels, strip_writer

DATA_VARIABLE = 'MOEISR_TEST_DATA'
WEIGHTS_VARIABLE = 'MOEISR_TEST_WEIGHTS'
# First lines of a program that needs `core` and `kernels` alone: the rest of the package takes seconds to import.
CORE_ALONE = f"""
import sys, types
package = types.ModuleType('moeisr_basicsr')
package.__path__ = [{str(Path(__file__).resolve().parents[1] / 'moeisr_basicsr')!r}]
sys.modules[package.__name__] = package
"""


def data_root() -> Path:
    """The folder of real images: the environment variable MOEISR_TEST_DATA, or ../shared/data beside the repository."""
    given = os.environ.get(DATA_VARIABLE)
    return Path(given) if given else Path(__file__).resolve().parents[2] / 'shared' / 'data'


def shared_data(*parts: str) -> Path:
    """A file or folder of the real images, for example `shared_data('Set5')`; skips the test where it is missing."""
    path = data_root().joinpath(*parts)
    if not path.exists():
        pytest.skip(f'real images are not at hand: {path} is missing; {DATA_VARIABLE} names another folder')
    return path


def pretrained(name: str) -> Path:
    """A file of public weights, in MOEISR_TEST_WEIGHTS or ../shared/pretrained; skips where it is missing."""
    given = os.environ.get(WEIGHTS_VARIABLE)
    path = (Path(given) if given else Path(__file__).resolve().parents[2] / 'shared' / 'pretrained') / name
    if not path.exists():
        pytest.skip(f'public weights are not at hand: {path} is missing; {WEIGHTS_VARIABLE} names another folder')
    return path


def write_image(path, rgb, alpha=None, bit_depth=8, grey=False, icc_profile=None, exif=None):
    """A whole image, by the package's writer of strips."""
    pixels = join_channels(rgb, alpha, bit_depth, grey)
    with strip_writer(path, *pixels.shape, bit_depth, icc_profile, exif) as write:
        write(pixels)


def set5_psnr(encoder, scale):
    """Mean PSNR (dB) of an encoder's own images as published: luma, saved in 8 bits, shave = scale."""
    import moeisr_basicsr  # noqa: F401  before BasicSR, which needs its shims
    from moeisr_basicsr.data.resize import imresize
    from moeisr_basicsr.metrics.psnr_ssim_sr_metric import calculate_psnr_sr

    values = []
    for path in sorted(shared_data('Set5').glob('*.png')):
        image = cv2.imread(str(path))[..., ::-1]
        rows, cols = (size // scale for size in image.shape[:2])
        image = image[: rows * scale, : cols * scale]
        gt, lq = (
            torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
            for pixels in (image, imresize(image, (rows, cols)))
        )
        with torch.no_grad():
            values.append(calculate_psnr_sr(encoder.with_image(lq * 2 - 1)[1], gt, scale, rounded=True))
    return np.mean(values)
