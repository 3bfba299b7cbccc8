"""What all tests share: one seed per test, and no threads beyond those that were asked for."""
import os

import pytest
import torch

import moeisr_basicsr  # noqa: F401  before any test imports BasicSR, which needs the shims

if 'OMP_NUM_THREADS' not in os.environ:
    torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
