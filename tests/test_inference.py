"""Upscaling with a network in hand: sizes, errors, modes, cost control. Tiles are in test_tiles.py."""

import copy

import pytest
import torch
from reference import grid
from torch import nn

from moeisr_basicsr.archs.moeisr_arch import LIIF, LTE, MoEISR
from moeisr_basicsr.errors import UserError
from moeisr_basicsr.inference import target_size, upscale, upscale_strips

ENCODER = {'type': 'EDSREncoder', 'num_feat': 8, 'num_block': 1}


def make_net(**options):
    torch.manual_seed(0)
    mapper = {'num_layers': 1, 'num_feat': 8}
    net = MoEISR(ENCODER, experts=[[8], [8, 8], [8] * 3], mapper=mapper, **options)
    with torch.no_grad():
        net.decoder.mapper.query_in.weight[:, -4:-2].mul_(8)
        net.decoder.mapper.query_out.weight.mul_(8)
        net.decoder.mapper.query_out.bias.zero_()
    return net


def make_lte():
    torch.manual_seed(0)
    return LTE(ENCODER, hidden_list=[8], hidden_dim=8)


@pytest.mark.parametrize(
    ('request_', 'expected'),
    [
        ({'scale': 2}, (18, 14)),
        ({'scale': 3.3}, (30, 23)),
        ({'scale': 2.5}, (23, 18)),
        ({'scale': 1}, (9, 7)),
        ({'scale': (2, 3.5)}, (18, 25)),
        ({'scale': [1, 4]}, (9, 28)),
        ({'size': (21, 40)}, (21, 40)),
        ({'size': (9, 7)}, (9, 7)),
    ],
)
def test_size_and_content(request_, expected):
    """The picture is the network's answer to the queries of its pixels, and each map entry that query's expert."""
    net = make_net().eval()
    lq = torch.rand(2, 3, 9, 7)
    result = upscale(net, lq, **request_)
    assert result.image.shape == (2, 3, *expected)
    coord, cell = grid(expected, batch=2)
    with torch.no_grad():
        prediction = net(lq, coord, cell)
        expert = net.decoder.route(net.encode(lq).feat, coord, cell).expert
    assert result.expert_map.dtype == torch.uint8
    agree = result.expert_map.flatten(1).long() == expert
    assert agree.float().mean() > 0.998  # a fused kernel's rounding may turn a near tie
    torch.testing.assert_close(result.image.flatten(2).transpose(1, 2)[agree], prediction[agree], rtol=0, atol=1e-5)
    assert result.expert_map.unique().numel() > 1 or expected == (9, 7), 'there each LR pixel has one position'
    assert result.image.dtype == torch.float32 and not result.image.requires_grad


@pytest.mark.parametrize('net', [LIIF(ENCODER, [8]), LTE(ENCODER, [8], hidden_dim=8)])
def test_dense_networks_have_no_expert_map(net):
    result = upscale(net, torch.rand(1, 3, 5, 6), 2.2)
    assert result.expert_map is None
    assert result.image.shape == (1, 3, 11, 13)


def test_one_pixel():
    assert upscale(make_net(), torch.rand(1, 3, 1, 1), size=(3, 5)).image.isfinite().all()


@pytest.mark.parametrize(
    ('scale', 'size', 'message'),
    [
        (None, None, 'give either a scale or a size'),
        (2, (20, 20), 'give either a scale or a size'),
        (0.99, None, 'scale must be a finite factor of at least 1.*got 0.99'),
        ((2, 0.5), None, r'got \(2, 0.5\)'),
        (float('nan'), None, 'scale must be'),
        (None, (10, 8), r'at least the input size of 10 x 9 .*got 10 x 8'),
    ],
)
def test_bad_sizes(scale, size, message):
    with pytest.raises(UserError, match=message) as caught:
        target_size((10, 9), scale, size)
    assert '\n' not in str(caught.value)
    with pytest.raises(UserError, match=message):
        upscale(make_net(), torch.rand(1, 3, 10, 9), scale, size)


@pytest.mark.parametrize('training', [True, False])
def test_training_mode_is_restored(training):
    net = make_net().train(training)
    net.encoder.body.eval()  # a part that its owner has frozen
    upscale(net, torch.rand(1, 3, 4, 4), 2)
    assert net.training is net.decoder.training is net.encoder.training is training
    assert not net.encoder.body.training
    assert torch.is_grad_enabled()


