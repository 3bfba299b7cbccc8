"""One training step of the models: gradients, accumulation, EMA, draws, temperature, non-finite losses, precision."""

import math
import re

import pytest
import torch
from basicsr.models import build_model
from tiny_runs import DENSE, change, gradients_of, image_batch, model_options, query_batch, weights_of

from moeisr_basicsr.core import gumbel_noise
from moeisr_basicsr.core import reference as method
from moeisr_basicsr.core.skip import skip_at
from moeisr_basicsr.errors import UserError
from moeisr_basicsr.models import non_finite
from moeisr_basicsr.models.non_finite import NonFiniteLossError
from moeisr_basicsr.models.training_draws import batch_noise, check_tau, tau_at


def build_twice(options, other):
    """Two models with the same initial weights."""
    torch.manual_seed(0)
    first = build_model(options)
    torch.manual_seed(0)
    return first, build_model(other)


def plain_predictions(net, batch, iteration, tau=1.0):
    """Every expert's predictions in image space and the gates, by the reference."""
    noise = torch.stack([gumbel_noise((40, 2), 3, iteration, slot) for slot in range(4)])
    feat, (coord, cell) = net.encode(batch['lq']).feat, (batch['coord'], batch['cell'])
    gate = method.gates(method.logits(net.decoder, feat, coord, cell), noise, tau)
    experts = torch.stack([method.predict(net.decoder, j, feat, coord, cell) for j in range(2)], dim=2)
    base = 0.5 if net.skip == 'none' else skip_at(batch['lq'], coord, cell, net.skip).unsqueeze(2)
    return experts * 0.5 + base, gate


def compare_with(loss, model, net):
    """The model's gradients against those of `loss` on its twin."""
    loss.backward()
    for name, gradient in gradients_of(model).items():
        expected = dict(net.named_parameters())[name].grad
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6, msg=name)


def test_the_paper_s_step_follows_the_written_loss():
    """L1 of the straight-through mixture + lambda * J * sum (share - 1/J)^2, written out on the bare network."""
    options = model_options(**{'train:tau': [4.0, 1.0], 'train:total_iter': 11})
    batch = query_batch()
    first, other = build_twice(options, options)
    first.feed_data(batch)
    first.optimize_parameters(6)

    net = other.net_g
    experts, gate = plain_predictions(net, batch, 6, tau=2.0)
    shares = gate.mean(dim=(0, 1))
    l1 = ((gate.unsqueeze(-1) * experts).sum(dim=2) - batch['gt']).abs().mean()
    balance = 0.5 * 2 * (shares - 0.5).square().sum()
    compare_with(l1 + balance, first, net)
    log = first.get_current_log()
    assert log['l_pix'] == pytest.approx(l1.item(), rel=1e-5)
    assert log['l_balance'] == pytest.approx(balance.item(), rel=1e-5)
    assert log['tau'] == pytest.approx(2.0)
    assert [log['share/expert_1'], log['share/expert_2']] == pytest.approx(shares.tolist())
    assert log['mean_cost'] == pytest.approx((shares * net.expert_costs).sum().item())


NESTED = {'network_g:experts': [[8], [8, 8]], 'network_g:shared_layers': 2}
JOINT = {'train:experts_opt': {'type': 'MoEExpertLoss', 'loss_weight': 0.3, 'routing_weight': 0.7}}


