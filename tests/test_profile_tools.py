"""What `basicsr profile` and the benchmarks are made of: plain images, given maps, clocks, charts."""

import itertools

import numpy as np
import pytest
import reference
import torch
from PIL import ImageColor

from moeisr_basicsr.analysis import schema
from moeisr_basicsr.archs.moeisr_arch import LIIF, MoEISR
from moeisr_basicsr.core import MoEDecoder, make_cell
from moeisr_basicsr.tools.profile import training
from moeisr_basicsr.tools.profile.chart import COLOURS, Bar, Panel, draw_chart, nice_step, panels_of
from moeisr_basicsr.tools.profile.rendering import clustered_map, plain_image, render_fixed
from moeisr_basicsr.tools.profile.stages import measure_stages

EXPERTS = [[16], [24, 16], [16, 32, 8], [32, 16, 24, 16]]
ENCODER = {'type': 'EDSREncoder', 'num_feat': 8, 'num_block': 1}
CPU = torch.device('cpu')
ENVIRONMENT = {'torch': '2', 'threads': 1, 'cpu': '', 'device': 'cpu', 'kernel': 'torch'}


def small(family):
    options = {'hidden_dim': 32} if family == 'lte' else {}
    return MoEDecoder(8, 3, family, EXPERTS, {'num_layers': 2, 'num_feat': 12}, **options).eval()


@pytest.mark.parametrize('family', ['liif', 'lte'])
def test_plain_images_in_chunks_against_reference(family):
    decoder, feat, size = small(family), torch.randn(1, 8, 6, 5), (18, 13)
    coord, cell = reference.grid(size)
    expected = reference.FAMILIES[family](decoder.pool, 3, feat, coord, cell).detach()
    assert torch.allclose(plain_image(decoder, 3, feat, size, make_cell(size), chunk=50), expected, atol=1e-6)
    part = plain_image(decoder, 3, feat, size, make_cell(size), chunk=50, max_chunks=2)
    assert part.shape[1] == 100 and torch.allclose(part, expected[:, :100], atol=1e-6)


@pytest.mark.parametrize('family', ['liif', 'lte'])
def test_given_map_is_rendered(family):
    decoder, feat, size = small(family), torch.randn(1, 8, 9, 40), (27, 100)  # two tiles side by side
    expert_map = torch.randint(4, size, dtype=torch.uint8)
    gates = torch.nn.functional.one_hot(expert_map.flatten().long(), 4)[None]
    expected = reference.mixture(decoder, feat, *reference.grid(size), gates)[0]
    assert torch.allclose(render_fixed(decoder, feat, size, expert_map).flatten(1).t(), expected, atol=1e-5)


def test_clustered_map():
    shares, size = [0.5, 0.25, 0.15, 0.1], (90, 70)
    expert_map = clustered_map(size, (30, 20), shares)
    counts = torch.bincount(expert_map.flatten().long(), minlength=4)
    assert all(abs(int(count) - share * 6300) <= 1 for count, share in zip(counts, shares))
    same = (expert_map[:, 1:] == expert_map[:, :-1]).double().mean()
    shuffled = expert_map.flatten()[torch.randperm(6300)].view(size)
    assert same > 0.9 > (shuffled[:, 1:] == shuffled[:, :-1]).double().mean()
    assert expert_map.equal(clustered_map(size, (30, 20), shares)) and clustered_map((4, 4), (2, 2), [1.0]).sum() == 0


def test_stages_are_medians_and_peaks_of_their_own_round(monkeypatch):
    now, pauses = [0.0], itertools.chain([9, 9], [1, 5, 3])  # seconds: warm-up, memory, then what counts
    monkeypatch.setattr('moeisr_basicsr.analysis.measure.time.perf_counter', lambda: now[0])

    def run(clock):
        with clock('outer'):
            now[0] += next(pauses)
            with clock('inner'):
                now[0] += 2
                torch.ones(48 << 18)  # 48 MiB, gone at once

    times, peaks = measure_stages(run, CPU, repeats=3)
    assert times == {'outer': 3000.0, 'inner': 2000.0}
    assert peaks['inner'] is None or (47 < peaks['inner'] < 60 and peaks['outer'] < 8)


def test_training_profile_names_its_parts_and_leaves_the_network():
    net = MoEISR(ENCODER, 'liif', EXPERTS, {'num_layers': 1, 'num_feat': 8}).eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    row = training.profile_training(net, batch=2, patch=8, queries=20, repeats=1)
    assert schema.problem(schema.document('profile', ENVIRONMENT, [row])) is None
    times = dict(row['time_ms'])
    assert times.pop('total') == pytest.approx(sum(times.values()))
    assert tuple(times) == training.PARTS and all(value > 0 for value in times.values())
    assert all(value.equal(before[key]) for key, value in net.state_dict().items())
    assert not net.training and all(parameter.grad is None for parameter in net.parameters())
    assert 'forward' not in vars(net.encoder) and 'evaluate' not in vars(net.decoder.pool)
    dense = training.profile_training(LIIF(ENCODER, [16, 16]), 2, 8, 20, repeats=1)['time_ms']
    assert 'mapper' not in dense and 'unchosen experts' not in dense and dense['chosen experts'] > 0


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


def test_chart_of_shares_has_the_colours_of_expert_maps():
    """By cost, not by number."""
    macs = dict.fromkeys(('encoder', 'mapper', 'tables', 'experts'), 1e3) | {'each_expert': [900, 0, 40]}
    row = {'case': 'upscale', 'scale': [2, 2], 'macs': macs, 'routing': {'shares': [0.5, 0.3, 0.2]}}
    panels = panels_of([row])
    cheapest, most_expensive = ImageColor.getrgb('#ffdc00'), ImageColor.getrgb('#dc2828')
    found = [ImageColor.getrgb(colour) for colour in panels[1].colours]
    assert (found[0], found[1]) == (most_expensive, cheapest) and len(set(found)) == 3
    pixels = np.asarray(draw_chart(panels))
    lengths = [int((pixels == colour).all(-1).sum(1).max()) for colour in (most_expensive, cheapest)]
    assert lengths[0] * 3 == pytest.approx(lengths[1] * 5, abs=10)
