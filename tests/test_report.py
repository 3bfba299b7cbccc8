"""`basicsr report`: figures against sums written out by hand, what is never mixed, one page that needs no other."""

import base64
import copy
import csv
import itertools
import json
import re
from html.parser import HTMLParser
from io import BytesIO

import cv2
import numpy as np
import pytest
import torch
from basicsr.models import build_model
from PIL import Image
from tiny_runs import DENSE, parse, run_yaml

from moeisr_basicsr.analysis import schema
from moeisr_basicsr.cli import main
from moeisr_basicsr.engine.data_loading import evaluation_loaders
from moeisr_basicsr.engine.test_loop import test as run_test
from moeisr_basicsr.tools.report.charts import Axis, series_of
from moeisr_basicsr.tools.report.collect import collect, read_sources
from moeisr_basicsr.tools.report.crops import SIDE, STRIDE, busiest_window
from moeisr_basicsr.tools.report.page import render

ENVIRONMENT = {'torch': '2.4', 'threads': 1, 'cpu': 'chip', 'device': 'cpu', 'device_name': 'chip', 'kernel': 'torch'}
PROTOCOL = 'benchmark: luma, shave ceil(s)'
VOID = {'meta', 'img'}


class Page(HTMLParser):
    """Checks the nesting; collects tables as rows of texts, and all attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tables, self.attributes, self.headings, self.texts = [], {}, [], [], []
        self.caption, self.rows = '', []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, name, attributes):
        self.attributes += [(name, *pair) for pair in attributes]
        if name not in VOID:
            self.open.append(name)
        if name == 'table':
            self.caption, self.rows = '', []
        elif name == 'tr':
            self.rows.append([])
        elif name in ('td', 'th'):
            self.rows[-1].append('')

    def handle_endtag(self, name):
        assert self.open.pop() == name
        if name == 'table':
            tidy = [[' '.join(cell.split()) for cell in row] for row in self.rows]  # as a browser does
            self.tables[' '.join(self.caption.split())] = tidy

    def handle_data(self, data):
        self.texts.append(data.strip())
        if 'caption' in self.open:
            self.caption += data
        elif self.open and 'tr' in self.open:
            self.rows[-1][-1] += data
        elif 'h2' in self.open:
            self.headings.append(data)

    def table(self, start):
        return next(rows for caption, rows in self.tables.items() if caption.startswith(start))


def image_row(dataset='Set_x2', scale=(2, 2), image='a', psnr=30.0, **more):
    metrics = {'psnr': psnr, 'bicubic_psnr': 25.0}
    row = dict(case='test', dataset=dataset, scale=list(scale), image=image, budget=None, cost_weight=None)
    row |= dict(protocol='LR by hand', metric_protocols={'psnr': PROTOCOL}, precision='fp32', metrics=metrics)
    return {**row, 'time_ms': {'total': 10.0}, **more}


MACS = dict(encoder=1000.0, mapper=100.0, tables=200.0, experts=300.0, total=1600.0)
MACS |= dict(dense_folded=1200.0, dense_plain=2400.0, each_expert=[100.0, 500.0])


def results(name, *rows, file=None, network=None, **environment):
    network = network or {'type': 'MoEISR', 'experts': [[8], [8, 8]]}
    counts = {'encoder': 1000, 'mapper': 100, 'shared': 0, 'experts': [50, 250], 'total': 1400}
    model = {'name': name, 'file': file, 'network_g': network, 'parameters': counts}
    return schema.document('test', {**ENVIRONMENT, **environment}, list(rows), model)


@pytest.fixture
def page_of(tmp_path):
    """Documents to the parsed page; documents are written as 0.json, 1.json, ..."""

    def build(*documents, **options):
        return Page(render(collect(read_sources(write(tmp_path, *documents))), **options))

    return build


def write(folder, *documents):
    paths = [folder / f'{place}.json' for place in range(len(documents))]
    for path, document in zip(paths, documents):
        path.write_text(json.dumps(document))
    return paths


def test_means_differences_best_and_bicubic(page_of):
    dense = results('dense', image_row(image='a', psnr=30.0), image_row(image='b', psnr=31.0))
    better = results('moe', image_row(image='a', psnr=30.5), image_row(image='b', psnr=31.1))
    wide = image_row('Set_x2x3.5', (2, 3.5), psnr=28.0)
    page = page_of(dense, {**better, 'rows': better['rows'] + [wide]})
    rows = page.table(f'Set: psnr in dB. {PROTOCOL}')
    assert rows[0][1:3] == ['x2LR by hand; 2 images', 'x2x3.5LR by hand; 1 image']
    assert rows[2:] == [
        ['bicubic', '25.00', '-5.50', '25.00', '–', '[1] [2]'],
        ['dense', '30.50', 'base', '–', '–', '[1]'],
        ['moe', '30.80', '+0.30', '28.00', '–', '[2]'],
    ]
    assert [pair for pair in page.attributes if pair == ('td', 'class', 'best')] == [('td', 'class', 'best')]
    rows = page_of(dense, better, baseline='moe').table('Set: psnr')
    assert [row[2] for row in rows[2:]] == ['-5.80', '-0.30', 'base']


def test_seeds_are_one_row_with_half_the_range(page_of):
    values = {1: 30.0, 2: 30.1, 7: 30.5}
    seeds = [results(f'moe_seed{seed}', image_row(psnr=value)) for seed, value in values.items()]
    rows = page_of(*seeds, results('moe_seeded', image_row(psnr=29.0))).table('Set: psnr')
    assert rows[3] == ['moe', '30.20 ± 0.25 (3)', 'base', '[1] [2] [3]']
    assert rows[4][0] == 'moe_seeded'


def test_controls_are_rows_of_their_own_and_seeds_before_them_are_one(page_of):
    controls = {
        '': ({}, 'moe'),
        '_b0.5': ({'budget': 0.5}, 'moe, budget 0.5'),
        '_cost_weight_2': ({'cost_weight': 2.0}, 'moe, cost weight 2'),
        '_k0.5': ({'cost_weight': 0.5}, 'moe, cost weight 0.5'),
        '_shuffled': ({'shuffle_experts': True}, 'moe_shuffled, shuffled experts'),
        '_bf16': ({'precision': 'bf16'}, 'moe_bf16, bf16'),
        '_0': ({'cost_weight': 0.0}, 'moe_0'),
    }
    runs = [
        results(f'moe_seed{seed}{suffix}', image_row(psnr=30.0 + seed, **control))
        for suffix, (control, _) in controls.items()
        for seed in (1, 2)
    ]
    rows = page_of(*runs).table('Set: psnr')[3:]
    assert [row[:2] for row in rows] == [[label, '31.50 ± 0.50 (2)'] for _, label in controls.values()]


def test_protocols_images_and_inputs_never_mix(page_of):
    """Three files on one dataset that differ in the metric's protocol, the test images, the LR images."""
    other = image_row(psnr=20.0, metric_protocols={'psnr': 'div2k: RGB, shave ceil(s) + 6'})
    images, inputs = image_row(image='z', psnr=40.0), image_row(psnr=41.0, protocol='LR by another')
    page = page_of(results('a', image_row()), results('b', other), results('c', images), results('d', inputs))
    rows = page.table(f'Set: psnr in dB. {PROTOCOL}')
    assert [row[1:7:2] for row in rows[3:]] == [['30.00', '–', '–'], ['–', '40.00', '–'], ['–', '–', '41.00']]
    assert [row[0] for row in page.table('Set: psnr in dB. div2k')[2:]] == ['bicubic', 'b']
    text = ' '.join(page.texts)
    assert 'psnr on Set was measured under 2 protocols' in text and 'different LR images or test images' in text
    old = image_row()
    del old['metric_protocols'], old['protocol']
    assert any('protocol not recorded' in caption for caption in page_of(results('old', old)).tables)


