"""Signals: the first asks for an orderly end, the second ends at once, torchrun's copy of the first is no second."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moeisr_basicsr.engine import signals
from moeisr_basicsr.engine.signals import StopRequest
from moeisr_basicsr.errors import ExitCode

# The module alone: importing the whole package would take seconds.
LOAD = f"""
import importlib.util, os, signal, sys, time, types
folder = {str(Path(signals.__file__).parent)!r}
engine = types.ModuleType('engine'); engine.__path__ = [folder]; sys.modules['engine'] = engine
from engine.signals import StopRequest, shield_worker
"""
WAIT = (
    LOAD
    + """
with StopRequest() as stop:
    print('ready', flush=True)
    while True:
        time.sleep(0.01)
"""
)
WORKER = (
    LOAD
    + """
import multiprocessing

def work():
    shield_worker()
    print('ready', flush=True)
    while True:
        time.sleep(0.01)

worker = multiprocessing.get_context('fork').Process(target=work)
worker.start()
signal.signal(signal.SIGTERM, lambda *_: None)
print(worker.pid, flush=True)
sys.stdin.readline()
worker.terminate()
worker.join(20)
print(worker.exitcode, flush=True)
"""
)


def start(script, **environment):
    clean = {key: value for key, value in os.environ.items() if not key.startswith('TORCHELASTIC')}
    process = subprocess.Popen(
        [sys.executable, '-c', script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**clean, **environment},
    )
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


@pytest.mark.parametrize('number, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_the_process_at_once(number, code):
    assert code in (ExitCode.INTERRUPTED, ExitCode.TERMINATED)
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


@pytest.mark.skipif(not hasattr(signal, 'sigwaitinfo'), reason='this system does not tell who has sent a signal')
def test_loader_workers_outlive_the_group_signal_and_obey_their_parent():
    process = subprocess.Popen([sys.executable, '-c', WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    words = process.stdout.readline() + process.stdout.readline()  # of two processes, whose lines may run together
    worker = int(re.search(r'\d+', words)[0])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
        os.kill(worker, number)
    time.sleep(0.5)  # equal signals that wait together become one: let it take these first
    os.kill(worker, 0)  # still there
    process.stdin.write('\n')
    process.stdin.flush()
    assert process.stdout.readline() == '0\n'
    assert finish(process) == 0
