"""Architectures: registration, and whole networks against the plain twins in reference.py."""

import copy
import inspect
import typing
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from basicsr.archs import build_network
from reference import FAMILIES, grid
from torch import nn

import moeisr_basicsr  # noqa: F401  before BasicSR, which needs its shims
from moeisr_basicsr.archs.moeisr_arch import MapperOptions, Skip
from moeisr_basicsr.core import Draw, Predictions, make_coord
from moeisr_basicsr.core.coords import pixel_centres
from moeisr_basicsr.core.mapper import GRANULARITIES, Mapper
from moeisr_basicsr.core.skip import SKIPS, skip_at, skip_grid
from moeisr_basicsr.official import official

EDSR = {'type': 'EDSREncoder', 'num_feat': 8, 'num_block': 1}
RDN = {'type': 'RDNEncoder', 'num_feat': 8, 'num_block': 2, 'num_conv': 2, 'growth': 4}
SWINIR = {'type': 'SwinIREncoder', 'embed_dim': 12, 'depths': [2], 'num_heads': [2]}
SMALL = {
    'LIIF': {'type': 'LIIF', 'encoder': EDSR, 'hidden_list': [12, 10]},
    'LTE': {'type': 'LTE', 'encoder': EDSR, 'hidden_list': [10], 'hidden_dim': 12},
    'MoEISR': {
        'type': 'MoEISR',
        'encoder': EDSR,
        'experts': [[12], [8, 10], [10, 6, 8]],
        'mapper': {'num_layers': 2, 'num_feat': 8},
    },
    'LMLIIF': {'type': 'LMLIIF', 'encoder': EDSR, 'latent': [14], 'depth': 2, 'render_width': 6},
    'MoEISR-LM': {
        'type': 'MoEISR',
        'encoder': EDSR,
        'decoder': 'lm',
        'experts': [{'latent': [], 'depth': 1}, {'latent': [9, 8], 'depth': 3}, []],
        'mapper': {'num_layers': 1, 'num_feat': 8},
    },
    'MoEISR-LTE': {
        'type': 'MoEISR',
        'encoder': EDSR,
        'decoder': 'lte',
        'experts': [[4], [8]],
        'hidden_dim': 12,
        'mapper': {'num_layers': 1, 'num_feat': 8},
        'skip': 'bilinear',
    },
}


def build(name, seed=0, **options):
    torch.manual_seed(seed)
    net = build_network({**SMALL[name], **options})
    if net.decoder.mapper is not None:  # make neighbouring queries differ in their expert
        with torch.no_grad():
            net.decoder.mapper.query_in.weight[:, -4:-2].mul_(8)
            net.decoder.mapper.query_out.weight.mul_(8)
            net.decoder.mapper.query_out.bias.zero_()
    return net


def random_output(net):
    """Undo the zero with which a bicubic skip starts."""
    for expert in net.decoder.pool.experts:
        for last in expert.layers[-1:]:
            last.reset_parameters()
    return net


@pytest.mark.parametrize('name', ['MoEISR', 'MoEISR-LTE'])
@pytest.mark.parametrize('skip', ['none', 'bicubic'])
def test_a_draw_gives_every_expert_in_image_space(name, skip):
    """What the objective sees: each expert's prediction with the skip, and the mixture of them."""
    net = random_output(build(name, skip=skip)).train()
    lq, (coord, cell) = torch.rand(2, 3, 6, 5), grid((9, 11), batch=2)
    noise = torch.randn(2, 99, net.num_experts)
    predictions = net(lq, coord, cell, Draw(noise))
    assert isinstance(predictions, Predictions) and predictions.experts.shape == (2, 99, net.num_experts, 3)
    for j in range(net.num_experts):  # noise that leaves no choice
        forced = torch.full_like(noise, -1e6)
        forced[..., j] = 1e6
        close(net(lq, coord, cell, Draw(forced)).mixture(), predictions.experts[:, :, j])
    chosen = predictions.routing.expert[..., None, None].expand(-1, -1, 1, 3)
    close(predictions.mixture(), predictions.experts.gather(2, chosen).squeeze(2))


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def conv(num_in, num_out, side=3):
    return num_in * num_out * side * side + num_out


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize('options', [EDSR, RDN, SWINIR, *SMALL.values()], ids=lambda options: options['type'])
def test_built_from_a_dict_that_stays_as_it_is(options):
    given = copy.deepcopy(options)
    net = build_network(given)
    assert type(net).__name__ == options['type']
    assert given == options


