"""metrics.jsonl, folders of a run, and the plain form of states."""

import errno
import json
import math
import os
import struct
import sys
import time
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from tiny_runs import log_text, metrics_lines, run_options

from moeisr_basicsr import __version__
from moeisr_basicsr.engine import logs
from moeisr_basicsr.engine.experiment import archive, make_folders
from moeisr_basicsr.engine.logs import MetricsFile
from moeisr_basicsr.engine.resume import plain, rng_state, set_rng_state
from moeisr_basicsr.engine.train_loop import train
from moeisr_basicsr.errors import UserError


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
    logs = log_text(tmp_path)
    assert '[eta: 0:00:0' in logs and 'queries_per_s' in logs
    assert f'moeisr_basicsr: {__version__}' in logs.partition('Version Information')[2]


def wandb_history(path):
    """{step: {tag: value}} of an offline run's file: blocks of 32 KiB, records with checksum, length and kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record, history = path.read_bytes(), 7, b'', {}
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        length, kind = struct.unpack('<HB', data[at + 4 : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            parsed, record = Record.FromString(record), b''
            values = {
                entry.nested_key[0] if entry.nested_key else entry.key: entry.value_json
                for entry in parsed.history.item
            }
            if values:
                history[parsed.history.step.num] = {tag: json.loads(value) for tag, value in values.items()}
    return history


def test_weights_and_biases_goes_on_with_the_same_run(tmp_path, monkeypatch):
    """The real package, offline and without TensorBoard."""
    pytest.importorskip('wandb', reason='wandb is not installed; at 64 MB it is none of the test requirements')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    folder, found = tmp_path / 'experiments' / 'run' / 'wandb', []
    for total in (3, 5):
        changes = {'train:total_iter': total, 'val:val_freq': 3, 'logger:wandb': {'project': 'tests'}}
        assert train(run_options(tmp_path, auto_resume=True, **changes)) == 0
        (new,) = {path for path in folder.glob('offline-run-*') if path not in found}
        found.append(new)
        limit = time.monotonic() + 20  # wandb writes in a process of its own
        while total not in wandb_history(next(new.glob('*.wandb'))) and time.monotonic() < limit:
            time.sleep(0.1)
    assert found[0].name[-16:] == found[1].name[-16:]  # one identity
    histories = [wandb_history(next(path.glob('*.wandb'))) for path in found]
    assert [sorted(history) for history in histories] == [[1, 2, 3], [4, 5]]
    together = histories[0] | histories[1]
    steps = [line for line in metrics_lines(tmp_path) if line['kind'] == 'train']
    assert [together[line['iter']]['losses/l_pix'] for line in steps] == [line['l_pix'] for line in steps]
    validations = [line for line in metrics_lines(tmp_path) if line['kind'] == 'validation']
    assert {line['iter'] for line in validations} == {3, 5}
    for line in validations:
        assert together[line['iter']][f'metrics/{line["dataset"]}/psnr'] == line['metrics']['psnr']
    assert list(found[1].rglob('*.png')) and not (tmp_path / 'tb_logger').exists()


def test_without_the_package_of_weights_and_biases_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    with pytest.raises(UserError, match='logger: wandb: the package is not installed'):
        train(run_options(tmp_path, **{'logger:wandb': {'project': 'tests'}}))
    assert not list((tmp_path / 'experiments').iterdir())


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
