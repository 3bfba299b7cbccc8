"""The decode of `core`, fused: C++ for CPU (`cpu`). Optional: where a kernel cannot run, `core` computes the same."""
