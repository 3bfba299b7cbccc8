"""`scripts/benchmark_decode.py` on tiny images: its lines, its results, and that wrong outputs stop it."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

from moeisr_basicsr.analysis import schema
from moeisr_basicsr.core.render import TorchBackend

SCRIPTS = Path(__file__).resolve().parents[1] / 'scripts'
MODULES = ('benchmark_decode', 'benchmark_case', 'benchmark_train', 'liif_peer', 'models')
TINY = ['--lq-size', '8', '--repeats', '2']
# the least of a checkout of yinboc/liif: the same interface, computed by the tests' own reference
PEER = """
import reference, torch
class Peer:
    def __init__(self):
        self.imnet = torch.nn.Module()
        self.imnet.layers = torch.nn.Sequential(*(m for i, o in ((580, 256), *[(256, 256)] * 3, (256, 3))
                                                  for m in (torch.nn.Linear(i, o), torch.nn.ReLU())))[:-1]
    def to(self, device): return self
    def eval(self): return self
    def query_rgb(self, coord, cell):
        pool = torch.nn.Module()
        pool.linears = lambda _: list(self.imnet.layers[::2])
        return reference.liif(pool, 0, self.feat.cuda(), coord, cell) + {error}
def make(spec):
    assert spec['name'] == 'liif'
    return Peer()
"""


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(torch.Tensor, 'cuda', torch.Tensor.cuda)  # the peer's patch is undone afterwards
    monkeypatch.setenv('MOEISR_KERNELS', 'off')
    module = importlib.import_module('benchmark_decode')
    monkeypatch.setattr(module, 'fused_backend', lambda decoder, device, precision: TorchBackend())
    yield module
    for name in MODULES:
        sys.modules.pop(name, None)


def test_lines_and_results(script, tmp_path, capsys):
    target = tmp_path / 'out.json'
    script.main([*TINY, '--scales', '2', '3', '--precisions', 'fp32', '--json', str(target)])
    lines = capsys.readouterr().out.splitlines()
    printed = [line for line in lines if not line.startswith('#')]
    assert all(re.fullmatch(r'\S+ x[\d.]+ [\d.e+-]+', line) for line in printed)
    rows = {(row['case'], row['scale'][0]): row for row in schema.load(target)['rows']}
    assert [(line.split()[0], float(line.split()[1][1:])) for line in printed] == list(rows)
    for scale in (2.0, 3.0):
        plain = rows['plain-30000', scale]['time_ms']['total']
        for code in ('torch', 'fused'):
            for what in ('dense', 'lm-dense', 'moe-uniform', 'moe-50/25/15/10'):
                row = rows[f'{code}-{what}-fp32', scale]
                assert row['ratio'] == pytest.approx(plain / row['time_ms']['total'])
                assert row['difference'] <= 1e-5 and row['repeats'] == 2
            dense, moe = (rows[f'{code}-{what}-fp32', scale] for what in ('dense', 'moe-50/25/15/10'))
            saved = dense['macs']['total'] / moe['macs']['total']
            # by hand: 5 layers of 256, experts of 1 to 4 hidden layers, tables of 9 x 64 x 256 per LR pixel and expert
            assert dense['macs']['total'] == 4 * (512 + 3 * 65536) + 768 + 147456 / scale**2
            assert moe['macs']['total'] == pytest.approx(4 * (512 + 0.85 * 65536) + 768 + 4 * 147456 / scale**2)
            lm = rows[f'{code}-lm-dense-fp32', scale]
            assert lm['macs']['total'] == 4 * (18 * 16 + 5 * 256) + 48 + (576 * 208 + 208 * 208) / scale**2
            gain = dense['time_ms']['total'] / lm['time_ms']['total']
            assert rows[f'lm-gain-{code}-fp32', scale]['ratio'] == pytest.approx(gain)
            assert rows[f'mac-efficiency-{code}-fp32', scale]['ratio'] == pytest.approx(
                dense['time_ms']['total'] / moe['time_ms']['total'] / saved
            )
        assert rows['route-agreement', scale]['ratio'] == 1
        assert ('whole-fused-moe-50/25/15/10-fp32', scale) in rows and ('plain-10000', scale) in rows


def test_wrong_output_stops_it(script, monkeypatch):
    class Wrong(TorchBackend):
        def decode(self, decoder, tile):
            output = super().decode(decoder, tile)
            output[:, 0, 0] += 1e-3  # one pixel of a tile, 5e-4 on the [0, 1] scale
            return output

    monkeypatch.setattr(script, 'fused_backend', lambda *_: Wrong())
    with pytest.raises(AssertionError, match='fused-moe-50/25/15/10-fp32 x3 differs by 0.00'):
        script.main([*TINY, '--scales', '3', '--quick'])


def test_quick_stops_in_time_and_says_what_is_missing(script, monkeypatch, capsys, tmp_path):
    target = tmp_path / 'out.json'
    now = [script.START]
    cases = importlib.import_module('benchmark_case')
    monkeypatch.setattr(script.time, 'perf_counter', lambda: now[0])

    def timed(work, device):
        work()
        now[0] += 9  # each case takes 9 seconds
        return 9000.0

    monkeypatch.setattr(cases, 'time_ms', timed)
    script.main([*TINY, '--quick', '--train', '--json', str(target)])
    output = capsys.readouterr().out
    assert now[0] - script.START <= 50
    assert 'fused-moe-50/25/15/10-fp32 x4' in output and 'skipped plain-10000: no time left' in output
    assert 'skipped x8: no time left' in output and 'skipped train: no time left' in output
    assert [row['scale'][0] for row in schema.load(target)['rows']].count(8.0) == 0


def test_missing_kernels_are_said(script, monkeypatch, capsys):
    monkeypatch.setattr(script, 'fused_backend', lambda *_: None)
    script.main([*TINY, '--quick', '--scales', '2', '--precisions', 'fp32'])
    output = capsys.readouterr().out
    assert '# skipped fused moe fp32' in output and '\nfused' not in output and '\ntorch-dense-fp32 x2 ' in output


def test_training_steps(script, monkeypatch, capsys):
    tiny = script.TrainSteps
    monkeypatch.setattr(script, 'TrainSteps', lambda decoder, batch: tiny(decoder, 1, patch=8, queries=40))
    monkeypatch.setattr(script, 'PATCH', 8)
    script.main([*TINY, '--quick', '--scales', '2', '--precisions', 'fp32', '--train'])
    output = capsys.readouterr().out
    assert '# equal train-exact' in output
    assert '\ntrain-exact x2.5 ' in output and '\ntrain-whole-exact x2.5 ' in output


def test_a_wrong_training_step_stops_it(script, monkeypatch):
    """One expert's gradient is scaled."""
    steps = script.TrainSteps(script.MoEDecoder(8), 1, patch=8, queries=40)
    output, gradient = steps.compare()
    assert output < 1e-5 and gradient < 1e-3
    weight = steps.decoder.pool.experts[1].layers[0].weight
    run = steps.run

    def wrong(form):
        handle = weight.register_hook(lambda grad: grad * (1.1 if form == 'exact' else 1))
        try:
            return run(form)
        finally:
            handle.remove()

    monkeypatch.setattr(steps, 'run', wrong)
    assert steps.compare()[1] == pytest.approx(0.1, rel=0.1)


