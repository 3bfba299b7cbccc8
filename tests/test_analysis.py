"""Closed forms against independent counters, statistics against slow truths, and the format of results."""

import itertools
import json
import math

import numpy as np
import pytest
import reference
import scipy.stats
import torch
from mmengine.analysis import FlopAnalyzer, parameter_count
from mmengine.analysis.jit_handles import addmm_flop_jit
from moeisr_basicsr.core.queries import make_queries
from PIL import ImageColor
from torch import nn

from moeisr_basicsr.analysis import measure, schema
from moeisr_basicsr.analysis.chart import COLOURS, Bar, Panel, draw_chart, nice_step
from moeisr_basicsr.analysis.complexity import (
    decoder_macs,
    dense_folded_macs,
    dense_plain_macs,
    encoder_macs,
    heaviest,
    parameters,
    plain_query_macs,
)
from moeisr_basicsr.analysis.environment import environment
from moeisr_basicsr.analysis.plain import expert_mlp, plain_image, plain_mixture, plain_pixels
from moeisr_basicsr.analysis.rendering import clustered_map, render_fixed
from moeisr_basicsr.analysis.routing_stats import depth_correlation, expert_loads, gradient_energy, mean_cost, spearman
from moeisr_basicsr.analysis.train_steps import TrainSteps
from moeisr_basicsr.analysis.training import PARTS, PartClock, make_batch, profile_training
from moeisr_basicsr.archs.edsr_encoder_arch import EDSREncoder
from moeisr_basicsr.archs.moeisr_arch import LIIF, LTE, MoEISR
from moeisr_basicsr.archs.rdn_encoder_arch import RDNEncoder
from moeisr_basicsr.archs.swinir_encoder_arch import SwinIREncoder
from moeisr_basicsr.core import MoEDecoder, make_cell
from moeisr_basicsr.core.coords import make_corners
from moeisr_basicsr.errors import UserError

EXPERTS = {
    'liif': [[16], [24, 16], [16, 32, 8], [32, 16, 24, 16]],
    'lte': [[], [24], [16, 32], [24, 16, 8]],
    'shared': [[16], [16, 24], [16, 32, 8], [16, 16, 24, 16]],
    'nested': [[16], [16, 24], [16, 24, 8], [16, 24, 8, 16]],
}
OPTIONS = {'liif': {}, 'lte': {'hidden_dim': 32}, 'shared': {'shared_layers': 1}, 'nested': {'shared_layers': 4}}
PUBLISHED = {'size': (720, 1280), 'lq_size': (180, 320)}  # of the published decoder costs
ENCODER = {'type': 'EDSREncoder', 'num_feat': 8, 'num_block': 1}


def small(family, channels=8):
    """`family` may also be 'shared', LIIF with one first layer for all experts, or 'nested', with all hidden layers."""
    mapper = {'num_layers': 2, 'num_feat': 12, 'hidden': 10}
    return MoEDecoder(
        channels, 3, 'lte' if family == 'lte' else 'liif', EXPERTS[family], mapper, **OPTIONS[family]
    ).eval()


class Call(nn.Module):
    """Any function of one tensor as a module that mmengine can trace."""

    def __init__(self, function, *owners):
        super().__init__()
        self.function = function
        self.owners = nn.ModuleList(owners)

    def forward(self, x):
        return self.function(x)


def mmengine_macs(module, x):
    """Multiply-adds by kind of operation."""
    counter = FlopAnalyzer(module, x).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    counter.set_op_handle('aten::addmm_', addmm_flop_jit)
    return {name: int(value) for name, value in counter.by_operator().items()}


def test_published_decoder_costs():
    liif = MoEDecoder(64, 3, 'liif', [[256] * 4])
    lte = MoEDecoder(64, 3, 'lte', [[256] * 3])
    assert round(plain_query_macs(liif, 0) / 1e3) == 1383
    assert round(plain_query_macs(lte, 0) / 1e3) == 791
    # 'LIIF folded' as published: the feature inputs taken out of the first layer, nothing else changed
    assert round((plain_query_macs(liif, 0) - 4 * 576 * 256) / 1e3) == 794
    at_lr = 9 * 64 * 256 / 16
    assert dense_folded_macs(liif, **PUBLISHED) == 4 * (2 * 256 + 3 * 256 * 256) + 256 * 3 + at_lr
    assert dense_plain_macs(liif, **PUBLISHED) == plain_query_macs(liif, 0)
    assert dense_plain_macs(lte, **PUBLISHED) == plain_query_macs(lte, 0) + 2 * at_lr
    assert round(encoder_macs(EDSREncoder(), PUBLISHED['lq_size']) / 1e9) == 70


