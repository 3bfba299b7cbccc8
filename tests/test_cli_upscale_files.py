"""`basicsr upscale` and odd files: kinds of images, subfolders, names that are no text, links, a signal."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import yaml
from basicsr.archs import build_network
from PIL import Image
from tiny_runs import DENSE, run_yaml

from moeisr_basicsr.checkpoint import save_model
from moeisr_basicsr.cli import main, upscale, upscale_run

NO_TEXT = os.fsdecode(b'caf\xe9')  # Latin-1, as old archives have it


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('MOEISR_KERNELS', 'off')  # nothing is compiled here
    torch.manual_seed(0)
    save_model('m.safetensors', build_network(DENSE), DENSE)
    return tmp_path


def smooth(rows=40, cols=30, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (rows, cols, 3)).astype(np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), 3)


def run(*words):
    return main(['upscale', *words, '--model', 'm.safetensors', '--device', 'cpu'])


def test_every_kind_is_read_and_the_rest_is_told(capsys):
    pictures = [Image.fromarray(smooth(seed=seed)) for seed in range(3)]
    Path('in/sub').mkdir(parents=True)
    pictures[0].save('in/whole.jp2')
    pictures[0].save('in/phone.avif', quality=100)
    pictures[0].save('in/animation.gif', save_all=True, append_images=pictures[1:])
    for name in ('in/notes.txt', 'in/raw.heic', 'in/READ', 'in/.hidden', 'in/more.txt'):
        Path(name).write_text('no image')
    assert run('in', '-o', 'out', '--scale', '1') == 0
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] == (
        'basicsr: note: left out: .txt 2, subfolders (taken with --recursive) 1, without a suffix 1, .heic 1.'
    )
    assert 'animation.gif: only the first of 3 frames' in shown[1] and len(shown) == 2
    assert sorted(os.listdir('out')) == ['animation_x1.png', 'phone_x1.png', 'whole_x1.png']
    assert run('in/whole.jp2', '-o', 'png.png', '--scale', '1') == 0
    pictures[0].save('same.png')  # the same pixels in a format of their own
    assert run('same.png', '-o', 'same_x1.png', '--scale', '1') == 0
    np.testing.assert_array_equal(cv2.imread('png.png'), cv2.imread('same_x1.png'))


@pytest.mark.parametrize('name, depth, options', [('a.jp2', 16, []), ('a.avif', 10, [cv2.IMWRITE_AVIF_DEPTH, 10])])
def test_deeper_images_are_not_cut_to_8_bits(capsys, name, depth, options):
    cv2.imwrite(name, smooth(80, 70).astype(np.uint16) << (depth - 8), options)
    assert run(name, '-o', 'out.png', '--scale', '2') == 2
    assert f'of {depth} bits; PNG and TIFF may have 16' in capsys.readouterr().err


def test_subfolders_keep_their_structure(capsys):
    for place in ('in', 'in/a', 'in/a/b', 'in/.cache'):
        os.makedirs(place, exist_ok=True)
        Image.fromarray(smooth()).save(f'{place}/p.png')
    os.symlink('..', 'in/a/up')
    assert run('in', '-o', 'in/large', '--scale', '1', '--recursive') == 0
    found = sorted(str(path) for path in Path('in/large').rglob('*.png'))
    assert found == ['in/large/a/b/p_x1.png', 'in/large/a/p_x1.png', 'in/large/p_x1.png']
    assert 'left out: linked folders 1.' in capsys.readouterr().err
    assert run('in', '-o', 'in/large', '--scale', '1', '--recursive', '--resume') == 0
    assert 'Nothing to do' in capsys.readouterr().out and len(list(Path('in/large').rglob('*.png'))) == 3


def test_names_that_cannot_be_printed_do_not_end_a_batch(capsys):
    os.mkdir('in')
    for stem in (NO_TEXT, 'two\nlines\x1b[2J', 'z'):
        Image.fromarray(smooth()).save(f'in/{stem}.png')
    Path('in', f'{NO_TEXT}_bad.png').write_bytes(b'no image')
    assert run('in', '-o', 'out', '--scale', '1') == 2
    output, error = capsys.readouterr()
    assert len(list(Path('out').iterdir())) == 3 and os.path.exists(f'out/{NO_TEXT}_x1.png')
    assert len(output.splitlines()) == 3 and r'in/caf\udce9.png' in output and r'two\nlines\x1b[2J.png' in output
    assert len(error.splitlines()) == 1 and r'in/caf\udce9_bad.png' in error


@pytest.mark.parametrize('model_type', ['MoEISRModel', 'SRModel'])
def test_names_that_are_no_text_in_tests_and_reports(folder, capsys, model_type):
    """Pictures, log, results and report; OpenCV's own writing crashes the process on such a name."""
    options = run_yaml(folder)
    for number, stem in enumerate((NO_TEXT, 'tab\there')):
        os.rename(folder / 'val' / f'{number}.png', folder / 'val' / f'{stem}.png')
    dataset = {**options['datasets']['val'], 'dataroot_gt': str(folder / 'val')}
    val = {
        'needs_weights': False,
        'save_img': True,
        'suffix': None,
        'metrics': {'psnr': {'type': 'calculate_psnr', 'crop_border': 2}},
    }
    network = {**DENSE, 'scale': 2}
    opt = {'name': 'odd', 'model_type': model_type, 'num_gpu': 0, 'network_g': network, 'datasets': {'test': dataset}}
    Path('odd.yml').write_text(yaml.safe_dump({**opt, 'path': {}, 'val': val}))
    assert main(['test', '-opt', 'odd.yml']) == 0
    assert len(list(Path('results/odd').rglob('*.png'))) == 3
    if model_type == 'MoEISRModel':
        assert r'caf\udce9_x2.png' in os.listdir('results/odd/visualization/tiny_x2')
        assert len(json.loads(Path('results/odd/results.json').read_text())['rows']) == 4
        os.rename('results/odd', f'results/{NO_TEXT}')
        assert main(['report', f'results/{NO_TEXT}', '-o', 'r.html', '--csv', 'r.csv']) == 0
        assert r'results/caf\udce9' in Path('r.html').read_text() and r'tab\there' in Path('r.csv').read_text()


