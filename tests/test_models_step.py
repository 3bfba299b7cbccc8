"""One training step of the models: gradients, accumulation, EMA, draws, temperature, non-finite losses, precision."""

import math
import re

import pytest
import torch
from basicsr.models import build_model
from tiny_runs import DENSE, NETWORK, change, gradients_of, image_batch, model_options, query_batch, weights_of

from moeisr_basicsr.core import gumbel_noise
from moeisr_basicsr.errors import UserError
from moeisr_basicsr.models import non_finite
from moeisr_basicsr.models.non_finite import NonFiniteLossError
from moeisr_basicsr.models.temperature import check_temperature, temperature_at
from moeisr_basicsr.models.training_draws import DrawAhead, DrawKey, batch_keep, batch_noise


def build_twice(options, other):
    """Two models with the same initial weights."""
    torch.manual_seed(0)
    first = build_model(options)
    torch.manual_seed(0)
    return first, build_model(other)


def test_step_follows_the_written_loss():
    """Gradients equal those of L1 + lambda * J * sum (load - 1/J)^2 written out by hand on the bare network."""
    options = model_options(**{'train:temperature': {'type': 'linear', 'start': 3.0, 'end': 1.0, 'total_iter': 11}})
    batch = query_batch()
    first, other = build_twice(options, options)
    first.feed_data(batch)
    first.optimize_parameters(6)

    noise = torch.stack([gumbel_noise((40, 2), 3, 6, slot) for slot in range(4)])
    net = other.net_g
    output, routing, _ = net(batch['lq'], batch['coord'], batch['cell'], noise=noise, tau=2.0, with_routing=True)
    load = routing.gates.mean(dim=(0, 1))
    l1 = (output - batch['gt']).abs().mean()
    balance = 0.5 * 2 * (load - 0.5).square().sum()
    (l1 + balance).backward()
    for name, gradient in gradients_of(first).items():
        torch.testing.assert_close(gradient, dict(net.named_parameters())[name].grad, msg=name)
    log = first.get_current_log()
    assert log['l_pix'] == pytest.approx(l1.item(), rel=1e-6)
    assert log['l_balance'] == pytest.approx(balance.item(), rel=1e-5)
    assert log['tau'] == 2.0
    assert [log['load/expert_1'], log['load/expert_2']] == pytest.approx(load.tolist())
    assert log['mean_cost'] == pytest.approx((load * net.expert_costs).sum().item())


NESTED = {
    'network_g:experts': [[8], [8, 8]],
    'network_g:shared_layers': 2,
    'train:experts_opt': {'type': 'MoEExpertLoss', 'loss_weight': 0.3},
}


@pytest.mark.parametrize('skip', ['none', 'bicubic'])
def test_the_loss_of_all_experts_follows_the_written_one(skip):
    """It sees each expert's answer as that expert alone would give it, the skip included."""
    options = model_options(**NESTED, **{'network_g:skip': skip, 'network_g:zero_init_last': False})
    batch = query_batch()
    first, other = build_twice(options, options)
    for model in (first, other):
        model.mapper_spread = 0
    first.feed_data(batch)
    first.optimize_parameters(1)

    net = other.net_g
    noise = torch.stack([gumbel_noise((40, 2), 3, 1, slot) for slot in range(4)])
    routed = net(batch['lq'], batch['coord'], batch['cell'], noise=noise, with_routing=True)
    alone = []
    for j in range(2):  # noise that leaves no choice
        forced = torch.full((4, 40, 2), -1e6)
        forced[..., j] = 1e6
        alone.append((net(batch['lq'], batch['coord'], batch['cell'], noise=forced) - batch['gt']).abs().mean())
    load = routed.routing.gates.mean(dim=(0, 1))
    experts = 0.3 * sum(alone) / 2
    loss = (routed.output - batch['gt']).abs().mean() + 0.5 * 2 * (load - 0.5).square().sum() + experts
    loss.backward()
    assert first.get_current_log()['l_experts'] == pytest.approx(experts.item(), rel=1e-5)
    for name, gradient in gradients_of(first).items():
        torch.testing.assert_close(gradient, dict(net.named_parameters())[name].grad, msg=name)


FITTED = {'type': 'MoEExpertLoss', 'loss_weight': 0.3, 'routing_weight': 1e-3, 'fit_temperature': 1e-2}


