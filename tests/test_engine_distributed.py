"""One process against two under torchrun on gloo: the same gradients, losses and validation results."""

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import yaml
from basicsr.models import build_model
from tiny_runs import assert_same, metrics_lines, model_options, run_yaml, saved, weights_of
from torch.distributed import TCPStore

from moeisr_basicsr.analysis import schema
from moeisr_basicsr.cli import main
from moeisr_basicsr.engine.distributed import find_launcher
from moeisr_basicsr.engine.rendezvous import fresh_store
from moeisr_basicsr.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
FLOAT64 = """
import torch
from basicsr.utils.registry import ARCH_REGISTRY
from moeisr_basicsr.archs.moeisr_arch import MoEISR


@ARCH_REGISTRY.register()
class Float64MoEISR(MoEISR):
    def __init__(self, encoder, experts, mapper):
        super().__init__(encoder, experts=experts, mapper=mapper)
        self.double()

    def forward(self, lq, *arguments, **named):
        return super().forward(lq.double(), *arguments, **named)

    def encode(self, lq):
        return super().encode(lq.double())
"""


# On rank 1, once, in the second epoch.
FAILING = """
import os
from moeisr_basicsr.data.arbitrary_scale_dataset import ArbitraryScaleImageDataset
from moeisr_basicsr.errors import UserError

read, damaged = ArbitraryScaleImageDataset.__getitem__, ['3.png']


def failing(self, index):
    if os.environ['RANK'] == '1' and self.epoch == 1 and damaged:
        raise UserError(f'{damaged.pop()} is damaged')
    return read(self, index)


ArbitraryScaleImageDataset.__getitem__ = failing
"""


# Exit codes and command lines. All share the two processes: starting them takes longer than the runs. Each run finds
# torchrun by itself, as there is no --launcher, and has a process group of its own.
SCRIPT = """
import sys
import torch.distributed as dist
from moeisr_basicsr.cli import main

for line in sys.argv[1:]:
    expected, *words = line.split()
    code = main(words)
    assert code == int(expected), (line, code)
    if code == 0:
        assert not dist.is_initialized()
    else:  # there processes end in earnest
        dist.destroy_process_group()
"""


