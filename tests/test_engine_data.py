"""The loader of the training loop: its place in the epoch, its workers, other datasets."""

import random

import cv2
import numpy as np
import pytest
import torch
from basicsr.utils.registry import DATASET_REGISTRY
from tiny_runs import DENSE, metrics_lines, parse, run_options, run_yaml, write_images
from torch.utils.data import Dataset, get_worker_info

from moeisr_basicsr.engine.data_loading import Place, TrainData
from moeisr_basicsr.engine.distributed import Ranks
from moeisr_basicsr.engine.train_loop import train
from moeisr_basicsr.errors import ExitCode, UserError

CPU = torch.device('cpu')


@DATASET_REGISTRY.register()
class DrawingDataset(Dataset):
    """Draws from the global generators, as BasicSR's datasets do."""

    def __init__(self, opt):
        self.opt = opt

    def __len__(self):
        return 6

    def __getitem__(self, index):
        worker = get_worker_info()
        return {
            'index': index,
            'worker': -1 if worker is None else worker.id,
            'lq_path': str(index),
            'draws': torch.tensor([random.random(), np.random.rand(), float(torch.rand(()))], dtype=torch.float64),
        }


def data(root, ranks=None, **changes):
    opt = run_options(root, **changes)
    return TrainData(opt, ranks or Ranks(), CPU)


def take(source, place, count):
    batches = source.batches(place)
    return [next(batches) for _ in range(count)]


def test_any_place_can_be_reached_again(tmp_path):
    """From every place of two epochs on, also with workers: the same batches as without an interruption."""
    whole = take(data(tmp_path), Place(), 14)
    assert [(place.epoch, place.samples) for place, _ in whole] == [(at // 6, 4 * (at % 6 + 1)) for at in range(14)]
    for start, workers in ((1, 0), (5, 1), (6, 0), (8, 2)):
        place = whole[start - 1][0]
        again = take(data(tmp_path, **{'datasets:train:num_worker_per_gpu': workers}), place, 14 - start)
        for (_, one), (_, other) in zip(whole[start:], again):
            assert one['lq_path'] == other['lq_path']
            for key in ('lq', 'gt', 'coord', 'cell', 'scale'):
                assert torch.equal(one[key], other[key]), (start, key)
    assert not torch.equal(whole[0][1]['scale'], whole[6][1]['scale'])  # epochs differ


def test_ranks_share_the_samples_of_one_process(tmp_path):
    """Batch 4 of one rank is the interleaved batches of 2 of two ranks; and a place can be taken over."""
    whole = take(data(tmp_path), Place(), 6)
    parts = [
        take(data(tmp_path, Ranks(rank, 2), **{'datasets:train:batch_size_per_gpu': 2}), Place(), 6)
        for rank in range(2)
    ]
    for (_, one), (_, first), (_, second) in zip(whole, *parts):
        assert torch.equal(one['gt'][0::2], first['gt']) and torch.equal(one['gt'][1::2], second['gt'])
    state = {'place': {**parts[0][2][0]._asdict(), 'world_size': 2}}
    place, notes = data(tmp_path).place_from(state)
    assert place == whole[2][0] and 'of 2 ranks' in notes[0]


def test_workers_live_for_the_whole_run(tmp_path):
    source = data(tmp_path, **{'datasets:train:num_worker_per_gpu': 2})
    batches, pids = source.batches(Place()), set()
    for _ in range(14):  # three epochs
        next(batches)
        pids |= {worker.pid for worker in source.loader._iterator._workers}
    assert len(pids) == 2


def drawing(workers, persistent=True):
    return {
        'datasets:train': {
            'name': 'drawing',
            'type': 'DrawingDataset',
            'batch_size_per_gpu': 1,
            'dataset_enlarge_ratio': 2,
            'num_worker_per_gpu': workers,
            'persistent_workers': persistent,
        }
    }


def test_datasets_that_draw_from_global_generators_differ_by_epoch_and_repeat(tmp_path):
    """BasicSR's loader reseeds numpy and python identically each epoch, and its sampler repeats the index."""
    before = random.getstate(), torch.get_rng_state()
    batches = [batch for _, batch in take(data(tmp_path, **drawing(0)), Place(), 36)]
    assert sorted(int(batch['index']) for batch in batches) == sorted(list(range(6)) * 6)
    for column in torch.cat([batch['draws'] for batch in batches]).t():
        assert len(set(column.tolist())) == 36
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])  # the model's own generator is left alone


@pytest.mark.parametrize(('workers', 'persistent'), [(0, False), (1, True), (2, False)])
def test_datasets_that_draw_from_global_generators_resume_exactly(tmp_path, workers, persistent):
    whole = take(data(tmp_path, **drawing(0)), Place(), 30)
    for done in (5, 14):  # in the middle of the first and of the second epoch of 12
        rest = take(data(tmp_path, **drawing(workers, persistent)), whole[done - 1][0], 10)
        for (place, batch), (expected_place, expected) in zip(rest, whole[done:]):
            assert place == expected_place and int(batch['index']) == int(expected['index'])
            assert torch.equal(batch['draws'], expected['draws'])


