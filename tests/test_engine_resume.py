"""Interrupted and resumed = never interrupted: weights, EMA, optimizer, schedule, generators, metrics, best values."""

import json
import os
import random
import signal
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from basicsr.models import build_model
from tiny_runs import assert_equal_runs, assert_same, log_text, parse, run_options, run_yaml, saved

from moeisr_basicsr.engine import train_loop
from moeisr_basicsr.engine.distributed import Ranks
from moeisr_basicsr.engine.resume import set_model_state
from moeisr_basicsr.engine.train_loop import Trainer, train
from moeisr_basicsr.errors import ExitCode, UserError
from moeisr_basicsr.models.moeisr_model import MoEISRModel

TOTAL = 24


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    """A run with two workers and EMA, never stopped."""
    root = tmp_path_factory.mktemp('uninterrupted')
    assert train(run_options(root, **{'datasets:train:num_worker_per_gpu': 2})) == ExitCode.OK
    return root


def interrupt(monkeypatch, at, how):
    """Call `how` right after the step of iteration `at`."""
    step = Trainer._step

    def step_then(self, *batch):
        step(self, *batch)
        if self.iteration == at:
            how()

    monkeypatch.setattr(Trainer, '_step', step_then)


def forget_options(root, iteration):
    """Make a state like BasicSR's, which does not hold the options."""
    path = root / 'experiments' / 'run' / 'training_states' / f'{iteration}.state'
    torch.save({key: value for key, value in torch.load(path).items() if key != 'options'}, path)


class Killed(BaseException):
    """Stands in for SIGKILL inside one process."""


def kill():
    raise Killed


@pytest.mark.parametrize('at', [10, 18])
def test_sigterm_saves_after_the_step_and_the_run_goes_on_exactly(tmp_path, monkeypatch, uninterrupted, at):
    """Iteration 10 is inside an epoch of 6; 18 ends an epoch and is due for validation, which the signal cuts off."""
    with monkeypatch.context() as patch:
        interrupt(patch, at, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(run_options(tmp_path)) == ExitCode.TERMINATED
    assert saved(tmp_path, at)[1]['iter'] == at
    assert f'Stopped by signal 15 after iteration {at}; continue with --auto_resume.' in log_text(tmp_path)
    # other workers, same draws: the number of workers is nothing that results depend on
    assert train(run_options(tmp_path, auto_resume=True, **{'datasets:train:num_worker_per_gpu': 1})) == ExitCode.OK
    assert_equal_runs(tmp_path, uninterrupted, TOTAL)


def test_a_stop_before_the_first_iteration_leaves_no_checkpoint(tmp_path, monkeypatch, uninterrupted):
    """What the first iteration does once only, as to scale a new mapper's logits, needs a run that starts anew."""
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, '_asked_to_stop', lambda *_: signal.SIGTERM)
        assert train(run_options(tmp_path)) == 143
    assert not list((tmp_path / 'experiments').rglob('*.state'))
    assert train(run_options(tmp_path, auto_resume=True)) == ExitCode.OK
    assert_equal_runs(uninterrupted, tmp_path, TOTAL)


def test_a_killed_run_goes_on_exactly_from_its_last_checkpoint(tmp_path, monkeypatch, uninterrupted):
    """Killed at 12, 16 and 18 with checkpoints at 7 and 14; the second time the newest checkpoint is cut off."""
    for at, newest in ((12, 7), (16, 14), (18, 14)):
        with monkeypatch.context() as patch:
            interrupt(patch, at, kill)
            with pytest.raises(Killed):
                train(run_options(tmp_path, auto_resume=True))
        state = tmp_path / 'experiments' / 'run' / 'training_states' / f'{newest}.state'
        assert state.is_file()
        if at == 16:
            state.write_bytes(state.read_bytes()[:3000])
    assert train(run_options(tmp_path, auto_resume=True)) == ExitCode.OK
    assert_equal_runs(tmp_path, uninterrupted, TOTAL)
    assert 'Checkpoint of iteration 14 is not usable' in log_text(tmp_path)


def test_a_finished_run_changes_nothing(tmp_path, uninterrupted):
    weights = saved(uninterrupted, TOTAL)[0]
    assert train(run_options(uninterrupted, auto_resume=True)) == ExitCode.OK
    assert_same(saved(uninterrupted, TOTAL)[0], weights)


