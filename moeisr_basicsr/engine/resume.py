"""The state of a training run as plain values and tensors, and back.

Resumed on the CPU with the same number of ranks, a run goes on bit for bit as if it had never stopped.
"""

import copy
import random
import warnings
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from basicsr.models.base_model import BaseModel
from torch import Tensor, nn
from torch.optim import Optimizer

from moeisr_basicsr.errors import UserError
from moeisr_basicsr.models.weights import bare_weights, describe_misfits, misfits

from .checkpoint_store import Weights


def plain(value: Any) -> Any:
    """Containers, numbers and strings as themselves, tensors on the CPU; what `weights_only` loading accepts.

    Raises:
        TypeError: Something else is in it.
    """
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {plain(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return (tuple if isinstance(value, tuple) else list)(plain(entry) for entry in value)
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f'A training state holds plain values and tensors only; got {type(value).__name__}.')


def rng_state(device: torch.device) -> dict:
    """The generators of python, numpy, torch and, on a GPU, its own. `plain` makes it what a file may hold."""
    cuda = torch.cuda.get_rng_state(device) if device.type == 'cuda' else None
    return {'python': random.getstate(), 'numpy': np.random.get_state(), 'torch': torch.get_rng_state(), 'cuda': cuda}


def set_rng_state(state: dict, device: torch.device) -> None:
    """Put the generators back to what `rng_state` saw."""
    random.setstate(state['python'])
    np.random.set_state(state['numpy'])
    torch.set_rng_state(state['torch'])
    if device.type == 'cuda' and state['cuda'] is not None:
        torch.cuda.set_rng_state(state['cuda'], device)


def networks(model: BaseModel) -> dict[str, nn.Module]:
    """The trained networks of any BasicSR model, without wrappers: {'net_g': ...}."""
    return {
        name: model.get_bare_model(net)
        for name, net in vars(model).items()
        if name.startswith('net_') and not name.endswith('_ema') and isinstance(net, nn.Module)
    }


def model_weights(model: BaseModel) -> Weights:
    """What the weights files hold: BasicSR's 'params' and, with EMA, 'params_ema' of every network, and its options.

    The options (`network_g`) let `basicsr convert` build the network that was trained, --force_yml included.
    """
    weights = {}
    for name, net in networks(model).items():
        options = f'network_{name.removeprefix("net_")}'
        weights[name] = {'params': bare_weights(net), options: plain(model.opt.get(options, {}))}
        if hasattr(model, f'{name}_ema'):
            weights[name]['params_ema'] = bare_weights(getattr(model, f'{name}_ema'))
    return weights


def set_model_weights(model: BaseModel, weights: Weights) -> list[str]:
    """Fill every network and its EMA; what could not be restored exactly.

    Raises:
        UserError: The weights do not fit the network.
    """
    notes = []
    for name, net in networks(model).items():
        if name not in weights:
            notes.append(f'{name} is not in the checkpoint and starts anew')
            continue
        params = weights[name].get('params', {})
        if found := misfits(net.state_dict(), params):
            raise UserError(
                f'The checkpoint does not fit network_{name.removeprefix("net_")} of the options: '
                f'{describe_misfits(found)}. Resume with the options of the run that saved it, or start '
                'anew under another name.'
            )
        net.load_state_dict(params)
        if hasattr(model, f'{name}_ema'):
            if 'params_ema' not in weights[name]:
                notes.append(f'the checkpoint has no EMA of {name}: it starts from the current weights')
            getattr(model, f'{name}_ema').load_state_dict(weights[name].get('params_ema', params))
    return notes


def without_pretrained(path_opt: dict, weights: Weights) -> dict:
    """`path` without the `pretrain_network_*` of the networks in a checkpoint: a resumed run has their weights there.

    A model may have others that never train, such as the identity network of a face loss: these come from their files.
    """
    return {**path_opt, **{pretrained_key(name): None for name in weights}}


def pretrained_key(net: str) -> str:
    """The key in `path` of the weights that 'net_g' starts from."""
    return f'pretrain_network_{net.removeprefix("net_")}'


def model_state(model: BaseModel) -> dict:
    """Optimizers, schedulers, AMP scaler, best metrics and counters of any BasicSR model."""
    precision, guard = getattr(model, 'precision', None), getattr(model, 'guard', None)
    return plain(
        {
            'optimizers': [optimizer.state_dict() for optimizer in model.optimizers],
            'schedulers': [scheduler.state_dict() for scheduler in model.schedulers],
            'scaler': precision.scaler.state_dict() if precision else {},
            'skipped_steps': guard.skipped if guard else 0,
            'best_metric_results': getattr(model, 'best_metric_results', {}),
        }
    )


def check_moments(model: BaseModel) -> None:
    """An optimizer's running means have the shapes of their parameters, which a state knows by their order only.

    Raises:
        UserError: They do not.
    """
    for parameter, state in (entry for optimizer in model.optimizers for entry in optimizer.state.items()):
        moment = state.get('exp_avg', state.get('momentum_buffer'))  # of Adam and its kin, of SGD
        if moment is not None and moment.shape != parameter.shape:
            raise UserError(
                'The training state is of a network whose parameters come in another order or size, perhaps of another '
                'version: start anew from its weights, with path: pretrain_network_g.'
            )


def rescheduled(model: BaseModel, state: dict) -> dict:
    """`state` with the rates and schedules that the model's own options have at its iteration, and its other numbers.

    The schedule is stepped from the start, which is right for every kind: some compute a rate from the one before.
    """
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch's, that the optimizer has not stepped between
        for scheduler in model.schedulers:
            for _ in range(state['iter'] - 1):
                scheduler.step()
    optimizers = [
        {
            **saved,
            'param_groups': [
                {**group, 'params': old['params']} for old, group in zip(saved['param_groups'], one.param_groups)
            ],
        }
        for one, saved in zip(model.optimizers, state['optimizers'])
    ]
    return {**state, 'optimizers': optimizers, 'schedulers': [one.state_dict() for one in model.schedulers]}


@torch.no_grad()
def check_goes_on(optimizer: Optimizer) -> None:
    """Try one step of a single parameter, with its state: other options may need more than the state has.

    Raises:
        UserError: The step fails.
    """
    trial = copy.copy(optimizer)
    parameter, state = next(iter(optimizer.state.items()), (torch.zeros(1), {}))
    stand_in = nn.Parameter(torch.zeros_like(parameter))
    stand_in.grad = torch.zeros_like(parameter)
    trial.param_groups = [{**optimizer.param_groups[0], 'params': [stand_in]}]
    trial.state = defaultdict(dict, {stand_in: copy.deepcopy(state)} if state else {})
    try:
        trial.step()
    except Exception as error:  # a missing entry, in most cases a KeyError; each optimizer has its own
        raise UserError(
            f'train: optim_g: {type(optimizer).__name__} with these options cannot go on from the saved state '
            f'({type(error).__name__}: {error}). Resume with the options of the saved run.'
        ) from error


def set_model_state(model: BaseModel, state: dict, reschedule: bool = False) -> list[str]:
    """Put `model_state` back; what the checkpoint lacks (BasicSR's own states lack much).

    Args:
        model: Made from the options that are to count.
        state: Of a checkpoint.
        reschedule: Whether rates and schedules are those of the model's options, not of the state.

    Raises:
        UserError: The state is of other optimizers, or of a network with other parameters.
    """
    notes = []
    try:
        model.resume_training(rescheduled(model, state) if reschedule else state)
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f'The training state does not fit train: optim_g and scheduler: {error}') from error
    check_moments(model)
    for optimizer in model.optimizers if reschedule else ():
        check_goes_on(optimizer)
    if 'best_metric_results' in state:
        model.best_metric_results = state['best_metric_results']
    else:
        notes.append('the checkpoint has no best metrics')
    if getattr(model, 'guard', None):
        model.guard.skipped = state.get('skipped_steps', 0)
    scaler = model.precision.scaler if getattr(model, 'precision', None) else None
    if scaler is not None and scaler.is_enabled():
        if state.get('scaler'):
            scaler.load_state_dict(state['scaler'])
        else:
            notes.append('the checkpoint has no AMP scaler: its factor starts anew')
    return notes
