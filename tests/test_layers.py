"""Imports point only downwards: each layer knows the layers below it, and nothing else.

The modules are read with `ast`, never imported, so an import inside a function counts as well.
"""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = 'moeisr_basicsr'
ROOT = Path(__file__).resolve().parents[1] / PACKAGE

FOUNDATION = {'atomic_file', 'compat', 'errors', 'safe_reading', 'shipped'}
PARTS = {'archs', 'data', 'losses', 'metrics'}  # do not know each other: BasicSR's registries join them
TOOLS = {'analysis', 'checkpoint', 'inference', 'official', 'safe_building'}
BELOW_MODELS = {'core', 'kernels', 'options'} | FOUNDATION | TOOLS
# What each part of the package may import from the package; '' is the package's own `__init__`.
ALLOWED = {
    'core': set(),
    'kernels': {'core'},
    'errors': set(),
    'safe_reading': {'errors'},
    'compat': {'atomic_file', 'errors', 'safe_reading'},
    'atomic_file': set(),
    'shipped': {'errors'},
    'options': {'errors', 'safe_reading', 'shipped'},
    'trained': {'options'} | FOUNDATION,
    **{part: {'core', 'options'} | FOUNDATION for part in PARTS},
    'archs': {'core', 'options', 'trained'} | FOUNDATION,
    **{tool: BELOW_MODELS | PARTS | {''} for tool in TOOLS},  # '' for its version only
    'models': BELOW_MODELS,  # archs, losses, data and metrics come from BasicSR's builders
    'engine': BELOW_MODELS | PARTS | {'models', ''},
    'tools': BELOW_MODELS | PARTS | {'models', 'engine', ''},
    'cli': BELOW_MODELS | PARTS | {'models', 'engine', 'tools', ''},
    'integrations': BELOW_MODELS | PARTS | {'cli', ''},  # nothing may import them
    '__main__': {'cli'},
    '': {'compat'},  # it registers everything by file name
}
# Outside packages, by their first name; parts not listed may import any.
OUTSIDE = {
    'core': {'torch', 'einops'},
    'kernels': {'torch', 'triton', 'numpy'},
    'safe_reading': {'torch', 'yaml'},
    'errors': set(),
}
COMMAND_LINE = {'argparse', 'rich'}
ASSEMBLED = ('basicsr.models', 'basicsr.train', 'basicsr.test')  # BasicSR's own upper layers
MAY_IMPORT_ASSEMBLED = {'compat', 'models', 'engine', 'cli', 'data', 'options'}


def imported_names(source, module, is_package):
    """Absolute dotted names of everything that a module imports, `from a import b` as a.b."""
    base = module.split('.') if is_package else module.split('.')[:-1]
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = '.'.join(base[: len(base) - node.level + 1]) if node.level else ''
            stem = '.'.join(part for part in (start, node.module) if part)
            names += [f'{stem}.{alias.name}' for alias in node.names]
    return names


def part_of(name, parts):
    """The package's part that a dotted name inside it belongs to; '' for the package itself."""
    pieces = name.split('.')
    return pieces[1] if len(pieces) > 1 and pieces[1] in parts else ''


def violations(source, module, is_package=False, parts=frozenset(ALLOWED)):
    """What a module imports against the rules, one readable line each."""
    part = part_of(module, parts)
    found = []
    for name in imported_names(source, module, is_package):
        first = name.split('.')[0]
        if first == PACKAGE:
            target = part_of(name, parts)
            if target != part and target not in ALLOWED[part]:
                found.append(f'{module} ({part}) imports {name}: {target or "the package itself"} is not below it')
            continue
        if part in OUTSIDE and first not in OUTSIDE[part] and first not in sys.stdlib_module_names:
            found.append(f'{module} imports {name}: {part} may import {sorted(OUTSIDE[part])} and the standard library')
        if first in COMMAND_LINE and part not in ('cli', *(('engine', 'tools') if first == 'rich' else ())):
            found.append(f'{module} imports {name}: only the command line does')
        if name.startswith(ASSEMBLED) and part not in MAY_IMPORT_ASSEMBLED:
            found.append(f'{module} imports {name}: {part} must not know the layers above it')
    return found


