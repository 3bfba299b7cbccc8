"""What all tests share: one seed and one logger per test, and no threads beyond those that were asked for."""

import gc
import logging
import os

import cv2
import numpy as np
import pytest
import torch

import moeisr_basicsr  # noqa: F401  before any test imports BasicSR, which needs the shims
from basicsr.utils.logger import initialized_logger
from moeisr_basicsr.data import reading

if 'OMP_NUM_THREADS' not in os.environ:
    torch.set_num_threads(min(2, os.cpu_count() or 1))


def pytest_collection_finish():
    """What has been imported is no garbage: each collection, of which a profile makes dozens, would look through it."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    """Between the attempts to read a file."""
    monkeypatch.setattr(reading, 'PAUSES_S', (0.01, 0.02, 0.04))


@pytest.fixture
def images_here(tmp_path, monkeypatch):
    """An empty folder with one image below `images`, as the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'images').mkdir()
    cv2.imwrite(str(tmp_path / 'images/a.png'), np.zeros((40, 40, 3), np.uint8))
    return tmp_path


@pytest.fixture(autouse=True)
def _logger():
    """A run in this process leaves handlers that write to streams which pytest closes after the test."""
    yield
    logger = logging.getLogger('basicsr')
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.NOTSET)
    initialized_logger.clear()
