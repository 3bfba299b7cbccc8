"""The balance loss: its value by hand, its gradient's path, one process against two. The experts' loss by hand."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from basicsr.losses import build_loss
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import moeisr_basicsr  # noqa: F401  before BasicSR, which needs its shims
from moeisr_basicsr.core.routing import gumbel_noise, route_gumbel
from moeisr_basicsr.losses.balance_loss import MoEBalanceLoss
from moeisr_basicsr.losses.expert_loss import MoEExpertLoss

COSTS = torch.tensor([0.1, 0.4, 0.6, 1.0])


def one_hot_gates(counts):
    """(1, Q, J) gates that give each expert its number of queries."""
    expert = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return nn.functional.one_hot(expert, len(counts)).float()[None]


@pytest.mark.parametrize(
    ('target', 'counts'),
    [
        ('uniform', [5, 5, 5, 5]),
        ([0.5, 0.25, 0.15, 0.1], [10, 5, 3, 2]),
        ([0, 0, 1, 0], [0, 0, 7, 0]),
        (0.525, [5, 5, 5, 5]),
        (0.1, [8, 0, 0, 0]),
        (1.0, [0, 0, 0, 3]),
        (0.4, [0, 9, 0, 0]),
        (0.4, [6, 0, 0, 3]),
    ],
)
def test_zero_at_the_target(target, counts):
    assert float(MoEBalanceLoss(1.0, target)(one_hot_gates(counts), COSTS)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ('target', 'counts', 'expected'),
    [
        # loads .7 .1 .2 0 against .25: J * (.45^2 + .15^2 + .05^2 + .25^2)
        ('uniform', [7, 1, 2, 0], 4 * (0.2025 + 0.0225 + 0.0025 + 0.0625)),
        ('uniform', [0, 0, 0, 3], 4 * (3 * 0.0625 + 0.5625)),
        ([0.5, 0.25, 0.15, 0.1], [7, 1, 2, 0], 4 * (0.04 + 0.0225 + 0.0025 + 0.01)),
        (0.5, [7, 1, 2, 0], (0.07 + 0.04 + 0.12 - 0.5) ** 2),
        (0.2, [0, 0, 0, 10], 0.8**2),
    ],
)
def test_value_by_hand(target, counts, expected):
    gates = one_hot_gates(counts)
    assert float(MoEBalanceLoss(1.0, target)(gates, COSTS)) == pytest.approx(expected, rel=1e-5)
    assert float(MoEBalanceLoss(0.03, target)(gates, COSTS)) == pytest.approx(0.03 * expected, rel=1e-5)


def test_mean_over_the_whole_batch_not_over_images():
    """Two images that are each one-sided but balanced together cost nothing."""
    gates = torch.cat([one_hot_gates([4, 0]), one_hot_gates([0, 4])])
    assert float(MoEBalanceLoss()(gates, torch.tensor([0.5, 1.0]))) == 0


@pytest.mark.parametrize('target', ['uniform', [0.1, 0.2, 0.3, 0.4], 0.3])
def test_gradient_comes_through_the_gates_only(target):
    logits = torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    noise = gumbel_noise((2, 50, 4), 0, 0, 0)
    costs = COSTS.clone().requires_grad_()
    routing = route_gumbel(logits, noise, 1.0)
    routing.gates.retain_grad()
    loss = MoEBalanceLoss(0.5, target)(routing.gates, costs.detach())
    loss.backward()

    load = nn.functional.one_hot(routing.expert, 4).float().mean(dim=(0, 1))
    if isinstance(target, float):
        pull = 2 * (load @ COSTS - target) * COSTS
    else:
        pull = 2 * 4 * (load - torch.tensor([0.25] * 4 if target == 'uniform' else target))
    expected = (0.5 * pull / 100).expand(2, 50, 4)
    torch.testing.assert_close(routing.gates.grad, expected, rtol=1e-4, atol=1e-9)
    soft = torch.softmax(logits + noise, dim=-1)
    (through_softmax,) = torch.autograd.grad((soft * expected).sum(), logits)
    torch.testing.assert_close(logits.grad, through_softmax, rtol=1e-4, atol=1e-9)
    assert logits.grad.abs().max() > 0


@pytest.mark.parametrize('target', ['uniform', [0.5, 0.25, 0.15, 0.1], 0.28])
def test_gradient_pulls_towards_the_target(target):
    """Gradient descent on free logits from one-sided routing ends near the load or the mean cost that is asked for."""
    logits = torch.tensor([0.0, 0.0, 0.0, 3.0], requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=0.5)
    for step in range(200):  # a mean cost is one number: its pull is weaker than that of a load per expert
        gates = route_gumbel(logits.expand(1, 2000, 4), gumbel_noise((1, 2000, 4), 0, step, 0), 1.0).gates
        optimizer.zero_grad()
        MoEBalanceLoss(target=target)(gates, COSTS).backward()
        optimizer.step()
    load = torch.softmax(logits.detach(), dim=-1)
    if isinstance(target, float):
        assert float(load @ COSTS) == pytest.approx(target, abs=0.02)
    else:
        assert float((load - torch.tensor([0.25] * 4 if target == 'uniform' else target)).abs().max()) < 0.05


def test_groups_of_scales_by_hand():
    """Three queries below x2.5 went to experts 0 0 1, one at x2.5 to expert 3: each group against the target."""
    gates = one_hot_gates([2, 1, 0, 1])
    scale = torch.tensor([[1.0, 2.0, 2.4, 2.5]])
    below, above = 4 * ((2 / 3 - 0.25) ** 2 + (1 / 3 - 0.25) ** 2 + 2 * 0.25**2), 4 * (0.75**2 + 3 * 0.25**2)
    loss = MoEBalanceLoss(2.0, 'uniform', scale_bounds=[2.5])
    assert float(loss(gates, COSTS, scale)) == pytest.approx(2.0 * (0.75 * below + 0.25 * above), rel=1e-5)
    assert float(loss(gates, COSTS, torch.ones(1, 4))) == pytest.approx(
        float(MoEBalanceLoss(2.0)(gates, COSTS)), rel=1e-5
    )  # one group is empty


def test_a_target_for_each_group():
    gates = one_hot_gates([2, 1, 0, 1])
    scale = torch.tensor([[1.0, 2.0, 2.4, 2.5]])  # loads 2/3 1/3 0 0 below x2.5, 0 0 0 1 from there on
    loss = MoEBalanceLoss(2.0, [[0.5, 0.5, 0, 0], [0.2, 0, 0, 0.8]], [2.5])
    below, above = 4 * 2 * (1 / 6) ** 2, 4 * 2 * 0.2**2
    assert float(loss(gates, COSTS, scale)) == pytest.approx(2.0 * (0.75 * below + 0.25 * above), rel=1e-5)
    assert (
        float(
            MoEBalanceLoss(1.0, [[0, 1, 0, 0], [1, 0, 0, 0]], [2.5])(
                one_hot_gates([2, 2, 0, 0]), COSTS, torch.tensor([[3.0, 3.0, 2.0, 2.0]])
            )
        )
        == 0
    )


def test_built_from_yaml_options():
    options = {'type': 'MoEBalanceLoss', 'loss_weight': 0.1, 'target': 0.4}
    loss = build_loss(options)
    assert isinstance(loss, MoEBalanceLoss) and loss.loss_weight == 0.1
    assert options['type'] == 'MoEBalanceLoss'


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'loss_weight': -1}, 'loss_weight must not be negative; got -1'),
        ({'target': 'equal'}, "got 'equal'"),
        ({'target': [0.5, 0.6]}, 'fractions that add up to 1'),
        ({'target': [1.5, -0.5]}, 'fractions that add up to 1'),
        ({'target': 0}, 'mean cost'),
        ({'target': 1.2}, 'mean cost'),
        ({'scale_bounds': [3, 2]}, 'scale_bounds must rise'),
        ({'target': [[1, 0], [0, 1]]}, r'lists 2 groups; scale_bounds \[\] make 1'),
        ({'target': [[1, 0]], 'scale_bounds': [2]}, r'lists 1 groups; scale_bounds \[2\] make 2'),
        ({'target': [[1, 0], [0.5, 0.6]], 'scale_bounds': [2]}, 'fractions that add up to 1'),
        ({'target': [[1, 0], 1.5], 'scale_bounds': [2]}, 'mean cost'),
    ],
)
def test_bad_options_say_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        MoEBalanceLoss(**options)


def test_target_must_fit_the_network():
    gates = one_hot_gates([2, 2, 2, 2])
    with pytest.raises(ValueError, match='lists 3 experts; the network has 4'):
        MoEBalanceLoss(target=[0.2, 0.3, 0.5])(gates, COSTS)
    with pytest.raises(ValueError, match='0.05 is below the cheapest expert; at least 0.1001'):
        MoEBalanceLoss(target=0.05)(gates, COSTS)


class Router(nn.Module):
    """A mapper of one linear layer, so that DDP has something to average."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 4)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(3)
            self.linear.weight.copy_(torch.randn(4, 5, generator=generator))
            self.linear.bias.copy_(torch.tensor([1.5, 0.0, -0.5, -1.0]))

    def forward(self, x, noise):
        return route_gumbel(self.linear(x), noise, 1.0).gates