@pytest.mark.parametrize('encoder', [RDN, SWINIR])
def test_any_encoder_serves_any_decoder(encoder):
    for name in SMALL:
        net = build(name, encoder=encoder, scale=1.5).eval()
        with torch.no_grad():
            assert net(torch.rand(2, 3, 6, 10)).shape == (2, 3, 9, 15)


@pytest.mark.parametrize('name', ['LIIF', 'LTE', 'LMLIIF'])
@pytest.mark.parametrize(
    ('size', 'out'), [((6, 5), (12, 10)), ((5, 7), (16, 14)), ((1, 1), (3, 3)), ((4, 3), (11, 12))]
)
def test_dense_equals_the_published_algorithm(name, size, out):
    net = build(name).eval()
    lq = torch.rand(2, 3, *size)
    coord, cell = grid(out, batch=2)
    with torch.no_grad():
        plain = FAMILIES[net.decoder.family](net.decoder.pool, 0, net.encoder((lq - 0.5) / 0.5), coord, cell)
        if name == 'LTE':
            plain = plain + F.grid_sample(
                (lq - 0.5) / 0.5,
                coord.flip(-1).unsqueeze(1),
                mode='bilinear',
                padding_mode='border',
                align_corners=False,
            )[:, :, 0].transpose(1, 2)
        expected = plain * 0.5 + 0.5
        close(net(lq, coord, cell), expected)
        rendered = net.decode_image(lq, net.encode(lq), out)
    assert rendered.expert_map is None
    close(rendered.output, expected.transpose(1, 2).unflatten(-1, out))


@pytest.mark.parametrize(('name', 'limit'), [('LTE', 4), ('LIIF', None)])
@pytest.mark.parametrize('out', [(40, 12), (25, 30), (8, 8)])
def test_cell_factor_beyond_the_training_scales(name, limit, out):
    """LTE's test code multiplies the cell by max(s / 4, 1); LIIF shows the true cell."""
    net = build(name).eval()
    lq = torch.rand(1, 3, 5, 4)
    coord, cell = grid(out)
    if limit:
        cell = cell * torch.tensor([max(out[0] / 5 / limit, 1), max(out[1] / 4 / limit, 1)])
    with torch.no_grad():
        close(net.decode_image(lq, net.encode(lq), out).output.flatten(2).transpose(1, 2), net(lq, coord, cell))


def test_cell_scale_max_can_be_set():
    assert build('LTE', cell_scale_max=0).test_cell((4, 4), (64, 64)).tolist() == [2 / 64] * 2
    assert build('LIIF', cell_scale_max=8).test_cell((4, 4), (64, 16)).tolist() == [4 / 64, 2 / 16]


def test_queries_are_shown_the_same_cells_as_whole_images():
    """Training on larger factors than `cell_scale_max` sees what a test will see."""
    net, free = build('LIIF', cell_scale_max=2), build('LIIF')
    free.load_state_dict(net.state_dict())
    lq, (coord, cell) = torch.rand(1, 3, 5, 4), grid((15, 6))
    with torch.no_grad():
        out = net(lq, coord, cell)
        close(out, free(lq, coord, torch.tensor([2 / 10, 2 / 6]).expand_as(cell)))  # rows x3, columns x1.5
        assert not torch.allclose(out, free(lq, coord, cell), atol=1e-4)
        close(net.decode_image(lq, net.encode(lq), (15, 6)).output.flatten(2).transpose(1, 2), out)


