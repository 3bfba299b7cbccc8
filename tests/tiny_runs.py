"""Tiny networks, options and batches for the tests of models and engine."""

import argparse
import copy
import json

import cv2
import numpy as np
import torch
import yaml

from moeisr_basicsr.core import make_cell, make_coord
from moeisr_basicsr.options import parse_options

NETWORK = {
    'type': 'MoEISR',
    'encoder': {'type': 'EDSREncoder', 'num_feat': 8, 'num_block': 1},
    'experts': [[8], [8, 8]],
    'mapper': {'num_layers': 1, 'num_feat': 8},
}
DENSE = {'type': 'LIIF', 'encoder': {'type': 'EDSREncoder', 'num_feat': 8, 'num_block': 1}, 'hidden_list': [8, 8]}


def change(options, changes):
    """A copy of nested options; a key 'train:amp' reaches into 'train'."""
    options = copy.deepcopy(options)
    for path, value in changes.items():
        *parents, last = path.split(':')
        section = options
        for name in parents:
            section = section.setdefault(name, {})
        section[last] = copy.deepcopy(value)
    return options


def model_options(**changes):
    """Options for build_model, without datasets; changes as {'train:amp': 'bf16'}."""
    return change(
        {
            'name': 'tiny',
            'model_type': 'MoEISRModel',
            'num_gpu': 0,
            'dist': False,
            'rank': 0,
            'world_size': 1,
            'manual_seed': 3,
            'is_train': True,
            'network_g': NETWORK,
            'path': {},
            'logger': {},
            'train': {
                'total_iter': 20,
                'ema_decay': 0.9,
                'optim_g': {'type': 'SGD', 'lr': 0.1},
                'scheduler': {'type': 'MultiStepLR', 'milestones': [1000]},
                'pixel_opt': {'type': 'L1Loss', 'loss_weight': 1.0, 'reduction': 'mean'},
                'balance_opt': {'type': 'MoEBalanceLoss', 'loss_weight': 0.5},
            },
            'val': {'metrics': {'psnr': {'type': 'calculate_psnr', 'crop_border': 0}}},
        },
        changes,
    )


def query_batch(images=4, queries=40, size=(9, 7), seed=0):
    """A collated training batch of queries, as a loader gives it."""
    generator = torch.Generator().manual_seed(seed)
    hr_size = 23, 16
    coord, cell = make_coord(hr_size), make_cell(hr_size)
    picked = [torch.randperm(coord.shape[0], generator=generator)[:queries] for _ in range(images)]
    return {
        'lq': torch.rand(images, 3, *size, generator=generator),
        'gt': torch.rand(images, queries, 3, generator=generator),
        'coord': torch.stack([coord[which] for which in picked]),
        'cell': cell.expand(images, queries, 2).clone(),
        'scale': torch.tensor([hr_size]).div(torch.tensor([size])).expand(images, 2).clone(),
        'lq_path': [f'lq/{i}.png' for i in range(images)],
        'gt_path': [f'gt/{i}.png' for i in range(images)],
    }


def image_batch(images=2, scale=2, seed=0):
    """A collated training batch of whole patches, as BasicSR's PairedImageDataset gives it."""
    generator = torch.Generator().manual_seed(seed)
    return {
        'lq': torch.rand(images, 3, 6, 5, generator=generator),
        'gt': torch.rand(images, 3, 6 * scale, 5 * scale, generator=generator),
        'lq_path': [f'{i}.png' for i in range(images)],
        'gt_path': [f'{i}.png' for i in range(images)],
    }


def weights_of(model):
    """The trained weights, as copies."""
    return {name: value.detach().clone() for name, value in model.get_bare_model(model.net_g).named_parameters()}


def gradients_of(model):
    """The gradients, as copies; None where there is none."""
    return {
        name: None if value.grad is None else value.grad.clone()
        for name, value in model.get_bare_model(model.net_g).named_parameters()
    }


def assert_same(first, second, where=''):
    """Bit for bit equal nested containers of tensors and plain values."""
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same(first[key], second[key], f'{where}/{key}')
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for position, (one, other) in enumerate(zip(first, second)):
            assert_same(one, other, f'{where}/{position}')
    else:
        assert first == second, (where, first, second)


