"""Weights in and out of files, without ever running code from a file."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from basicsr.utils import get_root_logger
from torch import Tensor, nn

from moeisr_basicsr.checkpoint import read_safetensors
from moeisr_basicsr.errors import UserError
from moeisr_basicsr.safe_reading import load_torch_file

from .parts import is_in


def bare_weights(net: nn.Module) -> dict[str, Tensor]:
    """The state dict on the CPU."""
    return {name: value.detach().cpu() for name, value in net.state_dict().items()}


def read_weights(path: str | os.PathLike, param_key: str | None = 'params') -> dict[str, Tensor]:
    """The weights of one network.

    Args:
        path: A BasicSR .pth file, or safetensors.
        param_key: Which entry of a .pth; 'params' stands in where it is missing, None takes the whole file.

    Raises:
        UserError: The file is missing, damaged, holds code, or has no such entry.
    """
    if not Path(path).is_file():
        raise UserError(f'Weights {path} do not exist.')
    if Path(path).suffix == '.safetensors':
        return read_safetensors(path)[0]
    weights = load_torch_file(path)
    if param_key is not None and isinstance(weights, dict):
        if param_key not in weights and 'params' in weights:
            get_root_logger().info(f'{path} has no [{param_key}]; using [params].')
            param_key = 'params'
        if param_key not in weights:
            raise UserError(f'{path} has no [{param_key}]; it has {", ".join(map(str, list(weights)[:8]))}.')
        weights = weights[param_key]
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f'{path} holds no weights under [{param_key}].')
    return {name.removeprefix('module.'): value for name, value in weights.items()}


def misfits(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Names by what is wrong with them: 'missing' from `weights`, 'unknown' to the network, 'of another shape'."""
    found = {
        'missing': sorted(own.keys() - weights.keys()),
        'unknown': sorted(weights.keys() - own.keys()),
        'of another shape': sorted(
            name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape
        ),
    }
    return {what: names for what, names in found.items() if names}


def describe_misfits(found: Mapping[str, list[str]]) -> str:
    """In words, with an example of each."""
    return ', '.join(f'{len(names)} {what} (such as {names[0]})' for what, names in found.items())


def load_weights(
    net: nn.Module,
    path: str | os.PathLike,
    strict: bool = True,
    param_key: str | None = 'params',
    leave_out: Sequence[str] = (),
) -> set[str]:
    """Fill `net` from a file; returns the names of what was filled.

    Args:
        strict: Every parameter must be there with its shape; otherwise what does not fit is named and left out.
        leave_out: Parts of the network that keep the weights they have.

    Raises:
        UserError: See `read_weights`; or names or shapes differ under `strict`.
    """
    weights = {name: value for name, value in read_weights(path, param_key).items() if not is_in(name, leave_out)}
    own = {name: value for name, value in net.state_dict().items() if not is_in(name, leave_out)}
    found = misfits(own, weights)
    if strict and found:
        raise UserError(
            f'{path} does not fit the network {type(net).__name__}: {describe_misfits(found)}. Check '
            'network_g, or set path: strict_load_g to false.'
        )
    other = found.get('of another shape', [])
    for what, names in found.items():
        get_root_logger().warning(f'{path}: parameters {what}, left alone: {", ".join(names)}')
    fitting = {name: value for name, value in weights.items() if name in own and name not in other}
    net.load_state_dict(fitting, strict=False)
    return set(fitting)