@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize('scale', [2, 3.3, [1.5, 4]])
def test_whole_image_equals_its_queries(name, scale):
    net = build(name, scale=scale).eval()
    lq = torch.rand(2, 3, 9, 7)
    factors = scale if isinstance(scale, list) else [scale, scale]
    size = int(9 * factors[0] + 0.5), int(7 * factors[1] + 0.5)
    coord, cell = grid(size, batch=2)
    with torch.no_grad():
        image = net(lq)
        prediction = net(lq, coord, cell)
        expert = net.decoder.route(net.encode(lq), coord, net.shown_cell(cell, (9, 7))).expert
        rendered = net.decode_image(lq, net.encode(lq), size)
    close(image, prediction.transpose(1, 2).unflatten(-1, size))
    if net.num_experts > 1:
        assert expert.unique().numel() > 1
        assert torch.equal(rendered.expert_map.flatten(1).long(), expert)


@pytest.mark.parametrize('name', SMALL)
def test_training_step_through_the_whole_image(name):
    net = build(name, scale=2.5).train()
    lq = torch.rand(1, 3, 6, 5)
    image = net(lq)
    assert image.shape == (1, 3, 15, 13)
    (image - 0.5).square().mean().backward()
    without = [key for key, parameter in net.named_parameters() if parameter.grad is None]
    assert not without, 'every parameter needs a gradient, or DDP waits for it'
    assert float(net.encoder.conv_first.weight.grad.abs().max()) > 0
    if net.num_experts > 1:
        assert float(net.decoder.mapper.query_out.weight.grad.abs().max()) > 0
        torch.manual_seed(1)
        first = net(lq)
        torch.manual_seed(2)
        assert not torch.equal(first, net(lq)), 'in training the routing is drawn'


def test_whole_image_needs_a_scale():
    with pytest.raises(ValueError, match='needs `scale`'):
        build('MoEISR')(torch.rand(1, 3, 4, 4))


@pytest.mark.parametrize('channels', [1, 4])
@pytest.mark.parametrize('name', SMALL)
def test_other_channel_counts(name, channels):
    net = build(name, in_channels=channels, out_channels=channels, skip='bicubic', scale=2).eval()
    assert net.encoder.conv_first.in_channels == channels
    with torch.no_grad():
        assert net(torch.rand(2, channels, 5, 4)).shape == (2, channels, 10, 8)
    if name == 'MoEISR':
        net = build(name, out_channels=channels, scale=2).eval()
        assert net(torch.rand(1, 3, 5, 4)).shape == (1, channels, 10, 8)


@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize('skip', ['none', 'bilinear', 'bicubic'])
def test_output_is_added_to_the_skip(name, skip):
    net = random_output(build(name, skip=skip)).eval()
    lq = torch.rand(1, 3, 6, 5)
    coord, cell = grid((13, 12))
    with torch.no_grad():
        decoded = net.decoder(net.encode(lq), coord, cell).prediction
        base = 0.5 if skip == 'none' else skip_at(lq, coord, skip)
        close(net(lq, coord, cell), decoded * 0.5 + base)
        close(net.decode_image(lq, net.encode(lq), (13, 12)).output.flatten(2).transpose(1, 2), decoded * 0.5 + base)


@pytest.mark.parametrize('name', SMALL)
def test_zero_initialised_network_is_exactly_bicubic(name):
    net = build(name, skip='bicubic', scale=3)
    lq = torch.rand(2, 3, 6, 5)
    coord = make_coord((18, 15)).expand(2, -1, -1)
    bicubic = skip_grid(lq, pixel_centres(18), pixel_centres(15), 'bicubic')
    with torch.no_grad():
        assert torch.equal(net.eval()(lq), bicubic)
        close(net.train()(lq), bicubic, 2e-6)
        assert torch.equal(net(lq, coord, torch.full_like(coord, 0.1)), skip_at(lq, coord, 'bicubic'))
        started = random_output(build(name, skip='bicubic', scale=3)).eval()
        assert not torch.allclose(started(lq), bicubic, atol=1e-4)


