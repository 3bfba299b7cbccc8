"""The decode of `core`, fused: C++ for CPU, Triton for CUDA.

Optional: where a kernel cannot run, `core` computes the same.
"""
from .select import fused_backend

__all__ = ['fused_backend']
