"""Registration by file name, BasicSR's own way, for the folders of this plugin."""

import importlib
import pkgutil
from collections.abc import Iterable


def import_by_suffix(package: str, path: Iterable[str], suffix: str) -> None:
    """Import every module of `package` whose name ends in `suffix`; importing it registers its classes."""
    for module in sorted(info.name for info in pkgutil.iter_modules(path)):
        if module.endswith(suffix):
            importlib.import_module(f'{package}.{module}')