def test_image_keeps_fp32_under_autocast():
    net = build('LIIF')
    coord, cell = grid((8, 8))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert net(torch.rand(1, 3, 4, 4), coord, cell).dtype == torch.float32


def test_dense_is_moeisr_with_one_expert():
    """The same code and the same parameter names: weights move from one to the other."""
    lm, widths = {'latent': [14], 'depth': 2}, {'hidden_dim': 12}
    for name, expert, options in (('LIIF', [12, 10], {}), ('LTE', [10], widths), ('LMLIIF', lm, {'render_width': 6})):
        dense = build(name).eval()
        options |= {'decoder': dense.decoder.family, 'skip': dense.skip, 'mapper': None}
        one = build('MoEISR', seed=5, experts=[expert], **options).eval()
        assert one.cell_scale_max == dense.cell_scale_max == (0 if name == 'LIIF' else 4)
        one.load_state_dict(dense.state_dict())
        lq = torch.rand(1, 3, 5, 6)
        coord, cell = grid((11, 17))
        with torch.no_grad():
            assert torch.equal(one(lq, coord, cell), dense(lq, coord, cell))


def test_published_widths_by_default():
    """LIIF's MLP is 580-256-256-256-256-3, LTE's 256-256-256-256-3 behind two 64 -> 256 convolutions; LM's below."""
    encoder = {'type': 'EDSREncoder', 'num_block': 1}
    liif = build_network({'type': 'LIIF', 'encoder': encoder})
    assert count(liif.decoder) == 581 * 256 + 3 * 257 * 256 + 257 * 3
    lte = build_network({'type': 'LTE', 'encoder': encoder})
    assert count(lte.decoder) == 2 * conv(64, 256) + 2 * 128 + 3 * 257 * 256 + 257 * 3
    lm = build_network({'type': 'LMLIIF', 'encoder': encoder})
    assert count(lm.decoder) == 579 * 208 + 209 * 208 + 21 * 16 + 5 * 17 * 16 + 17 * 3
    assert (liif.skip, lte.skip, lm.skip) == ('none', 'bilinear', 'none')
    moe = build_network({'type': 'MoEISR', 'encoder': encoder})
    assert moe.decoder.depths == [1, 2, 3, 4]
    assert moe.decoder.mapper.num_layers == 5


def test_the_options_check_states_what_the_method_takes():
    """`core` cannot import pydantic, so the mapper's arguments and the names of skips stand there and in the check."""
    arguments = inspect.signature(Mapper).parameters
    fields = MapperOptions.model_fields
    own = {name: field.default for name, field in fields.items()}
    assert own == {name: arguments[name].default for name in list(arguments)[2:]}  # behind in_channels, num_experts
    assert typing.get_args(fields['granularity'].annotation) == GRANULARITIES and typing.get_args(Skip) == SKIPS


class OfficialEDSR(nn.Module):
    """The published layout of EDSR's weights: head, body with the last convolution inside, unused mean shifts."""

    def __init__(self, width=8, blocks=2):
        super().__init__()
        self.sub_mean, self.add_mean = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.head = nn.Sequential(nn.Conv2d(3, width, 3, padding=1))
        self.body = nn.Sequential(*(nn.Module() for _ in range(blocks)), nn.Conv2d(width, width, 3, padding=1))
        for block in self.body[:-1]:
            block.body = nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
            )

    def forward(self, x):
        head = x = self.head(x)
        for block in self.body[:-1]:
            x = x + block.body(x)
        return head + self.body[-1](x)


class OfficialModel(nn.Module):
    """The published names of LIIF (`imnet`) and LTE (`coef`, `freq`, `phase`, `imnet`)."""

    def __init__(self, name):
        super().__init__()
        self.encoder = OfficialEDSR()
        widths = [8 * 9 + 4, 12, 10, 3] if name == 'liif' else [12, 12, 10, 3]
        if name == 'lte':
            self.coef, self.freq = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
            self.phase = nn.Linear(2, 6, bias=False)
        self.imnet = nn.Module()
        layers = [layer for pair in zip(widths[:-1], widths[1:]) for layer in (nn.Linear(*pair), nn.ReLU())]
        self.imnet.layers = nn.Sequential(*layers[:-1])