def batch_of_four():
    x = torch.randn(4, 30, 5, generator=torch.Generator().manual_seed(4))
    x[:2] += 1.0  # the ranks' loads differ: a loss per rank would be another loss
    return x, torch.stack([gumbel_noise((30, 4), 0, 0, slot) for slot in range(4)])


def losses_and_gradients(router, x, noise):
    result = {}
    scale = 1 + 3 * x[..., 0].sigmoid()
    for name, target, bounds in (
        ('uniform', 'uniform', []),
        ('loads', [0.4, 0.3, 0.2, 0.1], []),
        ('cost', 0.3, []),
        ('groups', [0.4, 0.3, 0.2, 0.1], [2.0, 3.0, 4.5]),  # nothing above 4.5
        ('targets', [[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]], [2.5]),
    ):
        router.zero_grad()
        loss = MoEBalanceLoss(1.0, target, bounds)(router(x, noise), COSTS, scale)
        loss.backward()
        result[name] = [loss.detach().clone(), *(parameter.grad.clone() for parameter in router.parameters())]
    return result


def run_rank(rank, folder):
    dist.init_process_group(
        'gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2, timeout=timedelta(seconds=180)
    )
    try:
        x, noise = (part[2 * rank : 2 * rank + 2] for part in batch_of_four())
        torch.save(losses_and_gradients(DistributedDataParallel(Router()), x, noise), f'{folder}/{rank}.pt')
    finally:
        dist.destroy_process_group()


