"""The decoder against its plain twins: folding, dispatch, exact straight-through training, rendering."""

import pytest
import torch
from reference import FAMILIES, grid, mixture

from moeisr_basicsr.core import MoEDecoder, render_image
from moeisr_basicsr.core import reference as method
from moeisr_basicsr.core.coords import make_corners
from moeisr_basicsr.core.decoder import FAMILIES as method_families
from moeisr_basicsr.core.liif import apply_linear
from moeisr_basicsr.core.mapper import Draw, Routing, gumbel_noise
from moeisr_basicsr.tools.profile.rendering import render_fixed

EXPERTS = {
    'liif': [[12], [8, 20], [16, 4, 8]],
    'lte': [[4], [12], [8, 20]],
    'shared': [[12], [12, 20], [12, 4, 8]],
    'nested': [[12, 8], [12], [12, 8, 20]],
    'nested-lte': [[12], [12, 8], [12, 8, 20]],
    'lm': [{'latent': [], 'depth': 1}, {'latent': [12], 'depth': 3}, {'latent': [9, 14], 'depth': 2}],
    'liif-and-none': [[12], [], [16, 4, 8]],
    'nested-and-none': [[], [12], [12, 8, 20]],
    'lte-and-none': [[4], [8, 20], []],
    'lm-and-none': [[], {'latent': [12], 'depth': 3}, {'latent': [9, 14], 'depth': 2}],
}
OPTIONS = {
    'lte': {'hidden_dim': 12},
    'shared': {'shared_layers': 1},
    'nested': {'shared_layers': 3},
    'nested-lte': {'shared_layers': 3, 'hidden_dim': 12},
    'nested-and-none': {'shared_layers': 3},
    'lte-and-none': {'hidden_dim': 12},
    'lm': {'render_width': 5},
    'lm-and-none': {'render_width': 5},
}
for name in method_families:  # a new family is tested with LIIF's experts unless it has its own here
    EXPERTS.setdefault(name, EXPERTS['liif'])
FAMILY = {kind: next((name for name in method_families if name in kind.split('-')), 'liif') for kind in EXPERTS}
KINDS = list(EXPERTS)
DENSE = {'lm': {'latent': [11], 'depth': 2}}  # elsewhere [10, 6]


def make_decoder(family='liif', experts=None, seed=0, **options):
    """`family` may also be 'shared', LIIF with one first layer for all experts, or 'nested', with all hidden layers."""
    torch.manual_seed(seed)
    decoder = MoEDecoder(
        6,
        3,
        FAMILY[family],
        experts or EXPERTS[family],
        mapper={'num_layers': 2, 'num_feat': 8},
        **OPTIONS.get(family, {}),
        **options,
    )
    if decoder.mapper is not None:  # make neighbouring queries differ in their expert, whatever the pool has drawn
        torch.manual_seed(seed)
        decoder.mapper.reset_parameters()
        with torch.no_grad():
            decoder.mapper.query_in.weight[:, -4:-2].mul_(8)
            decoder.mapper.query_out.weight.sub_(decoder.mapper.query_out.weight.mean(dim=0)).mul_(8)
            decoder.mapper.query_out.bias.zero_()
    return decoder


def random_queries(batch=2, count=37, seed=1):
    generator = torch.Generator().manual_seed(seed)
    coord = torch.rand(batch, count, 2, generator=generator) * 2 - 1
    cell = torch.rand(batch, 1, 2, generator=generator) * 0.2 + 0.02  # of each image: lm needs one for all its queries
    return coord, cell.repeat(1, count, 1)


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize('family', KINDS)
@pytest.mark.parametrize('size', [(5, 7), (1, 1), (1, 6), (2, 3)])
def test_folded_equals_unfolded(family, size):
    decoder = make_decoder(family).eval()
    feat = torch.randn(2, 6, *size)
    coord, cell = random_queries()
    output, routing = decoder(feat, coord, cell)
    one_hot = torch.nn.functional.one_hot(routing.expert, 3).float()
    assert len(routing.expert.unique()) > 1 or size == (1, 1), 'the case must use several experts to prove anything'
    close(output, mixture(decoder, feat, coord, cell, one_hot))


@pytest.mark.parametrize('family', KINDS)
@pytest.mark.parametrize('factor', [(2, 2), (3, 3), (2, 3.5), (5, 1), (1.3, 2.7), (7, 7)])
def test_render_equals_plain_grid(family, factor):
    decoder = make_decoder(family).eval()
    feat = torch.randn(2, 6, 9, 7)
    size = round(9 * factor[0]), round(7 * factor[1])
    coord, cell = grid(size, batch=2)
    rendered = render_image(decoder, feat, size, tile=4)
    gates = torch.nn.functional.one_hot(rendered.expert_map.long().flatten(1), 3).float()
    expected = mixture(decoder, feat, coord, cell, gates).transpose(1, 2).unflatten(-1, size)
    close(rendered.output, expected)
    scattered = decoder(feat, coord, cell)
    assert torch.equal(scattered.routing.expert, rendered.expert_map.long().flatten(1))


