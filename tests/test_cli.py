"""The command: help, exit codes, and one line for every mistake."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from basicsr.archs import build_network

from moeisr_basicsr import __version__
from moeisr_basicsr.atomic_file import SaveError
from moeisr_basicsr.checkpoint import read_model, save_model
from moeisr_basicsr.cli import COMMANDS, main
from moeisr_basicsr.cli import models as models_command
from moeisr_basicsr.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
ENCODER = {'type': 'EDSREncoder', 'num_feat': 4, 'num_block': 1}
NETWORK = {'type': 'MoEISR', 'encoder': ENCODER, 'experts': [[4], [4, 4]], 'mapper': {'num_layers': 1, 'num_feat': 4}}
DENSE = {'type': 'LIIF', 'encoder': ENCODER, 'hidden_list': [4]}


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp('models')
    torch.manual_seed(0)
    save_model(folder / 'moe.safetensors', build_network(NETWORK), NETWORK)
    save_model(folder / 'dense.safetensors', build_network(DENSE), DENSE)
    return folder


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, models):
    """The current folder: images, model files, and files that are wrong in some way."""
    monkeypatch.chdir(tmp_path)
    for name in ('moe.safetensors', 'dense.safetensors'):
        os.symlink(models / name, name)
    os.makedirs('images/sub')
    os.mkdir('empty')
    for name in ('a.png', 'b.jpg'):
        cv2.imwrite(f'images/{name}', np.full((6, 5, 3), 90, np.uint8))
    (tmp_path / 'cut.safetensors').write_bytes((models / 'moe.safetensors').read_bytes()[:2000])
    (tmp_path / 'broken.yml').write_text('name: x\ndatasets: [\n')
    (tmp_path / 'typo.yml').write_text('nmae: x\nmodel_type: MoEISRModel\n')
    (tmp_path / 'corrupt.png').write_bytes(b'\x89PNG\r\n\x1a\n' + bytes(40))
    (tmp_path / 'nothing.png').write_bytes(b'')
    (tmp_path / 'hostile.pth').write_bytes(pickle.dumps(os.system))
    return tmp_path


def run(capsys, *argv):
    """(exit code, standard output, standard error)."""
    code = main(list(argv))
    return code, *capsys.readouterr()


def fails(capsys, *argv):
    """The one line that a mistake gets."""
    code, _, error = run(capsys, *argv)
    lines = error.splitlines()
    assert code == 2 and len(lines) == 1, (code, error)
    assert lines[0].startswith('basicsr: error: ') and 'Traceback' not in error
    return lines[0].removeprefix('basicsr: error: ')


UPSCALE = ('upscale', 'images/a.png', '-o', 'out.png', '--model', 'moe.safetensors')


@pytest.mark.parametrize(
    ('argv', 'words'),
    [
        (('trian',), "invalid choice: 'trian' (choose from "),
        (('train',), 'needs an options file: -opt'),
        (('train', '-opt', 'gone.yml'), 'gone.yml: cannot read this options file: No such file'),
        (('train', '-opt', 'broken.yml'), 'broken.yml:3: broken YAML'),
        (('test', '-opt', 'broken.yml'), 'broken.yml:3: broken YAML'),
        (('train', '-optt', 'a.yml'), "unknown argument -optt. Did you mean '-opt'?"),
        (('train', '-opt', 'a.yml', '--lancher', 'none'), "Did you mean '--launcher'?"),
        (('train', '-opt', 'a.yml', '--launcher', 'mpi'), "invalid choice: 'mpi'"),
        (('train', '-opt', 'a.yml', 'more'), 'unknown argument more'),
        (('train', '-opt', 'typo.yml', '--import', 'not_there_at_all'), "No module named 'not_there_at_all'"),
        (('upscale',), 'the following arguments are required: IMAGE_OR_FOLDER'),
        (UPSCALE, 'one of the arguments --scale --size is required'),
        ((*UPSCALE, '--scale', '0.5'), "a factor must be at least 1, at most 1,000,000; got '0.5'"),
        ((*UPSCALE, '--scale', '2x0.9'), 'a factor must be at least 1'),
        ((*UPSCALE, '--scale', 'big'), "'big' is not a factor such as 3.3, or rows x columns such as 2.5x4"),
        ((*UPSCALE, '--scale', '1x2x3'), 'is not a factor'),
        ((*UPSCALE, '--scale', 'nan'), 'is not a factor'),
        ((*UPSCALE, '--size', '99'), 'is not a size such as 3840x2160, width first'),
        ((*UPSCALE, '--size', '4x9'), 'the output size must be at least the input size of 6 x 5 (rows x columns)'),
        ((*UPSCALE, '--size', '9x9', '--scale', '2'), 'not allowed with argument'),
        ((*UPSCALE, '--scale', '2', '--exprt-map'), "Did you mean '--expert-map'?"),
        ((*UPSCALE, '--scale', '2', '--budget', '0.001'), 'budget must lie between'),
        ((*UPSCALE, '--scale', '2', '--budget', '1.5'), 'budget must lie between'),
        ((*UPSCALE, '--scale', '2', '--budget', '0.5', '--cost-weight', '1'), 'not allowed with argument'),
        ((*UPSCALE, '--scale', '2', '--cost-weight', 'inf'), "'inf' is not a number"),
        ((*UPSCALE, '--scale', '2', '--tile', '3'), '--tile must be 0 (the whole image) or at least 16 pixels; got 3'),
        (
            (*UPSCALE, '--scale', '2', '--device', 'cdua'),
            "--device 'cdua' cannot be used here: Expected one of cpu, cuda",
        ),
        ((*UPSCALE, '--scale', '2', '--device', 'cuda:99'), "--device 'cuda:99' cannot be used here"),
        ((*UPSCALE, '--scale', '2', '--precision', 'fp8'), "invalid choice: 'fp8'"),
        ((*UPSCALE, '--scale', '2', '--overwrite', '--resume'), 'not allowed with argument'),
        ((*UPSCALE[:-1], 'gone.safetensors', '--scale', '2'), 'there is no model file gone.safetensors'),
        ((*UPSCALE[:-1], 'cut.safetensors', '--scale', '2'), 'cut.safetensors is no whole safetensors file'),
        ((*UPSCALE[:-1], 'hostile.pth', '--scale', '2'), 'hostile.pth is no checkpoint that can be read'),
        (
            (*UPSCALE[:-1], 'dense.safetensors', '--scale', '2', '--expert-map'),
            'has one expert: there is no map to draw',
        ),
        ((*UPSCALE[:-1], 'dense.safetensors', '--scale', '2', '--budget', '0.5'), 'a dense decoder has one expert'),
        (('upscale', 'images/c.png', *UPSCALE[2:], '--scale', '2'), 'there is no image or folder images/c.png'),
        (('upscale', 'image/a.png', *UPSCALE[2:], '--scale', '2'), 'there is no image or folder image/a.png'),
        (('upscale', 'empty', *UPSCALE[2:], '--scale', '2'), 'empty has no image directly in it'),
        (('upscale', 'images', *UPSCALE[2:], '--scale', '2'), 'out.png is one file, but there are 2 images'),
        (('upscale', 'images/a.png', '-o', 'images/a.png', *UPSCALE[4:], '--scale', '2'), 'would be overwritten'),
        (('upscale', 'images/a.png', '-o', 'a.gif', *UPSCALE[4:], '--scale', '2'), 'images are written as .png, .jpg'),
        (
            ('upscale', 'images/a.png', '-o', 'moe.safetensors', *UPSCALE[4:], '--scale', '2'),
            'moe.safetensors is a file',
        ),
        (
            ('upscale', 'images/a.png', '-o', 'typo.yml/x.png', *UPSCALE[4:], '--scale', '2'),
            'typo.yml is a file or a broken link, not a folder',
        ),
        (
            ('upscale', 'images', '-o', 'typo.yml/x/y', *UPSCALE[4:], '--scale', '2'),
            'typo.yml is a file or a broken link, not a folder',
        ),
        ((*UPSCALE, '--scale', '2', '--ext', 'jpg'), 'out.png and --ext jpg contradict each other'),
        (('upscale', 'corrupt.png', *UPSCALE[2:], '--scale', '2'), 'corrupt.png'),
        (('upscale', 'nothing.png', *UPSCALE[2:], '--scale', '2'), 'nothing.png: the file is empty'),
        (('convert', 'gone.pth', '-o', 'm.safetensors'), 'there is no model file or checkpoint gone.pth'),
        (('convert', 'hostile.pth', '-o', 'm.safetensors'), 'Nothing in it was run'),
        (('convert', 'moe.safetensors', '-o', 'm.pth'), "must end in '.safetensors'"),
        (('convert', 'moe.safetensors', '-o', 'dense.safetensors'), 'already exists: give --overwrite'),
        (('convert', 'moe.safetensors', '-o', 'm.safetensors', '-opt', 'typo.yml'), "the key 'network_g' is missing"),
        (
            ('convert', 'moe.safetensors', '-o', 'm.safetensors', '--force_yml', 'a=b'),
            'without -opt only network_g can be changed',
        ),
        (('convert', 'moe.safetensors', '-o', 'm.safetensors', '--metadata', 'license'), 'license: give KEY=VALUE'),
        (('convert', 'moe.safetensors', '-o', 'm.safetensors', '--metadata', 'a=\udce9'), 'this is not text in UTF-8'),
        (
            ('convert', 'moe.safetensors', '-o', 'm.safetensors', '--metadata', 'network_g={}'),
            'network_g is written by',
        ),
        (('convert', 'moe.safetensors', '-o', 'm.safetensors', '--store', 'int8'), "invalid choice: 'int8'"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2(capsys, argv, words):
    before = sorted(os.listdir())
    assert words in fails(capsys, *argv)
    assert sorted(os.listdir()) == before  # no folder, and no half-written file


@pytest.mark.parametrize(
    ('missing', 'hint'),
    [
        ('corupt.png', " Did you mean 'corrupt.png'?"),
        ('corrupt.jpg', " Did you mean 'corrupt.png'?"),
        ('image', " Did you mean 'images'?"),
        ('zq.png', ''),
        ('typo2.png', ''),  # typo.yml is no image
    ],
)
def test_a_missing_image_is_compared_with_images_by_the_stem(capsys, missing, hint):
    error = fails(capsys, 'upscale', missing, '-o', 'out.png', '--model', 'moe.safetensors', '--scale', '2')
    assert error == f'there is no image or folder {missing}.{hint}'


def test_several_mistakes_in_an_options_file_get_a_line_each(capsys, monkeypatch):
    code, _, error = run(capsys, 'train', '-opt', 'typo.yml')
    lines = error.splitlines()
    assert code == 2 and len(lines) > 3 and all(line.startswith('basicsr: error: typo.yml:') for line in lines)
    assert "nmae: unknown key. Did you mean 'name'?" in error and "the key 'train' is missing" in error
    monkeypatch.setenv('RANK', '1')  # of a distributed run, one process speaks
    assert run(capsys, 'train', '-opt', 'typo.yml') == (2, '', '')


@pytest.mark.parametrize(
    ('error', 'line'),
    [
        (UserError('bad\nvalue'), 'bad value'),
        (PermissionError(13, 'Permission denied', 'a.png'), 'a.png: Permission denied'),
        (OSError(28, 'No space left on device'), 'No space left on device'),
        (SaveError(28, 'No space left on device: cannot write a.pth'), 'No space left on device: cannot write a.pth'),
        (ValueError('too many values to unpack'), None),
        (KeyError('weight'), None),
        (ModuleNotFoundError("No module named 'x'"), None),
        (OSError('a library is unhappy'), None),
    ],
    ids=repr,
)
def test_only_mistakes_of_the_user_and_the_system_get_one_line(capsys, monkeypatch, error, line):
    def failing(args):
        raise error

    monkeypatch.setattr(models_command, 'run', failing)
    code, _, text = run(capsys, 'models')
    if line is None:
        assert code == 1 and text.startswith('Traceback') and str(error) in text
        assert text.splitlines()[-1].startswith('basicsr: this is a bug')
    else:
        assert (code, text) == (2, f'basicsr: error: {line}\n')


def test_help(capsys):
    for argv in ([], ['--help'], *([name, '--help'] for name in COMMANDS)):
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == 0
        output = capsys.readouterr().out
        assert output.startswith(' '.join(['usage: basicsr', *argv[:-1]]))
        assert all(len(line) <= 120 for line in output.splitlines())
        assert len(argv) == 2 or all(f'    {name} ' in output for name in COMMANDS)
    with pytest.raises(SystemExit):
        main(['--version'])
    assert __version__ in capsys.readouterr().out


def test_help_of_train_and_test_names_what_fits_each(capsys):
    def shown(command):
        with pytest.raises(SystemExit):
            main([command, '--help'])
        return ' '.join(capsys.readouterr().out.split())

    training = ('--auto_resume', '--debug', 'train:ema_decay', 'datasets:train:', 'options/moeisr_edsr.yml')
    testing = ('val:budget', 'path:pretrain_network_g', 'options/test_moeisr_edsr.yml')
    assert all((word in shown('train'), word in shown('test')) == (True, False) for word in training)
    assert all((word in shown('train'), word in shown('test')) == (False, True) for word in testing)
    for word in ('--auto_resume', '--debug'):
        assert fails(capsys, 'test', '-opt', 'typo.yml', word).startswith(f'unknown argument {word}.')


def test_keys_are_listed(capsys):
    code, output, _ = run(capsys, 'train', '--keys')
    assert code == 0 and '  train: tau\n' in output
    assert 'datasets: NAME (ArbitraryScaleImageDataset)' in output


def test_modules_of_users(capsys, folder):
    (folder / 'my_module.py').write_text('from pathlib import Path\nPath("imported").touch()\n')
    assert run(capsys, 'train', '--keys', '--import', 'my_module.py')[0] == 0
    assert os.path.exists('imported')
    (folder / 'bad_module.py').write_text('1 / 0\n')
    assert 'ZeroDivisionError' in fails(capsys, 'train', '--keys', '--import', 'bad_module')


def test_convert(capsys):
    code, output, error = run(capsys, 'convert', 'moe.safetensors', '-o', 'm.safetensors')
    assert (code, error) == (0, '') and output.startswith('m.safetensors: MoEISR with EDSREncoder')
    assert output.endswith('; options of moe.safetensors\n')
    change = ('convert', 'moe.safetensors', '-o', 'changed.safetensors', '--force_yml', 'network_g:scale=3')
    assert run(capsys, *change)[0] == 0 and read_model('changed.safetensors').network_opt['scale'] == 3


def test_as_a_module_in_a_process_of_its_own(folder):
    """`python -m moeisr_basicsr`, with the current folder elsewhere: the exit code reaches the shell."""
    done = subprocess.run(
        [sys.executable, '-m', 'moeisr_basicsr', 'train', '-opt', 'gone.yml'],
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        'basicsr: error: gone.yml: cannot read this options file: No such file or directory.'
    ]