def test_a_fitted_mapper_follows_the_written_one():
    """Scores by least squares, offsets by the balance loss at the routing of the test, and no noise."""
    options = change(model_options(**NESTED), {'train:experts_opt': FITTED})
    batch = query_batch()
    first, other = build_twice(options, options)
    for net in (first.net_g, other.net_g):
        with torch.no_grad():  # both experts are in use
            logits = net.decoder.logits(net.encode(batch['lq']), batch['coord'], batch['cell'])  # (4, 40, 2)
            net.decoder.mapper.query_out.bias[1] += (logits[..., 0] - logits[..., 1]).median()
    first.feed_data(batch)
    first.optimize_parameters(1)

    net = other.net_g
    mapper = net.decoder.mapper
    logits = net.decoder.logits(net.encode(batch['lq']), batch['coord'], batch['cell'])
    chosen = torch.nn.functional.one_hot(logits.argmax(dim=-1), 2)
    assert 0 < chosen[..., 0].float().mean() < 1
    alone, offset = [], mapper.query_out.bias.detach().clone()
    net.eval()
    for j in range(2):  # an offset that leaves no choice
        with torch.no_grad():
            mapper.query_out.bias[j] += 1e6
        alone.append(net(batch['lq'], batch['coord'], batch['cell']) - batch['gt'])
        with torch.no_grad():
            mapper.query_out.bias.copy_(offset)
    net.train()
    error = torch.stack([gap.abs().mean(dim=-1) for gap in alone], dim=-1)  # (4, 40, 2)
    routed = (torch.stack(alone, dim=2) * chosen[..., None]).sum(dim=2)
    scale = (2 / (batch['cell'] * torch.tensor(batch['lq'].shape[-2:]))).prod(dim=-1).sqrt()
    target = -error.detach() / scale[..., None] / 1e-2
    scores = logits - mapper.query_out.bias
    fit = ((scores - scores.mean(-1, keepdim=True)) - (target - target.mean(-1, keepdim=True))).square().mean()
    share = torch.softmax(logits.detach() + mapper.query_out.bias - mapper.query_out.bias.detach(), dim=-1)
    load = (chosen + share - share.detach()).mean(dim=(0, 1))
    loss = routed.abs().mean() + 0.3 * error.mean() + 1e-3 * fit + 0.5 * 2 * (load - 0.5).square().sum()
    loss.backward()
    log = first.get_current_log()
    assert log['load/expert_1'] == pytest.approx(chosen[..., 0].float().mean().item())
    assert log['l_experts'] == pytest.approx((0.3 * error.mean() + 1e-3 * fit).item(), rel=1e-4)
    for name, gradient in gradients_of(first).items():
        torch.testing.assert_close(gradient, dict(net.named_parameters())[name].grad, rtol=1e-3, atol=1e-6, msg=name)


def test_the_loss_of_all_experts_needs_all_answers():
    with pytest.raises(UserError, match='experts_opt needs training that runs every expert on every query'):
        build_model(model_options(**NESTED, **{'network_g:expert_grad': 'sampled'}))


@pytest.mark.parametrize('parts', [2, 3, 4])
@pytest.mark.parametrize('target', ['uniform', 0.9, [[0.2, 0.8], [0.9, 0.1]]])
def test_accumulation_gives_the_gradient_of_the_whole_batch(parts, target):
    """Also of the balance loss, which is no mean over images, and with parts of unequal size."""
    options = model_options(
        **NESTED,
        **{
            'train:balance_opt:target': target,
            'train:balance_opt:loss_weight': 5.0,
            'train:balance_opt:scale_bounds': [2.5],
        },
    )
    whole, cut = build_twice(options, change(options, {'train:accumulate': parts}))
    batch = query_batch()
    batch['cell'][1::2] *= 0.8  # scale factors on both sides of 2.5
    for model in (whole, cut):
        model.feed_data(batch)
        model.optimize_parameters(1)
    for name, gradient in gradients_of(whole).items():
        torch.testing.assert_close(gradients_of(cut)[name], gradient, rtol=1e-4, atol=1e-7, msg=name)
    assert cut.get_current_log() == pytest.approx(whole.get_current_log(), rel=1e-5)


def test_every_parameter_has_a_gradient_with_an_idle_expert():
    """DDP's find_unused_parameters can stay off: an idle expert's gradient is zero, not missing."""
    for grad in ('exact', 'naive', 'sampled'):
        model = build_model(model_options(**{'network_g:expert_grad': grad, 'train:mapper_spread': 0}))
        with torch.no_grad():
            model.net_g.decoder.mapper.query_out.bias.copy_(torch.tensor([1e4, -1e4]))  # expert 1 gets no query
        model.feed_data(query_batch())
        model.optimize_parameters(1)
        assert model.get_current_log()['load/expert_2'] == 0
        assert all(gradient is not None for gradient in gradients_of(model).values()), grad


