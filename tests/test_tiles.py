"""Tiled encoding and strips: the same image as the whole, for each encoder, with and without a budget."""

import pytest
import torch
from reference import grid
from tail_encoder import TailEncoder

from moeisr_basicsr import inference
from moeisr_basicsr.archs.moeisr_arch import LIIF, MoEISR
from moeisr_basicsr.errors import UserError
from moeisr_basicsr.inference import upscale, upscale_strips
from moeisr_basicsr.tools.profile.rendering import render_fixed

ENCODERS = [
    {'type': 'EDSREncoder', 'num_feat': 8, 'num_block': 2},
    {'type': 'RDNEncoder', 'num_feat': 8, 'num_block': 2, 'num_conv': 2, 'growth': 4},
    {'type': 'SwinIREncoder', 'embed_dim': 12, 'depths': [2], 'num_heads': [2]},
]
TAIL = {'type': TailEncoder.__name__, 'scale': 4}


def make_net(encoder, seed=0):
    torch.manual_seed(seed)
    net = MoEISR(encoder, 'liif', [[8], [8, 8], [8] * 3], mapper={'num_layers': 2, 'num_feat': 8})
    with torch.no_grad():  # neighbouring pixels differ in their expert
        net.decoder.mapper.query_in.weight[:, -4:-2].mul_(8)
        weight = net.decoder.mapper.query_out.weight
        weight.sub_(weight.mean(dim=0)).mul_(8)
        net.decoder.mapper.query_out.bias.zero_()
    return net


@pytest.mark.parametrize('encoder', ENCODERS, ids=lambda encoder: encoder['type'])
@pytest.mark.parametrize('budget', [None, 0.5])
def test_tiled_equals_whole(encoder, budget):
    net = make_net(encoder)
    lq = torch.rand(1, 3, 71, 53)
    whole = upscale(net, lq, (2.3, 3), tile=0, budget=budget)
    assert whole.expert_map.unique().numel() > 1
    for tile in (16, 40):
        tiled = upscale(net, lq, (2.3, 3), tile=tile, budget=budget)
        if budget is None:
            assert len(list(upscale_strips(net, lq, tuple(whole.image.shape[-2:]), tile=tile))) > 1
            torch.testing.assert_close(tiled.image, whole.image, rtol=0, atol=1e-5)
            agreement = (tiled.expert_map == whole.expert_map).float().mean()
            assert agreement >= 0.999  # rounding may turn a near tie
        cost = [net.expert_costs[result.expert_map.long()].double().mean().item() for result in (tiled, whole)]
        assert cost[0] == pytest.approx(cost[1], abs=1e-3)


@pytest.mark.parametrize('skip', ['bilinear', 'bicubic', 'network'])
@pytest.mark.parametrize('scale', [(1, 1.1), (2.3, 3), (4, 7.5)])
@pytest.mark.parametrize('dense', [True, False])
def test_the_base_image_of_a_tile_is_the_wholes(skip, scale, dense):
    """The resampling's taps lie further out than the codes of a decoder without a mapper."""
    torch.manual_seed(0)
    net = LIIF(TAIL, [8], skip=skip) if dense else MoEISR(TAIL, experts=[[8], [8, 8]], skip=skip)
    lq = torch.rand(1, 3, 41, 37)
    whole = upscale(net, lq, scale, tile=0)
    tiled = upscale(net, lq, scale, tile=16)
    torch.testing.assert_close(tiled.image, whole.image, rtol=0, atol=1e-5)
    coord, cell = grid(tuple(whole.image.shape[-2:]))
    with torch.no_grad():
        queries = net.eval()(lq, coord, cell).transpose(1, 2).view_as(whole.image)
    torch.testing.assert_close(whole.image, queries, rtol=0, atol=2e-5)  # fp32 coordinates


