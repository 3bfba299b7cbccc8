"""Reads that fail: tried again, replaced where the options say so, and one line where they end the run."""

import logging
import os
import shutil
import threading
import time

import pytest
import torch
from basicsr.data import build_dataset
from data_cases import make_lmdb, noise, options, same
from helpers import write_image
from tiny_runs import run_options, run_yaml, write_images

from moeisr_basicsr.data import reading
from moeisr_basicsr.data.image_reader import read_header, read_image
from moeisr_basicsr.data.reading import REPLACEMENTS, ReplaceDamaged
from moeisr_basicsr.engine.data_loading import Place, TrainData, open_dataset
from moeisr_basicsr.engine.distributed import Ranks
from moeisr_basicsr.errors import ImageError, UserError

CPU = torch.device('cpu')


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def train_data(root, ranks=None, **changes):
    opt = run_options(root, **{f'datasets:train:{key}': value for key, value in changes.items()})
    return TrainData(opt, ranks or Ranks(), CPU)


def take(source, place, count):
    batches = source.batches(place)
    return [next(batches) for _ in range(count)]


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('what', ['folder', 'cut'])
def test_a_folder_that_is_gone_for_a_moment_ends_nothing(tmp_path, monkeypatch, workers, what):
    """A share away, and a file that is written just now: the same batches as without."""
    monkeypatch.setattr(reading, 'PAUSES_S', (0.1, 0.4, 1.6))
    expected = take(train_data(tmp_path), Place(), 3)
    source, folder, away = train_data(tmp_path, num_worker_per_gpu=workers), tmp_path / 'train', tmp_path / 'away'
    if what == 'folder':
        folder.rename(away)
    else:
        shutil.copytree(folder, away)
        for path in folder.iterdir():
            cut(path)

    def come_back():
        time.sleep(0.3)
        shutil.copytree(away, folder, dirs_exist_ok=True)

    thread = threading.Thread(target=come_back)
    thread.start()
    try:
        assert all(same(one[1], other[1]) for one, other in zip(take(source, Place(), 3), expected))
    finally:
        thread.join()


def test_attempts_and_pauses(tmp_path, monkeypatch):
    """Four attempts; a file that has failed them all costs the pauses once."""
    pauses = []
    monkeypatch.setattr(reading, 'PAUSES_S', (1, 2, 4))
    monkeypatch.setattr(reading.time, 'sleep', pauses.append)
    write_image(tmp_path / 'a.png', noise(40, 40))
    dataset, whole = build_dataset(options(tmp_path)), (tmp_path / 'a.png').read_bytes()
    cut(tmp_path / 'a.png')
    for _ in range(2):
        with pytest.raises(ImageError, match='a.png: the image is damaged'):
            dataset[0]
        assert pauses == [1, 2, 4]
    (tmp_path / 'a.png').write_bytes(whole)
    dataset[0]
    cut(tmp_path / 'a.png')
    with pytest.raises(ImageError):
        dataset[0]
    assert pauses == [1, 2, 4] * 2  # it was fine in between


def test_skipped_images_are_replaced_alike_on_every_way(tmp_path, caplog):
    """After a resume, in workers, and by 2 ranks: the same items; the damaged image is named once and never drawn."""
    run_yaml(tmp_path)
    cut(tmp_path / 'train' / '1.png')
    whole = train_data(tmp_path, on_damaged='skip')
    logging.getLogger('basicsr').addHandler(caplog.handler)
    batches = take(whole, Place(), 14)  # two epochs of 6 batches and more
    named = [record.message for record in caplog.records if '1.png' in record.message]
    assert len(named) == 1 and '(1 of at most 1 unusable images)' in named[0] and '\n' not in named[0]
    drawn = [path for _, batch in batches for path in batch['gt_path']]
    assert len(drawn) == 56 and {path[-5:] for path in drawn} == {'0.png', '2.png', '3.png'}
    assert all('damaged' not in batch for _, batch in batches)
    assert len({tuple(item.flatten().tolist()) for _, batch in batches for item in batch['gt']}) == 56  # no two alike
    resumed = take(train_data(tmp_path, on_damaged='skip', num_worker_per_gpu=2), batches[4][0], 9)
    assert all(same(one[1], other[1]) for one, other in zip(resumed, batches[5:]))
    parts = [
        take(train_data(tmp_path, Ranks(rank, 2), on_damaged='skip', batch_size_per_gpu=2), Place(), 6)
        for rank in range(2)
    ]
    for (_, one), (_, first), (_, second) in zip(batches, *parts):
        assert torch.equal(one['gt'][0::2], first['gt']) and torch.equal(one['gt'][1::2], second['gt'])


@pytest.mark.parametrize('workers', [0, 2])
def test_more_damaged_images_than_allowed_end_the_run(tmp_path, workers):
    run_yaml(tmp_path)
    for number in (0, 2):
        cut(tmp_path / 'train' / f'{number}.png')
    words = (
        r'skip leaves out at most 1 of 4 images, and 2 cannot be used; `basicsr check` .*\d.png: the image is damaged'
    )
    with pytest.raises(UserError, match=words) as error:
        take(train_data(tmp_path, on_damaged='skip', num_worker_per_gpu=workers), Place(), 10)
    assert '\n' not in str(error.value)