def test_missing_values_and_duplicates_are_said(page_of, tmp_path):
    others = {'case': 'test'}, {'case': 'data-stages'}
    broken = results('a', image_row(image='a', psnr=None), image_row(image='b'), *others)
    twice = results('b', image_row(image='a'), image_row(image='b'))
    again = results('b', image_row(image='a', psnr=35.0), image_row(image='b'))
    page = page_of(broken, twice, again)
    assert [row[1] for row in page.table('Set: psnr')[2:]] == ['25.00', '–', '30.00']
    notes = ' '.join(page.texts)
    missing = 'psnr is missing or not finite for 1 of 2 images'
    for part in (missing, '2 rows are not shown', '1.json and again in', 'with other figures'):
        assert part in notes, part


def test_bicubic_tells_that_images_differ(page_of):
    first, other = image_row(), image_row(metrics={'psnr': 30.0, 'bicubic_psnr': 25.5})
    told = 'from 25.0000 to 25.5000: their images are not the same'
    assert told in ' '.join(page_of(results('a', first), results('b', other)).texts)
    assert 'not the same' not in ' '.join(page_of(results('a', first), results('b', first)).texts)


def test_costs_and_routing(page_of):
    def routed(name, experts, time, peak, share, value):
        routing = {'shares': [1 - share, share], 'texture_correlation': value}
        more = {'time_ms': {'total': time}, 'peak_mib': {'total': peak}, 'routing': routing}
        return image_row(image=name, macs={**MACS, 'experts': experts, 'total': 1300 + experts}, **more)

    rows = routed('a', 300.0, 10.0, 5.0, 0.5, 0.2), routed('b', 500.0, 30.0, 4.0, 1.0, None)
    page = page_of(results('moe', *rows), results('foreign', image_row(), image_row(image='b')))
    row = page.table('Set: thousand multiply-adds')[2]
    # decoder 100 + 200 + 400; of plain 2400: 29.2 %; of folded 1200: 58.3 %; median of two times; largest memory
    assert row == ['moe', '1.0', '0.1', '0.2', '0.4', '0.7', '1.7', '29.2', '58.3', '20.0', '5.0', 'E1']
    assert 'texture 0.20' in page.texts
    assert '75%' in page.texts and '25%' in page.texts  # shares (0.5 + 1) / 2
    # what a reader came for first; no pictures, no section
    assert page.headings == ['Quality', 'Quality against cost', 'Cost', 'Routing', 'Where the figures come from']


