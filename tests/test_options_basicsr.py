"""BasicSR's own options files, and the dictionary that BasicSR's pipelines take."""

import sys

import pytest
from basicsr.utils import options as basicsr_options
from options_cases import BASICSR, problems, swap, write

from moeisr_basicsr.options import load_options, parse_options

pytestmark = pytest.mark.usefixtures('images_here')


class Args:
    """Parsed arguments of `basicsr train`."""

    def __init__(self, opt, launcher='none', auto_resume=False, debug=False, force_yml=None):
        self.opt, self.launcher, self.auto_resume = opt, launcher, auto_resume
        self.debug, self.force_yml = debug, force_yml


def test_keys_of_another_model_are_unknown():
    text = swap('MoEISRModel', 'ArbitraryScaleModel')
    assert [problem for problem in problems(text) if 'train: balance_opt: unknown key' in problem]


def test_basicsr_files_pass_and_their_mistakes_do_not():
    load_options(write(BASICSR))
    assert "num_blok: unknown key. Did you mean 'num_block'?" in problems(swap('num_block', 'num_blok', BASICSR))[0]
    assert 'num_block: must be a number' in problems(swap('num_block: 1', 'num_block: one', BASICSR))[0]
    assert "the key 'num_in_ch' is missing" in problems(swap('  num_in_ch: 3\n', '', BASICSR))[0]
    assert 'test_y_chanel' in problems(swap('test_y_channel', 'test_y_chanel', BASICSR))[0]


def test_keys_that_nothing_reads():
    found = problems(swap('val_freq: ', 'use_pbar: true\n  val_freq: ', BASICSR))
    assert len(found) == 1 and "use_pbar: unknown key. Did you mean 'pbar'?" in found[0]


def differences(ours, theirs):
    """What BasicSR's dictionary says and ours does not; ours also has the defaults of keys that are not given."""
    found = set()
    for key, value in theirs.items():
        if isinstance(value, dict):
            found |= differences(ours[key], value)
        elif key not in ours or ours[key] != value:
            found.add(f'{key}: {value}')
    return found


def test_the_dictionary_is_that_of_basicsr(images_here, monkeypatch):
    monkeypatch.setattr(
        sys,
        'argv',
        ['train.py', '-opt', write(BASICSR), '--force_yml', 'train:ema_decay=0.5', 'val:metrics:psnr:crop_border=4'],
    )
    theirs, args = basicsr_options.parse_options(str(images_here), is_train=True)
    ours = parse_options(args, str(images_here), is_train=True)
    assert {ours[key] for key in ('root_path', 'opt_file', 'launcher', 'debug')} == {
        str(images_here),
        'run.yml',
        'none',
        False,
    }
    assert differences(ours, theirs) == set()

    # and in testing
    theirs, args = basicsr_options.parse_options(str(images_here), is_train=False)
    text = BASICSR.replace('  train:\n    name', '  test:\n    name')
    text = text.replace('pretrain_network_g: ~', 'pretrain_network_g: images/a.png')
    write(text)
    theirs, args = basicsr_options.parse_options(str(images_here), is_train=False)
    ours = parse_options(args, str(images_here), is_train=False)
    assert all(ours['path'][key] == theirs['path'][key] for key in ('results_root', 'log', 'visualization'))
    assert differences(ours['datasets'], theirs['datasets']) == set()


def test_debug_is_a_flag_and_not_a_name(images_here):
    path = write(swap('name: run', 'name: no_debugging'))
    opt = parse_options(Args(path), str(images_here))
    assert (opt['name'], opt['val']['val_freq'], opt['debug']) == ('no_debugging', 10, False)
    opt = parse_options(Args(path, debug=True), str(images_here))
    assert opt['name'] == 'debug_no_debugging' and opt['path']['log'].endswith('experiments/debug_no_debugging')
    assert (opt['val']['val_freq'], opt['logger']['print_freq'], opt['logger']['save_checkpoint_freq']) == (8, 1, 8)
