"""scripts/small_tables.py: means and differences over seeds, empty cells, and only rows that small_rows.py knows."""

import sys
from pathlib import Path

import pytest

from moeisr_basicsr.analysis import schema

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'scripts'))

import small_rows
import small_tables

ENVIRONMENT = {'torch': '2', 'threads': 1, 'cpu': '', 'device': 'cpu', 'kernel': 'torch'}


def write(root, name, psnr, experts, routing=None):
    """Means of one row on Set5 x2; a dense decoder as published takes 1000 multiply-adds."""
    row = {
        'case': 'mean',
        'dataset': 'Set5_x2',
        'metrics': {'psnr_y': psnr, 'bicubic_psnr_y': 33.671},
        'macs': {'encoder': 500, 'experts': experts, 'total': 500 + experts, 'dense_plain': 1000},
    }
    image = {'case': 'test', 'dataset': 'Set5_x2', 'image': 'baby', 'metrics': {'psnr_y': 0.0}}
    (root / name).mkdir()
    schema.save(
        root / name / 'results.json',
        schema.document('test', ENVIRONMENT, [image, row | ({'routing': routing} if routing else {})]),
    )


@pytest.fixture
def results(tmp_path):
    routing = {'loads': [0.404, 0.4, 0.096, 0.1], 'texture_correlation': 0.456}
    write(tmp_path, 'liif_seed0', 37.20, 740)
    write(tmp_path, 'liif_seed1', 37.30, 740)
    write(tmp_path, 'liif_seed2', 37.40, 740)
    write(tmp_path, 'moeisr_liif_routed_seed0', 37.25, 140, routing)
    write(tmp_path, 'moeisr_liif_routed_seed1', 37.28, 150, routing)
    write(tmp_path, 'moeisr_liif_routed_seed0_cost_weight_2', 37.24, 70)
    write(tmp_path, 'liif_2x192_seed0', 37.22, 150)
    return tmp_path


def lines(text, start):
    return [line for line in text.splitlines() if line.startswith(f'| {start}')]


def test_means_and_scatter(results):
    table = small_tables.liif(small_tables.Results(results))
    assert lines(table, 'Set5 x2') == [
        '| Set5 x2 | 33.67 | 37.30 ± 0.10 | 37.27 ± 0.02 | 14.5 % | 37.22 ± 0.00 | 15.0 % | 37.24 | 7.0 % |  |'
    ]
    assert lines(table, 'B100 x8') == ['| B100 x8 |' + '  |' * 9]
    assert table.splitlines()[1] == '|---' * 10 + '|'


def test_differences_are_taken_seed_by_seed(results):
    (row,) = lines(small_tables.differences(small_tables.Results(results)), 'Set5 x2')
    assert row == ('| Set5 x2 | +0.015 (+0.050 -0.020) | +0.030 (+0.030) |  | 40 40 10 10 | 0.46 0.46 |')


def test_crops_are_compared_in_rgb(tmp_path):
    row = {'case': 'mean', 'dataset': 'DIV2K_valid_crop256_x3.3', 'metrics': {'psnr_rgb': 30.126, 'psnr_y': 31.0}}
    (tmp_path / 'liif_seed0').mkdir()
    schema.save(tmp_path / 'liif_seed0' / 'results.json', schema.document('test', ENVIRONMENT, [row]))
    assert lines(small_tables.factors(small_tables.Results(tmp_path)), 'DIV2K crops x3.3') == [
        '| DIV2K crops x3.3 |  | 30.13 |  |  |'
    ]


def test_every_table(results, capsys):
    assert small_tables.main(['--results', str(results)]) == 0
    printed = capsys.readouterr().out
    for name in small_tables.TABLES:
        assert f'\n{name}\n\n| ' in printed
    assert '| MoEISR, cost weight 2 | 37.24, 7.0 % |  |  |  |' in printed
    assert small_tables.main(['sizes', '--results', str(results)]) == 0
    assert 'readme' not in capsys.readouterr().out


def test_the_tables_name_rows_that_can_be_trained():
    kinds = ['liif', 'lte', small_tables.MOE, small_tables.MOE_LTE, small_tables.EQUAL_COST]
    names = [f'{kind}_seed0' for kind in kinds] + [*small_tables.SIZES.values(), *small_tables.ABLATIONS.values()]
    assert not [name for name in names if name.partition('_cost_weight')[0] not in small_rows.ROWS]


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--results', 'nowhere'], 'nowhere has no NAME/results.json'),
        (['liiif'], 'no table is called liiif; there are readme, liif'),
    ],
)
def test_mistakes(arguments, message, capsys):
    try:
        assert small_tables.main(arguments) == 2
    except SystemExit as exit_:
        assert exit_.code == 2
    assert message in capsys.readouterr().err