def test_shares_of_the_dense_cost_are_of_the_baseline(page_of):
    """Whose own dense decoder is smaller or unknown says nothing of what it costs beside the baseline."""
    dense = results('dense', image_row(macs=MACS))
    small = results('moe', image_row(macs={**MACS, 'dense_plain': 600.0, 'dense_folded': 300.0}))
    for baseline, shares in (('dense', ['25.0', '50.0']), ('moe', ['100.0', '200.0'])):
        rows = page_of(small, dense, baseline=baseline).table('Set: thousand multiply-adds')
        assert [row[7:9] for row in rows[2:]] == [shares, shares]
    rows = page_of(results('foreign', image_row()), dense).table('Set: thousand multiply-adds')
    assert rows[2][7:9] == ['–', '–']  # the baseline's multiply-adds are not known


def test_profiles(page_of):
    row = dict(case='profile', scale=[4, 4], lq_size=[8, 9], size=[32, 36], budget=0.3, macs=MACS)
    row |= dict(time_ms={'encode': 1.0, 'total': 4.0}, peak_mib={'total': None})
    page = page_of({**results('moe', row), 'command': 'profile'})
    cells = page.table('Profiles')[1]
    assert cells[:2] == ['moe, budget 0.3', '8 x 9 to 32 x 36'] and cells[-2:] == ['–', 'E1']
    assert page.headings == ['Cost', 'Where the figures come from']


def test_a_line_connects_the_budgets_of_one_network(tmp_path):
    def budget(value):
        cost = value or 0.5
        return image_row(psnr=30 + cost, macs={**MACS, 'total': 1000 * (1 + cost)}, budget=value)

    given = [('moe', None, 'w'), ('moe_b0.3', 0.3, 'w'), ('renamed', 0.7, 'w'), ('moe_b0.9', 0.3, 'other')]
    documents = [results(name, budget(value), file=file) for name, value, file in given]
    report = collect(read_sources(write(tmp_path, *documents)))
    assert list(report.labels.values()) == ['moe', 'moe, budget 0.3', 'renamed, budget 0.7', 'moe_b0.9, budget 0.3']
    series = list(series_of(report).values())
    assert series[0] == series[1] == series[2] != series[3]
    page = render(report)
    lines = [line.split() for line in re.findall(r'<polyline points="([^"]*)"', page)]
    assert [len(line) for line in lines] == [3, 1, 3, 1]  # against multiply-adds and time
    assert lines[0] == sorted(lines[0], key=lambda pair: float(pair.split(',')[0]))


def test_axis():
    axis = Axis(0.0, 10.0, 50.0, 150.0)
    assert axis.at(5.0) == 100.0
    assert axis.ticks() == [(50, '0'), (70, '2'), (90, '4'), (110, '6'), (130, '8'), (150, '10')]
    assert [text for _, text in Axis(30.05, 30.4, 100.0, 0.0).ticks()] == ['30.1', '30.2', '30.3', '30.4']


def test_networks_of_one_name_are_numbered(page_of):
    other = results('moe', image_row(psnr=31.0), network={'type': 'LIIF'})
    page = page_of(results('moe', image_row()), other, results('bicubic', image_row()))
    assert [row[0] for row in page.table('Set: psnr')[2:]] == ['bicubic', 'moe', 'moe (2)', 'bicubic (2)']


