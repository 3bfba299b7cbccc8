"""Pretrained weights into a network, as BasicSR's `path:` section says."""

import os
from collections.abc import Mapping
from typing import Any

from basicsr.utils import get_root_logger
from torch import Tensor, nn

from moeisr_basicsr.checkpoint import describe_misfits, differences, fill, misfits, read_checkpoint
from moeisr_basicsr.errors import UserError
from moeisr_basicsr.shipped import find_model


def bare_weights(net: nn.Module) -> dict[str, Tensor]:
    """The state dict on the CPU."""
    return {name: value.detach().cpu() for name, value in net.state_dict().items()}


def load_weights(
    net: nn.Module,
    path: str | os.PathLike,
    strict: bool = True,
    param_key: str | None = 'params',
    network_opt: Mapping[str, Any] | None = None,
) -> set[str]:
    """Fill `net` from a file; returns the names of what was filled.

    Args:
        net: The network.
        path: See `checkpoint.read_checkpoint`; or the name of a shipped model.
        strict: Every parameter must be there with its shape; otherwise what does not fit is named and left out.
        param_key: Which entry of a BasicSR .pth; 'params' stands in where it is missing, and then the whole file.
        network_opt: The options of `net`; a warning says where the file's own differ.

    Raises:
        UserError: See `find_model`, `read_checkpoint` and `fill`; names or shapes differ under `strict`; nothing fits.
    """
    logger = get_root_logger()
    model = read_checkpoint(find_model(str(path)), (param_key, 'params', None))
    logger.info(f'Loading {type(net).__name__} from {path}, {model.metadata.get("param_key", "all of it")}.')
    own = net.state_dict()
    found = misfits(own, model.weights)
    if strict and found:
        raise UserError(
            f'{path} does not fit the network {type(net).__name__}: {describe_misfits(found)}. Check '
            'network_g, or set path: strict_load_g to false.'
        )
    for what, names in found.items():
        logger.warning(f'{path}: parameters {what}, left alone: {", ".join(names)}')
    fitting = own.keys() & model.weights.keys() - set(found.get('of another shape', ()))
    if not fitting & dict(net.named_parameters()).keys():
        raise UserError(f'{path}: nothing in it fits the network {type(net).__name__}: {describe_misfits(found)}.')
    if network_opt and model.network_opt and (changed := differences(model.network_opt, network_opt)):
        logger.warning(f'{path} was trained with other options: {changed}.')
    fill(net, {name: model.weights[name] for name in fitting}, str(path))
    return fitting
