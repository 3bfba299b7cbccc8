"""The balance loss: its value by hand, its gradient's path, one process against two. The experts' loss by hand."""

from datetime import timedelta

import moeisr_basicsr  # noqa: F401  before BasicSR, which needs its shims: also in the process that is spawned

# isort: split
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from basicsr.losses import build_loss
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moeisr_basicsr.core.mapper import Draw, gumbel_noise, route_gumbel
from moeisr_basicsr.losses.balance_loss import MoEBalanceLoss
from moeisr_basicsr.losses.expert_loss import MoEExpertLoss
from moeisr_basicsr.models.arbitrary_scale_model import average_over_ranks

SHARES = [0.5, 0.25, 0.15, 0.1]


@pytest.mark.parametrize('target', ['uniform', SHARES, [0, 0, 1, 0]])
def test_zero_at_the_target(target):
    shares = torch.tensor([0.25] * 4 if target == 'uniform' else target)
    assert float(MoEBalanceLoss(1.0, target)(shares)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ('target', 'shares', 'expected'),
    [
        # .7 .1 .2 0 against .25: J * (.45^2 + .15^2 + .05^2 + .25^2)
        ('uniform', [0.7, 0.1, 0.2, 0], 4 * (0.2025 + 0.0225 + 0.0025 + 0.0625)),
        ('uniform', [0, 0, 0, 1.0], 4 * (3 * 0.0625 + 0.5625)),
        (SHARES, [0.7, 0.1, 0.2, 0], 4 * (0.04 + 0.0225 + 0.0025 + 0.01)),
    ],
)
def test_value_by_hand(target, shares, expected):
    for weight in (1.0, 0.03):
        assert float(MoEBalanceLoss(weight, target)(torch.tensor(shares))) == pytest.approx(weight * expected, rel=1e-5)


@pytest.mark.parametrize('target', ['uniform', SHARES])
def test_gradient_through_the_gates_pulls_towards_the_target(target):
    """Gradient descent on free logits from one-sided routing ends near the shares that are asked for."""
    logits = torch.tensor([0.0, 0.0, 0.0, 3.0], requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=0.5)
    for step in range(200):
        gate = route_gumbel(logits.expand(1, 2000, 4), Draw(gumbel_noise((1, 2000, 4), 0, step, 0))).gate
        optimizer.zero_grad()
        MoEBalanceLoss(target=target)(gate.mean(dim=(0, 1))).backward()
        optimizer.step()
    wanted = torch.tensor([0.25] * 4 if target == 'uniform' else target)
    assert float((torch.softmax(logits.detach(), dim=-1) - wanted).abs().max()) < 0.05


def test_built_from_yaml_options():
    options = {'type': 'MoEBalanceLoss', 'loss_weight': 0.1, 'target': SHARES}
    loss = build_loss(options)
    assert isinstance(loss, MoEBalanceLoss) and loss.loss_weight == 0.1
    assert options['type'] == 'MoEBalanceLoss'


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'loss_weight': -1}, 'loss_weight must not be negative; got -1'),
        ({'target': 'equal'}, "got 'equal'"),
        ({'target': [0.5, 0.6]}, 'must add up to 1; .* add up to 1.1'),
        ({'target': [1.5, -0.5]}, 'fractions that add up to 1'),
    ],
)
def test_bad_options_say_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        MoEBalanceLoss(**options)


def test_target_must_fit_the_network():
    with pytest.raises(ValueError, match='lists 3 experts; the network has 4'):
        MoEBalanceLoss(target=[0.2, 0.3, 0.5])(torch.full((4,), 0.25))


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
        return route_gumbel(self.linear(x), Draw(noise)).gate


def batch_of_four():
    x = torch.randn(4, 30, 5, generator=torch.Generator().manual_seed(4))
    x[:2] += 1.0  # the ranks' shares differ: a loss per rank would be another loss
    return x, torch.stack([gumbel_noise((30, 4), 0, 0, slot) for slot in range(4)])


def losses_and_gradients(router, x, noise):
    result = {}
    for name, target in (('uniform', 'uniform'), ('shares', [0.4, 0.3, 0.2, 0.1])):
        router.zero_grad()
        loss = MoEBalanceLoss(1.0, target)(average_over_ranks(router(x, noise).mean(dim=(0, 1))))
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


def test_experts_loss_by_hand():
    """Two queries, two experts, one channel; the first query took expert 0, the second expert 1."""
    predictions = torch.tensor([[[[0.5], [0.2]], [[0.9], [0.4]]]], requires_grad=True)  # (1, 2, 2, 1)
    gt = torch.tensor([[[0.3], [0.3]]])
    gate = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], requires_grad=True)
    scale = torch.tensor([[2.0, 4.0]])
    loss = MoEExpertLoss(0.5, routing_weight=3.0)(predictions, gt, gate, scale)
    assert float(loss.detach()) == pytest.approx(0.5 * (0.2 + 0.1 + 0.6 + 0.1) / 4)
    loss.backward()
    torch.testing.assert_close(gate.grad, 3.0 / 2 * torch.tensor([[[0.2, 0.1], [0.6, 0.1]]]) / scale[..., None])
    torch.testing.assert_close(predictions.grad.flatten(), torch.tensor([1.0, -1, 1, 1]) * 0.5 / 4)  # all learn


@pytest.mark.parametrize('weights', [(-1.0, 0.0), (1.0, -0.1)])
def test_experts_loss_weights_are_not_negative(weights):
    with pytest.raises(ValueError, match='must not be negative'):
        MoEExpertLoss(*weights)
