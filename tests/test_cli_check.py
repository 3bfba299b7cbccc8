"""`basicsr check`: every image once, and a list of what is wrong with which."""

import json
from collections import Counter

import numpy as np
import pytest
from data_cases import make_lmdb, noise
from helpers import write_image
from PIL import Image
from tiny_runs import run_yaml, write_images

from moeisr_basicsr.cli import main
from moeisr_basicsr.data import image_source
from moeisr_basicsr.engine import data_check


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def checked(capsys, options, *more):
    """Exit code, and the lines of every dataset by its section."""
    with open('run.yml', 'w') as file:
        json.dump(options, file)
    code, found, problems = main(['check', '-opt', 'run.yml', *more]), {}, None
    for line in capsys.readouterr().out.splitlines():
        if not line.startswith('  '):
            head, _, counts = line.partition(': ')
            problems = found[head.split()[0]] = [counts]
        else:
            problems.append(line.strip())
    return code, found


def cut(path, part=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])


def test_all_is_well_and_each_file_is_decoded_once(root, capsys, monkeypatch):
    """Both validation sets have the same folder."""
    monkeypatch.setattr(data_check, 'MOST_WORKERS', 0)
    decoded, read = Counter(), image_source.read_image
    monkeypatch.setattr(image_source, 'read_image', lambda source, name: decoded.update([name]) or read(source, name))
    code, found = checked(capsys, run_yaml(root))
    assert code == 0
    assert found == {
        'train': ['4 images, 0 problems'],
        'val': ['3 images, 0 problems'],
        'val_2': ['3 images, 0 problems'],
    }
    assert decoded == {str(path): 1 for folder in ('train', 'val') for path in (root / folder).iterdir()}
    assert sorted(path.name for path in root.iterdir()) == ['run.yml', 'train', 'val']


@pytest.mark.parametrize('workers', [0, 2])
def test_damaged_and_small_images_of_every_dataset(root, capsys, monkeypatch, workers):
    monkeypatch.setattr(data_check, 'MOST_WORKERS', workers)
    options = run_yaml(root)
    cut(root / 'train' / '2.png')
    (root / 'train' / '3.png').write_bytes(b'')
    write_image(root / 'train' / 'small.png', noise(11, 40))
    write_image(root / 'val' / 'tiny.png', noise(3, 3))
    code, found = checked(capsys, options)
    assert code == 4
    train, val, val_2 = (found[section] for section in ('train', 'val', 'val_2'))
    assert train[0] == '5 images, 3 problems' and len(train) == 4
    assert 'train/2.png: the image is damaged' in train[1] and 'train/3.png: the file is empty' in train[2]
    assert 'train/small.png: 11 x 40 pixels' in train[3] and 'need 12 x 12' in train[3]
    assert val == ['4 images, 0 problems'] and 'tiny.png' in val_2[1] and 'leaves no LR pixel' in val_2[1]
    code, found = checked(capsys, options, '--force_yml', 'datasets:train:dataroot_gt=val', 'datasets:val_2=none')
    assert list(found) == ['train', 'val'] and code == 4


def test_a_file_that_comes_back_is_no_problem(root, capsys, monkeypatch):
    monkeypatch.setattr(data_check, 'MOST_WORKERS', 0)
    options, away = run_yaml(root), root / 'away.png'
    (root / 'train' / '1.png').rename(away)
    (root / 'train' / '1.png').symlink_to('nowhere')
    monkeypatch.setattr(data_check.time, 'sleep', lambda _: away.replace(root / 'train' / '1.png'))
    assert checked(capsys, options)[0] == 0


def test_pairs(root, capsys):
    """Missing partners, a rotated and a damaged image, all in one go; and a test file."""
    write_images(root / 'hr', 8, (48, 64))
    write_images(root / 'lr', 8, (24, 32))
    with Image.open(root / 'lr' / '5.png') as image:
        image.transpose(Image.Transpose.ROTATE_90).save(root / 'lr' / '5.png')
    cut(root / 'hr' / '6.png')
    dataset = {
        'name': 'pairs',
        'type': 'ArbitraryScalePairedDataset',
        'dataroot_gt': str(root / 'hr'),
        'dataroot_lq': str(root / 'lr'),
    }
    base = run_yaml(root)
    options = {
        **{key: base[key] for key in ('name', 'model_type', 'num_gpu', 'network_g', 'path')},
        'datasets': {'test': dataset},
        'val': {'needs_weights': False},
    }
    code, found = checked(capsys, options)
    assert code == 4 and found['test'][0] == '16 images, 2 problems'
    assert 'hr/6.png: the image is damaged' in found['test'][1]
    assert 'lr/5.png (32 x 24 rows x columns) does not fit' in found['test'][2]
    for number in (1, 3):
        (root / 'lr' / f'{number}.png').unlink()
    code, found = checked(capsys, options)
    assert code == 4 and found['test'][0] == '14 images, 3 problems'
    assert all(f'hr/{number}.png has no partner {number} in' in found['test'][at] for at, number in ((1, 1), (2, 3)))
    assert 'hr/6.png: the image is damaged' in found['test'][3]


def test_datasets_of_others_and_lmdbs(root, capsys):
    """OpenCV, with which BasicSR reads, takes a cut off JPEG for whole."""
    (root / 'lr').mkdir()
    write_images(root / 'hr', 4, (32, 40))
    write_images(root / 'lr', 4, (16, 20))
    picture = np.asarray(Image.open(root / 'lr' / '2.png').convert('RGB'))
    (root / 'lr' / '2.png').unlink()
    Image.fromarray(picture).save(root / 'lr' / '2.jpg')
    cut(root / 'lr' / '2.jpg', 0.9)
    (root / 'lr' / '2.jpg').rename(root / 'lr' / '2.png')  # the ending does not matter
    folder, lmdb = root / 'records', root / 'records.lmdb'
    write_images(folder, 3, (40, 40))
    cut(folder / '1.png')
    lmdb.mkdir()
    make_lmdb(lmdb, folder, '012')
    options = run_yaml(root)
    options['datasets']['val'] = {
        'name': 'basicsr',
        'type': 'PairedImageDataset',
        'dataroot_gt': str(root / 'hr'),
        'dataroot_lq': str(root / 'lr'),
        'io_backend': {'type': 'disk'},
        'scale': 2,
    }
    options['datasets']['val_2'].update(dataroot_gt=str(lmdb), io_backend={'type': 'lmdb'})
    code, found = checked(capsys, options)
    assert code == 4 and found['val'][0] == '4 images, 1 problems' and 'lr/2.png: the image is dam' in found['val'][1]
    assert found['val_2'][0] == '3 images, 1 problems' and 'records.lmdb: record 1' in found['val_2'][1]
    options['datasets']['val']['dataroot_lq'] = str(folder)
    code, found = checked(capsys, options)
    assert 'different number of images' in found['val'][1]


def test_a_wrong_options_file_is_its_own_error(root, capsys):
    assert checked(capsys, {**run_yaml(root), 'nme': 1})[0] == 2
    assert main(['check']) == 2