@pytest.mark.parametrize('family', list(EXPERTS))
def test_plain_costs_against_mmengine(family):
    decoder = small(family)
    for j in range(4):
        x = torch.rand(7, decoder.pool.linears(j)[0].in_features)
        count = mmengine_macs(Call(lambda x, j=j: expert_mlp(decoder, j, x), decoder), x)['linear']
        if family == 'lte':
            count += mmengine_macs(decoder.pool.phase, torch.rand(7, 2))['linear']
        assert plain_query_macs(decoder, j) * 7 == 4 * count


@pytest.mark.parametrize('family', list(EXPERTS))
def test_folded_costs_against_mmengine(family):
    decoder, feat = small(family), torch.rand(1, 8, 5, 6)
    pool = decoder.pool
    tables = mmengine_macs(Call(lambda x: torch.cat(pool.tables(x), dim=-1), pool), feat)
    assert tables == {'conv': pool.table_macs() * 5 * 6}
    with torch.no_grad():
        built = [table[0] for table in pool.tables(feat)]
    count = 11
    queries = make_queries(make_corners(torch.rand(1, count, 2), (5, 6)), torch.tensor([[0.3, 0.4]]))
    for j in range(4):
        with torch.no_grad():
            counted = mmengine_macs(
                Call(lambda rel, j=j: pool.evaluate(j, built, queries._replace(rel=rel)), pool), queries.rel
            )
        linear = sum(counted.get(kind, 0) for kind in ('linear', 'conv', 'addmm_'))
        if family != 'lte':
            # the cell is two more inputs here; whole images keep it in the bias, and that is what is counted
            linear -= 2 * 4 * count * pool.linears(j)[0].out_features
        else:
            linear -= pool.phase.weight.numel()  # once per image
            linear += 4 * count * pool.hidden_dim  # frequency times coordinate: elementwise, mmengine leaves it out
        assert pool.macs(j) * count == linear
        last = pool.linears(j)[-1].in_features
        assert counted['bmm'] == 4 * last * count  # the blend, which the docstring says is not counted


def test_mapper_costs_against_mmengine():
    mapper = small('liif').mapper
    feat = torch.rand(1, 8, 5, 6)
    assert mmengine_macs(Call(mapper.table, mapper), feat) == {'conv': mapper.table_macs() * 5 * 6}
    coord, cell, count = torch.rand(1, 9, 2), torch.full((1, 9, 2), 0.1), 9
    with torch.no_grad():
        counted = mmengine_macs(Call(lambda table: mapper(table, coord, cell, (5, 6)), mapper), mapper.table(feat))
    # the cell's two inputs are constant for an image and not counted
    assert sum(counted.values()) - 2 * 10 * count == mapper.macs() * count