def test_training_mode_is_restored_after_an_exception():
    net = make_net().train()

    class Broken(nn.Module):
        num_feat = 8
        halo = 1

        def forward(self, x):
            assert not torch.is_grad_enabled()
            raise RuntimeError('out of memory')

    net.encoder = Broken()
    with pytest.raises(RuntimeError, match='out of memory'):
        upscale(net, torch.rand(1, 3, 4, 4), 2)
    assert net.training and net.decoder.training
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled('cpu')


def test_caller_keeps_its_modes_between_strips():
    """A generator that rests, or is dropped half way, must leave no eval mode, no_grad or autocast behind."""
    net = make_net().train()
    strips = upscale_strips(net, torch.rand(1, 3, 40, 20), (80, 40), tile=16, precision='bf16')
    for _ in range(2):
        strip = next(strips)
        assert net.training and net.encoder.training
        assert torch.is_grad_enabled() and not torch.is_autocast_enabled('cpu')
        assert not strip.image.requires_grad
    del strips
    assert net.training and torch.is_grad_enabled() and not torch.is_autocast_enabled('cpu')


def test_strips_are_the_image_in_order():
    net = make_net()
    lq = torch.rand(1, 3, 140, 20)
    whole = upscale(net, lq, size=(240, 50))
    strips = list(upscale_strips(net, lq, (240, 50)))
    assert len(strips) > 1
    assert [strip.top for strip in strips] == [0, *(strip.bottom for strip in strips[:-1])]
    assert strips[-1].bottom == 240
    for strip in strips:
        assert torch.equal(strip.image, whole.image[0, :, strip.top : strip.bottom])
        assert torch.equal(strip.expert_map, whole.expert_map[0, strip.top : strip.bottom])


def test_mean_cost_falls_with_the_cost_weight():
    net = make_net()
    lq = torch.rand(1, 3, 12, 12)
    maps = [upscale(net, lq, 3, cost_weight=kappa).expert_map.long() for kappa in (-1e6, -2.0, 0.0, 2.0, 1e6)]
    for before, after in zip(maps[:-1], maps[1:]):
        assert (net.expert_costs[after] <= net.expert_costs[before]).all()
    means = [float(net.expert_costs[experts].mean()) for experts in maps]
    assert means[0] == pytest.approx(1) and means[-1] == pytest.approx(float(net.expert_costs.min()))
    assert means[1] > means[2] > means[3]


def test_bf16_changes_the_experts_precision_not_the_routing():
    net = make_net()
    lq = torch.rand(1, 3, 9, 9)
    plain, mixed = upscale(net, lq, 3), upscale(net, lq, 3, precision='bf16')
    assert mixed.image.dtype == torch.float32
    assert not torch.equal(mixed.image, plain.image)
    agree = plain.expert_map == mixed.expert_map  # features are 16 bit, the mapper is not
    assert agree.float().mean() > 0.97
    difference = (mixed.image - plain.image).transpose(0, 1)[:, agree]
    assert float(difference.abs().max()) < 0.02


@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('make', [make_net, make_lte])
def test_networks_of_any_precision_compute_in_fp32(make, dtype):
    net = make().to(dtype)
    lq = torch.rand(1, 3, 9, 8)
    result, expected = upscale(net, lq, 2.5), upscale(copy.deepcopy(net).float(), lq, 2.5)
    assert result.image.dtype == torch.float32 and torch.equal(result.image, expected.image)
    assert upscale(net, lq.to(dtype), 2.5).image.dtype == torch.float32
    assert {value.dtype for value in net.parameters()} == {dtype}  # the caller's own is as it was


@pytest.mark.parametrize('make', [make_net, make_lte])
def test_the_callers_default_type_and_autocast_do_not_matter(make):
    net, lq = make(), torch.rand(1, 3, 9, 8)
    expected = upscale(net, lq, 2.5)
    try:
        torch.set_default_dtype(torch.float64)
        under_double = upscale(net, lq, 2.5)
        budgeted = upscale(net, lq, 2.5, budget=0.9) if net.num_experts > 1 else under_double
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        under_autocast = upscale(net, lq, 2.5)
        assert torch.is_autocast_enabled('cpu')
    for result in (under_double, under_autocast):
        assert torch.equal(result.image, expected.image)
        assert result.expert_map is None or torch.equal(result.expert_map, expected.expert_map)
    assert budgeted.image.dtype == torch.float32
