"""Model files: weights and the network's options in one safetensors file, so that nothing else is needed to use it.

The metadata of a model file has `format` (`moeisr_basicsr`), `format_version` and `network_g`, the options of the
network as JSON. Reading a file never runs code from it.
"""

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from basicsr.archs import build_network
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from moeisr_basicsr.atomic_file import write_atomic
from moeisr_basicsr.errors import UserError
from moeisr_basicsr.options import check_network

FORMAT = 'moeisr_basicsr'
FORMAT_VERSION = 1
RESERVED = ('format', 'format_version', 'network_g')  # metadata that `save_model` itself writes


class Model(NamedTuple):
    """The content of a model file."""

    network_opt: dict[str, Any]  # the YAML's `network_g`
    weights: dict[str, Tensor]
    metadata: dict[str, str]


def save_model(
    path: str | PathLike, weights: nn.Module | Mapping[str, Tensor], network_opt: Mapping[str, Any], /, **notes: str
) -> None:
    """Write a model file: complete or not at all.

    Args:
        path: A name that ends in .safetensors; its folder must exist.
        weights: The network, or its state dict.
        network_opt: Options from which BasicSR's `build_network` makes the network.
        **notes: Further metadata, for example `source`.

    Raises:
        UserError: Another ending, or no such folder.
        OSError: The disk is full or read-only; what was there before is untouched.
    """
    path = Path(path)
    if path.suffix != '.safetensors':
        raise UserError(f"{path}: the name of a model file must end in '.safetensors'.")
    if not path.parent.is_dir():
        raise UserError(f'{path}: there is no folder {path.parent}.')
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    # A clone each: safetensors refuses tensors that share memory.
    state = {name: value.detach().to('cpu', copy=True).contiguous() for name, value in state.items()}
    metadata = {
        **notes,
        'format': FORMAT,
        'format_version': str(FORMAT_VERSION),
        'network_g': json.dumps(network_opt, sort_keys=True),
    }
    content = save(state, metadata)
    write_atomic(path, lambda file: file.write(content))


def read_model(path: str | PathLike, device: str | torch.device = 'cpu') -> Model:
    """The content of a model file.

    Raises:
        UserError: It is missing, truncated, or no model file of this package.
    """
    weights, metadata = read_safetensors(path, device)
    if metadata.get('format') != FORMAT or 'network_g' not in metadata:
        raise UserError(
            f'{path} does not say which network its weights belong to: it is no model file of '
            "moeisr_basicsr. `basicsr convert` makes one of it, given the network's options."
        )
    if metadata.get('format_version') != str(FORMAT_VERSION):
        raise UserError(
            f'{path} has format version {metadata.get("format_version")}; this moeisr_basicsr reads '
            f'version {FORMAT_VERSION}. Update moeisr_basicsr.'
        )
    try:
        network_opt = json.loads(metadata['network_g'])
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f'{path} is damaged: the options of its network are not JSON ({error}).') from error
    return Model(network_opt, weights, metadata)


def read_safetensors(
    path: str | PathLike, device: str | torch.device = 'cpu'
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights and metadata of any safetensors file.

    Raises:
        UserError: It is missing, truncated, or another kind of file.
    """
    if not Path(path).is_file():
        raise UserError(f'there is no model file {path}.')
    try:
        with safe_open(path, framework='pt', device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, ValueError) as error:
        if Path(path).suffix != '.safetensors':
            raise UserError(
                f'{path} is no model file (.safetensors). `basicsr convert {path} -o OUT.safetensors` '
                'makes one of a checkpoint.'
            ) from error
        raise UserError(f'{path} is no whole safetensors file: it is damaged or was cut short ({error}).') from error


def load_model(path: str | PathLike, device: str | torch.device = 'cpu') -> nn.Module:
    """The network of a model file, in eval mode.

    Raises:
        UserError: See `read_model`; or the options and the weights do not fit together.
    """
    model = read_model(path)
    return build(model.network_opt, model.weights, str(path)).to(device).eval()


def build(network_opt: Mapping[str, Any], weights: Mapping[str, Tensor], source: str) -> nn.Module:
    """A network with its weights.

    Args:
        network_opt: Options of the network.
        weights: Its state dict.
        source: Where they come from, for messages.

    Raises:
        UserError: The options are wrong, or the weights are those of another network.
    """
    check_network(network_opt, source)
    try:
        net = build_network(dict(network_opt))
    except (TypeError, ValueError, RuntimeError, MemoryError) as error:
        reason = ' '.join(str(error).split())
        raise UserError(f'{source}: {network_opt["type"]} cannot be built from its options: {reason}') from error
    fill(net, weights, source)
    return net


def fill(net: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict that must fit exactly; buffers that a network computes by itself may be missing.

    Raises:
        UserError: Names or shapes differ; the first ones are named.
    """
    own = net.state_dict()
    parameters = {name for name, _ in net.named_parameters()}
    gaps = {
        'missing': sorted((own.keys() & parameters) - weights.keys()),
        'unknown': sorted(weights.keys() - own.keys()),
        'of another shape': sorted(
            name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape
        ),
    }
    found = [f'{len(names)} {what} (such as {names[0]})' for what, names in gaps.items() if names]
    if found:
        raise UserError(f'{source}: the weights do not fit the network {type(net).__name__}: {", ".join(found)}.')
    net.load_state_dict(dict(weights), strict=False)
