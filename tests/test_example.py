"""The example of another implicit task: it learns, with more than one expert, and needs no BasicSR."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).resolve().parents[1] / 'examples' / 'fit_depth.py'


@pytest.fixture(scope='module')
def example():
    spec = importlib.util.spec_from_file_location('fit_depth', PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_learns(example):
    result = example.fit(iterations=80, queries=1024)
    assert result.rmse < result.start_rmse / 8
    guess = (result.truth - result.truth.mean()).square().mean().sqrt().item()
    assert result.rmse < guess / 2.5, 'much better than the mean depth'
    assert result.depth.shape == result.truth.shape == result.expert_map.shape == (192, 256)
    assert sum(result.shares) == pytest.approx(1)
    assert sum(share > 0.02 for share in result.shares) >= 2
    assert 0 < result.mean_cost < 1


def test_the_scene_is_analytic(example):
    """Depth at a position does not depend on the resolution, so the finer truth is a truth."""
    coarse = example.analytic_depth(torch.tensor([[0.25, -0.75], [-1.0, 1.0]]))
    assert torch.equal(coarse, example.analytic_depth(torch.tensor([[[0.25, -0.75]], [[-1.0, 1.0]]])).flatten())
    whole = example.analytic_depth(example.make_coord((300, 400)))
    assert whole.min() > 0 and whole.max() < 1


def test_command_line(example, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, 'argv', ['fit_depth.py', '--iterations', '2', '--png', str(tmp_path / 'depth.png')])
    example.main()
    printed = capsys.readouterr().out
    assert 'RMSE' in printed and 'PSNR' in printed and 'pixels per expert' in printed
    assert (tmp_path / 'depth.png').read_bytes().startswith(b'\x89PNG')


def test_it_uses_the_core_only():
    modules = {node.module for node in ast.walk(ast.parse(PATH.read_text())) if isinstance(node, ast.ImportFrom)}
    names = {
        alias.name
        for node in ast.walk(ast.parse(PATH.read_text()))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert 'moeisr_basicsr.core' in modules
    assert not any('basicsr' in name for name in (modules | names) - {'moeisr_basicsr.core'})