@pytest.mark.parametrize('skip', ['none', 'bilinear'])
@pytest.mark.parametrize('experts', [{}, NESTED], ids=['unshared', 'nested'])
def test_our_step_follows_the_written_loss(skip, experts):
    """MoEISR-J: each expert's L1 on each query, its relative loss for the mapper, no straight-through gradient."""
    options = model_options(**JOINT, **experts, **{'network_g:skip': skip})
    batch = query_batch()
    first, other = build_twice(options, options)
    first.mapper_is_new = False
    first.feed_data(batch)
    first.optimize_parameters(1)

    net = other.net_g
    experts, gate = plain_predictions(net, batch, 1)
    error = (experts - batch['gt'].unsqueeze(2)).abs().mean(dim=-1)  # (4, 40, 2)
    scale = (2 / (batch['cell'] * torch.tensor(batch['lq'].shape[-2:]))).prod(dim=-1).sqrt()
    mixture = (gate.detach().unsqueeze(-1) * experts).sum(dim=2)
    shares = gate.mean(dim=(0, 1))
    routing = 0.7 * (gate * error.detach() / scale.unsqueeze(-1)).sum(dim=-1).mean()
    balance = 0.5 * 2 * (shares - 0.5).square().sum()
    compare_with((mixture - batch['gt']).abs().mean() + 0.3 * error.mean() + routing + balance, first, net)
    assert first.get_current_log()['l_experts'] == pytest.approx(0.3 * error.mean().item(), rel=1e-5)


@pytest.mark.parametrize('parts', [2, 3, 4])
@pytest.mark.parametrize('objective', [{}, JOINT], ids=['paper', 'ours'])
def test_accumulation_gives_the_gradient_of_the_whole_batch(parts, objective):
    """Also of the balance loss, which is no mean over images, and with parts of unequal size."""
    options = model_options(**objective, **{'train:balance_opt:loss_weight': 5.0})
    whole, cut = build_twice(options, change(options, {'train:accumulate': parts}))
    batch = query_batch()
    for model in (whole, cut):
        model.feed_data(batch)
        model.optimize_parameters(1)
    for name, gradient in gradients_of(whole).items():
        torch.testing.assert_close(gradients_of(cut)[name], gradient, rtol=1e-4, atol=1e-7, msg=name)
    assert cut.get_current_log() == pytest.approx(whole.get_current_log(), rel=1e-5)


def test_every_parameter_has_a_gradient_with_an_idle_expert():
    """DDP's find_unused_parameters can stay off: an idle expert's gradient is zero, not missing."""
    for objective in ({}, JOINT):
        model = build_model(model_options(**objective))
        model.mapper_is_new = False
        with torch.no_grad():
            model.net_g.decoder.mapper.query_out.bias.copy_(torch.tensor([1e4, -1e4]))  # expert 1 gets no query
        model.feed_data(query_batch())
        model.optimize_parameters(1)
        assert model.get_current_log()['share/expert_2'] == 0
        assert all(gradient is not None for gradient in gradients_of(model).values()), objective


def test_only_the_parts_that_are_named_train():
    trainable = ['decoder.mapper.query_out', 'encoder.conv_first.weight']
    model = build_model(model_options(**NESTED, **{'train:trainable': trainable}))
    model.mapper_is_new = False
    before = weights_of(model)
    model.feed_data(query_batch())
    model.optimize_parameters(1)
    changed = {name for name, value in weights_of(model).items() if not torch.equal(value, before[name])}
    assert changed == {'decoder.mapper.query_out.weight', 'decoder.mapper.query_out.bias', 'encoder.conv_first.weight'}


def test_a_part_without_parameters_is_a_mistake():
    words = "train: trainable: MoEISR has no parameters in 'decoder.maper'. Did you mean 'decoder.mapper'?"
    with pytest.raises(UserError, match=re.escape(words)):
        build_model(model_options(**{'train:trainable': ['decoder.mapper', 'decoder.maper']}))
    with pytest.raises(UserError, match='train: trainable: names no part'):
        build_model(model_options(**{'train:trainable': []}))


def test_noise_does_not_depend_on_the_number_of_ranks():
    whole = batch_noise((6, 10, 3), 5, 7, 0, 1)
    for rank in range(2):
        assert torch.equal(batch_noise((3, 10, 3), 5, 7, rank, 2), whole[rank::2])
    assert not torch.equal(whole, batch_noise((6, 10, 3), 5, 8, 0, 1))
    assert not torch.equal(whole, batch_noise((6, 10, 3), 6, 7, 0, 1))