def pairs_of(root):
    """PairedImageDataset of factor 2."""
    write_images(root / 'hr', 4, (32, 40))
    write_images(root / 'lr', 4, (16, 20))
    return {
        'name': 'pairs',
        'type': 'PairedImageDataset',
        'dataroot_gt': str(root / 'hr'),
        'dataroot_lq': str(root / 'lr'),
        'io_backend': {'type': 'disk'},
        'scale': 2,
        'gt_size': 16,
        'use_hflip': True,
        'use_rot': True,
        'batch_size_per_gpu': 2,
        'num_worker_per_gpu': 1,
    }


GREY = {'network_g:in_channels': 1, 'network_g:out_channels': 1, 'train:total_iter': 2, 'logger:use_tb_logger': True}


def test_a_grey_run_trains_and_validates(tmp_path):
    grey = {f'datasets:{name}:grey': True for name in ('train', 'val', 'val_2')}
    changes = {**GREY, **grey, 'val:save_img': True, 'val:bicubic_baseline': True}
    changes['val:metrics'] = {'y': {'type': 'calculate_psnr_sr'}, 'psnr': {'type': 'calculate_psnr', 'crop_border': 2}}
    assert train(run_options(tmp_path, **changes)) == ExitCode.OK
    lines = [line for line in metrics_lines(tmp_path) if line['kind'] == 'validation']
    assert len(lines) == 2 and lines[0]['metrics'].keys() == {'y', 'psnr', 'bicubic_y', 'bicubic_psnr'}
    assert abs(lines[0]['metrics']['bicubic_y'] - lines[0]['metrics']['bicubic_psnr']) < 0.01
    picture = cv2.imread(str(tmp_path / 'experiments/run/visualization/tiny_x2/0_x2_2.png'), cv2.IMREAD_UNCHANGED)
    assert picture.shape == (26, 32)


def test_colours_for_a_grey_network_and_the_other_way_round(tmp_path):
    with pytest.raises(UserError, match='datasets: val_2: gives 3 channels, and network_g: in_channels is 1; grey: tr'):
        run_options(tmp_path, **{**GREY, 'datasets:train:grey': True, 'datasets:val:grey': True})
    with pytest.raises(UserError, match='datasets: train: gives 1 channels, and network_g: in_channels is 3'):
        run_options(tmp_path, **{'datasets:train:grey': True})
    with pytest.raises(UserError, match=r'train/\d.png: the output is \(4, 64, 1\), the truth \(4, 64, 3\). Check'):
        train(run_options(tmp_path, **{'network_g:out_channels': 1, 'network_g:skip': 'none'}))


def test_a_factor_that_the_network_does_not_have(tmp_path):
    """PairedImageDataset gives patches of twice the size; network_g says 3."""
    dense = {'model_type': 'ArbitraryScaleModel', 'network_g': {**DENSE, 'scale': 3}}
    opt = run_options(tmp_path, **{'datasets:train': pairs_of(tmp_path), **dense})
    with pytest.raises(UserError, match=r'hr/\d.png: the output is \(2, 3, 24, 24\), the truth \(2, 3, 16, 16\)'):
        train(opt)


@pytest.mark.parametrize('model_type', ['MoEISRModel', 'SRModel'])
def test_a_broken_validation_image_does_not_end_training(tmp_path, model_type):
    """BasicSR's own model gives up its dataset only."""
    changes = {'train:total_iter': 2, 'model_type': model_type, 'network_g:scale': 2, 'datasets:train:scale': 2}
    opt = run_yaml(tmp_path, **changes)
    if model_type == 'SRModel':
        opt['datasets']['train'] = pairs_of(tmp_path)
        opt['datasets']['val'] = {**pairs_of(tmp_path), 'name': 'first'}
        opt['datasets']['val_2'] = {**pairs_of(tmp_path), 'name': 'second', 'dataroot_lq': str(tmp_path / 'lr_2')}
        write_images(tmp_path / 'lr_2', 4, (16, 20))
        broken = tmp_path / 'lr_2' / '1.png'
    else:
        write_images(tmp_path / 'val_2', 3, (26, 33))
        opt['datasets']['val_2']['dataroot_gt'] = str(tmp_path / 'val_2')
        broken = tmp_path / 'val_2' / '1.png'
    broken.write_bytes(b'')
    assert train(parse(tmp_path, opt)) == ExitCode.OK
    log = ''.join(path.read_text() for path in (tmp_path / 'experiments/run').glob('*.log'))
    assert str(broken) in log and 'ERROR' in log and 'Training ended at iteration 2' in log
    if model_type == 'MoEISRModel':
        line = metrics_lines(tmp_path)[-1]
        assert line['count'] == 2 and list(line['failed']) == ['1']


def test_an_epoch_without_a_whole_batch_is_an_error(tmp_path):
    with pytest.raises(UserError, match='raise dataset_enlarge_ratio'):
        data(tmp_path, **{'datasets:train:batch_size_per_gpu': 100})


def test_a_damaged_image_in_a_worker_is_one_line(tmp_path):
    opt = run_options(tmp_path, **{'datasets:train:num_worker_per_gpu': 1})
    for path in (tmp_path / 'train').iterdir():
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError) as error:
        take(TrainData(opt, Ranks(), CPU), Place(), 1)
    assert '.png' in str(error.value) and '\n' not in str(error.value)
