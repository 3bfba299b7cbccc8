"""MoEISR (arXiv 2311.12077), arbitrary-scale super-resolution, as a plugin of BasicSR.

Importing this package makes BasicSR run on today's stack (see `compat`) and registers the plugin's classes in BasicSR's
registries. That side effect is its purpose: `import moeisr_basicsr` at the top of a script is all that BasicSR's own
pipelines need.
"""

from moeisr_basicsr import compat

compat.install_shims()  # before anything imports BasicSR

from moeisr_basicsr import archs, data, losses, metrics, models  # noqa: E402, F401

compat.patch_basicsr()

__version__ = '0.1.0'
