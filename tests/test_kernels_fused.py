"""The fused CPU backend against the torch backend on the same maps, and its place in `upscale`."""

import pytest
import torch

from moeisr_basicsr.archs.moeisr_arch import MoEISR
from moeisr_basicsr.core import MoEDecoder, render_image
from moeisr_basicsr.core.coords import grid_axis
from moeisr_basicsr.core.render import TORCH, FeatureWindow, Renderer, Tile
from moeisr_basicsr.inference import upscale
from moeisr_basicsr.kernels import cpu, fused_backend

needs_kernels = pytest.mark.skipif(not cpu.available(), reason=cpu.reason())
TOLERANCE = {'fp32': 1e-5, 'bf16': 8e-3}  # decoders answer in [-1, 1]: half of it on the image's [0, 1] scale


def sharpen(mapper):
    """Neighbouring pixels differ in their expert, so that groups are scattered."""
    with torch.no_grad():
        mapper.query_in.weight[:, -4:-2].mul_(8)
        mapper.query_out.weight.sub_(mapper.query_out.weight.mean(dim=0)).mul_(8)
        mapper.query_out.bias.zero_()


@needs_kernels
@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
@pytest.mark.parametrize(
    ('family', 'experts'),
    [
        ('liif', [[64], [64] * 2, [64] * 3, [64] * 4]),
        ('liif', [[20], [7, 100]]),
        ('liif', [[33, 5]]),
        ('shared', [[64], [64] * 2, [64, 20, 7]]),
        ('shared', [[20], [20, 100]]),
        ('nested', [[64], [64, 20], [64, 20, 7]]),
        ('nested', [[], [64], [64, 20]]),
        ('nested-lte', [[5], [5, 20], [5, 20, 100]]),
        ('liif', [[33, 5], [], [7]]),
        ('lte', [[64], [], [64] * 3]),
        ('lte', [[20], [7, 100]]),
        ('lm', [{'latent': [208], 'depth': 6}]),
        ('lm', [{'latent': [], 'depth': 1}, {'latent': [20, 33], 'depth': 2}, {'latent': [7], 'depth': 5}]),
        ('lm', [[], {'latent': [40], 'depth': 3}]),
        ('lm-7', [{'latent': [9], 'depth': 3}, [], {'latent': [], 'depth': 2}]),
        ('lm-33', [{'latent': [50], 'depth': 2}]),
    ],
)
@pytest.mark.parametrize('size', [(39, 45), (27, 91), (14, 31)])
def test_fused_equals_torch(family, experts, size, precision):
    torch.manual_seed(0)
    options = {
        'lte': {'hidden_dim': 40},
        'shared': {'shared_layers': 1},
        'nested': {'shared_layers': 3},
        'nested-lte': {'hidden_dim': 40, 'shared_layers': 3},
        'lm-7': {'render_width': 7},
        'lm-33': {'render_width': 33},
    }.get(family, {})
    name = next((name for name in ('lte', 'lm') if name in family), 'liif')
    decoder = MoEDecoder(16, 3, name, experts, **options).eval()
    if decoder.mapper is not None:
        sharpen(decoder.mapper)
    feat = torch.randn(2, 16, 13, 15)
    plain = render_image(decoder, feat, size)
    fused = render_image(decoder, feat, size, backend=fused_backend(decoder, 'cpu', precision), tile=8)
    if plain.expert_map is not None:
        assert plain.expert_map.unique().numel() > 1
        agree = plain.expert_map == fused.expert_map
        assert agree.float().mean() >= 0.999  # rounding may turn a near tie
        difference = (plain.output - fused.output).abs().amax(dim=1)[agree]
    else:
        difference = (plain.output - fused.output).abs()
    assert difference.max() <= TOLERANCE[precision]


@needs_kernels
def test_tiles_strips_and_one_query_of_lm():
    """Any tiling gives the same bits; a window of the image and its corner pixel are those of the whole."""
    torch.manual_seed(3)
    decoder = MoEDecoder(8, 3, 'lm', [[], {'latent': [12], 'depth': 2}, {'latent': [], 'depth': 1}]).eval()
    sharpen(decoder.mapper)
    feat, backend = torch.randn(1, 8, 11, 9), fused_backend(decoder, 'cpu')
    whole = render_image(decoder, feat, (25, 31), backend=backend)
    assert whole.expert_map.unique().numel() == 3
    for tile in (1, 3, 16):
        assert torch.equal(render_image(decoder, feat, (25, 31), backend=backend, tile=tile).output, whole.output)
    renderer = Renderer(decoder, (25, 31), (11, 9), backend=backend)
    for rows, cols in (((4, 17), (0, 31)), ((24, 25), (30, 31)), ((7, 8), (3, 20))):
        for top, bottom, strip in renderer.render_region(FeatureWindow(feat, 0, 0, (11, 9)), rows, cols):
            assert torch.equal(strip.output, whole.output[..., top:bottom, slice(*cols)])


