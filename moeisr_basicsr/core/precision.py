"""Where fp32 must mean fp32."""
from collections.abc import Iterator
from contextlib import contextmanager

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
        allowed = matmul.allow_tf32
        matmul.allow_tf32 = False
        try:
            with cudnn.flags(enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic,
                             allow_tf32=False):
                yield
        finally:
            matmul.allow_tf32 = allowed
