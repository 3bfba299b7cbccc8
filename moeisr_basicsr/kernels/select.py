"""Which backend renders on this machine."""
import importlib.util

import torch

from moeisr_basicsr.core.decoder import MoEDecoder
from moeisr_basicsr.core.render import Backend


FAMILIES = ('liif', 'lte')  # that the kernels are written for


def fused_backend(decoder: MoEDecoder, device: torch.device | str, precision: str = 'fp32') -> Backend | None:
    """The fused kernels for this decoder as it is now; None where the torch code has to do it.

    Packing the weights takes milliseconds: ask anew for each image rather than after each change of the weights.

    Args:
        decoder: On `device`.
        device: 'cpu' or a CUDA device.
        precision: 'fp32', 'bf16' or 'fp16'.
    """
    if decoder.family not in FAMILIES:
        return None
    device = torch.device(device)
    if device.type == 'cpu' and precision != 'fp16':  # no processor's kernel is written for fp16
        from . import cpu
        from .fused import FusedCPUBackend
        return FusedCPUBackend(decoder, precision) if cpu.available() and FusedCPUBackend.supports(decoder) else None
    if device.type == 'cuda' and importlib.util.find_spec('triton') is not None:
        try:
            from . import triton_decode
            return triton_decode.TritonBackend(decoder, precision) if triton_decode.available(device) else None
        except (ImportError, ValueError):  # an older Triton; a layer too wide for the registers of one program
            return None
    return None