def test_numbers_as_people_write_them(capsys):
    assert upscale.parse_scale('2.5e0x4') == (2.5, 4.0)
    Image.fromarray(smooth()).save('a.png')
    for wrong in ('1e23', '9' * 400, '1e-3'):
        assert run('a.png', '-o', 'b.png', '--scale', wrong) == 2
        assert 'a factor must be at least 1, at most 1,000,000' in capsys.readouterr().err
    assert run('a.png', '-o', 'b.png', '--scale', '2', '--cost-weight', '-1e-3') == 2
    assert 'a dense decoder has one expert' in capsys.readouterr().err  # the number was understood


def test_links_that_lead_nowhere_are_one_line(capsys):
    Image.fromarray(smooth()).save('a.png')
    os.symlink('loop', 'loop')
    os.symlink('loop.png', 'loop.png')
    os.symlink('gone.png', 'old.png')
    for target, message in (
        ('loop', 'loop is a file or a broken link, not a folder'),
        ('loop/b.png', 'loop is a file or a broken link, not a folder'),
        ('loop.png', 'loop.png already exists'),
        ('old.png', 'old.png already exists'),
    ):
        assert run('a.png', '-o', target, '--scale', '2') == 2
        error = capsys.readouterr().err
        assert message in error and error.count('\n') == 1
    assert run('a.png', '-o', 'loop.png', '--scale', '1', '--overwrite') == 0 and not os.path.islink('loop.png')


def test_sigterm_leaves_no_temporary_file(folder):
    Image.fromarray(smooth(300, 300)).save('a.png')
    words = ['upscale', 'a.png', '-o', 'out.tif', '--scale', '14', '--model', 'm.safetensors', '--device', 'cpu']
    process = subprocess.Popen([sys.executable, '-m', 'moeisr_basicsr', *words], stderr=subprocess.PIPE)
    while not list(folder.glob('.*.tmp')):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert sorted(os.listdir()) == ['a.png', 'm.safetensors']


def test_very_large_outputs_are_announced_or_refused(capsys, monkeypatch):
    Image.fromarray(smooth()).save('a.png')
    assert run('a.png', '-o', 'huge.png', '--scale', '1e5') == 2  # on the disk that there is
    error = capsys.readouterr().err
    assert 'huge.png: 3000000 x 4000000 pixels, 12,000,000 megapixels, 33,527.6 GiB uncompressed: this needs' in error
    assert error.count('\n') == 1 and sorted(os.listdir()) == ['a.png', 'm.safetensors']
    monkeypatch.setattr(upscale_run, 'LARGE', 60 * 80 * 3)
    for name, least in (('b.png', 0.17), ('b.tif', 1.17), ('b.jpg', 0.03)):
        room = int(60 * 80 * 3 * least) + 1
        monkeypatch.setattr(upscale_run.shutil, 'disk_usage', lambda path: SimpleNamespace(free=room))
        assert run('a.png', '-o', name, '--scale', '2') == 0
        assert f'{name}: 60 x 80 pixels, 0 megapixels, 0.0 GiB uncompressed' in capsys.readouterr().err
        room -= 2
        assert run('a.png', '-o', name, '--scale', '2', '--overwrite') == 2
        assert 'on the disk, which has' in capsys.readouterr().err and os.path.exists(name)
    assert run('a.png', '-o', 'c.png', '--scale', '1.9') == 0 and not capsys.readouterr().err
    for name, scale in (('c.webp', '1000'), ('c.jpg', '2000'), ('c.bmp', '1100')):
        assert run('a.png', '-o', name, '--scale', scale) == 2
        error = capsys.readouterr().err
        assert 'cannot hold' in error and error.count('\n') == 1


def test_a_size_of_other_proportions_is_told(capsys):
    Image.fromarray(smooth(40, 30)).save('a.png')
    assert run('a.png', '-o', 'b.png', '--size', '120x80') == 0
    assert 'a.png: its proportions change: 2 times the rows, 4 times the columns' in capsys.readouterr().err
    assert run('a.png', '-o', 'c.png', '--size', '61x81') == 0 and not capsys.readouterr().err


def test_numbers_of_processes_that_are_none(capsys, monkeypatch):
    """A rank by itself, as other launchers set it, must not leave images out."""
    for stem in 'ab':
        Image.fromarray(smooth()).save(f'{stem}.png')
    for variables, message in (
        ({'RANK': 'abc'}, "RANK must be a whole number; got 'abc'"),
        ({'RANK': '0', 'WORLD_SIZE': '0'}, 'RANK must be below WORLD_SIZE; got 0 of 0'),
        ({'RANK': '3', 'WORLD_SIZE': '2'}, 'RANK must be below WORLD_SIZE; got 3 of 2'),
    ):
        with monkeypatch.context() as patch:
            for key, value in variables.items():
                patch.setenv(key, value)
            assert run('a.png', 'b.png', '-o', 'out', '--scale', '1') == 2
        assert message in capsys.readouterr().err
    monkeypatch.setenv('RANK', '1')
    assert run('a.png', 'b.png', '-o', 'out', '--scale', '1') == 0
    assert sorted(os.listdir('out')) == ['a_x1.png', 'b_x1.png']