def test_times_of_two_machines_do_not_share_a_chart(page_of):
    page = page_of(results('a', image_row()), results('b', image_row(), threads=8))
    assert [row[0] for row in page.table('Environments')[1:]] == ['E1', 'E2']
    assert {'ms per image, environment E1', 'ms per image, environment E2'} <= set(page.texts)


def test_hostile_names_stay_text(page_of):
    name = '"><script>alert(1)</script>'
    page = page_of(results(name, image_row(name, image=name), network={'type': name}))
    assert not any(entry[0] == 'script' for entry in page.attributes) and name in ' '.join(page.texts)


def test_busiest_window_by_brute_force():
    rng = np.random.default_rng(0)
    truth = np.full((150, 170, 3), 90, np.uint8)
    truth[40:140, 60:165] = rng.integers(0, 256, (100, 105, 3))
    luma = np.pad(truth @ np.array([0.299, 0.587, 0.114]), 1, mode='edge')
    energy = (luma[2:, 1:-1] - luma[:-2, 1:-1]) ** 2 + (luma[1:-1, 2:] - luma[1:-1, :-2]) ** 2
    places = itertools.product(range(0, 150 - SIDE + 1, STRIDE), range(0, 170 - SIDE + 1, STRIDE))
    sums = {(top, left): energy[top : top + SIDE, left : left + SIDE].sum() for top, left in places}
    assert busiest_window(truth) == max(sums, key=sums.get)
    assert busiest_window(truth[:20, :30]) == busiest_window(np.zeros((150, 170, 3), np.uint8)) == (0, 0)


@pytest.fixture(scope='module')
def tested(tmp_path_factory):
    """Folder with the results of a MoE and a dense network, pictures among them."""
    root = tmp_path_factory.mktemp('tested')
    dense = {'network_g': DENSE, 'model_type': 'ArbitraryScaleModel'}
    for name, changes in (('moe', {'val:budget': 0.7}), ('dense', dense)):
        torch.manual_seed(0)
        base = run_yaml(root, **changes)
        sections = {key: base[key] for key in ('model_type', 'num_gpu', 'network_g', 'manual_seed')}
        metrics = {'psnr': {'type': 'calculate_psnr_sr', 'protocol': 'div2k', 'crop_border': 1}}
        val = dict.fromkeys(('save_img', 'save_expert_map', 'save_references', 'bicubic_baseline'), True)
        val |= {'needs_weights': False, 'metrics': metrics, 'budget': base['val'].get('budget')}
        datasets = {'test_1': base['datasets']['val'], 'test_2': base['datasets']['val_2']}
        run_test(parse(root, {**sections, 'name': name, 'datasets': datasets, 'path': {}, 'val': val}, is_train=False))
    return root / 'results'


