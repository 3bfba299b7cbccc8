"""Interrupted tests: what is done is written, the same command goes on, and another test starts anew."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from basicsr.models import build_model
from tiny_runs import model_options, parse, run_yaml, weights_of, write_images

from moeisr_basicsr.analysis import schema
from moeisr_basicsr.cli import main
from moeisr_basicsr.engine.test_loop import test as run_test
from moeisr_basicsr.engine.test_progress import identity
from moeisr_basicsr.errors import ExitCode, UserError
from moeisr_basicsr.models.image_evaluation import ImageEvaluator
from moeisr_basicsr.tools.report.collect import collect, read_sources

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def root(tmp_path):
    torch.manual_seed(0)
    torch.save({'params': weights_of(build_model(model_options()))}, tmp_path / 'weights.pth')
    write_images(tmp_path / 'other', 4, (26, 33), seed=5)
    return tmp_path


def sections(root, **val):
    """Two datasets of three and of four images."""
    base = run_yaml(root)
    second = {**base['datasets']['val_2'], 'dataroot_gt': str(root / 'other')}
    return {
        **{key: base[key] for key in ('name', 'model_type', 'num_gpu', 'network_g')},
        'path': {'pretrain_network_g': str(root / 'weights.pth')},
        'datasets': {'test': base['datasets']['val'], 'test_2': second},
        'val': {'metrics': {'psnr': {'type': 'calculate_psnr_sr'}}, 'save_img': True, **val},
    }


def evaluated(root, **val):
    return run_test(parse(root, sections(root, **val), is_train=False))


def results(root):
    return schema.load(root / 'results/run/results.json')['rows']


def without_times(rows):
    return [{key: value for key, value in row.items() if key != 'time_ms'} for row in rows]


def count_and(monkeypatch, at, what):
    """Count the images that are measured; before the image number `at` call `what`."""
    measured, timed = [], ImageEvaluator.timed

    def counted(self, *arguments):
        measured.append(1)
        if len(measured) == at:
            what()
        return timed(self, *arguments)

    monkeypatch.setattr(ImageEvaluator, 'timed', counted)
    return measured


def log_of(root):
    return ''.join(path.read_text() for path in sorted((root / 'results/run').glob('*.log')))


def interrupted(root, monkeypatch, at, what, **val):
    with monkeypatch.context() as patch:
        count_and(patch, at, what)
        return evaluated(root, **val)


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


def crash():
    raise RuntimeError('the GPU fell off')


@pytest.mark.parametrize(('how', 'at', 'datasets'), [(sigterm, 2, 0), (sigterm, 5, 1), (crash, 5, 1)])
def test_an_interrupted_test_goes_on_where_it_was(root, monkeypatch, how, at, datasets):
    """No image is measured twice; what is done is there before; the end is that of a test in one go."""
    assert evaluated(root) == ExitCode.OK
    whole = without_times(results(root))
    (root / 'results/run').rename(root / 'results/whole')
    if how is sigterm:
        assert interrupted(root, monkeypatch, at, how) == ExitCode.TERMINATED  # this image is finished
    else:
        with pytest.raises(RuntimeError, match='fell off'):
            interrupted(root, monkeypatch, at, how)
    if datasets:
        assert without_times(results(root)) == [row for row in whole if row['dataset'] == 'tiny_x2']
        assert 'Validation tiny_x2 x2, 3 images' in log_of(root)
    else:
        assert not (root / 'results/run/results.json').exists()
    measured = count_and(monkeypatch, 0, None)
    assert evaluated(root) == ExitCode.OK
    done = at - (how is crash)
    assert len(measured) == 7 - done
    assert without_times(results(root)) == whole
    assert f'going on with an interrupted test: {done} images are measured already' in log_of(root)
    assert sorted(path.name for path in (root / 'results').iterdir()) == ['run', 'whole']  # nothing was archived
    pictures = {path.relative_to(root / 'results/run') for path in (root / 'results/run').rglob('*.png')}
    assert pictures == {path.relative_to(root / 'results/whole') for path in (root / 'results/whole').rglob('*.png')}
    assert not list((root / 'results/run').glob('progress_*'))
    assert evaluated(root) == ExitCode.OK and len(measured) == 7 - done + 7  # a complete test is done again


@pytest.mark.parametrize('change', ['weights', 'options', 'images'])
def test_rows_of_another_test_are_not_used(root, monkeypatch, change):
    assert interrupted(root, monkeypatch, 5, sigterm) == ExitCode.TERMINATED
    val = {}
    if change == 'weights':
        weights = torch.load(root / 'weights.pth')['params']
        torch.save({'params': {name: value * 1.1 for name, value in weights.items()}}, root / 'weights.pth')
    elif change == 'options':
        val = {'precision': 'bf16'}
    else:
        write_images(root / 'val', 1, (26, 33), seed=9)  # another 0.png
    measured = count_and(monkeypatch, 0, None)
    assert evaluated(root, **val) == ExitCode.OK
    assert len(measured) == (3 if change == 'images' else 7)
    rows = results(root)
    (root / 'results/run').rename(root / 'results/went_on')
    assert evaluated(root, **val) == ExitCode.OK
    assert without_times(rows) == without_times(results(root))
    if change != 'images':
        assert len(list((root / 'results').glob('run_archived_*/progress_0.jsonl'))) == 1
        log = next((root / 'results/went_on').glob('*.log')).read_text()
        assert f'the interrupted test of this name had other {change}: starting anew' in log


@pytest.mark.parametrize('key', ['checkpoint', 'weights'])
def test_the_encoders_own_file_is_of_the_weights(tmp_path, key):
    network = {'type': 'FixedScale', 'encoder': {'type': 'NetworkEncoder', key: str(tmp_path / 'net.pth')}}
    found = []
    for content in (b'one', b'two', b'one'):
        (tmp_path / 'net.pth').write_bytes(content)
        found.append(identity({'path': {}, 'datasets': {}, 'network_g': network}))
    assert found[0] == found[2] and [name for name in found[0] if found[0][name] != found[1][name]] == ['weights']


def test_a_half_written_line_and_other_ranks(root, monkeypatch):
    """The lines of several ranks are put together; one that was cut off is measured again."""
    assert interrupted(root, monkeypatch, 5, sigterm) == ExitCode.TERMINATED
    path = root / 'results/run/progress_0.jsonl'
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 6
    path.write_text(''.join(lines[:3]))
    path.with_name('progress_3.jsonl').write_text(''.join([lines[0], *lines[3:5], lines[5][:40]]))
    measured = count_and(monkeypatch, 0, None)
    assert evaluated(root) == ExitCode.OK and len(measured) == 3
    assert len(results(root)) == 9


def test_a_broken_image_costs_its_own_row_and_is_tried_again(root, monkeypatch, capsys):
    whole = (root / 'other' / '2.png').read_bytes()
    (root / 'other' / '2.png').write_bytes(whole[:200])
    assert evaluated(root) == ExitCode.IMAGES_FAILED == 4
    rows = results(root)
    assert [row['case'] for row in rows] == ['test'] * 6 + ['failed', 'mean', 'mean']
    assert rows[6]['image'] == '2' and 'other/2.png: the image is damaged' in rows[6]['notes']
    assert 'failed' not in rows[7] and rows[8]['failed'] == 1 and rows[8]['count'] == 3
    assert rows[8]['notes'] == 'without 1 of 4 images: 2'
    psnrs = [row['metrics']['psnr'] for row in rows[3:6]]
    assert rows[8]['metrics']['psnr'] == pytest.approx(sum(psnrs) / 3)
    assert 'tiny_x3.3: 1 of 4 images could not be used' in log_of(root) and 'other/2.png' in log_of(root)
    notes = collect(read_sources([root / 'results/run'])).notes
    assert [note.partition(': ')[2] for note in notes] == ['tiny_x3.3 is without 1 images that could not be used: 2.']
    (root / 'other' / '2.png').write_bytes(whole)
    measured = count_and(monkeypatch, 0, None)
    assert evaluated(root) == ExitCode.OK and len(measured) == 1
    assert [row['case'] for row in results(root)] == ['test'] * 7 + ['mean'] * 2


def test_wrong_weights_leave_no_progress_behind(root):
    opt = parse(root, sections(root), is_train=False)
    torch.save({'params': {}}, root / 'weights.pth')
    with pytest.raises(UserError, match='weights.pth'):
        run_test(opt)
    assert not (root / 'results/run').exists()


def test_a_killed_command(root, monkeypatch):
    """SIGKILL in a process of its own, then the same command line."""
    monkeypatch.chdir(root)
    (root / 'test.yml').write_text(json.dumps(sections(root)))
    code = (
        'import os, signal, sys\n'
        'from moeisr_basicsr.models.image_evaluation import ImageEvaluator\n'
        'from moeisr_basicsr.cli import main\n'
        'timed, count = ImageEvaluator.timed, []\n'
        'def killed(*arguments):\n'
        '    count.append(1)\n'
        '    if len(count) == 4: os.kill(os.getpid(), signal.SIGKILL)\n'
        '    return timed(*arguments)\n'
        'ImageEvaluator.timed = killed\n'
        'main(sys.argv[1:])\n'
    )
    environment = {**os.environ, 'PYTHONPATH': str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, '-c', code, 'test', '-opt', 'test.yml'], env=environment, capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL
    head = json.loads((root / 'results/run/progress_0.jsonl').read_text().splitlines()[0])
    assert head.keys() == {'options', 'weights', 'environment'}
    if head['environment']['threads'] == torch.get_num_threads():
        measured = count_and(monkeypatch, 0, None)
        assert main(['test', '-opt', 'test.yml']) == 0 and len(measured) == 4
