"""No key is accepted and then ignored: somebody outside the options' check reads it."""

import ast
import inspect
from pathlib import Path

import basicsr
from pydantic import BaseModel

import moeisr_basicsr
from moeisr_basicsr.compat import init_dist
from moeisr_basicsr.data.options import ImageOptions, PairedOptions
from moeisr_basicsr.options.keys import Dataset, MoEISROptions

# What of BasicSR the engine stands in for: a key that only these read would be ignored.
REPLACED = ('train.py', 'test.py', 'utils/misc.py', 'utils/options.py', 'data/__init__.py')
# BasicSR's own recipes have it and nothing of it reads it, which the key's description says.
IGNORED = {'use_shuffle'}
RULES = {'needs_weights'}  # only a rule of the check itself reads it


def strings(package, leave_out):
    """All strings and attributes in the code of a package, but for some of its files: as code names a key."""
    root = Path(package.__file__).parent
    return {
        node.value if isinstance(node, ast.Constant) else node.attr
        for path in root.rglob('*.py')
        if not path.relative_to(root).as_posix().startswith(leave_out)
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8')))
        if isinstance(node, ast.Attribute) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
    }


def keys(model):
    """The keys of a section and of the sections in it."""
    for name, field in model.model_fields.items():
        yield name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation)


def test_every_key_has_a_reader():
    known = {*keys(MoEISROptions), *keys(Dataset), *keys(ImageOptions), *keys(PairedOptions)}
    assert {'keep_checkpoints', 'pixel_opt', 'tau', 'scale_range', 'filename_tmpl', 'print_freq'} <= known
    ours, theirs = strings(moeisr_basicsr, ('options/', 'data/options.py')), strings(basicsr, REPLACED)
    assert 'keep_checkpoints' in ours - theirs and 'pixel_opt' in theirs - ours
    arguments = set(inspect.signature(init_dist).parameters)  # `dist_params` is handed on as a whole
    unread = known - ours - theirs - arguments - IGNORED - RULES
    assert not unread, f'nothing reads {unread}'