@pytest.mark.parametrize(
    'encoder',
    [
        EDSREncoder(num_feat=12, num_block=2),
        RDNEncoder(num_feat=12, num_block=2, num_conv=3, growth=8),
        SwinIREncoder(embed_dim=24, depths=(2, 1), num_heads=(2, 2), window_size=4),
    ],
    ids=['edsr', 'rdn', 'swinir'],
)
def test_encoder_macs_against_mmengine(encoder):
    encoder.eval()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    for size in ((16, 24), (13, 9)):
        counted = mmengine_macs(encoder, torch.rand(1, 3, *size))
        kinds = ('conv', 'linear', 'matmul', 'addmm')
        assert encoder_macs(encoder, size) == sum(counted.get(kind, 0) for kind in kinds)
    assert all(value.device.type == 'cpu' and value.equal(before[key]) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize(
    'net',
    [
        MoEISR(ENCODER, 'liif', EXPERTS['liif']),
        LIIF(ENCODER, [16, 16]),
        MoEISR(ENCODER, 'liif', EXPERTS['shared'], shared_layers=1),
        MoEISR(ENCODER, 'liif', [[8], [8, 6]], shared_layers=2),
        MoEISR(ENCODER, 'lte', EXPERTS['lte'], hidden_dim=32),
        LTE(ENCODER, [16], 32),
    ],
    ids=['moe-liif', 'liif', 'moe-shared', 'moe-nested', 'moe-lte', 'lte'],
)
def test_parameters_against_mmengine(net):
    ours, theirs = parameters(net), parameter_count(net)
    assert ours.total == theirs[''] == ours.encoder + ours.mapper + ours.shared + sum(ours.experts)
    assert ours.encoder == theirs['encoder'] and ours.mapper == theirs.get('decoder.mapper', 0)
    assert ours.experts == [theirs[f'decoder.pool.experts.{j}'] for j in range(net.num_experts)]


def test_sum_per_pixel_at_unequal_scales():
    decoder = small('liif')
    counts = decoder_macs(decoder, (10, 20), (25, 70))
    loads = [0.1, 0.2, 0.3, 0.4]
    cells, pixels = 200, 1750
    whole = cells * (decoder.mapper.table_macs() + decoder.pool.table_macs())
    whole += pixels * (decoder.mapper.macs() + sum(p * m for p, m in zip(loads, decoder.expert_macs)))
    assert counts.total(loads) == pytest.approx(whole / pixels, rel=1e-12)
    assert heaviest(decoder) == max(range(4), key=lambda j: decoder.expert_macs[j])
    for wrong in ([0.5, 0.5], [0.5, 0.5, 0.5, -0.5], [0.1, 0.1, 0.1, 0.1]):
        with pytest.raises(ValueError, match='loads'):
            counts.total(wrong)


@pytest.mark.parametrize('family', ['liif', 'lte', 'shared'])
def test_plain_decoders_against_reference(family):
    decoder, feat, size = small(family), torch.randn(1, 8, 6, 5), (18, 13)
    coord, cell = reference.grid(size)
    expected = [reference.FAMILIES[decoder.family](decoder.pool, j, feat, coord, cell).detach() for j in range(4)]
    for j in range(4):
        actual = plain_image(decoder, j, feat, size, make_cell(size), chunk=50)
        assert torch.allclose(actual, expected[j], atol=1e-6)
    part = plain_image(decoder, 3, feat, size, make_cell(size), chunk=50, max_chunks=2)
    assert part.shape[1] == 100 and torch.allclose(part, expected[3][:, :100], atol=1e-6)
    pixels, experts = torch.tensor([0, 17, 233, 40]), torch.tensor([3, 0, 1, 0])
    actual = plain_pixels(decoder, feat, size, make_cell(size), pixels, experts)
    chosen = torch.stack([expected[j][0, at] for at, j in zip(pixels.tolist(), experts.tolist())])
    assert torch.allclose(actual, chosen, atol=1e-6)
    gates = torch.rand(1, coord.shape[1], 4)
    mixed = plain_mixture(decoder, feat, coord, cell, gates)
    assert torch.allclose(mixed, sum(gates[..., j : j + 1] * expected[j] for j in range(4)), atol=1e-6)


@pytest.mark.parametrize('family', ['liif', 'lte'])
@pytest.mark.parametrize('with_mapper', [False, True])
def test_given_map_is_rendered(family, with_mapper):
    decoder, feat, size = small(family), torch.randn(1, 8, 9, 40), (27, 100)  # two tiles side by side
    expert_map = torch.randint(4, size, dtype=torch.uint8)
    output = render_fixed(decoder, feat, size, expert_map, with_mapper=with_mapper)
    expected = plain_pixels(decoder, feat, size, make_cell(size), torch.arange(27 * 100), expert_map.flatten().long())
    assert torch.allclose(output.flatten(1).t(), expected, atol=1e-5)


def test_clustered_map():
    loads, size = [0.5, 0.25, 0.15, 0.1], (90, 70)
    expert_map = clustered_map(size, (30, 20), loads)
    counts = torch.bincount(expert_map.flatten().long(), minlength=4)
    assert all(abs(int(count) - load * 6300) <= 1 for count, load in zip(counts, loads))
    same = (expert_map[:, 1:] == expert_map[:, :-1]).double().mean()
    shuffled = expert_map.flatten()[torch.randperm(6300)].view(size)
    assert same > 0.9 > (shuffled[:, 1:] == shuffled[:, :-1]).double().mean()
    assert expert_map.equal(clustered_map(size, (30, 20), loads)) and clustered_map((4, 4), (2, 2), [1.0]).sum() == 0


def test_spearman_against_scipy():
    for count, values in itertools.product((5, 200), (3, 1000)):
        a, b = torch.randint(values, (count,)).double(), torch.randn(count).double()
        assert spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)
    assert spearman(torch.ones(4), torch.randn(4)) is None