def test_the_share_of_a_large_folder(tmp_path):
    """1 % of the images, at least one and at most 100, and nothing is replaced for ever."""
    for number in (1, 2):
        write_image(tmp_path / f'{number}.png', noise(40, 40))
    base, images = run_yaml(tmp_path), [str(tmp_path / f'{number}.png') for number in (1, 2)]
    for count, most in ((50, 1), (800, 8), (3450, 34), (11000, 100)):
        (tmp_path / 'list.txt').write_text(''.join(f'{images[at % 2]}\n' for at in range(count)))
        data = train_data(tmp_path, meta_info_file=str(tmp_path / 'list.txt'))
        assert (len(data.dataset), data.most_damaged) == (count, most)
    assert base['datasets']['train'].get('on_damaged') is None
    for path in images:
        cut(tmp_path / path)
    with pytest.raises(ImageError, match='damaged'):
        ReplaceDamaged(data.dataset)[0]
    assert REPLACEMENTS == 10


def test_a_damaged_header_in_the_memory_cache(tmp_path):
    run_yaml(tmp_path)
    (tmp_path / 'train' / '1.png').write_bytes(b'')
    with pytest.raises(UserError, match='1.png: the file is empty'):
        train_data(tmp_path, cache='memory')
    batches = take(train_data(tmp_path, cache='memory', on_damaged='skip'), Place(), 6)
    expected = take(train_data(tmp_path, on_damaged='skip'), Place(), 6)
    assert all(same(one[1], other[1]) for one, other in zip(batches, expected))


def pairs_of_basicsr(root, **more):
    """PairedImageDataset, with four pairs of factor 2."""
    if not (root / 'hr').is_dir():
        write_images(root / 'hr', 4, (32, 40))
        write_images(root / 'lr', 4, (16, 20))
    return {
        'name': 'pairs',
        'type': 'PairedImageDataset',
        'phase': 'train',
        'dataroot_gt': str(root / 'hr'),
        'dataroot_lq': str(root / 'lr'),
        'io_backend': {'type': 'disk'},
        'scale': 2,
        'gt_size': 16,
        'use_hflip': True,
        'use_rot': True,
        **more,
    }


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        ({'gt_size': 15}, 'gt_size must be a multiple of the scale, 2; got 15'),
        ({'gt_size': 64}, r'lr/\d.png and .*hr/\d.png: LQ \(16, 20\) is smaller than patch size \(32, 32\)'),
        ({'scale': 4}, r'lr/\d.png.*Scale mismatches. GT \(32, 40\) is not 4x +multiplication of LQ \(16, 20\)'),
        ({'use_rot': None}, 'the key .use_rot. is missing'),
        ({'filename_tmpl': '{}x2'}, 'PairedImageDataset cannot be opened: .x2.png is not in lq_paths'),
        ({'dataroot_lq': '/nowhere'}, 'PairedImageDataset cannot be opened: .*No such file'),
        ({'dataroot_gt': ['a', 'b']}, 'takes one folder as dataroot_gt; ArbitraryScalePairedDataset takes several'),
    ],
)
def test_basicsrs_own_datasets_fail_with_one_line(tmp_path, change, words):
    opt = {key: value for key, value in pairs_of_basicsr(tmp_path, **change).items() if value is not None}
    with pytest.raises(UserError, match=words) as error:
        open_dataset(opt)[0]
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('workers', [0, 1])
def test_damage_in_basicsrs_own_datasets(tmp_path, workers):
    """A missing partner, an empty file and one that is no image name their pair, and can be replaced."""
    opt = pairs_of_basicsr(tmp_path, batch_size_per_gpu=1, num_worker_per_gpu=workers)
    (tmp_path / 'lr' / '1.png').write_bytes(b'no image')
    (tmp_path / 'hr' / '2.png').write_bytes(b'')
    whole = {'datasets': {'train': opt}, 'manual_seed': 1}
    data = TrainData(whole, Ranks(), CPU)
    skipping = TrainData({**whole, 'datasets': {'train': {**opt, 'on_damaged': 'skip'}}}, Ranks(), CPU)
    skipping.most_damaged = 3
    (tmp_path / 'lr' / '3.png').unlink()
    for _ in range(3):
        with pytest.raises(ImageError, match=r'lr/(\d).png and .*hr/\1.png: missing, damaged or no image') as error:
            take(data, Place(), 4)
        assert '\n' not in str(error.value)
    assert {batch['gt_path'][0][-5:] for _, batch in take(skipping, Place(), 8)} == {'0.png'}


def test_an_lmdb_that_comes_back(tmp_path, monkeypatch):
    folder, root = tmp_path / 'hr', tmp_path / 'images.lmdb'
    for path in (folder, root):
        path.mkdir()
    for name in 'ab':
        write_image(folder / f'{name}.png', noise(40, 40))
    make_lmdb(root, folder, 'ab')
    dataset, away = build_dataset(options(root, io_backend={'type': 'lmdb'})), tmp_path / 'away'
    expected = build_dataset(options(folder))[0]
    root.rename(away)
    monkeypatch.setattr(reading.time, 'sleep', lambda _: away.exists() and away.rename(root))
    assert torch.equal(dataset[0]['gt'], expected['gt'])


def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / 'pipe.png')
    for read in (read_image, read_header):
        with pytest.raises(UserError, match='pipe.png: a named pipe, not a file'):
            read(tmp_path / 'pipe.png')