@needs_kernels
def test_a_latent_mlp_runs_where_its_queries_read(monkeypatch):
    """And not at all in a tile that is left to the expert without layers."""
    decoder = MoEDecoder(4, 3, 'lm', [[], {'latent': [8], 'depth': 1}, {'latent': [], 'depth': 2}]).eval()
    backend, ran = fused_backend(decoder, 'cpu'), []
    convolve = cpu.PackedConv.__call__
    monkeypatch.setattr(cpu.PackedConv, '__call__', lambda self, *args: ran.append(args[2]) or convolve(self, *args))
    axes = grid_axis(24, 6), grid_axis(24, 6)
    expert_map = torch.zeros(24, 24, dtype=torch.uint8)
    tile = Tile(torch.randn(1, 4, 8, 8), *axes, torch.tensor([0.5, 0.5]), expert_map)
    with torch.no_grad():
        assert (backend.decode(decoder, tile) == 0).all() and ran == []
        expert_map[10, 13] = 1
        got = backend.decode(decoder, tile)
        assert len(ran) == 1 and ran[0].tolist() == [12 + 2, 12 + 3, 18 + 2, 18 + 3]
        torch.testing.assert_close(got, TORCH.decode(decoder, tile), rtol=0, atol=1e-5)
    assert (got[:, 10, 13] != 0).all() and got.count_nonzero() == 3


@needs_kernels
@pytest.mark.parametrize('granularity', ['output_pixel', 'lr_pixel'])
def test_routing_and_logits(granularity):
    """What argmax takes, and the logits that budgets and cost weights see; on a part of the image too."""
    torch.manual_seed(1)
    decoder = MoEDecoder(8, 3, 'liif', [[16], [16, 16]], mapper={'granularity': granularity, 'num_layers': 1}).eval()
    sharpen(decoder.mapper)
    with torch.no_grad():
        decoder.mapper.query_out.bias.copy_(torch.randn(2))
        decoder.mapper.split_query_in()[1].normal_()  # starts at zero, which would hide the cell
    feat = torch.randn(1, 8, 9, 7)
    backend = fused_backend(decoder, 'cpu')
    expected = render_image(decoder, feat, (27, 21)).expert_map
    assert expected.unique().numel() > 1
    assert torch.equal(render_image(decoder, feat, (27, 21), backend=backend).expert_map, expected)

    renderer = Renderer(decoder, (27, 21), (9, 7))
    window = FeatureWindow(feat, 0, 0, (9, 7))
    for part in (((0, 27), (0, 21)), ((5, 14), (10, 21))):
        with torch.no_grad():
            inputs = decoder.mapper, renderer.mapper_table(window), *renderer.near(window, *part), renderer.cell_lr
            logits, plain = backend.logits(*inputs), TORCH.logits(*inputs)
        assert plain.std(dim=(0, 1)).min() > 0.1, 'logits that hardly differ would prove nothing'
        torch.testing.assert_close(logits, plain, rtol=1e-5, atol=1e-5)


@needs_kernels
def test_upscale_packs_the_weights_as_they_are_now():
    torch.manual_seed(2)
    net = MoEISR({'type': 'EDSREncoder', 'num_feat': 8, 'num_block': 1}, 'liif', [[16], [16, 16]])
    lq = torch.rand(1, 3, 12, 12)
    before = upscale(net, lq, 2).image
    with torch.no_grad():
        for expert in net.decoder.pool.experts:
            expert.layers[-1].bias.add_(0.5)
    torch.testing.assert_close(upscale(net, lq, 2).image, before + 0.25, rtol=0, atol=1e-5)


@needs_kernels
def test_experts_that_the_kernels_do_not_take_run_in_torch():
    assert fused_backend(MoEDecoder(4, 3, 'liif', [[]]), 'cpu') is None
    assert fused_backend(MoEDecoder(4, 3, 'liif', [[8]]), 'cpu', 'fp16') is None