def test_gradient_energy_against_loops():
    image, window = torch.rand(3, 6, 7), 3
    luma = np.tensordot([0.299, 0.587, 0.114], image.double().numpy(), 1)
    energy = np.zeros((6, 7))
    for r, c in np.ndindex(6, 7):
        row = luma[min(r + 1, 5), c] - luma[max(r - 1, 0), c]
        col = luma[r, min(c + 1, 6)] - luma[r, max(c - 1, 0)]
        energy[r, c] = (row**2 + col**2) / 4
    mean = np.zeros((6, 7))
    for r, c in np.ndindex(6, 7):
        mean[r, c] = np.mean(
            [energy[min(max(r + i, 0), 5), min(max(c + j, 0), 6)] for i in (-1, 0, 1) for j in (-1, 0, 1)]
        )
    assert np.allclose(gradient_energy(image, window), mean, atol=1e-6)
    with pytest.raises(ValueError, match='odd'):
        gradient_energy(image, 4)


def test_depth_follows_texture():
    image = torch.full((3, 40, 60), 0.5)
    image[:, :, 30:] += 0.3 * torch.rand(40, 30)  # texture on the right
    expert_map = torch.zeros(40, 60, dtype=torch.uint8)
    expert_map[:, 30:] = 2
    assert depth_correlation(expert_map, image, [1, 2, 4]) > 0.8
    assert depth_correlation(expert_map, image, [4, 2, 1]) < -0.8  # depth counts, not the expert's number
    assert abs(depth_correlation(expert_map.flatten()[torch.randperm(2400)].view(40, 60), image, [1, 2, 4])) < 0.1
    assert depth_correlation(torch.zeros_like(expert_map), image, [1, 2, 4]) is None


def test_loads_and_mean_cost():
    decoder = small('lte')
    expert_map = torch.tensor([[0, 0, 1, 3], [0, 2, 3, 3]], dtype=torch.uint8)
    loads = expert_loads(expert_map, 4)
    assert loads == [3 / 8, 1 / 8, 1 / 8, 3 / 8]
    chosen = sum(decoder.expert_macs[j] for j in expert_map.flatten().tolist())
    assert mean_cost(loads, decoder.expert_costs) == pytest.approx(chosen / 8 / max(decoder.expert_macs), rel=1e-6)
    with pytest.raises(ValueError, match='names expert 3'):
        expert_loads(expert_map, 3)


def results():
    row = {
        'case': 'test',
        'scale': [2, 3.5],
        'lq_size': [5, 6],
        'metrics': {'psnr_y': 30.5, 'psnr': math.inf},
        'routing': {'loads': [0.25, 0.75], 'mean_cost': 0.5},
        'macs': {'total': 7.5, 'each_expert': [1, 2]},
    }
    model = {'name': 'm', 'file': None, 'network_g': {'any': ['thing']}, 'parameters': {'total': 3, 'experts': [1, 2]}}
    return schema.document('test', environment('torch'), [row], model)


def test_results_are_written_and_read(tmp_path):
    path = tmp_path / 'results.json'
    schema.save(path, results())
    read = schema.load(path)
    expected = results()
    expected['rows'][0]['metrics']['psnr'] = None
    assert read == expected
    json.loads(json.dumps(schema.SCHEMA))  # plain JSON
    documented = set(schema.SCHEMA['properties']['rows']['items']['properties'])
    assert all(f'`{key}`' in schema.__doc__ for key in documented)


@pytest.mark.parametrize(
    'break_it, message',
    [
        (lambda r: r.pop('rows'), "lacks 'rows'"),
        (lambda r: r.update(version=2), 'results.version must be 1'),
        (lambda r: r['rows'][0].update(psnr=3), "results.rows\\[0\\] has the unknown key 'psnr'"),
        (lambda r: r['rows'][0].update(scale=[2]), 'scale must have 2 entries'),
        (lambda r: r['rows'][0].update(size=[0, 5]), 'size\\[0\\] must be at least 1'),
        (lambda r: r['rows'][0]['macs'].update(total='7'), 'macs.total must be number; got str'),
        (lambda r: r['rows'][0].update(repeats=True), 'repeats must be integer'),
        (lambda r: r['environment'].pop('cpu'), "environment lacks 'cpu'"),
    ],
)
def test_wrong_results_are_named(tmp_path, break_it, message):
    broken = results()
    break_it(broken)
    with pytest.raises(ValueError, match=message):
        schema.save(tmp_path / 'a.json', broken)
    assert not (tmp_path / 'a.json').exists()
    (tmp_path / 'b.json').write_text(json.dumps(broken))
    with pytest.raises(UserError, match=f'b.json: .*{message}'):
        schema.load(tmp_path / 'b.json')


def test_unreadable_results(tmp_path):
    (tmp_path / 'cut.json').write_text('{"format": "moe')
    with pytest.raises(UserError, match='cut.json.*no JSON'):
        schema.load(tmp_path / 'cut.json')
    with pytest.raises(UserError, match='missing.json'):
        schema.load(tmp_path / 'missing.json')


