"""No key is accepted and then ignored: somebody outside the options' check reads it."""

import ast
import inspect
from pathlib import Path

import basicsr
from basicsr.utils.file_client import MemcachedBackend

import moeisr_basicsr
from moeisr_basicsr.compat import init_dist
from moeisr_basicsr.options import schema

# What of BasicSR the engine stands in for: a key that only these read would be ignored.
REPLACED = ('train.py', 'test.py', 'utils/misc.py', 'utils/options.py', 'data/__init__.py')
# Sections that are handed on as a whole: their keys are arguments.
ARGUMENTS = {init_dist: {'backend', 'port'}, MemcachedBackend: {'server_list_cfg', 'client_cfg', 'sys_path'}}
# BasicSR's own recipes have these and nothing of it reads them, which the keys' descriptions say.
IGNORED = {'DATASET_TRAIN: use_shuffle', 'BASICSR_TOP: crop_border', 'BASICSR_TOP: save_img'}


def strings(package, leave_out):
    """All strings in the code of a package, but for some of its files: as code writes the key of a dictionary."""
    root = Path(package.__file__).parent
    return {
        node.value
        for path in root.rglob('*.py')
        if not path.relative_to(root).as_posix().startswith(leave_out)
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8')))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def keys(table):
    """The keys of a table and of the sections in it."""
    for name, key in table.items():
        yield name
        if isinstance(key.kind, schema.Section):
            yield from keys(key.kind.table)


def test_every_key_has_a_reader():
    tables = {
        name: value
        for name, value in vars(schema).items()
        if isinstance(value, dict) and all(isinstance(row, schema.Key) for row in value.values())
    }
    tables |= schema.DATASET_OURS
    assert {'TOP', 'PATH', 'TRAIN', 'VAL', 'BASICSR_TOP', 'ArbitraryScalePairedDataset'} <= set(tables)
    ours, theirs = strings(moeisr_basicsr, ('options/',)), strings(basicsr, REPLACED)
    assert 'keep_checkpoints' in ours - theirs and 'resume_id' in theirs - ours
    assert 'ignore_resume_networks' not in ours | theirs
    unread = {
        f'{title}: {key}'
        for title, table in tables.items()
        for key in set(keys(table)) - (theirs if title.startswith('BASICSR') else ours | theirs)
    }
    arguments = {
        key for function, names in ARGUMENTS.items() for key in names & set(inspect.signature(function).parameters)
    }
    assert {key for key in unread - IGNORED if key.split(': ')[1] not in arguments} == set()
