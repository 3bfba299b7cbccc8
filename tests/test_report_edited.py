"""`basicsr report` on results that people have edited: it shows them, or says in one line what is wrong."""

import json
import os

import pytest
from test_report import MACS, image_row, results

from moeisr_basicsr.cli import main

ROUTING = {'shares': [0.25, 0.75], 'mean_cost': 0.5, 'texture_correlation': 0.1}


def report(capsys, tmp_path, text):
    (tmp_path / 'r.json').write_text(text)
    code = main(
        [
            'report',
            str(tmp_path / 'r.json'),
            '-o',
            str(tmp_path / 'out.html'),
            '--csv',
            str(tmp_path / 'o.csv'),
            '--overwrite',
        ]
    )
    return code, capsys.readouterr().err


def document(network=None, **row):
    rows = [image_row(image=image, **{'macs': MACS, 'routing': ROUTING, **row}) for image in 'ab']
    return json.dumps(results('moe', *rows, network=network))


@pytest.mark.parametrize('experts', [3, 'x', {'a': 1}, [3, True], [{'a': 1}, None], [[8]], [['a'], [[8]]]])
def test_experts_that_are_none_of_ours(capsys, tmp_path, experts):
    assert report(capsys, tmp_path, document({'encoder': experts, 'experts': experts})) == (0, '')
    assert 'expert 2' in (tmp_path / 'out.html').read_text()


@pytest.mark.parametrize('each', [[1.0], [1.0, 2.0, 3.0], []])
def test_costs_of_another_number_of_experts(capsys, tmp_path, each):
    assert report(capsys, tmp_path, document(macs={**MACS, 'each_expert': each})) == (0, '')


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        (document().replace('30.0', '1e308'), '1e+308 is greater than the maximum'),
        (document().replace('30.0', '-1e308'), '-1e+308 is less than the minimum'),
        (document().replace('"moe"', '"\\ud800"'), 'it is no JSON'),
        (document().replace('30.0', '[' * 900 + ']' * 900), 'this is no results file'),
        (document().replace('30.0', '[' * 200 + ']' * 200), 'is not of type'),
        (document().replace('{"type"', '{"a\\nb": 1, "type"').replace('"model":', '"mod\\nel":'), 'mod'),
        (document().replace('30.0', '{"a": ' * 90_000), 'it is no JSON'),
    ],
    ids=['large', 'small', 'surrogate', 'deep', 'nested', 'newline', 'deeper'],
)
def test_what_cannot_be_shown_is_one_line(capsys, tmp_path, text, words):
    code, error = report(capsys, tmp_path, text)
    assert code == 2 and len(error.splitlines()) == 1 and words in error and len(error) < 500, error


def test_numbers_of_hundreds_of_digits_are_not_finite(capsys, tmp_path):
    for digits in (400, 5000):
        assert report(capsys, tmp_path, document().replace('30.0', '1' * digits)) == (0, '')
        assert 'psnr is missing or not finite' in (tmp_path / 'out.html').read_text()


@pytest.mark.parametrize('name', ['fifo', 'eps.png', 'nul\0.png', 'x' * 5000, 'loop.png', '.'])
def test_pictures_that_are_none(capsys, tmp_path, name):
    """A FIFO would be waited for, an EPS handed to Ghostscript."""
    os.mkfifo(tmp_path / 'fifo')
    (tmp_path / 'eps.png').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n')
    (tmp_path / 'loop.png').symlink_to('loop.png')
    assert report(capsys, tmp_path, document(pictures={'truth': name, 'result': name})) == (0, '')
    assert 'and is not shown' in (tmp_path / 'out.html').read_text()