@pytest.mark.parametrize('family', KINDS)
@pytest.mark.parametrize('is_dense', [False, True])
def test_tiled_equals_whole(family, is_dense):
    decoder = make_decoder(family, [DENSE.get(FAMILY[family], [10, 6])] if is_dense else None).eval()
    feat, size = torch.randn(1, 6, 11, 8), (29, 23)
    whole = render_image(decoder, feat, size, tile=64)
    for tile in (1, 3, 7):
        tiled = render_image(decoder, feat, size, tile=tile)
        close(tiled.output, whole.output, 2e-6)
        if not is_dense:
            assert torch.equal(tiled.expert_map, whole.expert_map)
        else:
            assert tiled.expert_map is None


def gradients(decoder, feat, answer):
    """Output, and the gradients of an L1 to a ramp, of `answer(features)`."""
    decoder.zero_grad()
    leaf = feat.clone().requires_grad_()
    output = answer(leaf)
    target = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    (output - target).abs().mean().backward()
    grads = {name: parameter.grad.clone() for name, parameter in decoder.named_parameters()}
    return output.detach(), {**grads, 'feat': leaf.grad}


@pytest.mark.parametrize('family', KINDS)
@pytest.mark.parametrize('tau', [0.5, 5.0])
@pytest.mark.parametrize('every_expert', [False, True])
def test_training_equals_the_reference(family, tau, every_expert):
    """Output and gradients of encoder features, every expert and the mapper; `every_expert` changes neither."""
    decoder = make_decoder(family).double()
    feat = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    coord, cell = (part.double() for part in random_queries())
    noise = gumbel_noise((2, 37, 3), seed=3, iteration=1, slot=0).double()
    assert decoder.pool.is_nested == family.startswith('nested')
    chosen = decoder.predict(feat, coord, cell, Draw(noise, tau)).routing.expert
    assert chosen.unique().numel() == 3
    draw = Draw(noise, tau, every_expert)
    output, fast = gradients(decoder, feat, lambda z: decoder.predict(z, coord, cell, draw).mixture())
    expected, plain = gradients(decoder, feat, lambda z: method.decode(decoder, z, coord, cell, noise, tau)[0])
    close(output, expected, 1e-9)
    for name, grad in plain.items():
        assert grad.abs().max() > 0, name
        close(fast[name], grad, 2e-6 * float(grad.abs().max()))


@pytest.mark.parametrize('family', KINDS)
def test_test_equals_the_reference(family):
    decoder = make_decoder(family).eval()
    feat = torch.randn(2, 6, 5, 7)
    coord, cell = random_queries()
    decoded = decoder(feat, coord, cell)
    expected, gate = method.decode(decoder, feat, coord, cell)
    assert torch.equal(decoded.routing.expert, gate.argmax(dim=-1)) and decoded.routing.gate is None
    close(decoded.prediction, expected)


