"""The network that is profiled, and its input."""

import torch
from basicsr.archs import build_network
from rich.console import Console
from torch import Tensor

from moeisr_basicsr.analysis.complexity import parameters
from moeisr_basicsr.archs.moeisr_arch import MoEISR
from moeisr_basicsr.checkpoint import load_model, read_model
from moeisr_basicsr.data.image_reader import read_image, to_float
from moeisr_basicsr.errors import UserError
from moeisr_basicsr.options import check_network, read_yaml


def load_network(model: str | None, options: str) -> tuple[MoEISR, dict]:
    """The network of a model file, or of an options file with random weights, and its options.

    Raises:
        UserError: The file is wrong, or its network has no decoder of this package.
    """
    if model is not None:
        net, network_opt = load_model(model), read_model(model).network_opt
    else:
        data = read_yaml(options).data
        if 'network_g' not in data:
            raise UserError(f"{options} has no section 'network_g'.")
        network_opt = data['network_g']
        check_network(network_opt, options)
        try:
            net = build_network(dict(network_opt))
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            reason = ' '.join(str(error).split())
            raise UserError(f'{options}: {network_opt["type"]} cannot be built: {reason}') from error
    if not isinstance(net, MoEISR):
        raise UserError(
            f'{model or options}: {type(net).__name__} has no decoder to profile; MoEISR, LIIF and LTE have one.'
        )
    return net, network_opt


def input_image(net: MoEISR, file: str | None, size: tuple[int, int]) -> Tensor:
    """(1, C, H, W) RGB in [0, 1]: of a file, or noise of `size` (H, W) where none is named."""
    if file is None:
        return torch.rand(1, net.in_channels, *size, generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(to_float(read_image(file).rgb)).permute(2, 0, 1)[None]


def show_parameters(console: Console, net: MoEISR) -> None:
    """One line on the screen."""
    count = parameters(net)
    parts = [f'{name} {count[name]:,}' for name in ('encoder', 'mapper', 'shared') if count[name]]
    experts = ' + '.join(f'{value:,}' for value in count['experts'])
    console.print(f'Parameters: {", ".join(parts)}, experts {experts}; in all {count["total"]:,}')
