"""Routing: keyed Gumbel noise, straight-through gates, cost-aware argmax."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moeisr_basicsr.core import reference as method
from moeisr_basicsr.core.control import route_by_cost
from moeisr_basicsr.core.mapper import Draw, gumbel_noise, route_gumbel

KEY = {'seed': 7, 'iteration': 11, 'slot': 2}


def test_noise_depends_on_its_key_only():
    state = torch.random.get_rng_state()
    noise = gumbel_noise((50, 4), **KEY)
    assert torch.equal(torch.random.get_rng_state(), state), 'the global generator must not move'
    torch.manual_seed(99)
    torch.rand(5)
    assert torch.equal(gumbel_noise((50, 4), **KEY), noise)
    for name in KEY:
        other = gumbel_noise((50, 4), **{**KEY, name: KEY[name] + 1})
        assert (other == noise).sum() <= 2, f'{name} must change the noise'
    swapped = gumbel_noise((50, 4), seed=11, iteration=7, slot=2)
    assert not torch.equal(swapped, noise)
    # '1' and '12' beside '11' and '2': keys must not run together
    assert not torch.equal(gumbel_noise((9,), 1, 12, 0), gumbel_noise((9,), 11, 2, 0))


def test_noise_has_the_gumbel_distribution():
    noise = torch.cat([gumbel_noise((4096, 4), seed=0, iteration=i, slot=i % 3).flatten() for i in range(12)]).double()
    count = noise.numel()  # 196608: standard errors of mean and variance are 0.003 and 0.01
    assert torch.isfinite(noise).all()
    assert float(noise.mean()) == pytest.approx(0.5772156649, abs=0.015)  # Euler's constant
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.05)
    ordered = noise.sort().values
    empirical = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    assert float((torch.exp(-torch.exp(-ordered)) - empirical).abs().max()) < 1.95 / math.sqrt(count)  # Kolmogorov


def test_neighbouring_keys_are_uncorrelated():
    first = gumbel_noise((20000,), 0, 5, 0)
    for key in ((0, 6, 0), (0, 5, 1), (1, 5, 0)):
        assert abs(float(torch.corrcoef(torch.stack([first, gumbel_noise((20000,), *key)]))[0, 1])) < 0.03


def logits_and_noise(seed=0, queries=200, experts=4):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, queries, experts, generator=generator) * 3
    return logits, gumbel_noise((2, queries, experts), seed, 0, 0)


@pytest.mark.parametrize('tau', [0.05, 1.0, 5.0])
def test_gates_are_exactly_one_hot(tau):
    logits, noise = logits_and_noise()
    routing = route_gumbel(logits, Draw(noise, tau))
    assert set(routing.gate.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(routing.gate.sum(dim=-1), torch.ones(2, 200))
    assert torch.equal(routing.gate.argmax(dim=-1), routing.expert)
    assert torch.equal(routing.expert, (logits + noise).argmax(dim=-1)), 'tau must not change the choice'
    assert torch.equal(routing.gate, method.gates(logits, noise, tau))


@pytest.mark.parametrize('tau', [0.5, 1.0, 5.0])
def test_gate_gradient_is_that_of_softmax(tau):
    logits, noise = (part.double() for part in logits_and_noise())
    pull = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    hard, soft = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    (route_gumbel(hard, Draw(noise, tau)).gate * pull).sum().backward()
    (F.softmax((soft + noise) / tau, dim=-1) * pull).sum().backward()
    assert hard.grad.abs().max() > 1e-3
    torch.testing.assert_close(hard.grad, soft.grad, rtol=1e-12, atol=1e-15)


def test_extreme_noise_keeps_gates_finite():
    logits = torch.zeros(1, 1, 3, requires_grad=True)
    routing = route_gumbel(logits, Draw(torch.tensor([[[80.0, -4.0, 0.0]]]), 0.05))
    assert routing.gate.tolist() == [[[1.0, 0.0, 0.0]]]


@pytest.mark.parametrize('tau', [0, -1.0])
def test_temperature_must_be_positive(tau):
    with pytest.raises(ValueError, match=f'tau must be above 0; got {tau}'):
        route_gumbel(logits_and_noise()[0], Draw(logits_and_noise()[1], tau))


def test_gumbel_max_frequencies_are_softmax():
    logits = torch.tensor([1.0, -0.5, 0.3, 2.0])
    draws = 60000
    noise = gumbel_noise((1, draws, 4), seed=5, iteration=0, slot=0)
    expert = route_gumbel(logits.expand(1, draws, 4), Draw(noise, 3.0)).expert
    frequency = expert.flatten().bincount(minlength=4) / draws
    torch.testing.assert_close(frequency, F.softmax(logits, dim=-1), rtol=0, atol=0.01)  # 5 standard errors


def test_zero_cost_weight_is_plain_argmax():
    logits, _ = logits_and_noise(3)
    costs = torch.tensor([0.1, 0.2, 0.5, 1.0])
    assert torch.equal(route_by_cost(logits, costs, 0.0), logits.argmax(dim=-1))
    assert not torch.equal(route_by_cost(logits, costs, 1.0), logits.argmax(dim=-1))


def test_ties_go_to_the_first_expert():
    costs = torch.tensor([0.5, 0.5, 1.0])
    logits = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 2.0], [-3.0, -3.0, -9.0]])
    assert route_by_cost(logits, costs, 0.0).tolist() == [0, 1, 0]
    assert route_by_cost(logits, costs, 0.5).tolist() == [0, 1, 0]
    assert route_by_cost(logits, costs, math.inf).tolist() == [0, 1, 0]
    assert route_by_cost(logits, costs, -math.inf).tolist() == [2, 2, 2]


def test_limits_of_the_cost_weight():
    logits, _ = logits_and_noise(4)
    costs = torch.tensor([0.4, 0.1, 1.0, 0.7])
    for large in (1e6, math.inf):
        assert (route_by_cost(logits, costs, large) == 1).all()
        assert (route_by_cost(logits, costs, -large) == 2).all()


def test_by_hand():
    """log p = (log .6, log .4); the expensive first expert loses as soon as kappa (1 - .5) exceeds log 1.5 = 0.405."""
    logits = torch.tensor([0.6, 0.4]).log() + 5  # a common shift changes nothing
    costs = torch.tensor([1.0, 0.5])
    assert int(route_by_cost(logits, costs, 0.80)) == 0
    assert int(route_by_cost(logits, costs, 0.82)) == 1


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.floats(-20, 20, width=32), min_size=4, max_size=4), min_size=1, max_size=8),
    st.lists(st.floats(0.03125, 1, width=32), min_size=4, max_size=4),
    st.lists(st.integers(-3200, 3200), min_size=2, max_size=6),
)
@example([[0.0, 0.0, 0.0, 1e-9]], [1.0, 1.0, 1.0, 0.5], [0, 1])
@example(
    [[-7.940105438232422, -7.940104961395264, -20.0, -20.0]],  # fp32 ties here, and the more expensive comes first
    [0.13278253376483917, 0.13278251886367798, 0.9, 0.9],
    [0, 32],
)
def test_cost_never_rises_with_kappa(logits, costs, steps):
    """Near ties included: in fp32, rounding makes some queries more expensive."""
    logits, costs = torch.tensor(logits), torch.tensor(costs)
    kappas = [-math.inf, *sorted({*steps, 0}), math.inf]
    chosen = [costs[route_by_cost(logits, costs, kappa / 64)] for kappa in kappas]
    for before, after in zip(chosen[:-1], chosen[1:]):
        assert (after <= before).all()
    assert (chosen[0] == costs.max()).all() and (chosen[-1] == costs.min()).all()