def test_only_the_parts_that_are_named_train():
    model = build_model(
        model_options(
            **NESTED,
            **{'train:trainable': ['decoder.mapper.query_out', 'encoder.conv_first.weight'], 'train:mapper_spread': 0},
        )
    )
    before = weights_of(model)
    model.feed_data(query_batch())
    model.optimize_parameters(1)
    changed = {name for name, value in weights_of(model).items() if not torch.equal(value, before[name])}
    assert changed == {'decoder.mapper.query_out.weight', 'decoder.mapper.query_out.bias', 'encoder.conv_first.weight'}


def test_a_part_that_restarts_does_not_start_from_the_pretrained_weights(tmp_path):
    trained = build_model(model_options(**NESTED))
    torch.save({'params': trained.net_g.state_dict(), 'params_ema': trained.net_g.state_dict()}, tmp_path / 'net_g.pth')
    start = {'path:pretrain_network_g': str(tmp_path / 'net_g.pth'), 'train:ema_decay': 0.9, 'manual_seed': 8}
    torch.manual_seed(8)
    model = build_model(model_options(**NESTED, **start, **{'train:restart': ['decoder.mapper']}))
    own, averaged, old = (net.state_dict() for net in (model.net_g, model.net_g_ema, trained.net_g))
    fresh = {name for name, value in own.items() if not torch.equal(value, old[name])}
    assert 'decoder.mapper.query_in.weight' in fresh and all(name.startswith('decoder.mapper.') for name in fresh)
    assert all(torch.equal(value, averaged[name]) for name, value in own.items())

    with pytest.raises(UserError, match="train: restart: MoEISR has no parameters in 'mapper'"):
        build_model(model_options(**NESTED, **start, **{'train:restart': ['mapper']}))
    # A resumed run goes on with the weights that it had.
    resumed = build_model(
        model_options(**NESTED, **start, **{'train:restart': ['decoder.mapper'], 'path:resume_state': 'some.state'})
    )
    assert all(torch.equal(value, old[name]) for name, value in resumed.net_g.state_dict().items())


def test_a_part_without_parameters_is_a_mistake():
    words = "train: trainable: MoEISR has no parameters in 'decoder.maper'. Did you mean 'decoder.mapper'?"
    with pytest.raises(UserError, match=re.escape(words)):
        build_model(model_options(**{'train:trainable': ['decoder.mapper', 'decoder.maper']}))
    with pytest.raises(UserError, match='train: trainable: names no part'):
        build_model(model_options(**{'train:trainable': []}))


def test_draws_do_not_depend_on_the_number_of_ranks():
    whole = batch_noise(DrawKey(5, 7, 0, 1), (6, 10, 3))
    for rank in range(2):
        assert torch.equal(batch_noise(DrawKey(5, 7, rank, 2), (3, 10, 3)), whole[rank::2])
    assert not torch.equal(whole, batch_noise(DrawKey(5, 8, 0, 1), (6, 10, 3)))
    assert not torch.equal(whole, batch_noise(DrawKey(6, 7, 0, 1), (6, 10, 3)))


def test_draws_made_ahead_are_those_of_their_iteration():
    ahead, key, shape = DrawAhead(), DrawKey(5, 1, 1, 2), (3, 20, 2)
    for iteration, rate in ((1, 0.5), (2, 0.5), (3, 0.5), (7, 0.5), (8, None), (9, None)):
        asked = key._replace(iteration=iteration)
        draws = ahead(asked, shape, rate)
        assert torch.equal(draws.noise, batch_noise(asked, shape))
        assert (draws.keep is None) if rate is None else torch.equal(draws.keep, batch_keep(asked, shape, rate))


def test_keep_draws_have_their_rate_and_are_not_the_noise():
    key = DrawKey(5, 7, 0, 1)
    keep = batch_keep(key, (8, 5000, 4), 0.125)
    assert keep.float().mean().item() == pytest.approx(0.125, abs=0.003)  # 160000 draws: 3.6 sigma
    assert batch_keep(key, (1, 100, 2), 1.0).all()
    noise = batch_noise(key, (8, 5000, 4))
    assert noise[keep].mean().item() == pytest.approx(noise.mean().item(), abs=0.03)


