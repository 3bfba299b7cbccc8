"""Weights in files: model files, written and read, and the checkpoints that become one.

A model file is safetensors with the metadata `format` and `network_g`, the network's options as JSON, so that nothing
else is needed to use it. Reading a file never runs code from it.
"""

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from basicsr.archs import build_network
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from moeisr_basicsr.archs.moeisr_arch import MoEISR, resolve_network
from moeisr_basicsr.atomic_file import write_atomic
from moeisr_basicsr.errors import UserError
from moeisr_basicsr.official import official
from moeisr_basicsr.options import check_network
from moeisr_basicsr.safe_reading import load_torch_file

FORMAT = 'moeisr_basicsr'
RESERVED = ('format', 'network_g')  # metadata that `save_model` itself writes
# Where a .pth has its weights, best first: averaged, plain, or the file is the state dict itself.
PARAM_KEYS = ('params_ema', 'params', None)
STORES = {'fp32': torch.float32, 'fp16': torch.float16}  # number formats of the weights in a model file


class Model(NamedTuple):
    """The content of a model file or of a checkpoint."""

    network_opt: dict[str, Any]  # the YAML's `network_g`; empty where a checkpoint does not say it
    weights: dict[str, Tensor]
    metadata: dict[str, str]  # what else the file says, such as `source` and `param_key`


def save_model(
    path: str | PathLike, weights: nn.Module | Mapping[str, Tensor], network_opt: Mapping[str, Any], /, **notes: str
) -> None:
    """Write a model file: complete or not at all.

    Args:
        path: A name that ends in .safetensors.
        weights: The network, or its state dict.
        network_opt: Options from which BasicSR's `build_network` makes the network.
        **notes: Further metadata, for example `source`.

    Raises:
        UserError: Another ending.
        OSError: There is no such folder, or it is full or read-only; what was there before is untouched.
    """
    path = Path(path)
    if path.suffix != '.safetensors':
        raise UserError(f"{path}: the name of a model file must end in '.safetensors'.")
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    # A clone each: safetensors rejects tensors that share memory.
    state = {name: value.detach().to('cpu', copy=True).contiguous() for name, value in state.items()}
    content = save(state, {**notes, 'format': FORMAT, 'network_g': json.dumps(network_opt, sort_keys=True)})
    write_atomic(path, lambda file: file.write(content))


def read_model(path: str | PathLike) -> Model:
    """The content of a model file.

    Raises:
        UserError: It is missing, truncated, or no model file of this package.
    """
    if not Path(path).is_file():
        raise UserError(f'there is no model file {path}.')
    if Path(path).suffix != '.safetensors':
        raise UserError(
            f'{path} is no model file (.safetensors). `basicsr convert {path} -o OUT.safetensors` makes one of a '
            'checkpoint.'
        )
    model = _read_safetensors(path)
    if not model.network_opt:
        raise UserError(
            f'{path} does not say which network its weights belong to: it is no model file of '
            "moeisr_basicsr. `basicsr convert` makes one of it, given the network's options."
        )
    return model


def load_model(path: str | PathLike, device: str | torch.device = 'cpu') -> nn.Module:
    """The network of a model file, in eval mode.

    Raises:
        UserError: See `read_model`; or the options and the weights do not fit together.
    """
    model = read_model(path)
    return build(model.network_opt, model.weights, str(path)).to(device).eval()


def load_any(path: str | PathLike, device: str | torch.device = 'cpu') -> MoEISR:
    """The network of any file with weights, able to upscale by any factor, in eval mode.

    A fixed-scale network becomes `FixedScale`, untrained: one that a model file names, and one that `NetworkEncoder`
    recognises by its weights.

    Raises:
        UserError: The file cannot be read, or its weights are not recognised.
    """
    try:
        model = read_checkpoint(path)
    except UserError:  # weights under other names than BasicSR's, or none: `NetworkEncoder` says
        model = Model({}, {}, {})
    encoder: dict[str, Any] = {'type': 'NetworkEncoder', 'checkpoint': str(path)}
    if model.network_opt:
        net = build(model.network_opt, model.weights, str(path))
        if isinstance(net, MoEISR):
            return net.to(device).eval()
        encoder = {'type': 'NetworkEncoder', 'arch': model.network_opt, 'weights': str(path)}
    elif any(name.startswith('decoder.pool.') for name in model.weights):
        raise UserError(f'{path} does not say its options: `basicsr convert {path} -opt FILE.yml` makes a model file.')
    return build_network({'type': 'FixedScale', 'encoder': encoder}).to(device).eval()