def test_all_that_draws_from_global_generators_goes_on_too(tmp_path, monkeypatch):
    """A model that draws from torch's, numpy's and python's generators in its step (dropout, drop path)."""
    draws = []

    def record(self, iteration, step=MoEISRModel.optimize_parameters):
        step(self, iteration)
        draws.append((iteration, torch.rand(2).tolist(), np.random.rand(), random.random()))

    monkeypatch.setattr(MoEISRModel, 'optimize_parameters', record)
    short = {'train:total_iter': 8, 'datasets:train:num_worker_per_gpu': 1}
    train(run_options(tmp_path, name='whole', **short))
    whole = list(draws)
    draws.clear()
    with monkeypatch.context() as patch:
        interrupt(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train(run_options(tmp_path, name='parts', **short))
    train(run_options(tmp_path, name='parts', auto_resume=True, **short))
    assert draws == whole


def test_the_scaler_and_the_count_of_skipped_steps_are_kept(tmp_path, monkeypatch):
    changes = {'train:amp': 'fp16', 'train:total_iter': 9, 'train:non_finite': 'skip'}
    with monkeypatch.context() as patch:
        step = Trainer._step

        def spoil(self, *batch):
            step(self, *batch)
            if self.iteration == 5:
                self.model.guard.skipped = 3
                self.model.precision.scaler.update(1024.0)
                os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(Trainer, '_step', spoil)
        train(run_options(tmp_path, **changes))
    assert saved(tmp_path, 5)[1]['scaler']['scale'] == 1024.0
    train(run_options(tmp_path, auto_resume=True, **changes))
    state = saved(tmp_path, 9)[1]
    assert state['skipped_steps'] == 3
    assert state['scaler']['scale'] == 1024.0 and state['scaler']['_growth_tracker'] == 9  # one per finite step


def test_a_drawn_seed_is_the_runs_own(tmp_path):
    """Without manual_seed one is drawn, and the resumed run takes it from the checkpoint."""
    train(run_options(tmp_path, **{'manual_seed': None, 'train:total_iter': 7}))
    seed = saved(tmp_path, 7)[1]['manual_seed']
    train(run_options(tmp_path, auto_resume=True, **{'manual_seed': None, 'train:total_iter': 8}))
    assert saved(tmp_path, 8)[1]['manual_seed'] == seed


def test_resume_state_of_the_yaml(tmp_path, uninterrupted):
    """A state by its path, also of another experiment; its weights lie beside it."""
    state = uninterrupted / 'experiments' / 'run' / 'training_states' / '14.state'
    assert train(run_options(tmp_path, name='other', **{'path:resume_state': str(state)})) == ExitCode.OK
    assert_same(saved(tmp_path, TOTAL, 'other')[0], saved(uninterrupted, TOTAL)[0])
    last = uninterrupted / 'experiments' / 'run' / 'training_states' / f'{TOTAL}.state'  # nothing left to do
    assert train(run_options(tmp_path, name='done', **{'path:resume_state': str(last)})) == ExitCode.OK
    assert_same(saved(tmp_path, TOTAL, 'done')[0], saved(uninterrupted, TOTAL)[0])


def test_a_bad_resume_state_is_one_clear_line(tmp_path):
    state = tmp_path / '5.state'
    state.write_bytes(b'PK nonsense')
    with pytest.raises(UserError) as error:
        train(run_options(tmp_path, **{'path:resume_state': str(state)}))
    assert str(state) in str(error.value) and '\n' not in str(error.value)


def test_a_checkpoint_of_another_network_is_one_clear_line(tmp_path):
    train(run_options(tmp_path, **{'train:total_iter': 2}))
    changes = {'train:total_iter': 3, 'network_g:experts': [[8], [8]]}
    with pytest.raises(UserError, match='cannot change network_g: experts: ') as error:
        train(run_options(tmp_path, auto_resume=True, **changes))
    assert '\n' not in str(error.value)
    forget_options(tmp_path, 2)
    with pytest.raises(UserError, match='does not fit network_g') as error:
        train(run_options(tmp_path, auto_resume=True, **changes))
    assert '\n' not in str(error.value)


def test_a_state_of_another_order_of_parameters_is_one_clear_line():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    net(torch.rand(1, 3)).sum().backward()
    written = torch.optim.Adam(net.parameters())
    written.step()
    for order in (1, -1):
        read = torch.optim.Adam(list(net.parameters())[::order])
        model = SimpleNamespace(optimizers=[read], resume_training=read.load_state_dict)
        if order == 1:
            assert set_model_state(model, written.state_dict()) == ['the checkpoint has no best metrics']
        else:
            with pytest.raises(UserError, match='come in another order'):
                set_model_state(model, written.state_dict())


def test_another_number_of_ranks_continues_and_says_so(tmp_path):
    """A state of two ranks that have taken 8 samples each: one rank goes on after 16."""
    train(run_options(tmp_path, **{'train:total_iter': 4}))
    path = tmp_path / 'experiments' / 'run' / 'training_states' / '4.state'
    state = torch.load(path)
    torch.save({**state, 'place': {'epoch': 0, 'samples': 8, 'world_size': 2}, 'rng': state['rng'] * 2}, path)
    train(run_options(tmp_path, auto_resume=True, **{'train:total_iter': 5}))
    assert saved(tmp_path, 5)[1]['place'] == {'epoch': 0, 'samples': 20, 'world_size': 1}
    logs = log_text(tmp_path)
    assert 'of 2 ranks, this run has 1' in logs and 'equal in distribution only' in logs


def test_without_auto_resume_the_old_run_is_archived(tmp_path):
    for _ in range(2):
        train(run_options(tmp_path, **{'train:total_iter': 1}))
    folders = sorted(path.name for path in (tmp_path / 'experiments').iterdir())
    assert len(folders) == 2 and folders[0] == 'run' and folders[1].startswith('run_archived_')
    assert (tmp_path / 'experiments' / folders[1] / 'models' / 'net_g_1.pth').is_file()


def test_a_restart_by_the_same_torchrun_goes_on_and_another_torchrun_begins_anew(tmp_path, monkeypatch, uninterrupted):
    """torchrun's count of restarts stays 0 on a node whose own processes did not die."""
    launches = iter(['first', 'first', 'second'])
    monkeypatch.setattr(train_loop, 'launched', lambda *_: nullcontext(Ranks(launch=next(launches))))
    with monkeypatch.context() as patch:
        interrupt(patch, 12, kill)
        with pytest.raises(Killed):
            train(run_options(tmp_path))
    assert train(run_options(tmp_path)) == ExitCode.OK
    assert_equal_runs(tmp_path, uninterrupted, TOTAL)
    assert [path.name for path in (tmp_path / 'experiments').iterdir()] == ['run']
    assert train(run_options(tmp_path, **{'train:total_iter': 1})) == ExitCode.OK
    assert len(list((tmp_path / 'experiments').iterdir())) == 2


def test_networks_that_the_checkpoint_does_not_hold_come_from_their_files(tmp_path, monkeypatch):
    """BasicSR's models may have frozen ones beside those that train and are saved."""
    assert train(run_options(tmp_path, name='first', **{'train:total_iter': 1})) == ExitCode.OK
    weights = str(tmp_path / 'experiments' / 'first' / 'models' / 'net_g_1.pth')
    start = {'train:total_iter': 1, 'path:pretrain_network_g': weights}
    assert train(run_options(tmp_path, **start)) == ExitCode.OK
    opt = run_options(tmp_path, auto_resume=True, **start)
    opt['path'].update(pretrain_network_identity='identity.pth')
    seen = []
    monkeypatch.setattr(train_loop, 'build_model', lambda opt: seen.append(opt['path']) or build_model(opt))
    assert train(opt) == ExitCode.OK
    assert seen[0]['pretrain_network_g'] is None and seen[0]['pretrain_network_identity'] == 'identity.pth'


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'datasets:train:dataroot_gt': 'empty'}, 'no image'),  # before the model
        ({'path:pretrain_network_g': 'other.pth'}, 'does not fit'),
        ({'datasets:train:lq_size': 80}, 'too small'),  # at the first batch
    ],
)
def test_a_start_that_fails_leaves_the_earlier_run_where_it_was(tmp_path, monkeypatch, changes, words):
    monkeypatch.chdir(tmp_path)
    assert train(run_options(tmp_path, **{'train:total_iter': 2})) == ExitCode.OK
    (tmp_path / 'empty').mkdir()
    torch.save({'params': {'weight': torch.zeros(1)}}, 'other.pth')
    before = {path: path.read_bytes() for path in (tmp_path / 'experiments').rglob('*') if path.is_file()}
    for _ in range(2):
        with pytest.raises(UserError, match=words):
            train(run_options(tmp_path, **changes))
    assert {path: path.read_bytes() for path in (tmp_path / 'experiments').rglob('*') if path.is_file()} == before
    with pytest.raises(UserError, match=words):
        train(run_options(tmp_path, name='other', **changes))
    assert [path.name for path in (tmp_path / 'experiments').iterdir()] == ['run']


