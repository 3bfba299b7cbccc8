"""Where fp32 must mean fp32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_fp32(device: torch.device) -> Iterator[None]:
    """Convolutions and matrix products inside multiply unrounded fp32, outside of any autocast.

    PyTorch lets cuDNN round the operands of convolutions to tf32 by default, and those of matrix products on request.
    """
    with torch.autocast(device.type, enabled=False):
        if device.type != 'cuda':
            yield
            return
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        try:
            allowed, _ = matmul.allow_tf32, cudnn.allow_tf32
        except RuntimeError:  # set by the names of PyTorch 2.9, `fp32_precision`: the older ones may not be mixed in
            with unrounded(matmul), unrounded(cudnn.conv):  # type: ignore[attr-defined]  # put there at run time
                yield
            return
        matmul.allow_tf32 = False
        try:
            with cudnn.flags(
                enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False
            ):
                yield
        finally:
            matmul.allow_tf32 = allowed


@contextmanager
def unrounded(operation: Any) -> Iterator[None]:
    """IEEE fp32 for one of PyTorch's operations inside, as it was afterwards."""
    before, operation.fp32_precision = operation.fp32_precision, 'ieee'
    try:
        yield
    finally:
        operation.fp32_precision = before