def test_halo_is_needed():
    """The test above can fail: a halo cut short shows at the tile borders."""
    net = make_net(ENCODERS[0])
    lq = torch.rand(1, 3, 71, 53)
    whole = upscale(net, lq, 2, tile=0).image
    net.encoder.halo = 2
    assert (upscale(net, lq, 2, tile=16).image - whole).abs().max() > 1e-4


def test_encoder_without_known_halo_is_not_tiled():
    net = make_net(ENCODERS[0])
    lq = torch.rand(1, 3, 40, 40)
    whole = upscale(net, lq, 2, tile=0).image
    net.encoder.halo = None
    torch.testing.assert_close(upscale(net, lq, 2, tile=16).image, whole, rtol=0, atol=0)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'scale': 0.5}, 'at least 1'),
        ({'scale': (2, 0.9)}, 'at least 1'),
        ({}, 'either a scale or a size'),
        ({'scale': 2, 'size': (40, 40)}, 'either a scale or a size'),
        ({'size': (10, 90)}, 'at least the input size'),
        ({'scale': 2, 'tile': 3}, 'tile must be'),
        ({'scale': 2, 'precision': 'int8'}, 'fp32, bf16, fp16'),
        ({'scale': 2, 'budget': 0.001}, 'budget must lie between'),
        ({'scale': 2, 'budget': 1.1}, 'budget must lie'),
        ({'scale': 2, 'budget': 0.5, 'cost_weight': 1.0}, 'either a cost weight or a budget'),
    ],
)
def test_bad_requests(options, message):
    net = make_net(ENCODERS[0]).train()
    with pytest.raises(UserError, match=message):
        upscale(net, torch.rand(1, 3, 20, 20), **options)
    assert net.training


def test_dense_decoder_has_nothing_to_choose():
    net = LIIF(ENCODERS[0], [8])
    assert upscale(net, torch.rand(1, 3, 9, 9), 2).expert_map is None
    with pytest.raises(UserError, match='dense decoder'):
        upscale(net, torch.rand(1, 3, 9, 9), 2, budget=0.5)


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('control', [{}, {'budget': 0.5}, {'cost_weight': 1.5}])
def test_shuffled_experts(monkeypatch, fused, control):
    """The routing's own counts, elsewhere; each pixel is what its new expert makes of it, with any tiles."""
    if not fused:
        monkeypatch.setattr(inference, 'fused_backend', lambda *args: None)
    net = make_net(ENCODERS[0])
    lq = torch.rand(1, 3, 40, 37)
    trained = upscale(net, lq, (2.3, 3), tile=0, **control)
    shuffled = upscale(net, lq, (2.3, 3), tile=0, shuffle_seed=1, **control)
    counts = [result.expert_map.flatten().bincount(minlength=3) for result in (trained, shuffled)]
    assert torch.equal(*counts) and (counts[0] > 0).sum() > 1
    assert not torch.equal(shuffled.expert_map, trained.expert_map)
    size = tuple(trained.image.shape[-2:])
    expected = render_fixed(net.decoder, net.encode(lq).feat.detach(), size, shuffled.expert_map[0])
    torch.testing.assert_close(shuffled.image, expected[None] * 0.5 + 0.5, rtol=0, atol=1e-5)
    tiled = upscale(net, lq, (2.3, 3), tile=16, shuffle_seed=1, **control)
    moved = tiled.expert_map.flatten().bincount(minlength=3) - counts[0]
    assert moved.abs().max() <= 2  # rounding may turn a near tie
    if not moved.any():
        assert torch.equal(tiled.expert_map, shuffled.expert_map)
        torch.testing.assert_close(tiled.image, shuffled.image, rtol=0, atol=1e-5)
    assert not torch.equal(upscale(net, lq, (2.3, 3), shuffle_seed=2, **control).expert_map, shuffled.expert_map)


def test_a_dense_network_has_nothing_to_shuffle():
    with pytest.raises(UserError, match='a dense decoder has one expert: there is nothing to shuffle'):
        upscale(LIIF(ENCODERS[0], [8]), torch.rand(1, 3, 5, 6), 2, shuffle_seed=0)