def test_without_a_draw_torch_draws():
    decoder = make_decoder()
    feat, (coord, cell) = torch.randn(2, 6, 5, 7), random_queries()
    first, again, other = (
        (torch.manual_seed(seed), decoder(feat, coord, cell).routing.expert)[1] for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_idle_expert_gets_a_zero_gradient():
    decoder = make_decoder()
    with torch.no_grad():
        decoder.mapper.query_out.bias.copy_(torch.tensor([0.0, 0.0, -1e4]))
    coord, cell = random_queries()
    feat, draw = torch.randn(2, 6, 5, 7), Draw(torch.zeros(2, 37, 3))
    assert not (decoder.predict(feat, coord, cell, draw).routing.expert == 2).any()
    _, grads = gradients(decoder, feat, lambda z: decoder.predict(z, coord, cell, draw).mixture())
    idle = [grad for name, grad in grads.items() if 'experts.2.' in name]
    assert idle and all(torch.count_nonzero(grad) == 0 for grad in idle)
    busy = [grad for name, grad in grads.items() if 'experts.0.' in name]
    assert all(torch.count_nonzero(grad) > 0 for grad in busy)


@pytest.mark.parametrize('family', list(method_families))
def test_one_query(family):
    decoder = make_decoder(family).eval()
    feat = torch.randn(1, 6, 4, 4)
    coord, cell = random_queries(batch=1, count=1)
    output, routing = decoder(feat, coord, cell)
    assert output.shape == (1, 1, 3)
    close(output, FAMILIES[family](decoder.pool, int(routing.expert), feat, coord, cell))


@pytest.mark.parametrize('family', list(method_families))
def test_one_expert_is_the_dense_decoder(family):
    """No mapper, no routing, the same code: in training and in test, output and gradients."""
    decoder = make_decoder(family, [DENSE.get(family, [10, 6])])
    assert decoder.mapper is None
    coord, cell = random_queries()
    feat = torch.randn(2, 6, 5, 7)
    decoded = decoder(feat, coord, cell)
    assert isinstance(decoded.routing, Routing) and decoded.routing.gate is None and not decoded.routing.expert.any()
    output, fast = gradients(decoder, feat, lambda z: decoder(z, coord, cell).prediction)
    expected, plain = gradients(decoder, feat, lambda z: FAMILIES[family](decoder.pool, 0, z, coord, cell))
    close(output, expected)
    close(decoder.eval()(feat, coord, cell).prediction, expected)
    for name, grad in plain.items():
        close(fast[name], grad, 1e-6)


def test_queries_are_independent_of_their_company():
    """Chunked = whole: a query's answer and expert do not depend on the other queries."""
    decoder = make_decoder().eval()
    feat = torch.randn(1, 6, 5, 7)
    coord, cell = random_queries(batch=1, count=40)
    whole = decoder(feat, coord, cell)
    parts = [decoder(feat, coord[:, at : at + 7], cell[:, at : at + 7]) for at in range(0, 40, 7)]
    close(torch.cat([part.prediction for part in parts], dim=1), whole.prediction, 1e-6)
    assert torch.equal(torch.cat([part.routing.expert for part in parts], dim=1), whole.routing.expert)


def test_latent_mlps_run_only_where_their_queries_read(monkeypatch):
    """At test, on a whole image and on scattered queries; in training on every LR pixel."""
    decoder = make_decoder('lm-and-none').eval()
    feat, size = torch.randn(1, 6, 9, 7), (20, 30)
    expert_map = torch.zeros(size, dtype=torch.uint8)
    expert_map[3:9, 4:20], expert_map[12:, 22:] = 1, 2
    coord, cell = grid(size)
    corners = make_corners(coord, (9, 7)).index[:, 0]  # (4, Q)
    gates = torch.nn.functional.one_hot(expert_map.long().flatten(), 3)[None].float()
    expected = mixture(decoder, feat, coord, cell, gates)[0]
    rows = {1: [], 2: []}  # LR pixels that each expert's latent MLP has seen, call by call
    for j, seen in rows.items():
        decoder.pool.latent_linears(j)[-1].register_forward_hook(
            lambda layer, x, y, seen=seen: seen.append(x[0][..., 0].numel())
        )
    close(render_fixed(decoder, feat, size, expert_map).flatten(1).t(), expected)
    for j, seen in rows.items():
        assert seen == [corners[:, expert_map.flatten() == j].unique().numel()] and 0 < seen[0] < 63
    few = torch.tensor([95, 130, 415, 599])
    routing = Routing(expert_map.flatten()[few].long()[None], None)
    assert routing.expert.tolist() == [[1, 1, 2, 2]]
    monkeypatch.setattr(decoder, 'route', lambda *_: routing)
    close(decoder(feat, coord[:, few], cell[:, few]).prediction[0], expected[few])
    for j, seen in rows.items():
        assert seen[-1] == corners[:, few[routing.expert[0] == j]].unique().numel()
    monkeypatch.undo()
    decoder.train()(feat, coord[:, few], cell[:, few])
    assert rows[1][-1] == rows[2][-1] == 63


def test_lm_needs_one_cell_for_all_queries_of_an_image():
    decoder, feat = make_decoder('lm'), torch.randn(2, 6, 5, 7)
    coord, cell = random_queries()
    assert not torch.equal(cell[0], cell[1])
    decoder(feat, coord, cell)
    cell[1, 5, 0] *= 2
    with pytest.raises(ValueError, match="'lm' needs one cell for all queries of an image"):
        decoder(feat, coord, cell)


def test_costs_and_macs_by_hand():
    decoder = MoEDecoder(64, 3, 'liif', [[256] * 4, [256]])
    heavy = 4 * (2 * 256 + 3 * 256 * 256) + 256 * 3
    light = 4 * 2 * 256 + 256 * 3
    assert decoder.expert_macs == [heavy, light]
    assert decoder.expert_costs.tolist() == pytest.approx([1.0, light / heavy])
    assert decoder.pool.table_macs() == 2 * 9 * 64 * 256


def test_a_shared_first_layer_is_stored_and_computed_once():
    decoder = make_decoder('shared')
    separate = make_decoder('liif', EXPERTS['shared'])
    width, inputs = 12, 9 * 6 + 4
    assert [name for name, value in decoder.state_dict().items() if value.shape == (width, inputs)] == [
        'pool.shared.0.weight'
    ]
    count, before = (sum(value.numel() for value in net.state_dict().values()) for net in (decoder, separate))
    assert before - count == 2 * width * (inputs + 1)
    assert decoder.depths == separate.depths == [1, 2, 3]
    assert decoder.expert_macs == separate.expert_macs
    assert decoder.pool.table_macs() * 3 == separate.pool.table_macs() == 3 * 9 * 6 * width
    tables = decoder.pool.tables(torch.randn(1, 6, 4, 5))
    assert len(tables) == 3 and len({table.data_ptr() for table in tables}) == 1


def test_nested_experts_have_only_output_layers_of_their_own():
    decoder = make_decoder('nested')
    assert {name: tuple(value.shape) for name, value in decoder.pool.named_parameters() if name.endswith('weight')} == {
        'shared.0.weight': (12, 58),
        'shared.1.weight': (8, 12),
        'shared.2.weight': (20, 8),
        'experts.0.layers.0.weight': (3, 8),
        'experts.1.layers.0.weight': (3, 12),
        'experts.2.layers.0.weight': (3, 20),
    }
    assert decoder.depths == [2, 1, 3]
    assert decoder.expert_macs == make_decoder('liif', EXPERTS['nested']).expert_macs


@pytest.mark.parametrize('family', KINDS)
def test_every_expert_predicts_as_it_would_alone(family):
    """One pass through what is shared against each expert by itself, in the plain way; gradients too."""
    decoder = make_decoder(family).double()
    feat = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    coord, cell = (part.double() for part in random_queries())
    weight = torch.randn(2, 37, 3, 3, dtype=torch.float64)  # of every expert's every prediction
    found = []
    for predict in (
        lambda: decoder.predict(feat, coord, cell, Draw(every_expert=True)).experts,
        lambda: torch.stack([FAMILIES[decoder.family](decoder.pool, j, feat, coord, cell) for j in range(3)], dim=2),
    ):
        decoder.zero_grad()
        predictions = predict()
        (predictions * weight).sum().backward()
        grads = {name: value.grad.clone() for name, value in decoder.pool.named_parameters()}
        found.append((predictions.detach(), grads))
    (fast, fast_grads), (plain, plain_grads) = found
    close(fast, plain, 1e-9)
    for name, grad in plain_grads.items():
        close(fast_grads[name], grad, 2e-6 * float(grad.abs().max()))


@pytest.mark.parametrize('rows', [0, 1, 7, 5000])
@pytest.mark.parametrize('widths', [(12, 20), (256, 3), (1, 1)])
def test_linear_layers_as_convolutions(rows, widths):
    layer = torch.nn.Linear(*widths)
    x = torch.randn(rows, widths[0])
    expected = x.double() @ layer.weight.double().t() + layer.bias.double()
    with torch.no_grad():
        fast = apply_linear(layer, x)
    assert fast.shape == expected.shape
    close(fast, expected.float(), 1e-5)
    apply_linear(layer, x).sum().backward()  # with gradients it is the layer itself
    assert layer.weight.grad is not None


@pytest.mark.parametrize(
    ('family', 'experts', 'count', 'message'),
    [
        ('liif', [[8], [12, 8]], 1, 'first widths agree'),
        ('liif', [[8, 6], [8, 5]], 2, 'first widths agree'),
        ('lm', [[]], 1, "'lm' have no layers in common; got 1"),
        ('lte', [[8], [12, 8]], 1, 'first widths agree'),
        ('liif', [[8]], -1, 'must not be negative'),
    ],
)
def test_shared_layers_need_equal_widths(family, experts, count, message):
    with pytest.raises(ValueError, match=f'shared_layers.*{message}'):
        MoEDecoder(4, 3, family, experts, shared_layers=count)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'family': 'lif'}, 'decoder must be one of'),
        ({'experts': []}, 'experts must list'),
        ({'experts': [256]}, 'experts must list'),
        ({'experts': [[0]]}, 'experts must list'),
        ({'experts': [{'latent': [8], 'depth': 2}]}, 'experts must list the hidden widths'),
        *(
            ({'family': 'lm', 'experts': [wrong]}, 'experts must list the layers')
            for wrong in (
                [8],
                {'latent': [8]},
                {'latent': [8], 'depth': 0},
                {'latent': [0], 'depth': 2},
                {'latent': [8], 'depth': 2, 'width': 16},
            )
        ),
        ({'experts': [[]] * 257}, '256 experts at most; got 257'),
        ({'family': 'lte', 'hidden_dim': 7}, 'hidden_dim'),
        ({'mapper': {'num_layers': 6}}, 'num_layers'),
        ({'mapper': {'granularity': 'image'}}, 'granularity'),
    ],
)
def test_bad_options_say_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        MoEDecoder(4, **options)
