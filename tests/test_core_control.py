"""Cost weight and budget against brute force."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeisr_basicsr.core.control import Budget, CostWeight, Shuffle, route_by_cost

COSTS = torch.tensor([0.05, 0.3, 0.65, 1.0])


def draw_logits(seed, count=3000, spread=2.0):
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed)) * spread


def mean_cost(expert, costs=COSTS):
    return costs.double()[expert].mean().item()


def spend(budget, logits, costs=COSTS, pieces=1):
    control = Budget(budget, costs)
    for piece in logits.chunk(pieces):
        control.observe(piece)
    return torch.cat([control.route(piece, costs) for piece in logits.chunk(pieces)])


@given(st.integers(0, 10_000), st.lists(st.floats(-50, 50), min_size=2, max_size=6))
@settings(max_examples=40, deadline=None)
def test_cost_never_rises_with_kappa_per_query(seed, kappas):
    logits = draw_logits(seed, 200)
    routed = [COSTS[route_by_cost(logits, COSTS, kappa)] for kappa in sorted(kappas)]
    for before, after in zip(routed[:-1], routed[1:]):
        assert (after <= before).all()


def test_kappa_zero_is_the_trained_routing_and_extremes_are_the_extremes():
    logits = draw_logits(0)
    assert torch.equal(CostWeight(0).route(logits, COSTS), logits.argmax(dim=-1))
    assert (CostWeight(1e6).route(logits, COSTS) == 0).all()
    assert (CostWeight(-1e6).route(logits, COSTS) == 3).all()


def test_equals_the_softmax_formula():
    logits = draw_logits(1)
    expected = (logits.double().softmax(dim=-1).log() - 1.7 * COSTS.double()).argmax(dim=-1)
    assert torch.equal(route_by_cost(logits, COSTS, 1.7), expected)


@pytest.mark.parametrize('budget', [0.05, 0.0501, 0.2, 0.5, 0.731, 0.999, 1.0])
@pytest.mark.parametrize('pieces', [1, 7])
def test_budget_is_met_within_one_query(budget, pieces):
    logits = draw_logits(2)
    cost = mean_cost(spend(budget, logits, pieces=pieces))
    assert budget - 1 / 3000 <= cost <= budget + 1e-6


def test_budget_one_is_the_most_expensive_everywhere():
    assert (spend(1.0, draw_logits(3)) == 3).all()


def test_tied_pixels_are_split_in_pixel_order():
    """A flat image: every query has the same logits, so one kappa moves them all."""
    logits = torch.tensor([0.3, 0.1, 0.2, 0.0]).expand(1000, 4)
    expert = spend(0.5, logits, pieces=4)
    assert mean_cost(expert) == pytest.approx(0.5, abs=1 / 1000)
    costs = COSTS[expert]
    assert (costs[1:] <= costs[:-1]).all(), 'the more expensive experts must come first in pixel order'


@pytest.mark.parametrize('budget', [0.3, 0.6, 0.9])
@pytest.mark.parametrize(
    'logits',
    [
        torch.zeros(10_000, 4),
        torch.tensor([[1.0, -9.0, -9.0, 1.0]]).repeat(10_000, 1),
        torch.randint(-4, 5, (10_000, 4), generator=torch.Generator().manual_seed(0)) / 2.0,
    ],
)
def test_budget_is_met_where_experts_tie(logits, budget):
    costs = torch.tensor([0.25, 0.5, 0.75, 1.0])
    control = Budget(budget, costs)
    control.observe(logits)
    assert costs[control.route(logits, costs)].mean().item() == pytest.approx(budget, abs=1e-4)


def test_result_does_not_depend_on_the_strips():
    logits = draw_logits(4)
    assert torch.equal(spend(0.4, logits, pieces=1), spend(0.4, logits, pieces=13))


def test_budget_takes_the_queries_that_lose_least():
    """Against brute force over kappa: the budget's routing scores as well as the best fixed kappa of equal cost."""
    logits = draw_logits(5, 500)
    expert = spend(0.35, logits)
    log_p = logits.double().log_softmax(dim=-1)
    score = log_p.gather(1, expert[:, None]).sum()
    kappas = torch.linspace(-30, 30, 6001).tolist()
    affordable = [
        log_p.gather(1, chosen[:, None]).sum()
        for chosen in (route_by_cost(logits, COSTS, kappa) for kappa in kappas)
        if mean_cost(chosen) <= 0.35
    ]
    assert score >= max(affordable) - 1e-9


def test_equal_costs_are_never_traded():
    costs = torch.tensor([0.5, 1.0, 1.0])
    logits = torch.randn(400, 3, generator=torch.Generator().manual_seed(6))
    assert mean_cost(spend(0.75, logits, costs), costs) == pytest.approx(0.75, abs=1 / 400)
    assert torch.equal(spend(1.0, logits, costs), logits[:, 1:].argmax(dim=-1) + 1)


def test_errors_name_the_least_budget():
    with pytest.raises(ValueError, match='between 0.0500 .* and 1 .*got 0.01'):
        Budget(0.01, COSTS)
    with pytest.raises(ValueError, match='cost_weight must be a finite number'):
        CostWeight(math.nan)


def test_a_shuffled_map_keeps_the_counts_and_depends_on_them_and_the_seed_only():
    routed = torch.randint(0, 3, (40, 30), generator=torch.Generator().manual_seed(7)).to(torch.uint8)

    def shuffled(pieces, seed=5):
        shuffle = Shuffle((40, 30), 4, seed)
        for piece in pieces:
            shuffle.count(piece)
        return shuffle.expert_map

    whole = shuffled([routed])
    assert whole.dtype == torch.uint8 and whole.shape == routed.shape
    assert torch.equal(whole.flatten().bincount(minlength=4), routed.flatten().bincount(minlength=4))
    assert torch.equal(shuffled(reversed(routed.split(7, dim=1))), whole)
    assert torch.equal(shuffled([routed.flip(0)]), whole), 'where the experts were does not matter'
    assert not torch.equal(shuffled([routed], seed=6), whole)
    # As many pixels keep their expert as chance says.
    chance = (routed.flatten().bincount() / routed.numel()).square().sum()
    assert (whole == routed).float().mean() == pytest.approx(float(chance), abs=0.05)