def test_environment_fits_the_schema():
    assert schema.problems(environment('torch', 'cpu'), schema.SCHEMA['properties']['environment']) == []


def test_peak_memory_sees_what_was_freed():
    device = torch.device('cpu')
    peak = measure.peak_mib(lambda: torch.ones(48 << 18).sum(), device)  # 48 MiB, gone at the end
    if peak is None:
        pytest.skip('this system does not say how much memory a process used')
    assert 47 <= peak <= 60
    assert measure.peak_mib(lambda: torch.ones(16).sum(), device) < 8


def test_cases_take_turns():
    calls = []
    times = measure.interleaved_ms({name: (lambda n=name: calls.append(n)) for name in 'ab'}, 2, torch.device('cpu'))
    assert ''.join(calls) == 'ababab' and set(times) == {'a', 'b'}


def test_part_clock_counts_inner_parts_once(monkeypatch):
    now = itertools.count()
    monkeypatch.setattr('moeisr_basicsr.analysis.training.time.perf_counter', lambda: next(now))
    clock = PartClock(torch.device('cpu'))
    with clock.part('outer'):  # the clock is read twice at each edge; in between pass 1000 ms
        with clock.part('inner'), clock.part('outer'):
            pass
        with clock.part('inner'):
            pass
    assert clock.times == {'outer': 4000.0, 'inner': 3000.0}


def test_training_profile_names_its_parts_and_restores_the_network():
    net = MoEISR(ENCODER, 'liif', EXPERTS['liif'], {'num_layers': 1, 'num_feat': 8, 'hidden': 8}).eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    rows = profile_training(net, make_batch(net, batch_size=2, patch=8, queries=20), repeats=1)
    assert [row['case'] for row in rows] == ['train-exact', 'train-naive', 'train-sampled']
    assert schema.problems(rows, schema.SCHEMA['properties']['rows']) == []
    for row in rows:
        times = row['time_ms']
        assert times['total'] == pytest.approx(sum(times[part] for part in PARTS))
        assert (times['unchosen_experts'] == 0) == (row['case'] == 'train-naive')
        assert all(times[part] > 0 for part in PARTS if part != 'unchosen_experts')
    assert all(value.equal(before[key]) for key, value in net.state_dict().items())
    assert not net.training and net.decoder.expert_grad == 'exact'
    assert all(parameter.grad is None for parameter in net.parameters())
    assert 'forward' not in vars(net.encoder) and 'evaluate' not in vars(net.decoder.pool)
    dense = LIIF(ENCODER, [16, 16])
    rows = profile_training(dense, make_batch(dense, 2, 8, 20), repeats=1)
    assert [row['case'] for row in rows] == ['train-dense'] and rows[0]['time_ms']['mapper'] == 0 and dense.training


@pytest.mark.parametrize('family', ['liif', 'lte'])
def test_training_forms_agree(family):
    steps = TrainSteps(small(family), batch=2, patch=9, queries=60)
    for form in ('exact', 'naive'):
        output, gradient = steps.compare(form)
        assert output < 1e-5 and gradient < 1e-4
    output, gradient = steps.compare('sampled')  # an estimate: the output is exact, the gradient is not
    assert output < 1e-5 and gradient > 1e-3
    with torch.no_grad():
        steps.decoder.pool.experts[0].linears[-1].bias += 1
    expected = steps.run('plain-naive')[0]
    with torch.no_grad():
        steps.decoder.pool.experts[0].linears[-1].bias -= 1
    assert not torch.allclose(steps.run('exact')[0], expected, atol=1e-3)  # the comparison can fail


def test_chart_bars_have_their_lengths():
    image = draw_chart([Panel('t', [Bar('one', {'a': 30.0, 'b': 10.0}), Bar('two', {'a': 0.0, 'b': 20.0})])])
    pixels = np.asarray(image)
    lengths = {}
    for name, colour in zip('ab', COLOURS):
        rows = (pixels == ImageColor.getrgb(colour)).all(-1).sum(1)
        lengths[name] = sorted({int(n) for n in rows if n > 20})  # the legend's squares are 14 wide
    assert len(lengths['a']) == 1 and len(lengths['b']) == 2
    unit = lengths['a'][0] / 30
    assert lengths['b'] == [pytest.approx(10 * unit, abs=2), pytest.approx(20 * unit, abs=2)]
    assert [nice_step(value) for value in (1, 4.9, 1000, 0.003)] == pytest.approx([0.2, 1, 200, 0.001])
    assert draw_chart([Panel('nothing', [Bar('zero', {'a': 0.0})])]).size[0] == image.size[0]