def test_a_failure_after_a_step_keeps_both_runs(tmp_path, monkeypatch):
    assert train(run_options(tmp_path, **{'train:total_iter': 2})) == ExitCode.OK

    def fail():
        raise UserError('a damaged image')

    interrupt(monkeypatch, 3, fail)
    with pytest.raises(UserError, match='damaged'):
        train(run_options(tmp_path))
    assert len(list((tmp_path / 'experiments').iterdir())) == 2


def test_auto_resume_without_a_checkpoint_says_so_and_where_there_is_one(tmp_path):
    assert train(run_options(tmp_path, **{'train:total_iter': 1})) == ExitCode.OK
    assert train(run_options(tmp_path, **{'train:total_iter': 1})) == ExitCode.OK
    run = tmp_path / 'experiments' / 'run'
    for state in (run / 'training_states').iterdir():
        state.unlink()
    assert train(run_options(tmp_path, auto_resume=True, **{'train:total_iter': 1})) == ExitCode.OK
    log = log_text(tmp_path)
    first = min(tmp_path.glob('experiments/run_archived_*'))
    assert 'has no checkpoint; starting from iteration 0.' in log
    assert f'The newest checkpoint of an earlier run of this name is in {first}.' in log


def test_a_restart_before_the_first_folder_goes_on_with_no_older_run(tmp_path, monkeypatch):
    assert train(run_options(tmp_path, **{'train:total_iter': 2})) == ExitCode.OK
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')  # the first attempt died at once
    monkeypatch.setattr(train_loop, 'launched', lambda *_: nullcontext(Ranks(launch='new')))
    assert train(run_options(tmp_path, **{'train:total_iter': 1})) == ExitCode.OK
    assert len(list((tmp_path / 'experiments').iterdir())) == 2


