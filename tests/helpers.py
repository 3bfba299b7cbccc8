"""What several test files need."""

import os
from pathlib import Path

import pytest

DATA_VARIABLE = 'MOEISR_TEST_DATA'
WEIGHTS_VARIABLE = 'MOEISR_TEST_WEIGHTS'


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