def test_temperature_schedules():
    for kind, middle in (('linear', 3.0), ('exponential', math.sqrt(5.0)), ('cosine', 3.0)):
        options = {'type': kind, 'start': 5.0, 'end': 1.0, 'total_iter': 101}
        check_temperature(options)
        values = [temperature_at(options, iteration) for iteration in range(1, 200)]
        assert values[0] == 5.0
        assert values[50] == pytest.approx(middle)
        assert values[100] == pytest.approx(1.0) and values[-1] == values[100]
        assert all(after <= before for before, after in zip(values, values[1:]))
    assert temperature_at({'start': 2}, 10**6) == 2.0
    for wrong, hint in (
        ({'type': 'linaer', 'start': 1}, "Did you mean 'linear'"),
        ({'start': 0}, 'above 0'),
        ({'type': 'linear', 'start': 1}, 'end must be'),
    ):
        with pytest.raises(UserError, match=hint):
            check_temperature(wrong)


def test_ema_is_fp32_and_follows_its_formula():
    options = model_options(**{'train:amp': 'bf16', 'train:mapper_spread': 0})
    model = build_model(options)
    averages = weights_of(model)
    for iteration in (1, 2, 3):
        model.feed_data(query_batch(seed=iteration))
        model.optimize_parameters(iteration)
        current = weights_of(model)
        averages = {name: 0.9 * average + 0.1 * current[name] for name, average in averages.items()}
    for name, value in model.net_g_ema.named_parameters():
        assert value.dtype == torch.float32 and not value.requires_grad
        torch.testing.assert_close(value, averages[name], msg=name)
    assert model.evaluated_net is model.net_g_ema


def test_ema_copies_buffers():
    model = build_model(model_options())
    for net, value in ((model.net_g, 1.0), (model.net_g_ema, 0.0)):
        net.register_buffer('extra', torch.tensor(value))
    model.model_ema(0.9)
    assert model.net_g_ema.extra == 1


@pytest.mark.parametrize(
    'changes',
    [
        {'train:amp': 'bf16'},
        {'train:amp': 'fp16'},
        {'train:channels_last': True},
        {'train:compile': {'backend': 'aot_eager'}},
    ],
)
def test_precision_options_train_nearly_as_fp32(changes):
    plain, other = build_twice(model_options(), model_options(**changes))
    for model in (plain, other):
        for iteration in (1, 2, 3):
            model.feed_data(query_batch(seed=iteration))
            model.optimize_parameters(iteration)
    assert all(value.dtype == torch.float32 for value in other.net_g.state_dict().values())
    tolerance = 3e-2 if 'train:amp' in changes else 1e-4
    assert other.get_current_log()['l_pix'] == pytest.approx(plain.get_current_log()['l_pix'], rel=tolerance)
    if changes.get('train:amp') == 'fp16':
        assert other.precision.scaler.get_scale() > 1
        # the scaler's factor must be out of the gradient again
        assert other.get_current_log()['grad_norm'] == pytest.approx(plain.get_current_log()['grad_norm'], rel=0.2)


def test_gradient_clipping():
    plain, clipped = build_twice(model_options(), model_options(**{'train:grad_clip': 1e-3}))
    for model in (plain, clipped):
        model.feed_data(query_batch())
        model.optimize_parameters(1)
    norm = plain.get_current_log()['grad_norm']
    assert norm > 1e-3 and clipped.get_current_log()['grad_norm'] == pytest.approx(norm)
    total = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients_of(clipped).values()))
    assert total == pytest.approx(1e-3, rel=1e-3)


def test_non_finite_loss_stops_and_names_its_files():
    model = build_model(model_options())
    before = weights_of(model)
    batch = query_batch()
    batch['gt'][2] = float('nan')
    model.feed_data(batch)
    with pytest.raises(NonFiniteLossError) as error:
        model.optimize_parameters(17)
    text = str(error.value)
    assert 'iteration 17' in text and 'gt/2.png' in text and 'l_pix = nan' in text and '2.556 x 2.286' in text
    assert all(torch.equal(value, before[name]) for name, value in weights_of(model).items())


def test_non_finite_gradient_is_found_behind_a_finite_loss():
    model = build_model(model_options(model_type='ArbitraryScaleModel', network_g=DENSE))
    next(model.net_g.parameters()).register_hook(lambda gradient: gradient * float('inf'))
    model.feed_data(query_batch())
    with pytest.raises(NonFiniteLossError, match='grad_norm'):
        model.optimize_parameters(1)


def test_non_finite_steps_are_skipped_up_to_the_limit(monkeypatch):
    monkeypatch.setattr(non_finite, 'MOST_SKIPPED', 2)
    model = build_model(model_options(**{'train:non_finite': 'skip', 'train:mapper_spread': 0}))
    bad = query_batch()
    bad['gt'][0] = float('inf')
    before = weights_of(model)
    for iteration in (1, 2):
        model.feed_data(bad)
        model.optimize_parameters(iteration)
    assert model.guard.skipped == 2
    assert all(torch.equal(value, before[name]) for name, value in weights_of(model).items())
    model.feed_data(query_batch())
    model.optimize_parameters(3)
    assert not all(torch.equal(value, before[name]) for name, value in weights_of(model).items())
    model.feed_data(bad)
    with pytest.raises(NonFiniteLossError, match='2 steps were skipped before'):
        model.optimize_parameters(4)


