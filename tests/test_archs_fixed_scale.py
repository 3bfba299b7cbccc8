"""The base image that the encoder makes itself: `skip: network`, alone (`FixedScale`) and below experts."""

import pytest
import torch
from basicsr.archs import build_network
from reference import grid
from tail_encoder import TailEncoder

from moeisr_basicsr.analysis.complexity import macs_per_pixel, parameters
from moeisr_basicsr.archs.moeisr_arch import FixedScale, MoEISR
from moeisr_basicsr.data.resize import imresize
from moeisr_basicsr.errors import UserError
from moeisr_basicsr.inference import upscale

TAIL = {'type': TailEncoder.__name__, 'scale': 3}


def image_of(net, lq):
    """The encoder's own output, by its layers."""
    with torch.no_grad():
        return net.encoder.tail(net.encoder.body(lq * 2 - 1))


def routed(**options):
    """An expert without layers and two with; neighbouring queries differ in their expert."""
    mapper = {'num_layers': 1, 'num_feat': 8}
    net = MoEISR(TAIL, experts=[[], [8], [8, 8]], mapper=mapper, skip='network', **options)
    with torch.no_grad():
        net.decoder.mapper.query_in.weight[:, -4:-2].mul_(8)
        net.decoder.mapper.query_out.weight.mul_(8)
        net.decoder.mapper.query_out.bias.zero_()
        for expert in net.decoder.pool.experts[1:]:
            expert.layers[-1].reset_parameters()  # with this skip they start at zero
    return net.eval()


@pytest.mark.parametrize('size', [(33, 21), (22, 14), (11, 8), (29, 40), (70, 51)])
@pytest.mark.parametrize('tile', [0, 16])
def test_fixed_scale_is_the_networks_image_resized(size, tile):
    """At its own factor, below, above, and at unequal ones; the resize is that of the data pipeline."""
    net = build_network({'type': 'FixedScale', 'encoder': TAIL, 'scale': 3}).eval()
    lq = torch.rand(2, 3, 11, 7) if tile == 0 else torch.rand(1, 3, 40, 50)
    size = size if tile == 0 else (3 * size[0] + 40, 3 * size[1] + 50)
    image = image_of(net, lq)
    expected = [torch.from_numpy(imresize(each.permute(1, 2, 0).numpy(), size)).permute(2, 0, 1) for each in image]
    result = upscale(net, lq, size=size, tile=tile)
    torch.testing.assert_close(result.image, torch.stack(expected), rtol=0, atol=3e-6)
    coord, cell = grid(size, lq.shape[0])
    with torch.no_grad():
        queries = net(lq, coord, cell).transpose(1, 2).unflatten(-1, size)
    torch.testing.assert_close(queries, torch.stack(expected), rtol=0, atol=2e-5)  # fp32 coordinates
    assert torch.equal(net(lq), image_of(net, lq)), 'at its own factor it is its image, bit for bit'


def test_fixed_scale_has_no_decoder(monkeypatch):
    net = FixedScale(TAIL).eval()
    assert {name.split('.')[0] for name, _ in net.named_parameters()} == {'encoder'}
    assert net.decoder.mapper is None and net.expert_macs == [0] and net.expert_costs.tolist() == [0]
    counts = parameters(net)
    assert counts['total'] == counts['encoder'] == sum(value.numel() for value in net.parameters())
    macs = macs_per_pixel(net, (10, 10), (20, 20), [1.0])
    assert macs['total'] == macs['encoder'] == 9 * (3 * 8 + 8 * 8 + 8 * 27) / 4 and macs['dense_folded'] == 0

    def computed(*_, **__):
        raise AssertionError('there is no expert to read it')

    monkeypatch.setattr(net.decoder.pool, 'tables', computed)
    upscale(net, torch.rand(1, 3, 9, 9), 2)


def test_fixed_scale_trains_its_encoder():
    net = FixedScale(TAIL, scale=2.5).train()
    net(torch.rand(1, 3, 6, 5)).square().mean().backward()
    assert all(float(parameter.grad.abs().max()) > 0 for parameter in net.parameters())


@pytest.mark.parametrize('scale', [3, (2.2, 3.4)])
def test_where_the_expert_without_layers_is_chosen_the_base_image_stays(scale):
    net, fixed = routed(), FixedScale(TAIL).eval()
    fixed.load_state_dict({name: value for name, value in net.state_dict().items() if name.startswith('encoder')})
    lq = torch.rand(2, 3, 12, 9)
    result, base = upscale(net, lq, scale), upscale(fixed, lq, scale).image
    assert {0} < set(result.expert_map.unique().tolist())
    same = (result.image == base).all(dim=1)
    torch.testing.assert_close(same, result.expert_map == 0)
    coord, cell = grid(tuple(base.shape[-2:]), 2)
    with torch.no_grad():
        queries = net(lq, coord, cell).transpose(1, 2).view_as(base)
    torch.testing.assert_close(result.image, queries, rtol=0, atol=2e-5)


def test_the_budget_spends_where_a_decoder_pays():
    net = routed()
    lq = torch.rand(1, 3, 20, 20)
    costs = net.expert_costs
    assert costs[0] == 0 and costs[2] == 1
    means = [costs[upscale(net, lq, 3, budget=budget).expert_map.long()].mean() for budget in (0.1, 0.5)]
    assert means == [pytest.approx(0.1, abs=0.01), pytest.approx(0.5, abs=0.01)]
    cheapest = upscale(net, lq, 3, cost_weight=1e6)
    assert not cheapest.expert_map.any()
    torch.testing.assert_close(cheapest.image, image_of(net, lq), rtol=0, atol=1e-6)


def test_training_reaches_the_tail():
    net = routed().train()
    coord, cell = grid((9, 8))
    net(torch.rand(1, 3, 6, 5), coord, cell).square().mean().backward()
    assert float(net.encoder.tail[0].weight.grad.abs().max()) > 0
    without = [name for name, parameter in net.named_parameters() if parameter.grad is None]
    assert not without, 'every parameter needs a gradient, or DDP waits for it'
    assert not hasattr(MoEISR(TAIL, skip='bicubic').encoder, 'tail'), 'no other skip needs it'


def test_an_encoder_without_an_image_is_refused():
    with pytest.raises(UserError, match='EDSREncoder has no image of its own, which skip: network needs'):
        build_network({'type': 'FixedScale', 'encoder': {'type': 'EDSREncoder'}})