def build(network_opt: Mapping[str, Any], weights: Mapping[str, Tensor], source: str) -> nn.Module:
    """A network with its weights; buffers that it computes by itself may be missing from them.

    Raises:
        UserError: The options are wrong, or the weights are those of another network; `source` is named.
    """
    check_network(network_opt, source)
    try:
        net = build_network(dict(network_opt))
    except (TypeError, ValueError, RuntimeError, MemoryError) as error:
        reason = ' '.join(str(error).split())
        raise UserError(f'{source}: {network_opt["type"]} cannot be built from its options: {reason}') from error
    parameters = dict(net.named_parameters())
    own = {name: value for name, value in net.state_dict().items() if name in parameters or name in weights}
    if found := misfits(own, weights):
        kind = type(net).__name__
        raise UserError(f'{source}: the weights do not fit the network {kind}: {describe_misfits(found)}.')
    net.load_state_dict(dict(weights), strict=False)
    return net


def misfits(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Names by what is wrong with them: 'missing' from `weights`, 'unknown' to the network, 'of another shape'."""
    both = own.keys() & weights.keys()
    found = {
        'missing': sorted(own.keys() - both),
        'unknown': sorted(weights.keys() - both),
        'of another shape': sorted(name for name in both if own[name].shape != weights[name].shape),
    }
    return {what: names for what, names in found.items() if names}


def describe_misfits(found: Mapping[str, list[str]]) -> str:
    """In words, with an example of each."""
    return ', '.join(f'{len(names)} {what} (such as {names[0]})' for what, names in found.items())


def read_checkpoint(path: str | PathLike, param_keys: Sequence[str | None] = PARAM_KEYS) -> Model:
    """The content of any file with weights: safetensors, or a .pth of BasicSR or of the official LIIF or LTE code.

    Args:
        path: The file.
        param_keys: Entries of a BasicSR .pth, the wanted one first; None is the file as a whole.

    Raises:
        UserError: The file is missing, damaged, holds code, or has no weights under these keys.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f'there is no checkpoint {path}.')
    source = {'source': path.name}
    if path.suffix == '.safetensors':
        model = _read_safetensors(path)
        return model._replace(metadata={**source, **model.metadata} if model.network_opt else source)
    content = load_torch_file(path)
    if not isinstance(content, Mapping):
        raise UserError(f'{path} holds no weights but a {type(content).__name__}.')
    if isinstance(content.get('model'), Mapping):
        return Model(*official(content['model'], str(path)), source)
    for key in param_keys:
        weights = content if key is None else content.get(key)
        if isinstance(weights, Mapping) and weights and all(isinstance(value, Tensor) for value in weights.values()):
            weights = {str(name).removeprefix('module.'): value for name, value in weights.items()}
            return Model(content.get('network_g', {}), weights, {**source, 'param_key': key} if key else source)
    if 'optimizers' in content:
        raise UserError(f'{path} is a training state without weights; those are in the models folder beside it.')
    raise UserError(
        f'{path} has no weights under {" or ".join(key for key in param_keys if key)}; it has '
        f'{", ".join(map(str, list(content)[:8])) or "nothing"}.'
    )


def convert(
    checkpoint: str | PathLike,
    out: str | PathLike,
    network_opt: Mapping[str, Any] | None = None,
    param_key: str | None = None,
    store: str = 'fp32',
    notes: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write the model file of a checkpoint.

    Args:
        checkpoint: See `read_checkpoint`.
        out: The model file.
        network_opt: The network's options, where the checkpoint does not say them.
        param_key: `params` or `params_ema` of a BasicSR checkpoint; the averaged ones if there are any.
        store: 'fp32' or 'fp16', the number format of the weights in the file. A network always gets fp32.
        notes: Further metadata, beside or in place of what a model file that is converted again has.

    Returns:
        The network's options.

    Raises:
        UserError: See `read_checkpoint`; the weights do not fit the options; a weight is too large for fp16.
    """
    model = read_checkpoint(checkpoint, PARAM_KEYS if param_key is None else (param_key,))
    network_opt = network_opt or model.network_opt
    if not network_opt:
        raise UserError(f'{checkpoint} does not say which network it belongs to: name its options file with -opt.')
    network_opt = resolve_network(network_opt)
    weights = build(network_opt, model.weights, str(checkpoint)).state_dict()
    stored = {name: value.to(STORES[store]) if value.is_floating_point() else value for name, value in weights.items()}
    for name, value in weights.items():
        if value.isfinite().all() and not stored[name].isfinite().all():
            raise UserError(
                f'{checkpoint}: {name} has a value of {value.abs().max():.3g}; fp16 goes to '
                f'{torch.finfo(torch.float16).max:.0f}. Store it as fp32.'
            )
    save_model(out, stored, network_opt, **{**model.metadata, **(notes or {})})
    return dict(network_opt)


def _read_safetensors(path: str | PathLike) -> Model:
    try:
        with safe_open(path, framework='pt') as file:
            weights, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, ValueError) as error:
        raise UserError(f'{path} is no whole safetensors file: it is damaged or was cut short ({error}).') from error
    if metadata.get('format') != FORMAT:
        return Model({}, weights, metadata)
    try:
        network_opt = json.loads(metadata.get('network_g', '{}'))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f'{path} is damaged: the options of its network are not JSON ({error}).') from error
    return Model(network_opt, weights, {key: value for key, value in metadata.items() if key not in RESERVED})
