"""scripts/create_lmdb.py: what it stores, what it leaves out, and what happens when it is interrupted."""

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from basicsr.data.data_util import paths_from_lmdb
from basicsr.utils import FileClient, imfrombytes
from helpers import write_image
from PIL import Image

from moeisr_basicsr.data.resize import imresize

SCRIPT = Path(__file__).resolve().parents[1] / 'scripts' / 'create_lmdb.py'


@pytest.fixture(scope='module')
def script():
    spec = importlib.util.spec_from_file_location('create_lmdb', SCRIPT)
    module = sys.modules['create_lmdb'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules['create_lmdb']


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / 'photos'
    (root / 'sub').mkdir(parents=True)
    write_image(root / 'one.v2.png', noise(50, 70))
    write_image(root / 'sub' / 'two words.png', noise(30, 20, seed=1))
    write_image(root / 'grey.png', noise(40, 40, seed=2), grey=True)
    (root / 'notes.txt').write_text('no image')
    return root


def records(path):
    """{key: pixels (H, W, 3) RGB}, read as BasicSR reads them."""
    client = FileClient('lmdb', db_paths=[str(path)], client_keys=['gt'])
    found = {key: imfrombytes(client.get(key, 'gt'))[..., ::-1] for key in paths_from_lmdb(str(path))}
    with client.client._client['gt'].begin() as transaction:
        assert transaction.stat()['entries'] == len(found)  # no bookkeeping is left
    client.client._client['gt'].close()
    return found


def test_whole_images_are_what_basicsr_reads(script, folder, tmp_path, capsys):
    output = tmp_path / 'out.lmdb'
    assert script.main([str(folder), '-o', str(output), '--workers', '1']) == 0
    found = records(output)
    assert list(found) == ['grey', 'one_v2', 'sub_two_words']
    np.testing.assert_array_equal(found['one_v2'], noise(50, 70))
    np.testing.assert_array_equal(found['sub_two_words'], noise(30, 20, seed=1))
    assert (found['grey'] == found['grey'][..., :1]).all() and found['grey'].std() > 10
    assert (output / 'meta_info.txt').read_text() == (
        'grey.png (40,40,1) 1\none_v2.png (50,70,3) 1\nsub_two_words.png (30,20,3) 1\n'
    )
    assert '3 images from 3 files' in capsys.readouterr().out and not (tmp_path / 'out.lmdb.partial').exists()
    assert script.main([str(folder), '-o', str(output)]) == 2
    assert 'exists already' in capsys.readouterr().err


def test_squares_cover_the_image_as_basicsr_cuts_them(script, folder, tmp_path):
    output = tmp_path / 'out.lmdb'
    assert (
        script.main([str(folder), '-o', str(output), '--crop', '32', '--step', '16', '--thresh', '3', '--workers', '1'])
        == 0
    )
    found, image = records(output), noise(50, 70)
    # 50 = 16 + 32 + a rest of 2, which --thresh lets go; 70 = 32 + 32 + a rest of 6, which gets its own squares.
    places = [(top, left) for top in (0, 16) for left in (0, 16, 32, 38)]
    assert [key for key in found if key.startswith('one')] == [f'one_v2_s{n:03d}' for n in range(1, 9)]
    for number, (top, left) in enumerate(places, 1):
        np.testing.assert_array_equal(found[f'one_v2_s{number:03d}'], image[top : top + 32, left : left + 32])
    assert found['sub_two_words_s001'].shape == (30, 20, 3)  # smaller than a square: whole


def test_jpegs_are_shrunk_and_flat_pieces_dropped(script, tmp_path, capsys):
    root = tmp_path / 'photos'
    root.mkdir()
    Image.fromarray(noise(81, 60)).save(root / 'photo.jpg', quality=95)
    write_image(root / 'still.png', noise(20, 20))
    write_image(root / 'sky.png', np.full((20, 20, 3), 200, np.uint8))
    write_image(root / 'glass.png', noise(20, 20), alpha=noise(20, 20)[..., 0])
    output = tmp_path / 'out.lmdb'
    assert script.main([str(root), '-o', str(output), '--jpeg-shrink', '2', '--min-detail', '2', '--workers', '1']) == 0
    found = records(output)
    assert list(found) == ['glass', 'photo', 'still'] and found['still'].shape == (20, 20, 3)
    np.testing.assert_array_equal(found['photo'], imresize(np.asarray(Image.open(root / 'photo.jpg')), size=(40, 30)))
    told = capsys.readouterr().out
    assert '1 flat' in told and '1 files have transparency' in told


def test_an_interrupted_run_goes_on(script, folder, tmp_path, monkeypatch, capsys):
    output, whole = tmp_path / 'out.lmdb', tmp_path / 'whole.lmdb'
    arguments = [str(folder), '-o', str(output), '--crop', '16', '--workers', '1']
    original, made = script.make, []

    def make(job):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(job.key)
        return original(job)

    monkeypatch.setattr(script, 'make', make)
    assert script.main(arguments) == 130
    assert '--resume' in capsys.readouterr().err and not output.exists()
    monkeypatch.setattr(script, 'make', original)
    assert script.main(arguments) == 2
    assert '--resume goes on' in capsys.readouterr().err
    assert script.main([*arguments, '--resume', '--step', '4']) == 2
    assert 'other settings' in capsys.readouterr().err
    with open(tmp_path / 'out.lmdb.partial' / 'progress.jsonl', 'a') as log:
        log.write('\n{"key": "gr')  # the machine went down
    again = []
    monkeypatch.setattr(script, 'make', lambda job: again.append(job.key) or original(job))
    assert script.main([*arguments, '--resume']) == 0
    assert len(again) == 1 and again[0] not in made
    assert script.main([str(folder), '-o', str(whole), '--crop', '16', '--workers', '1']) == 0
    assert (output / 'meta_info.txt').read_text() == (whole / 'meta_info.txt').read_text()
    first, second = records(output), records(whole)
    assert first.keys() == second.keys() and all((first[key] == second[key]).all() for key in first)


def test_a_small_map_grows(script, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(script, 'FIRST_MAP_SIZE', 1 << 14)
    output = tmp_path / 'out.lmdb'
    assert script.main([str(folder), '-o', str(output), '--crop', '24', '--step', '6', '--workers', '1']) == 0
    assert len(records(output)) > 30


def test_damaged_files(script, folder, tmp_path, capsys):
    data = (folder / 'one.v2.png').read_bytes()
    (folder / 'one.v2.png').write_bytes(data[: len(data) // 2])
    output = tmp_path / 'out.lmdb'
    assert script.main([str(folder), '-o', str(output), '--workers', '1']) == 2
    assert re.search('one.v2.png: the image is damaged', capsys.readouterr().err)
    assert script.main([str(folder), '-o', str(tmp_path / 'b.lmdb'), '--workers', '1', '--skip-damaged']) == 0
    assert str(folder / 'one.v2.png') in capsys.readouterr().out
    assert list(records(tmp_path / 'b.lmdb')) == ['grey', 'sub_two_words']


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['{folder}', '-o', 'out'], 'must end in .lmdb'),
        (['{folder}/none', '-o', '{out}'], 'is not a folder'),
        (['{empty}', '-o', '{out}'], 'holds no image'),
        (['{folder}', '-o', '{out}', '--crop', '0'], '--crop: 0 must be at least 1'),
        (['{folder}', '-o', '{out}', '--step', '5'], 'give --crop'),
        (['{folder}', '-o', '{out}', '--jpeg-shrink', '0.5'], 'at least 1'),
        (['{folder}', '{folder}', '-o', '{out}'], 'same name'),
        (['{folder}', '-o', '{out}', '--min-detail', '900'], 'No image is left'),
    ],
)
def test_mistakes_are_one_line(script, folder, tmp_path, capsys, arguments, words):
    (tmp_path / 'empty').mkdir()
    places = {'folder': folder, 'out': tmp_path / 'o.lmdb', 'empty': tmp_path / 'empty'}
    assert script.main([text.format(**places) for text in arguments] + ['--workers', '1']) == 2
    error = capsys.readouterr().err.split('\r')[-1]
    assert words in error and error.strip().count('create_lmdb:') == 1


def test_names_that_basicsr_cannot_read(script, tmp_path, capsys):
    (tmp_path / 'in').mkdir()
    write_image(tmp_path / 'in' / 'käse.png', noise(4, 4))
    assert script.main([str(tmp_path / 'in'), '-o', str(tmp_path / 'o.lmdb')]) == 2
    assert 'ASCII' in capsys.readouterr().err


def test_several_processes(script, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(SCRIPT.parent)  # workers import the script by its name
    output = tmp_path / 'out.lmdb'
    assert script.main([str(folder), '-o', str(output), '--workers', '2', '--crop', '20']) == 0
    assert '100%' in capsys.readouterr().err  # the progress bar
    assert script.main([str(folder), '-o', str(tmp_path / 'b.lmdb'), '--workers', '1', '--crop', '20']) == 0
    assert (output / 'meta_info.txt').read_text() == (tmp_path / 'b.lmdb' / 'meta_info.txt').read_text()
    first, second = records(output), records(tmp_path / 'b.lmdb')
    assert len(first) == 35 and all((first[key] == second[key]).all() for key in second)


def test_help_names_every_option(script, capsys):
    with pytest.raises(SystemExit) as caught:
        script.main(['--help'])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for option in ('--crop', '--step', '--thresh', '--jpeg-shrink', '--min-detail', '--workers', '--resume'):
        assert option in text
