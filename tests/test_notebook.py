"""`examples/quickstart.ipynb`: the method in twelve cells, committed without outputs."""

import ast
import json
import re
from pathlib import Path

import pytest
from PIL import Image

PATH = Path(__file__).resolve().parents[1] / 'examples' / 'quickstart.ipynb'
CELLS = json.loads(PATH.read_text(encoding='utf-8'))['cells']
CODE = [''.join(cell['source']) for cell in CELLS if cell['cell_type'] == 'code']


def test_twelve_cells_without_outputs():
    assert len(CODE) == 12 and [cell['cell_type'] for cell in CELLS] == ['markdown', 'code'] * 12
    assert all(cell['outputs'] == [] and cell['execution_count'] is None for cell in CELLS[1::2])
    headings = re.findall(r'^## (\d+)\. ', '\n'.join(line for cell in CELLS[::2] for line in cell['source']), re.M)
    assert headings == [str(number) for number in range(1, 13)]


def check(printed, pictures, names):
    """What the text between the cells claims holds; `names` are the notebook's variables, where they are at hand."""
    assert len(pictures) == 10
    mapped, shuffled = map(float, re.search(r'as the mapper says: (.*) dB, at random: (.*) dB', printed).groups())
    assert mapped > shuffled + 0.05
    assert 'x3.3: 211 x 158 pixels' in printed
    assert all(float(error) < 1e-5 for error in re.findall(r'differs from encoding anew by (\S+)', printed))
    if names:
        assert names['psnr'](names['routed'].image[0]) > names['psnr'](names['smooth']) + 0.5
        work = [sum(bar.parts.values()) for bar in names['work']]
        assert work[0] == pytest.approx(100) and work == sorted(work, reverse=True)
        gain = [sum(bar.parts.values()) for bar in names['gain']]
        assert max(abs(one - gain[0]) for one in gain[1:-1]) < 0.1  # the knob hardly costs quality


def test_it_runs(monkeypatch, capsys):
    """In this process, without Jupyter: the last expression of a cell is shown, as there."""
    monkeypatch.chdir(PATH.parent)
    pictures = []
    names = {'display': pictures.append}
    for source in CODE:
        tree = ast.parse(source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, PATH.name, 'exec'), names)
        if last is not None and (value := eval(compile(ast.Expression(last.value), PATH.name, 'eval'), names)):
            pictures.append(value)
    assert all(isinstance(picture, Image.Image) for picture in pictures)
    check(capsys.readouterr().out, pictures, names)


def test_it_runs_in_jupyter(monkeypatch):
    reason = 'nbclient and ipykernel bring 86 MB of packages, too much for one test; the cells have run without them'
    nbclient = pytest.importorskip('nbclient', reason=reason)
    nbformat = pytest.importorskip('nbformat', reason=reason)
    pytest.importorskip('ipykernel', reason=reason)
    notebook = nbformat.read(PATH, as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=200, resources={'metadata': {'path': PATH.parent}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == 'code' for output in cell.outputs]
    printed = ''.join(output.text for output in outputs if output.output_type == 'stream' and output.name == 'stdout')
    pictures = [output for output in outputs if 'image/png' in output.get('data', {})]
    check(printed, pictures, {})
