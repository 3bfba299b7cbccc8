"""Architectures. Importing this package registers every `*_arch.py` in BasicSR's ARCH_REGISTRY."""

from moeisr_basicsr.registration import import_by_suffix

import_by_suffix(__name__, __path__, '_arch')