@pytest.mark.parametrize('name', ['liif', 'lte'])
def test_official_weights_give_the_official_answers(name):
    torch.manual_seed(3)
    model = OfficialModel(name)
    edsr = {'name': 'edsr-baseline', 'args': {'no_upsampling': True, 'n_resblocks': 2, 'n_feats': 8}}
    args = {'encoder_spec': edsr, 'imnet_spec': {'name': 'mlp', 'args': {'out_dim': 3, 'hidden_list': [12, 10]}}}
    if name == 'lte':
        args['hidden_dim'] = 12
    options, weights = official({'name': name, 'args': args, 'sd': model.state_dict()}, 'a test')
    net = build_network(options).eval()
    net.load_state_dict(weights)  # strict: every name has its place

    pool = SimpleNamespace(linears=lambda _: list(model.imnet.layers[::2]))
    for part in ('coef', 'freq', 'phase'):
        setattr(pool, part, getattr(model, part, None))
    lq = torch.rand(2, 3, 5, 7)
    for out in ((10, 14), (16, 13), (15, 21)):
        coord, cell = grid(out, batch=2)
        with torch.no_grad():
            expected = FAMILIES[name](pool, 0, model.encoder(lq * 2 - 1), coord, cell)
            if name == 'lte':
                expected = expected + F.grid_sample(
                    lq * 2 - 1, coord.flip(-1).unsqueeze(1), mode='bilinear', padding_mode='border', align_corners=False
                )[:, :, 0].transpose(1, 2)
            close(net(lq, coord, cell), expected / 2 + 0.5)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'skip': 'nearest'}, "skip must be one of .*'none', 'bilinear', 'bicubic'.*got 'nearest'"),
        ({'decoder': 'lift'}, "decoder must be one of .*'liif', 'lte'.*got 'lift'"),
        ({'hidden_dim': 16}, "hidden_dim belongs to the decoder 'lte'"),
        ({'render_width': 16}, "render_width belongs to the decoder 'lm'; the decoder is 'liif'"),
        ({'decoder': 'lm', 'experts': [[]], 'shared_layers': 1}, "shared_layers: experts of 'lm'"),
        ({'skip': 'bilinear', 'in_channels': 1}, 'needs in_channels = out_channels; got 1 and 3'),
        ({'experts': [[16], [8, 8]], 'shared_layers': 1}, 'shared_layers: 1 needs experts whose first widths agree'),
        ({'encoder': {'num_feat': 8}}, "encoder needs a type, for example .*; got {'num_feat': 8}"),
        ({'encoder': 'EDSREncoder'}, "encoder needs a type, for example .*; got 'EDSREncoder'"),
        ({'encoder': {'type': 'EDSR', 'num_out_ch': 3}}, 'EDSR is no encoder: .* `num_feat`'),
        ({'encoder': {**RDN, 'depth': 3}}, "encoder RDNEncoder cannot be built: .*'depth'"),
        ({'experts': [[16], 8]}, 'experts must list the hidden widths'),
        ({'mapper': {'num_layers': 0}}, 'num_layers must be 1 to 5; got 0'),
        ({'encoder': {**RDN, 'config': 'C'}}, r"config must be one of \['A', 'B'\]; got 'C'"),
        ({'encoder': {**SWINIR, 'num_heads': [5]}}, 'divisible by every num_heads'),
        ({'encoder': {**SWINIR, 'num_heads': [2, 2]}}, 'equally long'),
        ({'encoder': {**SWINIR, 'img_size': 8}}, 'img_size must be above window_size; got 8 and 8'),
    ],
)
def test_bad_options_say_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        build('MoEISR', **options)
