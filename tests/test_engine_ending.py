"""A run that must end saves its state first, says where, and shows the error that ended it."""

import os
import signal

import pytest
import torch
from tiny_runs import assert_equal_runs, log_text, metrics_lines, run_options, saved

from moeisr_basicsr.atomic_file import SaveError
from moeisr_basicsr.engine import train_loop
from moeisr_basicsr.engine.checkpoint_store import CheckpointStore
from moeisr_basicsr.engine.train_loop import Trainer, train
from moeisr_basicsr.errors import ExitCode, UserError
from moeisr_basicsr.models.moeisr_model import MoEISRModel

TOTAL = 12  # checkpoints at 7 and 12, validations at 9 and 12, epochs of 6
SHORT = {'train:total_iter': TOTAL}


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    root = tmp_path_factory.mktemp('undisturbed')
    assert train(run_options(root, **SHORT)) == ExitCode.OK
    return root


def iterations(root):
    return sorted(int(path.stem) for path in (root / 'experiments' / 'run' / 'training_states').glob('*.state'))


def after_step(patch, at, action):
    """Call `action(trainer)` after the step of iteration `at`."""
    step = Trainer._step

    def step_then(self, *batch):
        step(self, *batch)
        if self.iteration == at:
            action(self)

    patch.setattr(Trainer, '_step', step_then)


def fail(*_):
    raise RuntimeError('a fault of the network')


@pytest.mark.parametrize('workers', [0, 1])
def test_an_image_that_breaks_during_the_run(tmp_path, monkeypatch, undisturbed, workers):
    victim, changes = tmp_path / 'train' / '0.png', {**SHORT, 'datasets:train:num_worker_per_gpu': workers}
    with monkeypatch.context() as patch:
        options = run_options(tmp_path, **changes)
        whole = victim.read_bytes()
        after_step(patch, 8, lambda _: victim.write_bytes(whole[:700]))
        with pytest.raises(UserError, match='0.png') as error:
            train(options)
    assert '\n' not in str(error.value)
    newest = iterations(tmp_path)[-1]
    assert newest >= 8
    assert f'The newest state is of iteration {newest}, ' in log_text(tmp_path).splitlines()[-1]
    victim.write_bytes(whole)
    assert train(run_options(tmp_path, auto_resume=True, **changes)) == ExitCode.OK
    assert_equal_runs(tmp_path, undisturbed, TOTAL)


