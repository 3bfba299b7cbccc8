"""Parts of a network by name: which of them train."""

from collections.abc import Sequence

from basicsr.utils import get_root_logger
from torch import nn

from moeisr_basicsr.errors import UserError, did_you_mean


def is_in(name: str, parts: Sequence[str]) -> bool:
    """Whether `name` is a parameter of one of `parts`, which name parameters or modules."""
    return any(name == part or name.startswith(f'{part}.') for part in parts)


def keep_trainable(net: nn.Module, parts: Sequence[str]) -> None:
    """Freeze all parameters but those of `parts`, for example ['decoder.mapper'].

    Raises:
        UserError: A part has no parameters, or no part is named.
    """
    if not parts:
        raise UserError('train: trainable: names no part; leave it out to train the whole network.')
    for part in parts:
        if not any(is_in(name, [part]) for name, _ in net.named_parameters()):
            modules = [name for name, module in net.named_modules() if name and any(True for _ in module.parameters())]
            hint = did_you_mean(part, modules)
            raise UserError(f'train: trainable: {type(net).__name__} has no parameters in {part!r}.{hint}')
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(is_in(name, parts))
    trained = sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
    get_root_logger().info(f'Only {", ".join(parts)} will train: {trained:,} parameters.')