def under_torchrun(root, lines):
    """Exit codes and `basicsr` command lines in two processes below `root`; what they write to stderr."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    (root / 'script.py').write_text(SCRIPT)
    start = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', f'--master_port={port}']
    done = subprocess.run(
        [*start, 'script.py', *lines],
        cwd=root,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stderr


def alone(root, line):
    """One `basicsr` command line in a process of its own (this one), on one thread as under torchrun."""
    threads, folder = torch.get_num_threads(), os.getcwd()
    torch.set_num_threads(1)
    os.chdir(root)
    try:
        assert main(line.split()) == 0
    finally:
        torch.set_num_threads(threads)
        os.chdir(folder)


def train_options(root, processes, name, **changes):
    """The same run in one process with a batch of 4 and in two with a batch of 2."""
    options = run_yaml(
        root,
        name=f'{name}_{processes}',
        **{
            'train:total_iter': 20,
            'datasets:train:batch_size_per_gpu': 4 // processes,
            'val:val_freq': 100,
            'train:optim_g': {'type': 'SGD', 'lr': 0.5},
            'logger:save_checkpoint_freq': 1,
            'logger:keep_checkpoints': 0,
            **changes,
        },
    )
    if name == 'fp64':  # rendering is fp32
        del options['val'], options['datasets']['val'], options['datasets']['val_2']
    return options


def evaluation_options(root, processes):
    """Three datasets of 3, 3 and 4 images: an uneven number of jobs."""
    base = run_yaml(root)
    third = {**base['datasets']['val'], 'name': 'tiny_x2x3', 'scale': [2, 3], 'dataroot_gt': str(root / 'train')}
    return {
        **{key: base[key] for key in ('model_type', 'num_gpu', 'network_g', 'manual_seed')},
        'name': f'test_{processes}',
        'path': {'pretrain_network_g': str(root / 'weights.pth')},
        'datasets': {'test_1': base['datasets']['val'], 'test_2': base['datasets']['val_2'], 'test_3': third},
        'val': {
            'save_img': True,
            'bicubic_baseline': True,
            'metrics': {
                'psnr': {'type': 'calculate_psnr_sr'},
                'ssim': {'type': 'calculate_ssim_sr', 'protocol': 'div2k', 'crop_border': 0},
            },
        },
    }


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """A folder with the runs fp32, fp64, joint and test of one and of two processes, and the run failing of two."""
    root = tmp_path_factory.mktemp('distributed')
    (root / 'float64.py').write_text(FLOAT64)
    torch.manual_seed(0)
    torch.save({'params': weights_of(build_model(model_options()))}, root / 'weights.pth')
    float64 = {'network_g:type': 'Float64MoEISR', 'train:accumulate': 2}
    # every expert learns every query, the mapper learns from their losses, and the encoder rests at first
    experts_opt = {'type': 'MoEExpertLoss', 'loss_weight': 4.0, 'routing_weight': 1e-3}
    joint = {'network_g:shared_layers': 2, 'train:fix_encoder': 10, 'train:experts_opt': experts_opt}
    for processes in (1, 2):
        options = {
            'fp32': train_options(root, processes, 'fp32', **{'datasets:train:num_worker_per_gpu': 1}),
            'fp64': train_options(root, processes, 'fp64', **float64),
            'joint': train_options(root, processes, 'joint', **joint),
            'test': evaluation_options(root, processes),
        }
        for name, one in options.items():
            (root / f'{name}.yml').write_text(yaml.safe_dump(one, sort_keys=False))
        lines = [
            'train -opt fp32.yml',
            'train -opt fp64.yml --import float64.py',
            'train -opt joint.yml',
            'test -opt test.yml',
        ]
        if processes == 2:
            changes = {
                'train:total_iter': 14,
                'datasets:train:batch_size_per_gpu': 2,
                'logger:save_checkpoint_freq': 14,
            }
            failing = run_yaml(root, name='failing', val=None, **changes)
            (root / 'failing.yml').write_text(yaml.safe_dump(failing, sort_keys=False))
            (root / 'failing.py').write_text(FAILING)
            again = 'train -opt failing.yml --import failing.py --auto_resume'
            said = under_torchrun(root, [*(f'0 {line}' for line in lines), f'2 {again}', f'0 {again}'])
            (root / 'stderr.txt').write_text(said)
        else:
            for line in lines:
                alone(root, line)
    return root


@pytest.mark.parametrize('name, tolerance', [('fp32', 1e-5), ('fp64', 1e-9), ('joint', 1e-5)])
def test_two_processes_train_as_one(runs, name, tolerance):
    """20 losses, gradient norms and loads; the fp64 run is also cut into parts."""
    one, two = (
        [line for line in metrics_lines(runs, f'{name}_{processes}') if line['kind'] == 'train'] for processes in (1, 2)
    )
    assert [line['iter'] for line in one] == [line['iter'] for line in two] == list(range(1, 21))
    for line, other in zip(one, two):
        for key in ('l_pix', 'l_balance', 'grad_norm', 'share/expert_1', 'mean_cost'):
            assert line[key] == pytest.approx(other[key], abs=tolerance), (line['iter'], key)
    assert one[0]['l_pix'] != one[19]['l_pix']


def test_two_processes_have_the_first_gradients_of_one(runs):
    """Read from the first two checkpoints of plain SGD."""
    steps = []
    for processes in (1, 2):
        first, second = (saved(runs, iteration, f'fp32_{processes}')[0]['params'] for iteration in (1, 2))
        steps.append({name: second[name] - first[name] for name in first})
    for name in steps[0]:
        largest = float(steps[0][name].abs().max())
        torch.testing.assert_close(steps[1][name], steps[0][name], rtol=0, atol=1e-4 * largest + 1e-8, msg=name)


def test_the_state_of_two_processes(runs):
    state = saved(runs, 20, 'fp32_2')[1]
    assert state['place'] == {'epoch': 3, 'samples': 4, 'world_size': 2} and len(state['rng']) == 2
    assert not torch.equal(state['rng'][0]['torch'], state['rng'][1]['torch'])


def test_two_processes_evaluate_as_one(runs):
    """Images x scales shared among ranks: every value is exactly the single process's, in the same order."""
    one, two = (
        [
            {key: value for key, value in row.items() if key != 'time_ms'}
            for row in schema.load(runs / 'results' / f'test_{processes}' / 'results.json')['rows']
        ]
        for processes in (1, 2)
    )
    assert len(one) == 3 + 3 + 4 + 3
    assert_same(one, two)
    pictures = [
        sorted(
            str(path.relative_to(runs / 'results' / f'test_{processes}'))
            for path in (runs / 'results' / f'test_{processes}').rglob('*.png')
        )
        for processes in (1, 2)
    ]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 10


