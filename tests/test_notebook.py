"""`examples/quickstart.ipynb`: the method in twelve cells, committed without outputs."""

import json
import re
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[1] / 'examples' / 'quickstart.ipynb'
CELLS = json.loads(PATH.read_text(encoding='utf-8'))['cells']
# What the text between the cells claims of the notebook's variables; runs as its last cell.
CHECKS = """
assert psnr(routed.image[0]) > psnr(smooth) + 0.5
sums = [sum(bar.parts.values()) for bar in work]
assert abs(sums[0] - 100) < 1e-3 and sums == sorted(sums, reverse=True)
sums = [sum(bar.parts.values()) for bar in gain]
assert max(abs(one - sums[0]) for one in sums[1:-1]) < 0.1  # the knob hardly costs quality
"""


def test_twelve_cells_without_outputs():
    assert [cell['cell_type'] for cell in CELLS] == ['markdown', 'code'] * 12
    assert all(cell['outputs'] == [] and cell['execution_count'] is None for cell in CELLS[1::2])
    headings = re.findall(r'^## (\d+)\. ', '\n'.join(line for cell in CELLS[::2] for line in cell['source']), re.M)
    assert headings == [str(number) for number in range(1, 13)]


def test_it_runs_in_jupyter():
    nbclient = pytest.importorskip('nbclient', reason='its pinned versions need Python 3.11')
    nbformat = pytest.importorskip('nbformat')
    notebook = nbformat.read(PATH, as_version=4)
    nbformat.validate(notebook)
    notebook.cells.append(nbformat.v4.new_code_cell(CHECKS))
    nbclient.NotebookClient(notebook, timeout=200, resources={'metadata': {'path': PATH.parent}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == 'code' for output in cell.outputs]
    assert sum('image/png' in output.get('data', {}) for output in outputs) == 10
    printed = ''.join(output.text for output in outputs if output.output_type == 'stream' and output.name == 'stdout')
    mapped, shuffled = map(float, re.search(r'as the mapper says: (.*) dB, at random: (.*) dB', printed).groups())
    assert mapped > shuffled + 0.05
    assert 'x3.3: 211 x 158 pixels' in printed
    assert all(float(error) < 1e-5 for error in re.findall(r'differs from encoding anew by (\S+)', printed))
