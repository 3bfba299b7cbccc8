"""metrics.jsonl, folders of a run, and the plain form of states."""

import errno
import json
import math
import os
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from tiny_runs import run_options

from moeisr_basicsr.engine import logs
from moeisr_basicsr.engine.experiment import archive, make_folders
from moeisr_basicsr.engine.logs import MetricsFile
from moeisr_basicsr.engine.resume import plain, rng_state, set_rng_state
from moeisr_basicsr.engine.train_loop import train


def lines(folder):
    return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def test_a_resumed_run_drops_the_lines_that_come_again(tmp_path):
    metrics = MetricsFile(tmp_path, is_main=True)
    for iteration in (5, 10, 15):
        metrics.write('train', iteration, {'l_pix': 0.5})
        metrics.write('validation', iteration, {'metrics': {'psnr': math.inf}})
    with open(metrics.path, 'a') as file:
        file.write('{"kind": "train", "iter": 1')  # killed while writing
    MetricsFile(tmp_path, is_main=True, after=10)
    assert [(line['kind'], line['iter']) for line in lines(tmp_path)] == [
        ('train', 5),
        ('validation', 5),
        ('train', 10),
        ('validation', 10),
    ]
    assert lines(tmp_path)[1]['metrics']['psnr'] is None  # JSON has no infinity
    MetricsFile(tmp_path, is_main=True, after=10, validate_again=True)
    assert [(line['kind'], line['iter']) for line in lines(tmp_path)] == [
        ('train', 5),
        ('validation', 5),
        ('train', 10),
    ]


def test_a_full_disk_costs_the_lines_and_not_the_run(tmp_path, monkeypatch):
    """Other ranks know nothing of it: they must not wait for a rank 0 that ended."""
    metrics = MetricsFile(tmp_path, is_main=True)
    metrics.write('train', 1, {})
    with monkeypatch.context() as patch:
        patch.setattr(logs, 'open', HalfWritten, raising=False)
        metrics.write('train', 2, {})
    metrics.write('train', 3, {})
    assert [line['iter'] for line in lines(tmp_path)] == [1, 3]


class HalfWritten:
    """A file on a disk that fills up."""

    def __init__(self, path, mode, encoding):
        self.file = open(path, mode, encoding=encoding)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, text):
        self.file.write(text[:5])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_only_rank_0_writes(tmp_path):
    MetricsFile(tmp_path, is_main=False).write('train', 1, {})
    assert not list(tmp_path.iterdir())


def options(root):
    folder = root / 'experiments' / 'run'
    return {
        'name': 'run',
        'is_train': True,
        'root_path': str(root),
        'path': {
            'experiments_root': str(folder),
            'models': str(folder / 'models'),
            'log': str(folder),
            'training_states': str(folder / 'training_states'),
            'visualization': str(folder / 'visualization'),
        },
    }


def test_a_fresh_run_archives_what_is_there_and_loses_nothing(tmp_path):
    opt = options(tmp_path)
    for number in range(3):  # all within one second
        make_folders(opt, fresh=True)
        (tmp_path / 'experiments' / 'run' / 'models' / 'net_g_1.pth').write_text(str(number))
    kept = sorted((tmp_path / 'experiments').glob('run*/models/net_g_1.pth'))
    assert sorted(path.read_text() for path in kept) == ['0', '1', '2']
    assert (tmp_path / 'experiments' / 'run' / 'models' / 'net_g_1.pth').read_text() == '2'
    assert make_folders(opt, fresh=False) == {}
    assert (tmp_path / 'experiments' / 'run' / 'models' / 'net_g_1.pth').read_text() == '2'
    assert archive(tmp_path / 'nothing') is None


def test_the_options_file_is_kept_with_the_command(tmp_path):
    source = tmp_path / 'run.yml'
    source.write_text('name: run\n')
    make_folders({**options(tmp_path), 'opt_file': str(source)}, fresh=True)
    text = (tmp_path / 'experiments' / 'run' / 'run.yml').read_text()
    assert text.startswith('# GENERATE TIME') and text.endswith('name: run\n')


def test_tensorboard_has_what_users_plot(tmp_path):
    reader = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    changes = {'train:total_iter': 4, 'val:val_freq': 4, 'logger:use_tb_logger': True}
    assert train(run_options(tmp_path, **changes)) == 0
    events = reader.EventAccumulator(str(tmp_path / 'tb_logger' / 'run'))
    events.Reload()
    tags = set(events.Tags()['scalars'])
    assert {
        'losses/l_pix',
        'losses/l_balance',
        'share/expert_1',
        'share/expert_2',
        'mean_cost',
        'lr',
        'tau',
        'grad_norm',
        'queries_per_s',
        'metrics/tiny_x2/psnr',
        'metrics/tiny_x3.3/psnr',
        'val_share/tiny_x2/expert_1',
    } <= tags
    assert [event.step for event in events.Scalars('losses/l_pix')] == [1, 2, 3, 4]
    assert {'tiny_x2_x2/0', 'tiny_x2_x2/0_experts', 'tiny_x3.3_x3.3/0'} <= set(events.Tags()['images'])
    logs = ''.join(path.read_text() for path in (tmp_path / 'experiments' / 'run').glob('*.log'))
    assert '[eta: 0:00:0' in logs and 'queries_per_s' in logs


def test_plain_values():
    weight = torch.nn.Parameter(torch.ones(1))
    value = plain(OrderedDict(a=Counter([1, 1]), b=(np.float64(0.5), [None, True]), c=weight))
    assert value == {'a': {1: 2}, 'b': (0.5, [None, True]), 'c': torch.ones(1)}
    assert type(value) is dict and type(value['a']) is dict and type(value['b'][0]) is float
    assert not value['c'].requires_grad
    with pytest.raises(TypeError, match='plain'):
        plain({'f': print})


def test_generators_come_back_through_a_file(tmp_path):
    import random

    cpu = torch.device('cpu')
    np.random.randn(3)  # leaves a cached second value
    torch.save(plain(rng_state(cpu)), tmp_path / 'rng')
    first = random.random(), np.random.randn(5).tolist(), torch.rand(3).tolist(), random.gauss(0, 1)
    set_rng_state(torch.load(tmp_path / 'rng', weights_only=True), cpu)
    assert (random.random(), np.random.randn(5).tolist(), torch.rand(3).tolist(), random.gauss(0, 1)) == first