def test_attempts_of_torchrun_share_no_keys():
    """Ranks of a dead attempt have left their questions, names and addresses in the store."""
    server = TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    timeout = timedelta(seconds=20)

    def attempt(ranks, world_size=3):
        def come(rank):
            time.sleep(0.05 * ((rank + 1) % 3))  # rank 0 is not the first
            store = TCPStore('127.0.0.1', server.port, is_master=False, wait_for_workers=False)
            return fresh_store(store, rank, world_size, timeout if len(ranks) == world_size else timedelta(seconds=0.3))

        with ThreadPoolExecutor(world_size) as pool:
            return [future.exception() or future.result() for future in [pool.submit(come, rank) for rank in ranks]]

    assert all(isinstance(result, TimeoutError) for result in attempt([1, 2]))  # died before rank 0 came
    assert isinstance(attempt([0, 1])[0], TimeoutError)  # rank 2 is missing; rank 1 has an answer from this attempt
    first, second = attempt([0, 1, 2]), attempt([0, 1, 2])
    for stores in (first, second):
        assert not any(store.check(['address']) for store in stores)
        stores[0].set('address', 'here')
        assert all(store.get('address') == b'here' for store in stores)


@pytest.mark.parametrize(
    ('environment', 'given', 'launcher'),
    [
        ({}, None, 'none'),
        ({'RANK': '0', 'WORLD_SIZE': '1'}, None, 'none'),
        ({'RANK': '1', 'WORLD_SIZE': '2'}, None, 'pytorch'),
        ({'RANK': '1', 'WORLD_SIZE': '2'}, 'slurm', 'slurm'),
        ({'RANK': 'abc'}, None, "RANK must be a whole number; got 'abc'."),
        ({'RANK': '0', 'WORLD_SIZE': '-2'}, 'pytorch', "WORLD_SIZE must be a whole number; got '-2'."),
        ({'RANK': '2', 'WORLD_SIZE': '2'}, 'pytorch', 'RANK must be below WORLD_SIZE; got 2 of 2.'),
    ],
)
def test_the_launcher_of_an_environment(monkeypatch, capsys, environment, given, launcher):
    for key in ('RANK', 'WORLD_SIZE'):
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    if not launcher.endswith('.'):
        assert find_launcher(given) == launcher
        return
    with pytest.raises(UserError, match=launcher):
        find_launcher(given)
    assert main(['train', '-opt', 'any.yml', *(['--launcher', given] if given else [])]) == 2
    assert capsys.readouterr().err == f'basicsr: error: The environment variable {launcher}\n'


def test_all_ranks_save_where_one_cannot_read(runs):
    """Together: the state has the generators of both, and rank 0, whose terminal it is, knows why the run ended."""
    said = (runs / 'stderr.txt').read_text()
    for line in ('basicsr: error: 3.png is damaged', 'basicsr: error: rank 1: 3.png is damaged'):
        assert line in said, said[-3000:]
    state = saved(runs, 6, 'failing')[1]
    assert state['place'] == {'epoch': 0, 'samples': 12, 'world_size': 2}
    assert len(state['rng']) == 2 and not torch.equal(state['rng'][0]['torch'], state['rng'][1]['torch'])
    assert 'Resuming from iteration 6, epoch 0, 12 samples into it.' in said
    assert [line['iter'] for line in metrics_lines(runs, 'failing')] == list(range(1, 15))
    names = {f'{name}_{processes}' for name in ('fp32', 'fp64', 'joint') for processes in (1, 2)}
    assert {path.name for path in (runs / 'experiments').iterdir()} == {*names, 'failing'}  # one folder for both ranks