def test_the_options_choose_cudnns_benchmark_which_validation_does_without(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train_loop, 'evaluate', lambda *_: seen.append(torch.backends.cudnn.benchmark) or [])
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', False)
    for chosen in (True, False):
        assert train(run_options(tmp_path, cudnn_benchmark=chosen, **{'train:total_iter': 1})) == ExitCode.OK
        assert torch.backends.cudnn.benchmark is chosen
    assert seen == [False, False]


def test_a_full_disk_ends_the_run_with_a_clear_error(tmp_path, monkeypatch):
    from moeisr_basicsr.atomic_file import SaveError
    from moeisr_basicsr.engine.checkpoint_store import CheckpointStore

    store = CheckpointStore.save

    def full(self, iteration, weights, state):
        if iteration == 14:
            raise SaveError(28, f'No space left on device: cannot write {self.state_path(14)}')
        store(self, iteration, weights, state)

    monkeypatch.setattr(CheckpointStore, 'save', full)
    assert train(run_options(tmp_path)) == ExitCode.SAVE_FAILED
    assert saved(tmp_path, 7)[1]['iter'] == 7
    log = log_text(tmp_path)
    assert 'No space left on device' in log


def test_a_non_finite_loss_ends_the_run_with_its_code(tmp_path):
    options = run_yaml(tmp_path, **{'train:optim_g:lr': 1e30, 'train:warmup_iter': -1, 'train:total_iter': 6})
    assert train(parse(tmp_path, options)) == ExitCode.NON_FINITE
    log = log_text(tmp_path)
    assert 'Not finite at iteration' in log and '.png at scale' in log
    assert 'No state has been saved.' in log and not list((tmp_path / 'experiments').rglob('*.state'))


def test_the_metrics_file_has_what_users_plot(uninterrupted):
    lines = [json.loads(line) for line in (uninterrupted / 'experiments' / 'run' / 'metrics.jsonl').open()]
    steps = [line for line in lines if line['kind'] == 'train']
    assert [line['iter'] for line in steps] == list(range(1, TOTAL + 1))
    for key in ('l_pix', 'l_balance', 'share/expert_1', 'share/expert_2', 'mean_cost', 'lr', 'tau', 'queries_per_s'):
        assert all(isinstance(line[key], float) for line in steps), key
    validations = [(line['iter'], line['dataset'], line['scale']) for line in lines if line['kind'] == 'validation']
    assert validations == [(at, f'tiny_{scale}', scale) for at in (9, 18, TOTAL) for scale in ('x2', 'x3.3')]
