"""scripts/small_tables.py: means and spread over seeds, empty cells, and only rows that small_rows.py knows."""

import sys
from pathlib import Path

import pytest

from moeisr_basicsr.analysis import schema

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'scripts'))

import small_rows
import small_tables

ENVIRONMENT = {'torch': '2', 'threads': 1, 'cpu': '', 'device': 'cpu', 'kernel': 'torch'}


def write(root, name, psnr, experts, dataset='Set5_x2'):
    """Means of one row; a dense decoder as published takes 1000 multiply-adds."""
    row = {
        'case': 'mean',
        'dataset': dataset,
        'metrics': {'psnr_y': psnr, 'psnr_rgb': psnr - 2, 'bicubic_psnr_y': 33.671},
        'macs': {'encoder': 500, 'experts': experts, 'total': 500 + experts, 'dense_plain': 1000},
    }
    image = {'case': 'test', 'dataset': dataset, 'image': 'baby', 'metrics': {'psnr_y': 0.0}}
    (root / name).mkdir()
    schema.save(root / name / 'results.json', schema.document('test', ENVIRONMENT, [image, row]))


@pytest.fixture
def results(tmp_path):
    for seed, psnr in enumerate((37.20, 37.30, 37.40)):
        write(tmp_path, f'liif_seed{seed}', psnr, 740)
    write(tmp_path, 'moeisr_liif_seed0', 37.25, 400)
    write(tmp_path, 'moeisr_j_liif_seed0', 37.25, 140)
    write(tmp_path, 'moeisr_j_liif_seed1', 37.28, 150)
    write(tmp_path, 'moeisr_j_liif_seed0_cost_weight_2', 37.24, 70)
    return tmp_path


def table(results, name):
    """Lines by their first cell."""
    text = small_tables.markdown(small_tables.TABLES[name], small_tables.Results(results))
    lines = [[cell.strip() for cell in line.strip('|').split('|')] for line in text.splitlines()]
    assert lines[1] == ['---'] * len(lines[0]) and {len(line) for line in lines} == {len(lines[0])}
    return {first: rest for first, *rest in lines}


def test_means_spread_and_cost(results):
    rows = table(results, 'liif')
    assert next(iter(rows)) == 'PSNR, multiply-adds'
    assert rows['PSNR, multiply-adds'] == ['bicubic', 'dense LIIF', 'MoEISR-LIIF', 'MoEISR-J-LIIF (ours)']
    assert rows['Set5 x2'] == ['33.67', '37.30 ± 0.10, 74.0 %', '37.25, 40.0 %', '37.27 ± 0.02, 14.5 %']
    assert rows['B100 x8'] == [''] * 4


def test_controls_are_apart_from_the_trained_routing(results):
    rows = table(results, 'controls')
    assert rows['PSNR, multiply-adds'] == ['Set5 x2', 'Set5 x4', 'B100 x2', 'B100 x4']
    assert rows['MoEISR-J'][0] == '37.27 ± 0.02, 14.5 %'
    assert rows['MoEISR-J, cost weight 2'] == ['37.24, 7.0 %', '', '', '']
    assert rows['MoEISR-J, cost weight 4'] == [''] * 4


def test_crops_are_compared_in_rgb(tmp_path):
    write(tmp_path, 'liif_seed0', 32.126, 740, 'DIV2K_valid_crop256_x3.3')
    assert table(tmp_path, 'factors')['DIV2K crops x3.3'] == ['', '30.13, 74.0 %', '', '']


def test_every_table(results, capsys):
    assert small_tables.main(['--results', str(results)]) == 0
    printed = capsys.readouterr().out
    for name in small_tables.TABLES:
        assert f'\n{name}\n\n| ' in printed
    assert small_tables.main(['controls', '--results', str(results)]) == 0
    assert 'ablations' not in capsys.readouterr().out


def test_the_tables_name_rows_that_can_be_trained():
    models = [model for table in small_tables.TABLES.values() for model in table.models.values()]
    names = [name.replace('*', '0') for model in models for name in (model.names, model.dense) if name]
    plain = {name.partition('_cost_weight')[0].removesuffix('_shuffled') for name in names}
    assert len(plain) > 20 and plain <= set(small_rows.ROWS)


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--results', 'nowhere'], 'nowhere has no NAME/results.json'),
        (['liiif'], 'no table is called liiif; there are liif, lte'),
    ],
)
def test_mistakes(arguments, message, capsys):
    try:
        assert small_tables.main(arguments) == 2
    except SystemExit as exit_:
        assert exit_.code == 2
    assert message in capsys.readouterr().err
