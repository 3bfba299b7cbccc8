"""Where fp32 must mean fp32."""
from contextlib import AbstractContextManager, nullcontext

import torch


def full_fp32(device: torch.device) -> AbstractContextManager:
    """Convolutions inside multiply unrounded fp32; PyTorch lets cuDNN round their operands to tf32 by default."""
    if device.type != 'cuda':
        return nullcontext()
    cudnn = torch.backends.cudnn
    return cudnn.flags(enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic,
                       allow_tf32=False)
