"""Pretrained weights into a network, as BasicSR's `path:` section says."""

import os
from collections.abc import Sequence

from basicsr.utils import get_root_logger
from torch import Tensor, nn

from moeisr_basicsr.checkpoint import describe_misfits, misfits, read_checkpoint
from moeisr_basicsr.errors import UserError

from .parts import is_in


def bare_weights(net: nn.Module) -> dict[str, Tensor]:
    """The state dict on the CPU."""
    return {name: value.detach().cpu() for name, value in net.state_dict().items()}


def load_weights(
    net: nn.Module,
    path: str | os.PathLike,
    strict: bool = True,
    param_key: str | None = 'params',
    leave_out: Sequence[str] = (),
) -> set[str]:
    """Fill `net` from a file; returns the names of what was filled.

    Args:
        net: The network.
        path: See `checkpoint.read_checkpoint`.
        strict: Every parameter must be there with its shape; otherwise what does not fit is named and left out.
        param_key: Which entry of a BasicSR .pth; 'params' stands in where it is missing, None takes the whole file.
        leave_out: Parts of the network that keep the weights they have.

    Raises:
        UserError: See `read_checkpoint`; or names or shapes differ under `strict`.
    """
    logger = get_root_logger()
    model = read_checkpoint(path, (param_key, 'params'))
    logger.info(f'Loading {type(net).__name__} from {path}, {model.metadata.get("param_key", "all of it")}.')
    weights = {name: value for name, value in model.weights.items() if not is_in(name, leave_out)}
    own = {name: value for name, value in net.state_dict().items() if not is_in(name, leave_out)}
    found = misfits(own, weights)
    if strict and found:
        raise UserError(
            f'{path} does not fit the network {type(net).__name__}: {describe_misfits(found)}. Check '
            'network_g, or set path: strict_load_g to false.'
        )
    for what, names in found.items():
        logger.warning(f'{path}: parameters {what}, left alone: {", ".join(names)}')
    fitting = own.keys() & weights.keys() - set(found.get('of another shape', ()))
    net.load_state_dict({name: weights[name] for name in fitting}, strict=False)
    return fitting