def run_other_rank(_, folder):
    torch.set_num_threads(1)
    run_rank(1, folder)


def test_two_processes_equal_one(tmp_path):
    """The global loss on each rank, and DDP's averaged gradients, are those of one process with the whole batch."""
    other = mp.spawn(run_other_rank, args=(str(tmp_path),), nprocs=1, join=False)
    run_rank(0, str(tmp_path))
    while not other.join():
        pass
    x, noise = batch_of_four()
    whole = losses_and_gradients(Router(), x, noise)
    halves = losses_and_gradients(Router(), x[:2], noise[:2]), losses_and_gradients(Router(), x[2:], noise[2:])
    for rank in range(2):
        for name, values in torch.load(f'{tmp_path}/{rank}.pt', weights_only=True).items():
            for actual, expected in zip(values, whole[name]):
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)
    for name, values in whole.items():  # the case tells a global loss from the mean of two local ones
        assert abs(float(values[0] - (halves[0][name][0] + halves[1][name][0]) / 2)) > 1e-3
        assert not torch.allclose(values[1], (halves[0][name][1] + halves[1][name][1]) / 2, atol=1e-4)


def expert_case():
    """Two queries, two experts, one channel: answers, truth and gates that took expert 0, then expert 1."""
    answers = torch.tensor([[[[0.5], [0.2]], [[0.9], [0.4]]]], requires_grad=True)  # (1, 2, 2, 1)
    gt = torch.tensor([[[0.3], [0.3]]])
    gates = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], requires_grad=True)
    return answers, gt, gates