def write_images(folder, count, size, seed=0):
    """Smooth random PNG images of `size` (rows, columns)."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        coarse = rng.integers(0, 256, (7, 7, 3)).astype(np.float32)
        image = cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / f'{number}.png'), image.clip(0, 255).round().astype(np.uint8))
    return str(folder)


def run_yaml(root, **changes):
    """The options of a whole run below `root`, as they stand in a YAML file: 24 iterations, 6 per epoch."""
    if not (root / 'train').is_dir():
        write_images(root / 'train', 4, (64, 72))
        write_images(root / 'val', 3, (26, 33), seed=1)
    dataset = {'type': 'ArbitraryScaleImageDataset', 'io_backend': {'type': 'disk'}}
    validation = {**dataset, 'dataroot_gt': str(root / 'val')}
    options = change(
        {
            'name': 'run',
            'model_type': 'MoEISRModel',
            'num_gpu': 0,
            'manual_seed': 3,
            'network_g': NETWORK,
            'datasets': {
                'train': {
                    **dataset,
                    'name': 'train',
                    'dataroot_gt': str(root / 'train'),
                    'lq_size': 12,
                    'sample_q': 64,
                    'scale_range': [1, 4],
                    'batch_size_per_gpu': 4,
                    'num_worker_per_gpu': 0,
                    'dataset_enlarge_ratio': 6,
                },
                'val': {**validation, 'name': 'tiny_x2', 'scale': 2},
                'val_2': {**validation, 'name': 'tiny_x3.3', 'scale': 3.3},
            },
            'path': {},
            'train': {
                'total_iter': 24,
                'ema_decay': 0.9,
                'warmup_iter': 3,
                'optim_g': {'type': 'Adam', 'lr': 1e-3},
                'scheduler': {'type': 'MultiStepLR', 'milestones': [8, 16], 'gamma': 0.5},
                'pixel_opt': {'type': 'L1Loss', 'loss_weight': 1.0, 'reduction': 'mean'},
                'balance_opt': {'type': 'MoEBalanceLoss', 'loss_weight': 0.1},
                'tau': [2.0, 1.0],
            },
            'val': {'val_freq': 9, 'metrics': {'psnr': {'type': 'calculate_psnr', 'crop_border': 2}}},
            'logger': {'print_freq': 1, 'save_checkpoint_freq': 7},
        },
        changes,
    )
    if options['model_type'] != 'MoEISRModel':
        for key in ('balance_opt', 'tau'):
            options['train'].pop(key)
    return options


def parse(root, options, is_train=True, auto_resume=False, launcher='none'):
    """Options as the command line hands them to the loops: through a file and its check."""
    path = root / f'{options["name"]}.yml'
    path.write_text(yaml.safe_dump(options, sort_keys=False))
    args = argparse.Namespace(opt=str(path), launcher=launcher, auto_resume=auto_resume, debug=False, force_yml=None)
    return parse_options(args, str(root), is_train)


def run_options(root, auto_resume=False, **changes):
    """`run_yaml`, parsed."""
    return parse(root, run_yaml(root, **changes), auto_resume=auto_resume)


def metrics_lines(root, name='run'):
    """The run's metrics without what depends on the clock."""
    clock = ('time', 'time_s', 'data_time_s', 'queries_per_s')
    lines = (root / 'experiments' / name / 'metrics.jsonl').read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in clock} for line in lines]


def saved(root, iteration, name='run'):
    """Weights and training state of an iteration."""
    folder = root / 'experiments' / name
    return (
        torch.load(folder / 'models' / f'net_g_{iteration}.pth', weights_only=True),
        torch.load(folder / 'training_states' / f'{iteration}.state', weights_only=True),
    )


def assert_equal_runs(root, other, total):
    """The last weights and states of two runs, their metrics and best weights; not where their files were."""
    for part, expected in zip(saved(root, total), saved(other, total)):
        assert_same(*({key: value for key, value in one.items() if key != 'options'} for one in (part, expected)))
    assert metrics_lines(root) == metrics_lines(other)
    for name in ('net_g_latest', 'net_g_best_tiny_x2_psnr', 'net_g_best_tiny_x3.3_psnr'):
        assert_same(*(torch.load(one / 'experiments' / 'run' / 'models' / f'{name}.pth') for one in (root, other)))


def log_text(root, name='run'):
    """All logs of a run."""
    return ''.join(path.read_text() for path in sorted((root / 'experiments' / name).glob('*.log')))