def test_a_fault_in_a_step_before_its_optimizer(tmp_path, monkeypatch, undisturbed):
    """Rate, schedule and generators, which the step has moved on already, are those of the whole step before."""
    part_losses = MoEISRModel.part_losses

    def spoilt(self, *arguments):
        if self.schedulers[0].last_epoch == 8:  # of iteration 9
            torch.rand(3)
            fail()
        return part_losses(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(MoEISRModel, 'part_losses', spoilt)
        with pytest.raises(RuntimeError, match='a fault of the network'):
            train(run_options(tmp_path, **SHORT))
    assert iterations(tmp_path) == [7, 8]
    state = saved(tmp_path, 8)[1]
    assert state['schedulers'][0]['last_epoch'] == 7 and state['optimizers'][0]['param_groups'][0]['lr'] == 1e-3
    assert train(run_options(tmp_path, auto_resume=True, **SHORT)) == ExitCode.OK
    assert_equal_runs(tmp_path, undisturbed, TOTAL)


def test_a_step_that_is_cut_off_halfway_is_not_saved(tmp_path, monkeypatch):
    step, count = torch.optim.Adam.step, []

    def half(self, *arguments):
        count.append(1)
        step(self, *arguments)
        return fail() if len(count) == 9 else None

    monkeypatch.setattr(torch.optim.Adam, 'step', torch.optim.Optimizer.profile_hook_step(half))
    with pytest.raises(RuntimeError, match='a fault of the network'):
        train(run_options(tmp_path, **SHORT))
    assert iterations(tmp_path) == [7]
    assert 'The step of iteration 9 was cut off halfway' in log_text(tmp_path)
    assert 'The newest state is of iteration 7, ' in log_text(tmp_path)


def test_a_fault_in_validation(tmp_path, monkeypatch, undisturbed):
    with monkeypatch.context() as patch:
        patch.setattr(train_loop, 'evaluate', fail)
        with pytest.raises(RuntimeError, match='a fault of the network'):
            train(run_options(tmp_path, **SHORT))
    assert iterations(tmp_path) == [7, 9] and saved(tmp_path, 9)[1]['validation_due']
    assert train(run_options(tmp_path, auto_resume=True, **SHORT)) == ExitCode.OK
    assert_equal_runs(tmp_path, undisturbed, TOTAL)


def test_what_is_on_disk_is_not_written_again_and_weights_that_are_not_finite_never(tmp_path, monkeypatch):
    written, save = [], CheckpointStore.save
    monkeypatch.setattr(CheckpointStore, 'save', lambda self, at, *what: (written.append(at), save(self, at, *what)))

    def spoil(trainer):
        next(trainer.model.net_g.parameters()).data.fill_(float('nan'))
        fail()

    for at, action, expected in ((7, fail, [7]), (8, spoil, [7])):
        written.clear()
        with monkeypatch.context() as patch:
            if at == 7:
                patch.setattr(
                    Trainer,
                    '_next',
                    lambda self, batches, read=Trainer._next: (
                        (None, RuntimeError('a fault of the network')) if self.iteration == 7 else read(self, batches)
                    ),
                )
            else:
                after_step(patch, at, action)
            with pytest.raises(RuntimeError, match='a fault of the network'):
                train(run_options(tmp_path, **SHORT))
        assert written == expected
        assert 'The newest state is of iteration 7, ' in log_text(tmp_path).splitlines()[-1]
    assert 'could not be saved: the weights are not finite' in log_text(tmp_path)


def test_a_failing_save_does_not_hide_the_error(tmp_path, monkeypatch):
    def full(*_):
        raise SaveError(28, 'No space left on device: cannot write it')

    after_step(monkeypatch, 2, lambda _: monkeypatch.setattr(CheckpointStore, 'save', full) or fail())
    with pytest.raises(RuntimeError, match='a fault of the network'):
        train(run_options(tmp_path, **SHORT))
    log = log_text(tmp_path)
    assert 'The state could not be saved: ' in log and 'No space left on device' in log
    assert 'No state has been saved.' in log


def test_a_finished_validation_is_not_repeated(tmp_path, monkeypatch):
    """Neither after the end nor where the run was stopped right behind it; a cut-off one is."""
    seen, evaluate = [], train_loop.evaluate

    def count(model, loaders, iteration, *more):
        seen.append(iteration)
        return evaluate(model, loaders, iteration, *more)

    monkeypatch.setattr(train_loop, 'evaluate', count)
    changes = {**SHORT, 'val:val_freq': 7}
    with monkeypatch.context() as patch:
        validate = Trainer.validate
        patch.setattr(Trainer, 'validate', lambda self: (validate(self), os.kill(os.getpid(), signal.SIGTERM)))
        assert train(run_options(tmp_path, **changes)) == ExitCode.TERMINATED
    best = saved(tmp_path, 7)[1]['best_metric_results']
    assert best['tiny_x2']['psnr']['iter'] == 7
    assert train(run_options(tmp_path, auto_resume=True, **changes)) == ExitCode.OK
    assert train(run_options(tmp_path, auto_resume=True, **changes)) == ExitCode.OK
    assert seen == [7, TOTAL]
    assert [line['iter'] for line in metrics_lines(tmp_path) if line['kind'] == 'validation'] == [7, 7, TOTAL, TOTAL]
    records = saved(tmp_path, TOTAL)[1]['best_metric_results']['tiny_x2']['psnr']
    assert records['val'] >= best['tiny_x2']['psnr']['val']
