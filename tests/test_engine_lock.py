"""A run's folder is held while the run lives: a second start is refused, a dead holder's folder is taken over."""

import multiprocessing
import os
import signal
import socket
import threading
import time
from contextlib import contextmanager

import pytest
from tiny_runs import run_options

from moeisr_basicsr.engine import run_lock
from moeisr_basicsr.engine.distributed import Ranks
from moeisr_basicsr.engine.run_lock import held
from moeisr_basicsr.engine.test_loop import test as evaluate
from moeisr_basicsr.engine.train_loop import train
from moeisr_basicsr.errors import ExitCode, UserError

SHORT = {'train:total_iter': 1, 'val': None}


def hold(folder, ready):
    with held(folder, Ranks()):
        ready.set()
        time.sleep(60)


@contextmanager
def holder(folder):
    """A living process that holds `folder`."""
    fork = multiprocessing.get_context('fork')
    ready = fork.Event()
    process = fork.Process(target=hold, args=(folder, ready))
    process.start()
    try:
        assert ready.wait(20)
        yield process
    finally:
        process.kill()
        process.join()


def taken(folder):
    """Whether this process may hold `folder` now."""
    try:
        with held(folder, Ranks()):
            return True
    except UserError:
        return False


def change_marker(folder, **changes):
    """Rewrite fields of the lock's file in place."""
    path = folder.with_name(f'.{folder.name}.lock')
    lines = [line.partition('=') for line in path.read_text().splitlines()]
    path.write_text(''.join(f'{key}{sign}{changes.get(key, value)}\n' for key, sign, value in lines))
    return path


def test_a_second_start_is_refused_before_anything_is_moved(tmp_path):
    assert train(run_options(tmp_path, **SHORT)) == ExitCode.OK
    folder = tmp_path / 'experiments' / 'run'
    before = {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}
    with holder(folder) as process:
        for auto_resume in (False, True):
            with pytest.raises(UserError) as error:
                train(run_options(tmp_path, auto_resume=auto_resume, **SHORT))
            assert str(error.value).startswith(f'{folder} is in use by process {process.pid} on {socket.gethostname()}')
            assert '\n' not in str(error.value)
        assert {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()} == before
        assert train(run_options(tmp_path, name='other', **SHORT)) == ExitCode.OK
        process.kill()
        process.join()
        assert train(run_options(tmp_path, **SHORT)) == ExitCode.OK  # a dead holder
    assert not list((tmp_path / 'experiments').glob('.*.lock'))
    assert len(list((tmp_path / 'experiments').glob('run_archived_*'))) == 1


def test_the_results_of_a_test_are_held_too(tmp_path):
    options = run_options(tmp_path)
    options.update(is_train=False, name='measured')
    options['path'] = {'results_root': str(tmp_path / 'results' / 'measured'), 'log': str(tmp_path)}
    with holder(tmp_path / 'results' / 'measured'), pytest.raises(UserError, match='is in use by process'):
        evaluate(options)


def test_a_process_that_has_the_holders_number_by_chance_is_not_the_holder(tmp_path):
    folder = tmp_path / 'run'
    with holder(folder) as process:
        process.kill()
        process.join()
    change_marker(folder, pid=os.getppid())
    assert taken(folder)  # the start time differs


def test_another_machine_lives_while_its_heart_beats(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_lock, 'LEASE_S', 2.0)
    monkeypatch.setattr(run_lock, 'BEAT_S', 0.2)
    monkeypatch.setattr(run_lock, 'PROBE_S', 0.1)
    folder = tmp_path / 'run'
    with holder(folder) as process:
        change_marker(folder, host='elsewhere')
        assert not taken(folder)  # beats
        assert 'on elsewhere: waiting for its heartbeat' in capsys.readouterr().err
        os.kill(process.pid, signal.SIGSTOP)
        began = time.monotonic()
        assert taken(folder)
        assert time.monotonic() - began > 1.5
        os.kill(process.pid, signal.SIGCONT)
        # It sees that the folder has changed hands, and ends before it writes among the other run's files.
        with held(folder, Ranks()):
            process.join(20)
        assert process.exitcode == ExitCode.USER_ERROR


def test_of_many_that_start_at_once_one_wins(tmp_path):
    folder, won, barrier = tmp_path / 'run', [], threading.Barrier(5)

    def start():
        barrier.wait()
        try:
            with held(folder, Ranks()):
                won.append(1)
                time.sleep(3 * run_lock.PROBE_S)
        except UserError:
            pass

    threads = [threading.Thread(target=start) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1


def test_a_run_with_loader_workers_holds_its_folder_to_the_end(tmp_path, monkeypatch):
    """Workers are copies of the process that holds it; their end must not let go."""
    from moeisr_basicsr.engine.train_loop import Trainer

    step, seen = Trainer._step, []

    def look(self, *arguments):
        step(self, *arguments)
        seen.append((tmp_path / 'experiments' / '.run.lock').is_file())

    monkeypatch.setattr(Trainer, '_step', look)
    changes = {'train:total_iter': 8, 'datasets:train:num_worker_per_gpu': 1, 'val': None}
    assert train(run_options(tmp_path, **changes, **{'datasets:train:persistent_workers': False})) == ExitCode.OK
    assert seen == [True] * 8
