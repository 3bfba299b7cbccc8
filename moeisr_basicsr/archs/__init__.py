"""Architectures. The package registers every `*_arch.py` in BasicSR's ARCH_REGISTRY."""