def test_experts_loss_by_hand():
    answers, gt, gates = expert_case()  # errors .2 .1 of query 0, .6 .1 of query 1
    scale = torch.tensor([[2.0, 4.0]])
    loss = MoEExpertLoss(0.5, routing_weight=3.0)(answers, gt, gates, COSTS[:2], scale)
    assert float(loss) == pytest.approx(0.5 * (0.2 + 0.1 + 0.6 + 0.1) / 4)
    loss.backward()
    torch.testing.assert_close(gates.grad, 3.0 / 2 * torch.tensor([[[0.2, 0.1], [0.6, 0.1]]]) / scale[..., None])
    torch.testing.assert_close(answers.grad.flatten(), torch.tensor([1.0, -1, 1, 1]) * 0.5 / 4)  # all of them learn


def test_depth_emphasis_weighs_experts_by_cost():
    answers, gt, gates = expert_case()  # costs .1 and .4
    loss = MoEExpertLoss(1.0, depth_emphasis=1.0)(answers, gt, gates, COSTS[:2], torch.ones(1, 2))
    assert float(loss) == pytest.approx((0.2 * (0.2 + 0.6) + 0.8 * (0.1 + 0.1)) / 2)


@pytest.mark.parametrize('routing_weight', [0.0, 1.0])
def test_with_a_routing_weight_the_pixel_loss_leaves_the_mapper_alone(routing_weight):
    answers, _, gates = expert_case()
    routed = MoEExpertLoss(1.0, routing_weight).routed(answers, gates)
    assert routed.flatten().tolist() == pytest.approx([0.5, 0.4])
    routed.sum().backward()
    assert (gates.grad is None) == (routing_weight > 0)
    assert answers.grad.flatten().tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize('weights', [(-1.0, 0.0), (1.0, -0.1), (1.0, 0.0, -1.0)])
def test_experts_loss_weights_are_not_negative(weights):
    with pytest.raises(ValueError, match='must not be negative'):
        MoEExpertLoss(*weights)


def test_fit_by_hand():
    """Score by score, up to what is the same for all experts: half the gap of both relative losses in units of .01."""
    answers, gt, gates = expert_case()
    scale = torch.tensor([[2.0, 4.0]])  # relative errors .1 .05 of query 0, .15 .025 of query 1
    loss = MoEExpertLoss(0.0, routing_weight=3.0, fit_temperature=0.01)
    scores = torch.zeros(1, 2, 2, requires_grad=True)
    value = loss(answers, gt, gates, COSTS[:2], scale, scores)
    assert float(value.detach()) == pytest.approx(3.0 * (2.5**2 + 6.25**2) / 2)
    value.backward()
    torch.testing.assert_close(scores.grad, torch.tensor([[[2.5, -2.5], [6.25, -6.25]]]) * 3.0 * 2 / 4)
    assert gates.grad is None and not answers.grad.any()  # the fit teaches the mapper only
    best = torch.tensor([[[7.0, 12.0], [-15.0, -2.5]]])  # -relative / .01, plus 17 and 0
    assert float(loss(answers, gt, gates, COSTS[:2], scale, best)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize('temperature, weight', [(0.0, 1.0), (-1e-4, 1.0), (1e-4, 0.0)])
def test_a_fit_needs_a_temperature_and_a_weight(temperature, weight):
    with pytest.raises(ValueError, match='fit_temperature must be above 0 and needs a routing_weight above 0'):
        MoEExpertLoss(1.0, routing_weight=weight, fit_temperature=temperature)