def test_from_test_to_report(tested, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inputs = [str(tested / 'dense'), str(tested / 'moe' / 'results.json')]
    assert main(['report', *inputs, '-o', 'report.html', '--csv', 'rows.csv', '--images', '2']) == 0
    text = (tmp_path / 'report.html').read_text()
    page = Page(text)
    ends = ['Routing', 'Pictures', 'Where the figures come from']
    assert page.headings == ['Quality', 'Quality against cost', 'Cost', *ends]
    rows = page.table("tiny: psnr in dB. div2k: RGB, shave 1. LR by MATLAB's bicubic; 3 images.")
    assert [row[0] for row in rows[2:]] == ['bicubic', 'dense', 'moe, budget 0.7']
    document = schema.load(tested / 'moe' / 'results.json')
    mean = next(row for row in document['rows'] if row['case'] == 'mean')['metrics']
    assert rows[4][1] == f'{mean["psnr"]:.2f}' and rows[2][1] == f'{mean["bicubic_psnr"]:.2f}'
    # of two images each: whole, truth, bicubic, dense, moe, its experts
    tiles = [entry[2] for entry in page.attributes if entry[:2] == ('img', 'alt')]
    assert tiles == 2 * ['whole image', 'truth', 'bicubic', 'dense', 'moe, budget 0.7', 'experts of moe, budget 0.7']
    shown = [entry[2] for entry in page.attributes if entry[:2] == ('img', 'src')]
    assert all(address.startswith('data:image/') for address in shown)
    truth = np.array(Image.open(BytesIO(base64.b64decode(shown[1].partition(',')[2]))))
    assert np.array_equal(truth, cv2.imread(str(tested.parent / 'val' / '0.png'))[:, :32, ::-1])
    # nothing outside the file; the same bytes again
    assert not re.search(r'(?:src|href)="(?!data:)|url\(|@import|<script|<link', text)
    assert main(['report', *inputs, '-o', 'report.html', '--images', '2', '--overwrite']) == 0
    assert (tmp_path / 'report.html').read_text() == text and not list(tmp_path.glob('.*'))
    assert 'report.html' in capsys.readouterr().out
    lines = list(csv.DictReader((tmp_path / 'rows.csv').open()))
    assert len(lines) == 2 * (6 + 2) and {line['model'] for line in lines} == {'dense', 'moe'}
    first = next(line for line in lines if line['model'] == 'moe')
    assert float(first['routing.shares.1']) == document['rows'][0]['routing']['shares'][1] and first['scale.1'] == '2.0'


def test_pictures_that_do_not_fit_are_left_out(tested, tmp_path):
    document = json.loads((tested / 'dense' / 'results.json').read_text())
    saved = {'result': '', 'truth': '_truth', 'bicubic': '_bicubic'}
    names = {kind: f'visualization/tiny_x2/0_x2{suffix}.png' for kind, suffix in saved.items()}
    assert document['rows'][0]['pictures'] == names
    folder = tmp_path / 'copy'
    folder.mkdir()
    moved = copy.deepcopy(document)
    moved['model']['name'] = 'moved'
    shown_rows = [row for row in moved['rows'] if 'pictures' in row]
    for row in shown_rows:
        row['pictures']['result'] = '../' + row['pictures']['result']
    (folder / 'results.json').write_text(json.dumps(moved))

    def tiles(*paths):
        page = Page(render(collect(read_sources(paths)), max_images=1))
        return [entry[2] for entry in page.attributes if entry[:2] == ('img', 'alt')], ' '.join(page.texts)

    shown, notes = tiles(tested / 'dense', folder)
    assert shown == ['whole image', 'truth', 'bicubic', 'dense'] and 'lies outside its folder' in notes
    shown, notes = tiles(folder)
    assert shown == [] and 'is not there' in notes
    # another truth of the same name is not comparable
    for row in shown_rows:
        row['pictures'] = {'result': 'other.png', 'truth': 'other.png'}
    cv2.imwrite(str(folder / 'other.png'), np.zeros((26, 32, 3), np.uint8))
    (folder / 'results.json').write_text(json.dumps(moved))
    shown, notes = tiles(tested / 'dense', folder)
    assert 'moved' not in shown and 'another truth' in notes
    (folder / 'other.png').write_bytes((folder / 'other.png').read_bytes()[:40])
    shown, notes = tiles(tested / 'dense', folder)
    assert 'moved' not in shown and 'the picture other.png is damaged' in notes


@pytest.mark.parametrize(
    'arguments, part',
    [
        (['none.json', '-o', 'r.html'], 'none.json: cannot read'),
        (['empty', '-o', 'r.html'], 'holds no results.json'),
        (['text.json', '-o', 'r.html'], 'it is no JSON'),
        (['version.json', '-o', 'r.html'], 'results.version: 2 is not one of [1]'),
        (['good.json'], '-o OUT.html'),
        (['good.json', '-o', 'r.html', '--images', '-1'], '0 or more; got -1'),
        (['good.json', './good.json', '-o', 'r.html'], 'given twice'),
        (['loader.json', '-o', 'r.html'], 'no rows of'),
        (['good.json', '-o', 'r.html', '--baseline', 'desne'], "Did you mean 'dense'"),
    ],
)
def test_mistakes_are_one_line(arguments, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'empty').mkdir()
    good = results('dense', image_row())
    documents = {'good': good, 'version': {**good, 'version': 2}, 'loader': results('dense', {'case': 'data-stages'})}
    for name, document in documents.items():
        (tmp_path / f'{name}.json').write_text(json.dumps(document))
    (tmp_path / 'text.json').write_text('hello')
    assert main(['report', *arguments]) == 2
    error = capsys.readouterr().err
    assert part in error and error.count('\n') == 1 and not (tmp_path / 'r.html').exists()
    assert json.loads((tmp_path / 'good.json').read_text()) == good


def test_references_in_training_are_not_written(tmp_path):
    opt = parse(tmp_path, run_yaml(tmp_path, **{'val:save_references': True}))
    opt |= {'dist': False, 'rank': 0, 'world_size': 1}
    build_model(opt).validate(evaluation_loaders(opt, ('val',)), 1, None, save_img=True)
    names = {path.name for path in (tmp_path / 'experiments').rglob('*.png')}
    assert names and not any('truth' in name or 'bicubic' in name for name in names)