def checkout(folder, error):
    (folder / 'models').mkdir(parents=True)
    (folder / 'models' / '__init__.py').write_text(PEER.replace('{error}', str(error)))
    (folder / 'models' / 'liif.py').write_text('')
    return str(folder)


def test_peer_takes_the_place_of_the_plain_algorithm(script, tmp_path, capsys):
    target = tmp_path / 'out.json'
    peer = '--peer', checkout(tmp_path / 'p', 0.0)
    script.main([*TINY, '--quick', '--scales', '2', '--precisions', 'fp32', *peer, '--json', str(target)])
    rows = {row['case']: row for row in schema.load(target)['rows']}
    assert rows['peer-30000']['ratio'] == 1 and 'plain-30000' in rows and 'peer-10000' in rows
    assert rows['torch-dense-fp32']['baseline'] == 'peer-30000'
    assert '# equal peer' in capsys.readouterr().out


def test_peer_that_computes_something_else(script, tmp_path):
    with pytest.raises(AssertionError, match='peer differs'):
        script.main([*TINY, '--quick', '--scales', '2', '--peer', checkout(tmp_path / 'p', 1e-3)])


def test_peer_that_is_no_checkout(script, tmp_path):
    with pytest.raises(SystemExit, match='no checkout'):
        script.main([*TINY, '--quick', '--peer', str(tmp_path)])


def test_an_existing_file_is_kept(script, tmp_path, capsys):
    target = tmp_path / 'mine.json'
    target.write_text('mine')
    with pytest.raises(SystemExit) as stopped:
        script.main([*TINY, '--json', str(target)])
    assert stopped.value.code == 2 and 'give --overwrite' in capsys.readouterr().err.splitlines()[-1]
    assert target.read_text() == 'mine'