def test_tau_is_annealed_exponentially():
    ends = check_tau([5.0, 1.0])
    values = [tau_at(ends, iteration, 101) for iteration in range(1, 200)]
    assert values[0] == 5.0 and values[50] == pytest.approx(math.sqrt(5.0))
    assert values[100] == pytest.approx(1.0) and values[-1] == values[100]
    assert all(after <= before for before, after in zip(values, values[1:]))
    assert {tau_at(check_tau(2), iteration, 9) for iteration in range(1, 12)} == {2.0}
    for wrong in (0, -1.0, 'one', True, [1.0], [1.0, 0], [1, 2, 3]):
        with pytest.raises(UserError, match='train: tau must be a number above 0, or'):
            check_tau(wrong)


def test_ema_is_fp32_and_follows_its_formula():
    model = build_model(model_options(**{'train:amp': 'bf16'}))
    model.mapper_is_new = False
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
    model = build_model(model_options(**{'train:non_finite': 'skip'}))
    model.mapper_is_new = False
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
        assert log['share/expert_1'] + log['share/expert_2'] == pytest.approx(1) and log['l_balance'] >= 0
        assert model.batch.queries == 2 * 12 * 10


def test_bad_train_options_are_user_errors():
    for changes, hint in (
        ({'train:amp': 'bf61'}, "Did you mean 'bf16'"),
        ({'train:accumulate': 0}, 'at least 1'),
        ({'train:non_finite': 'ignore'}, 'stop, skip'),
        ({'train:tau': 0}, 'tau must be a number above 0'),
        ({'network_g': {'type': 'MSRResNet'}}, 'needs a network with experts'),
    ):
        with pytest.raises(UserError, match=hint):
            build_model(model_options(**changes))


@pytest.mark.parametrize('parts', [1, 3])
def test_first_step_spreads_the_logits_once(parts):
    """Mean 0 and deviation 1 on the first batch, in the averaged weights too; later steps leave it be."""
    model = build_model(model_options(**{'train:accumulate': parts, 'train:optim_g:lr': 1e-12}))
    batch = query_batch()
    model.feed_data(batch)
    model.optimize_parameters(1)
    for net in (model.net_g, model.net_g_ema):
        logits = net.decoder.logits(net.encode(batch['lq']).feat, batch['coord'], batch['cell']).flatten(0, 1)
        torch.testing.assert_close(logits.mean(dim=0), torch.zeros(2), rtol=0, atol=1e-3)
        torch.testing.assert_close(logits.std(dim=0, correction=0), torch.ones(2), rtol=1e-3, atol=0)
    before = weights_of(model)
    model.feed_data(query_batch(seed=5))
    model.optimize_parameters(2)
    for name, value in weights_of(model).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-9, msg=name)


def test_a_mapper_that_is_not_pretrained_is_spread(tmp_path):
    """The experts and encoder of a dense network, a mapper of its own."""
    dense = {'model_type': 'ArbitraryScaleModel', 'train:balance_opt': None}
    weights = weights_of(build_model(model_options(**{'network_g': DENSE, **dense})))
    torch.save({'params': weights, 'params_ema': weights}, tmp_path / 'net.pth')
    start = {'path:pretrain_network_g': str(tmp_path / 'net.pth'), 'path:strict_load_g': False}
    model = build_model(model_options(**start, **{'train:optim_g:lr': 1e-12}))
    batch = query_batch()
    model.feed_data(batch)
    model.optimize_parameters(1)
    logits = model.net_g.logits(batch['lq'], batch['coord'], batch['cell']).flatten(0, 1)
    torch.testing.assert_close(logits.std(dim=0, correction=0), torch.ones(2), rtol=1e-3, atol=0)


def test_pretrained_mapper_keeps_its_scale(tmp_path):
    weights = weights_of(build_model(model_options()))
    torch.save({'params': weights, 'params_ema': weights}, tmp_path / 'net.pth')
    model = build_model(
        model_options(**{'path:pretrain_network_g': str(tmp_path / 'net.pth'), 'train:optim_g:lr': 1e-12})
    )
    model.feed_data(query_batch())
    model.optimize_parameters(1)
    for name, value in weights_of(model).items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-9, msg=name)