def modules():
    for path in sorted(ROOT.rglob('*.py')):
        parts = path.relative_to(ROOT.parent).with_suffix('').parts
        is_package = parts[-1] == '__init__'
        yield path, '.'.join(parts[:-1] if is_package else parts), is_package


def test_imports_point_downwards():
    found = [
        line for path, module, is_package in modules() for line in violations(path.read_text(), module, is_package)
    ]
    assert not found, '\n'.join(found)


def test_every_part_has_a_rule():
    parts = {path.stem for path in ROOT.iterdir() if path.suffix == '.py'} - {'__init__'}
    parts |= {path.parent.name for path in ROOT.glob('*/__init__.py')}
    assert parts <= set(ALLOWED), f'no rule for {sorted(parts - set(ALLOWED))}'
    assert {'core', 'kernels', 'archs', 'losses', 'inference', 'errors'} <= parts


def test_no_circle_among_parts():
    """Tools may use one another; no chain of imports leads back."""
    uses = {part: set() for part in ALLOWED}
    for path, module, is_package in modules():
        part = part_of(module, ALLOWED)
        for name in imported_names(path.read_text(), module, is_package):
            if name.split('.')[0] == PACKAGE and part not in ('', part_of(name, ALLOWED)):
                uses[part].add(part_of(name, ALLOWED))
    uses = {part: below - {''} for part, below in uses.items()}
    while uses:
        lowest = {part for part, below in uses.items() if not below & set(uses)}
        assert lowest, f'circle among {sorted(uses)}'
        uses = {part: below for part, below in uses.items() if part not in lowest}


@pytest.mark.parametrize(
    ('module', 'source', 'wrong'),
    [
        ('core.render', 'import torch\nfrom .coords import make_coord\nfrom torch.nn import functional', 0),
        ('core.render', 'from basicsr.utils import scandir', 1),
        ('core.render', 'import numpy', 1),
        ('core.render', 'def late():\n    from moeisr_basicsr.errors import UserError', 1),
        ('core.render', 'from ..inference import upscale', 1),
        ('core.render', 'from .. import archs', 1),
        ('kernels.cpu', 'from moeisr_basicsr.core.coords import EPS_AREA\nimport ctypes', 0),
        ('kernels.cpu', 'from moeisr_basicsr import compat', 1),
        ('archs.moeisr_arch', 'from moeisr_basicsr.core import render\nfrom basicsr.archs import build_network', 0),
        ('archs.moeisr_arch', 'from moeisr_basicsr.losses.balance_loss import MoEBalanceLoss', 1),
        ('losses.balance_loss', 'from basicsr.models import build_model', 1),
        ('data.sampler', 'import moeisr_basicsr.archs', 1),
        ('metrics.psnr_metric', 'from ..data import resize', 1),
        ('inference', 'from moeisr_basicsr.models.batch import Batch', 1),
        ('inference', 'import argparse', 1),
        ('inference', 'from basicsr.models.sr_model import SRModel', 1),
        ('models.moeisr_model', 'from moeisr_basicsr.inference import upscale\nfrom basicsr.models import SRModel', 0),
        ('models.moeisr_model', 'from moeisr_basicsr.engine.train_loop import train', 1),
        ('models.moeisr_model', 'from moeisr_basicsr.archs.moeisr_arch import MoEISR', 1),
        ('engine.train_loop', 'from moeisr_basicsr.cli import main', 1),
        ('errors', 'from moeisr_basicsr import __version__', 1),
        ('cli.train', 'import argparse\nfrom moeisr_basicsr import __version__\nfrom .options import add', 0),
    ],
)
def test_the_check_itself(module, source, wrong):
    assert len(violations(source, f'{PACKAGE}.{module}')) == wrong