@pytest.mark.parametrize('network', ['moe', 'dense'])
def test_whole_patches_train_like_queries_of_all_their_pixels(network):
    """Items without coordinates (BasicSR's PairedImageDataset): net(lq) at the network's scale."""
    options = model_options(**{'network_g:scale': 2})
    if network == 'dense':
        options = model_options(model_type='ArbitraryScaleModel', network_g={**DENSE, 'scale': 2})
    model = build_model(options)
    batch = image_batch()
    model.feed_data(batch)
    model.optimize_parameters(1)
    log = model.get_current_log()
    if network == 'dense':
        model = build_twice(options, options)[0]
        expected = (model.net_g(batch['lq']) - batch['gt']).abs().mean()
        model.feed_data(batch)
        model.optimize_parameters(1)
        assert model.get_current_log()['l_pix'] == pytest.approx(expected.item(), rel=1e-6)
    else:
        assert log['load/expert_1'] + log['load/expert_2'] == pytest.approx(1) and log['l_balance'] >= 0
        assert model.batch.queries == 2 * 12 * 10


def test_bad_train_options_are_user_errors():
    for changes, hint in (
        ({'train:amp': 'bf61'}, "Did you mean 'bf16'"),
        ({'train:accumulate': 0}, 'at least 1'),
        ({'train:non_finite': 'ignore'}, 'stop, skip'),
        ({'network_g': {'type': 'MSRResNet'}}, 'needs a network with experts'),
    ):
        with pytest.raises(UserError, match=hint):
            build_model(model_options(**changes))


@pytest.mark.parametrize('parts', [1, 3])
def test_first_step_spreads_the_logits_once(parts):
    """Mean 0 and deviation `mapper_spread` on the first batch, in the averaged weights too; later steps leave it be."""
    model = build_model(
        model_options(**{'train:mapper_spread': 2.0, 'train:accumulate': parts, 'train:optim_g:lr': 1e-12})
    )
    batch = query_batch()
    model.feed_data(batch)
    model.optimize_parameters(1)
    for net in (model.net_g, model.net_g_ema):
        logits = net.decoder.logits(net.encode(batch['lq']), batch['coord'], batch['cell']).flatten(0, 1)
        torch.testing.assert_close(logits.mean(dim=0), torch.zeros(2), rtol=0, atol=1e-3)
        torch.testing.assert_close(logits.std(dim=0, correction=0), torch.full((2,), 2.0), rtol=1e-3, atol=0)
    before = weights_of(model)
    model.feed_data(query_batch(seed=5))
    model.optimize_parameters(2)
    for name, value in weights_of(model).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    'network, changes',
    [(NETWORK, {'train:restart': ['decoder.mapper']}), (DENSE, {'path:strict_load_g': False})],
    ids=['restarted', 'from a dense network'],
)
def test_a_mapper_that_is_not_pretrained_is_spread(tmp_path, network, changes):
    source = build_model(
        model_options(
            **{'network_g': network, 'train:mapper_spread': 0}
            | ({'model_type': 'ArbitraryScaleModel', 'train:balance_opt': None} if network is DENSE else {})
        )
    )
    torch.save({'params': weights_of(source), 'params_ema': weights_of(source)}, tmp_path / 'net.pth')
    model = build_model(
        model_options(**{'path:pretrain_network_g': str(tmp_path / 'net.pth'), 'train:optim_g:lr': 1e-12, **changes})
    )
    batch = query_batch()
    model.feed_data(batch)
    model.optimize_parameters(1)
    logits = model.net_g.decoder.logits(model.net_g.encode(batch['lq']), batch['coord'], batch['cell']).flatten(0, 1)
    torch.testing.assert_close(logits.std(dim=0, correction=0), torch.ones(2), rtol=1e-3, atol=0)


def test_pretrained_mapper_keeps_its_scale(tmp_path):
    source = build_model(model_options(**{'train:mapper_spread': 0}))
    weights = weights_of(source)
    torch.save({'params': weights, 'params_ema': weights}, tmp_path / 'net.pth')
    model = build_model(
        model_options(**{'path:pretrain_network_g': str(tmp_path / 'net.pth'), 'train:optim_g:lr': 1e-12})
    )
    model.feed_data(query_batch())
    model.optimize_parameters(1)
    for name, value in weights_of(model).items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-9, msg=name)
