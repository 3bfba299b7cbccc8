"""Signals: the first asks for an orderly end, the second ends at once, torchrun's copy of the first is no second."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moeisr_basicsr.engine import exit_codes
from moeisr_basicsr.engine.signals import StopRequest

# The module alone: importing the whole package would take seconds.
LOAD = f'''
import importlib.util, os, signal, sys, time, types
folder = {str(Path(exit_codes.__file__).parent)!r}
engine = types.ModuleType('engine'); engine.__path__ = [folder]; sys.modules['engine'] = engine
from engine.signals import StopRequest, shield_worker
'''
WAIT = LOAD + '''
with StopRequest() as stop:
    print('ready', flush=True)
    while True:
        time.sleep(0.01)
'''
WORKER = LOAD + '''
shield_worker()
print('ready', flush=True)
while True:
    time.sleep(0.01)
'''


def start(script, **environment):
    clean = {key: value for key, value in os.environ.items() if not key.startswith('TORCHELASTIC')}
    process = subprocess.Popen([sys.executable, '-c', script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**clean, **environment})
    assert process.stdout.readline() == 'ready\n'
    return process


def still_runs(process, seconds=0.15):
    time.sleep(seconds)
    return process.poll() is None


def finish(process):
    try:
        return process.wait(timeout=10)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_remembered_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop and stop.signal == number
    assert signal.getsignal(number) is before


@pytest.mark.parametrize('number, code', [(signal.SIGINT, exit_codes.INTERRUPTED), (signal.SIGTERM, exit_codes.TERMINATED)])
def test_a_second_signal_ends_the_process_at_once(number, code):
    assert code == 128 + number
    process = start(WAIT)
    process.send_signal(number)
    assert still_runs(process, 0.5)
    process.send_signal(number)
    assert finish(process) == code


def test_torchruns_copy_of_a_signal_is_no_second_one():
    process = start(WAIT, TORCHELASTIC_RUN_ID='run')
    process.send_signal(signal.SIGINT)
    assert still_runs(process, 0.5)
    process.send_signal(signal.SIGTERM)
    assert still_runs(process)
    process.kill()
    finish(process)


def test_loader_workers_outlive_the_group_signal_but_not_their_parent():
    process = start(WORKER)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert still_runs(process)
    process.send_signal(signal.SIGTERM)
    assert finish(process) == -signal.SIGTERM
