"""Optimizers and schedulers by name, warm-up, and their state as plain values."""

import math

import pytest
import torch

from moeisr_basicsr.engine.resume import plain
from moeisr_basicsr.errors import UserError
from moeisr_basicsr.models.optimizers import build_optimizer, build_scheduler, step_schedulers
from moeisr_basicsr.options.registered import optimizer_classes, scheduler_classes

SCHEDULER_ARGUMENTS = {
    'CosineAnnealingLR': {'T_max': 10},
    'CosineAnnealingWarmRestarts': {'T_0': 5},
    'StepLR': {'step_size': 3},
    'CyclicLR': {'base_lr': 1e-4, 'max_lr': 1e-3},
    'ExponentialLR': {'gamma': 0.9},
    'MultiStepLR': {'milestones': [3]},
    'MultiStepRestartLR': {'milestones': [3]},
    'OneCycleLR': {'max_lr': 1e-3, 'total_steps': 30},
    'CosineAnnealingRestartLR': {'periods': [10, 10], 'restart_weights': [1, 0.5]},
}


def parameter():
    return torch.nn.Parameter(torch.ones(3, 3))


@pytest.mark.parametrize('name', sorted(optimizer_classes()))
def test_every_optimizer_steps_and_its_state_is_plain(name, tmp_path):
    weight = parameter()
    optimizer = build_optimizer({'type': name, 'lr': 0.1}, [weight])
    for _ in range(2):
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()
    assert not torch.equal(weight, torch.ones(3, 3))
    torch.save(plain(optimizer.state_dict()), tmp_path / 'state')
    state = torch.load(tmp_path / 'state', weights_only=True)
    other_weight = torch.nn.Parameter(weight.detach().clone())
    other = build_optimizer({'type': name, 'lr': 0.1}, [other_weight])
    other.load_state_dict(state)
    for one, its_weight in ((optimizer, weight), (other, other_weight)):
        one.zero_grad()
        its_weight.square().sum().backward()
        one.step()
    assert torch.equal(weight, other_weight)


@pytest.mark.parametrize('name', sorted(scheduler_classes()))
def test_every_scheduler_goes_on_from_its_plain_state(name, tmp_path):
    def start():
        optimizer = torch.optim.SGD([parameter()], lr=1e-3, momentum=0.9)
        return optimizer, build_scheduler({'type': name, **SCHEDULER_ARGUMENTS.get(name, {})}, optimizer)

    optimizer, scheduler = start()
    rates = []
    for iteration in range(1, 15):
        step_schedulers([scheduler], iteration, warmup_iter=-1)
        optimizer.step()
        rates.append(optimizer.param_groups[0]['lr'])
        if iteration == 6:
            torch.save(plain({'o': optimizer.state_dict(), 's': scheduler.state_dict()}), tmp_path / 'state')
    state = torch.load(tmp_path / 'state', weights_only=True)
    optimizer, scheduler = start()
    optimizer.load_state_dict(state['o'])
    scheduler.load_state_dict(state['s'])
    again = []
    for iteration in range(7, 15):
        step_schedulers([scheduler], iteration, warmup_iter=-1)
        optimizer.step()
        again.append(optimizer.param_groups[0]['lr'])
    assert again == rates[6:]


def test_betas_of_a_yaml_list():
    options = {'type': 'AdamW', 'lr': 1e-4, 'betas': [0.9, 0.95], 'weight_decay': 0.02}
    optimizer = build_optimizer(options, [parameter()])
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults['betas'] == (0.9, 0.95) and optimizer.defaults['weight_decay'] == 0.02


def test_warm_up_scales_the_schedule_and_leaves_no_trace():
    """BasicSR's MultiStepLR stays below its schedule for ever after a warm-up; ours does not."""
    optimizer = torch.optim.SGD([parameter()], lr=1.0)
    scheduler = build_scheduler({'type': 'MultiStepLR', 'milestones': [8], 'gamma': 0.1}, optimizer)
    rates = []
    for iteration in range(1, 12):
        step_schedulers([scheduler], iteration, warmup_iter=5)
        optimizer.step()
        rates.append(optimizer.param_groups[0]['lr'])
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 0.1, 0.1, 0.1])

    optimizer = torch.optim.SGD([parameter()], lr=1.0)
    scheduler = build_scheduler({'type': 'CosineAnnealingLR', 'T_max': 20}, optimizer)
    for iteration in range(1, 15):
        step_schedulers([scheduler], iteration, warmup_iter=10)
        optimizer.step()
        expected = 0.5 * (1 + math.cos(math.pi * (iteration - 1) / 20)) * min(iteration / 10, 1)
        assert optimizer.param_groups[0]['lr'] == pytest.approx(expected)


@pytest.mark.parametrize(
    'options, hint',
    [
        ({'type': 'Adan', 'lr': 1e-4}, "Did you mean 'Adam'"),
        ({'type': 'LBFGS', 'lr': 1}, 'must be one of'),
        ({'type': 'AdamW', 'lr': 1e-4, 'weight_deacy': 0}, 'weight_deacy'),
        ({'type': 'Adam', 'lr': -1}, 'does not take'),
        ({'lr': 1e-4}, 'type must be'),
    ],
)
def test_wrong_optimizers_are_user_errors(options, hint):
    with pytest.raises(UserError, match=hint):
        build_optimizer(options, [parameter()])


@pytest.mark.parametrize(
    'options, hint',
    [
        ({'type': 'MultiStpLR', 'milestones': [1]}, "Did you mean 'MultiStepLR'"),
        ({'type': 'MultiStepLR'}, 'does not take'),
        ({'type': 'CosineAnnealingRestartLR', 'periods': [20], 'restart_weights': [1, 2]}, 'does not take'),
        ({'type': 'CosineAnnealingRestartLR', 'periods': [9]}, 'ends after 9 iterations; total_iter is 10'),
        ({'type': 'OneCycleLR', 'max_lr': 1, 'total_steps': 5}, 'ends after 5 iterations'),
        ({'type': 'LambdaLR'}, 'must be one of'),
    ],
)
def test_wrong_schedulers_are_user_errors(options, hint):
    with pytest.raises(UserError, match=hint):
        build_scheduler(options, torch.optim.SGD([parameter()], lr=1.0), total_iter=10)
