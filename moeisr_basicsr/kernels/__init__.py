"""The decode of `core`, fused: C++ for CPU, Triton for CUDA.

Optional: where a kernel cannot run, `core` computes the same. The environment variable MOEISR_KERNELS=off switches
all of them off; 'auto', the default, uses those that run; 'avx2', 'avx512' or 'avx512_bf16' is the newest instruction
set that CPU kernels may use, to measure what an older processor would do.
"""

from .select import fused_backend

__all__ = ['fused_backend']
