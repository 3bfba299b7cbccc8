"""What scripts/gpu_suite.py does beside running other programs."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'scripts'))

import gpu_suite


def test_states_travel_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, 'STATE_MIB', 1)
    content = bytes(range(256)) * 10000  # 2.4 MiB
    for name in ('40.state', 'net_g_40.pth'):
        (tmp_path / name).write_bytes(content + name.encode())
    gpu_suite.split_parts([tmp_path / '40.state', tmp_path / 'net_g_40.pth'], tmp_path / 'pieces')
    pieces = sorted((tmp_path / 'pieces').iterdir())
    assert len(pieces) == 6 and max(piece.stat().st_size for piece in pieces) == 1 << 20
    gpu_suite.join_parts(tmp_path / 'pieces', tmp_path / 'run')
    assert (tmp_path / 'run/training_states/40.state').read_bytes() == content + b'40.state'
    assert (tmp_path / 'run/models/net_g_40.pth').read_bytes() == content + b'net_g_40.pth'


def test_a_part_that_fails_costs_only_itself(tmp_path, monkeypatch, capsys):
    def fails(args, out, seconds):
        raise RuntimeError('no such kernel')

    def lasts(args: Namespace, out, seconds):
        return {'left': seconds}

    monkeypatch.setattr(gpu_suite, 'environment', dict)
    monkeypatch.setattr(gpu_suite, 'PARTS', (('kernels', fails, 0.2), ('training', lasts, None)))
    assert gpu_suite.main(['-o', str(tmp_path), '--device', 'cpu', '--seconds', '50']) == 1
    out = capsys.readouterr().out
    assert 'RuntimeError: no such kernel' in out and '"left": ' in out


def test_a_command_that_takes_too_long_gets_sigterm():
    code = (
        'import signal, sys, time; signal.signal(15, lambda *_: sys.exit(143)); print("up", flush=True); time.sleep(60)'
    )
    assert gpu_suite.run([sys.executable, '-c', code], 3, (143,)) == 'up\n'
    with pytest.raises(RuntimeError, match='exit code 3 of .*gone'):
        gpu_suite.run([sys.executable, '-c', 'print("gone"); raise SystemExit(3)'], 30)


def test_arithmetic_against_the_card():
    row = {'case': 'a', 'size': [100, 50], 'macs': {'total': 1e6}, 'time_ms': {'total': 2.0}}
    found = gpu_suite.roofline(row, {'tflops': 50.0})
    assert found['tflops'] == pytest.approx(5.0) and found['of_the_card'] == pytest.approx(0.1)
