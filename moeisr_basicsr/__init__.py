"""MoEISR (arXiv 2311.12077), arbitrary-scale super-resolution, as a plugin of BasicSR.

Importing this package makes BasicSR run on today's stack (see `compat`) and registers the plugin's classes in BasicSR's
registries. That side effect is its purpose: `import moeisr_basicsr` at the top of a script is all that BasicSR's own
pipelines need.
"""

import importlib
from pathlib import Path

from moeisr_basicsr import compat

__version__ = '0.1.0'  # the only place; setup.py reads this line

compat.install_shims()  # before anything imports BasicSR

# By file name, as BasicSR registers its own: importing a module registers its classes.
for _folder, _suffix in (
    ('archs', 'arch'),
    ('data', 'dataset'),
    ('losses', 'loss'),
    ('metrics', 'metric'),
    ('models', 'model'),
):
    for _path in sorted(Path(__file__).with_name(_folder).glob(f'*_{_suffix}.py')):
        importlib.import_module(f'{__name__}.{_folder}.{_path.stem}')

compat.patch_basicsr()
