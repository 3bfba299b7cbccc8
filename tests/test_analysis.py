"""Closed forms against independent counters, statistics against slow truths, and the format of results."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from jsonschema import Draft202012Validator
from mmengine.analysis import FlopAnalyzer
from mmengine.analysis.jit_handles import addmm_flop_jit
from torch import nn

from moeisr_basicsr.analysis import schema
from moeisr_basicsr.analysis.complexity import (
    decoder_macs,
    dense_folded_macs,
    dense_plain_macs,
    encoder_macs,
    most_expensive,
    parameters,
    plain_query_macs,
)
from moeisr_basicsr.analysis.environment import environment
from moeisr_basicsr.analysis.measure import PeakMeter, StageClock
from moeisr_basicsr.analysis.routing_stats import depth_correlation, expert_shares, gradient_energy, lr_reads, mean_cost
from moeisr_basicsr.archs.edsr_encoder_arch import EDSREncoder
from moeisr_basicsr.archs.moeisr_arch import LIIF, LTE, MoEISR
from moeisr_basicsr.archs.rdn_encoder_arch import RDNEncoder
from moeisr_basicsr.archs.swinir_encoder_arch import SwinIREncoder
from moeisr_basicsr.core import MoEDecoder
from moeisr_basicsr.core.coords import make_corners, make_near, make_queries
from moeisr_basicsr.errors import UserError
from moeisr_basicsr.options import read_yaml
from moeisr_basicsr.tools.profile.rendering import clustered_map

EXPERTS = {
    'liif': [[16], [24, 16], [16, 32, 8], [32, 16, 24, 16]],
    'lte': [[8], [24], [16, 32], [24, 16, 8]],
    'shared': [[16], [16, 24], [16, 32, 8], [16, 16, 24, 16]],
    'nested': [[16], [16, 24], [16, 24, 8], [16, 24, 8, 16]],
}
LM = [{'latent': [], 'depth': 1}, [], {'latent': [14], 'depth': 3}, {'latent': [9, 12], 'depth': 2}]
OPTIONS = {'liif': {}, 'lte': {'hidden_dim': 32}, 'shared': {'shared_layers': 1}, 'nested': {'shared_layers': 4}}
PUBLISHED = {'size': (720, 1280), 'lq_size': (180, 320)}  # of the published decoder costs
ENCODER = {'type': 'EDSREncoder', 'num_feat': 8, 'num_block': 1}


def small(family, channels=8):
    """`family` may also be 'shared', LIIF with one first layer for all experts, or 'nested', with all hidden layers."""
    mapper = {'num_layers': 2, 'num_feat': 12}
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
    lm = MoEDecoder(64, 3, 'lm', [{'latent': [208], 'depth': 6}])
    assert round(plain_query_macs(liif, 0) / 1e3) == 1383
    assert round(plain_query_macs(lte, 0) / 1e3) == 791
    # 'LIIF folded' as published: the feature inputs taken out of the first layer, nothing else changed
    assert round((plain_query_macs(liif, 0) - 4 * 576 * 256) / 1e3) == 794
    at_lr = 9 * 64 * 256 / 16
    assert dense_folded_macs(liif, **PUBLISHED) == 4 * (2 * 256 + 3 * 256 * 256) + 256 * 3 + at_lr
    assert dense_plain_macs(liif, **PUBLISHED) == plain_query_macs(liif, 0)
    assert dense_plain_macs(lte, **PUBLISHED) == plain_query_macs(lte, 0) + 2 * at_lr
    assert plain_query_macs(lm, 0) == 4 * (20 * 16 + 5 * 16 * 16 + 16 * 3) == 6592
    assert dense_plain_macs(lm, **PUBLISHED) == 6592 + (578 * 208 + 208 * 208) / 16 == 16810
    # the cell in the bias, the last layer after the blend
    assert dense_folded_macs(lm, **PUBLISHED) == 4 * (18 * 16 + 5 * 16 * 16) + 16 * 3 + (576 * 208 + 208 * 208) / 16
    assert round(encoder_macs(EDSREncoder(), PUBLISHED['lq_size']) / 1e9) == 70


@pytest.mark.parametrize('family', list(EXPERTS))
def test_plain_costs_against_mmengine(family):
    decoder = small(family)
    for j in range(4):
        x = torch.rand(7, decoder.pool.linears(j)[0].in_features)
        count = mmengine_macs(Call(lambda x, j=j: reference.mlp(decoder, j, x), decoder), x)['linear']
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
                Call(lambda rel, j=j: pool.predict(j, queries._replace(rel=rel), built), pool), queries.rel
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


def test_lm_costs_against_mmengine():
    """On all LR pixels and on those that are read; an expert without layers costs nothing."""
    decoder = MoEDecoder(8, 3, 'lm', LM, {'num_layers': 1, 'num_feat': 4}, render_width=6)
    pool, feat, cell_lr = decoder.pool, torch.rand(1, 8, 5, 6), torch.tensor([[[0.3, 0.4]]])
    reads = torch.zeros(4, 1, 30, dtype=torch.bool)
    for j, count in enumerate((30, 4, 11, 17)):
        reads[j, 0, torch.randperm(30)[:count]] = True
    w_cell = sum(2 * pool.latent_linears(j)[0].out_features for j in (0, 2, 3))  # once per image
    layers = torch.tensor([8 * 9 * 18, 0, 8 * 9 * 14 + 14 * 42, 8 * 9 * 9 + 9 * 12 + 12 * 30])
    for read, shares in ((None, torch.ones(4)), (reads, reads.double().mean(dim=(1, 2)))):

        def build(x, read=read):
            return torch.cat([table.flatten() for table in pool.tables(x, 1, cell_lr, read)])

        with torch.no_grad():
            built = mmengine_macs(Call(build, pool), feat)
        macs = pool.table_macs(None if read is None else shares.tolist())
        assert macs == pytest.approx(float((shares * layers).sum()))
        assert sum(built.values()) - w_cell == pytest.approx(30 * macs)
    with torch.no_grad():
        tables = [table[0] for table in pool.tables(feat, 1, cell_lr)]
    queries = make_queries(make_corners(torch.rand(1, 11, 2), (5, 6)), cell_lr[0])
    for j in range(4):
        with torch.no_grad():
            counted = mmengine_macs(
                Call(lambda rel, j=j: pool.predict(j, queries._replace(rel=rel), tables), pool), queries.rel
            )
        cell = 2 * 4 * 6 * 11 if LM[j] else 0  # two more inputs here
        assert sum(counted.get(kind, 0) for kind in ('linear', 'conv')) - cell == 11 * pool.macs(j)
    assert (pool.macs(1), pool.own_table_macs(1), pool.cost(1), decoder.depths[1]) == (0, 0, 0, 0)
    assert decoder.expert_costs[1] == 0 and most_expensive(decoder) == 2


def test_lm_experts_count_where_they_are_read():
    decoder = MoEDecoder(8, 3, 'lm', LM, {'num_layers': 1, 'num_feat': 4}, render_width=6)
    expert_map = torch.randint(0, 3, (11, 17), dtype=torch.uint8)
    expert_map[:, 9:] = 3
    corners = make_corners(reference.grid((11, 17))[0], (4, 6))
    found = lr_reads(decoder, expert_map, (4, 6))
    for j in range(4):
        read = {
            int(at) for query in range(187) if expert_map.flatten()[query] == j for at in corners.index[:, 0, query]
        }
        assert 0 < len(read) < 24 and found[j] == pytest.approx(len(read) / 24)
    counts = decoder_macs(decoder, (4, 6), (11, 17), found)
    assert counts.tables == pytest.approx(
        sum(p * decoder.pool.own_table_macs(j) for j, p in enumerate(found)) * 24 / 187
    )
    assert lr_reads(small('liif'), expert_map, (4, 6)) is None


def test_the_lm_recipe_costs_ten_thousand_macs():
    """Behind the encoder, mapper counted, at the shares that the recipe balances to, in patches as texture comes."""
    options = read_yaml(Path(__file__).resolve().parents[1] / 'options/moeisr_lm_edsr.yml').data
    network, target = options['network_g'], options['train']['balance_opt']['target']
    decoder = MoEDecoder(64, 3, 'lm', network['experts'], network['mapper'], render_width=network['render_width'])
    reads = lr_reads(decoder, clustered_map(PUBLISHED['size'], PUBLISHED['lq_size'], target), PUBLISHED['lq_size'])
    counts = decoder_macs(decoder, **PUBLISHED, reads=reads)
    assert 8e3 < counts.total(target) < 10e3 and counts.mapper < 1.5e3


def test_mapper_costs_against_mmengine():
    mapper = small('liif').mapper
    feat = torch.rand(1, 8, 5, 6)
    assert mmengine_macs(Call(mapper.table, mapper), feat) == {'conv': mapper.table_macs() * 5 * 6}
    coord, cell, count = torch.rand(1, 9, 2), torch.full((1, 9, 2), 0.1), 9
    with torch.no_grad():
        counted = mmengine_macs(
            Call(lambda table: mapper(table, make_near(coord, (5, 6)), cell), mapper), mapper.table(feat)
        )
    # the cell's two inputs are constant for an image and not counted
    assert sum(counted.values()) - 2 * 12 * count == mapper.macs() * count


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
        MoEISR(ENCODER, 'lm', LM),
    ],
    ids=['moe-liif', 'liif', 'moe-shared', 'moe-nested', 'moe-lte', 'lte', 'moe-lm'],
)
def test_parameters_against_the_modules(net):
    def count(*modules):
        return sum(value.numel() for module in modules for value in module.parameters())

    ours, decoder = parameters(net), net.decoder
    assert ours['total'] == count(net) == ours['encoder'] + ours['mapper'] + ours['shared'] + sum(ours['experts'])
    assert ours['encoder'] == count(net.encoder)
    assert ours['mapper'] == (0 if decoder.mapper is None else count(decoder.mapper))
    assert ours['experts'] == [count(expert) for expert in decoder.pool.experts]


def test_sum_per_pixel_at_unequal_scales():
    decoder = small('liif')
    counts = decoder_macs(decoder, (10, 20), (25, 70))
    shares = [0.1, 0.2, 0.3, 0.4]
    codes, pixels = 200, 1750
    whole = codes * (decoder.mapper.table_macs() + decoder.pool.table_macs())
    whole += pixels * (decoder.mapper.macs() + sum(p * m for p, m in zip(shares, decoder.expert_macs)))
    assert counts.total(shares) == pytest.approx(whole / pixels, rel=1e-12)
    assert most_expensive(decoder) == max(range(4), key=lambda j: decoder.expert_macs[j])
    for wrong in ([0.5, 0.5], [0.5, 0.5, 0.5, -0.5], [0.1, 0.1, 0.1, 0.1]):
        with pytest.raises(ValueError, match='4 shares that add up to 1'):
            counts.total(wrong)


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


def test_shares_and_mean_cost():
    decoder = small('lte')
    expert_map = torch.tensor([[0, 0, 1, 3], [0, 2, 3, 3]], dtype=torch.uint8)
    shares = expert_shares(expert_map, 4)
    assert shares == [3 / 8, 1 / 8, 1 / 8, 3 / 8]
    chosen = sum(decoder.expert_macs[j] for j in expert_map.flatten().tolist())
    assert mean_cost(shares, decoder.expert_costs) == pytest.approx(chosen / 8 / max(decoder.expert_macs), rel=1e-6)
    with pytest.raises(ValueError, match='names expert 3'):
        expert_shares(expert_map, 3)


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
    Draft202012Validator.check_schema(schema.SCHEMA)
    (tmp_path / 'nan.json').write_text(json.dumps(results()))  # as other programs write it: Infinity
    assert schema.load(tmp_path / 'nan.json') == expected


@pytest.mark.parametrize(
    'break_it, message',
    [
        (lambda r: r.pop('rows'), "results: 'rows' is a required property"),
        (lambda r: r.update(version=2), 'results.version: 2 is not one of \\[1\\]'),
        (lambda r: r['rows'][0].update(psnr=3), "results.rows\\[0\\]: .*'psnr' was unexpected"),
        (lambda r: r['rows'][0].update(scale=[2]), 'scale: \\[2\\] is too short'),
        (lambda r: r['rows'][0].update(size=[0, 5]), 'size\\[0\\]: 0 is less than the minimum of 1'),
        (lambda r: r['rows'][0]['macs'].update(total='7'), "macs.total: '7' is not of type 'number'"),
        (lambda r: r['rows'][0].update(repeats=True), "repeats: True is not of type 'integer'"),
        (lambda r: r['environment'].pop('cpu'), "results.environment: 'cpu' is a required property"),
        (lambda r: r.update(rows={'a': 'long ' * 1000}), "results.rows: .* is not of type 'array'"),
    ],
)
def test_wrong_results_are_named(tmp_path, break_it, message):
    broken = results()
    break_it(broken)
    with pytest.raises(ValueError, match=message) as error:
        schema.save(tmp_path / 'a.json', broken)
    assert not (tmp_path / 'a.json').exists() and len(str(error.value)) < 300
    (tmp_path / 'b.json').write_text(json.dumps(broken))
    with pytest.raises(UserError, match=f'b.json: .*{message}'):
        schema.load(tmp_path / 'b.json')


def test_unreadable_results(tmp_path):
    (tmp_path / 'cut.json').write_text('{"format": "moe')
    with pytest.raises(UserError, match='cut.json.*no JSON'):
        schema.load(tmp_path / 'cut.json')
    with pytest.raises(UserError, match='missing.json'):
        schema.load(tmp_path / 'missing.json')


def test_scales_for_people():
    pairs = {(2, 2): 'x2', (3.3, 3.3): 'x3.3', (2, 3.5): 'x2x3.5', (10 / 3, 10 / 3): 'x3.333'}
    assert {scale: schema.scale_label(scale) for scale in pairs} == pairs


def test_peak_memory_sees_what_was_freed():
    meter = PeakMeter(torch.device('cpu'))
    if not meter.works:
        pytest.skip('this system does not say how much memory a process used')
    torch.ones(48 << 18).sum()  # 48 MiB, gone at the end
    assert 47 <= meter.read() <= 60
    meter.start()
    torch.ones(16).sum()
    assert meter.read() < 8


def test_stage_clock_counts_inner_stages_once(monkeypatch):
    now = itertools.count()
    monkeypatch.setattr('moeisr_basicsr.analysis.measure.time.perf_counter', lambda: next(now))
    clock = StageClock(torch.device('cpu'))
    with clock('outer'):  # the clock is read twice at each edge of a stage, so each piece takes 1000 ms
        with clock('inner'), clock('outer'):
            pass
        with clock('inner'):
            pass
    assert clock.times == {'outer': 4000.0, 'inner': 3000.0}
    with pytest.raises(ZeroDivisionError), clock('broken'):
        raise ZeroDivisionError
    with clock('outer'):
        pass
    assert clock.times == {'outer': 5000.0, 'inner': 3000.0, 'broken': 1000.0}
