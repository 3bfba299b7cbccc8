"""Weights in files: model files, written and read, and the checkpoints that become one.

A model file is safetensors with the metadata `format` and `network_g`, the network's options as JSON, so that nothing
else is needed to use it. The options of a network of ours are among its tensors too: some programs keep nothing else.
Reading a file never runs code from it.
"""

import copy
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from moeisr_basicsr.archs.encoders import resolve_network
from moeisr_basicsr.archs.moeisr_arch import FixedScale, MoEISR
from moeisr_basicsr.atomic_file import write_atomic
from moeisr_basicsr.errors import UserError
from moeisr_basicsr.official import official
from moeisr_basicsr.options import force
from moeisr_basicsr.options.registered import registered
from moeisr_basicsr.options.values import show
from moeisr_basicsr.safe_building import build_bounded
from moeisr_basicsr.safe_reading import OPTIONS, load_torch_file, plain_options

FORMAT = 'moeisr_basicsr'
RESERVED = ('format', 'network_g')  # metadata that `save_model` itself writes
# Where a .pth has its weights, best first: averaged, plain, or the file is the state dict itself.
PARAM_KEYS = ('params_ema', 'params', None)
STORES = {'fp32': torch.float32, 'fp16': torch.float16}  # number formats of the weights in a model file


class Model(NamedTuple):
    """The content of a model file or of a checkpoint."""

    network_opt: dict[str, Any]  # the YAML's `network_g`; empty where a checkpoint does not say it
    weights: Mapping[str, Tensor]
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
    kind = registered('ARCH').get(str(network_opt.get('type')))
    if isinstance(kind, type) and issubclass(kind, MoEISR):  # other networks are read elsewhere, by their weights alone
        state[OPTIONS] = options_tensor(network_opt)
    content = save(state, {**notes, 'format': FORMAT, 'network_g': json.dumps(network_opt, sort_keys=True)})
    write_atomic(path, lambda file: file.write(content))


def options_tensor(network_opt: Mapping[str, Any]) -> Tensor:
    """The options as `OPTIONS` holds them: int32, since spandrel's reader of .pth files rejects bytes."""
    return torch.tensor(list(json.dumps(network_opt, sort_keys=True).encode()), dtype=torch.int32)


def read_options(stored: Tensor, source: str) -> dict[str, Any]:
    """The options that `options_tensor` stored, whatever number format they were converted to since.

    Raises:
        UserError: They are damaged; `source` is named.
    """
    return plain_options(_parse(stored.double().round().to(torch.uint8).cpu().numpy().tobytes(), source), source)


def _parse(text: str | bytes, source: str | PathLike) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # the former also for numbers of thousands of digits
        raise UserError(f'{source} is damaged: the options of its network are not JSON ({error}).') from error


def read_model(path: str | PathLike) -> Model:
    """The content of a model file, or of a checkpoint that holds its network.

    Raises:
        UserError: See `read_checkpoint`; or the file does not say which network its weights belong to.
    """
    model = read_checkpoint(path)
    if not model.network_opt:
        raise UserError(
            f'{path} does not say which network its weights belong to. `basicsr convert {path} -opt YAML -o '
            'OUT.safetensors` makes a model file of it, given the options of its training.'
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
    return FixedScale(encoder).to(device).eval()


def build(network_opt: Mapping[str, Any], weights: Mapping[str, Tensor], source: str) -> nn.Module:
    """A network with its weights; buffers that it computes by itself may be missing from them.

    Raises:
        UserError: See `build_bounded` and `fill`; or the weights are those of another network. `source` is named.
    """
    net = build_bounded(network_opt, weights, source)
    parameters = dict(net.named_parameters())
    own = {name: value for name, value in net.state_dict().items() if name in parameters or name in weights}
    if found := misfits(own, weights):
        kind = type(net).__name__
        raise UserError(f'{source}: the weights do not fit the network {kind}: {describe_misfits(found)}.')
    fill(net, weights, source)
    return net


def fill(net: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Weights, all of which have their place in `net`, into it.

    Raises:
        UserError: One is NaN or infinite, or is in single precision.
    """
    for name, _ in net.named_parameters():
        if name in weights and not weights[name].to(torch.float32).isfinite().all():
            raise UserError(f'{source}: {name} has values that are NaN or infinite: these weights are of no use.')
    net.load_state_dict(dict(weights), strict=False)


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

    What distributed and compiled networks put before their parameters' names (`module.`, `_orig_mod.`) is left out.

    Args:
        path: The file.
        param_keys: Entries of a BasicSR .pth, the wanted one first; None is the file as a whole.

    Raises:
        UserError: The file is missing, damaged, holds code, or has no weights under these keys.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f'there is no model file or checkpoint {path}.')
    source = {'source': path.name}
    if path.suffix == '.safetensors':
        model = _read_safetensors(path)
        model = model._replace(metadata={**source, **model.metadata} if model.network_opt else source)
    else:
        model = _read_torch(path, param_keys, source)
    network_opt, weights = plain_options(model.network_opt, str(path)), plain_weights(model.weights, path)
    if OPTIONS in weights:
        within = read_options(weights.pop(OPTIONS), str(path))
        if network_opt and network_opt != within:
            raise UserError(f'{path}: its metadata and its tensor {OPTIONS} hold the options of different networks.')
        network_opt = within
    return Model(network_opt, weights, model.metadata)


def plain_weights(weights: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """Weights by the names that a network by itself gives them.

    Raises:
        UserError: Two become one, or something is no dense tensor of real numbers.
    """
    plain: dict[str, Tensor] = {}
    for name, value in weights.items():
        known = re.sub(r'^module\.|(?<![^.])_orig_mod\.', '', re.sub(r'^_orig_mod\.', '', str(name)))
        if known in plain:
            raise UserError(f'{path} has the weights {known} twice, with and without a prefix: they may differ.')
        is_dense = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == 'cpu'
        if not is_dense or value.is_complex() or value.is_quantized:
            raise UserError(f'{path}: {known} is no tensor of real numbers in memory.')
        plain[known] = value
    return plain


def _read_torch(path: Path, param_keys: Sequence[str | None], source: dict[str, str]) -> Model:
    content = load_torch_file(path)
    if not isinstance(content, Mapping):
        raise UserError(f'{path} holds no weights but a {type(content).__name__}.')
    if isinstance(content.get('model'), Mapping):
        try:
            return Model(*official(content['model'], str(path)), source)
        except (AttributeError, KeyError, TypeError) as error:  # anything may stand where options belong
            raise UserError(f'{path} is no official LIIF, LTE or LMF checkpoint: {error!r:.100}.') from error
    for key in param_keys:
        weights = content if key is None else content.get(key)
        if isinstance(weights, Mapping) and weights and all(isinstance(value, Tensor) for value in weights.values()):
            return Model(content.get('network_g') or {}, weights, {**source, 'param_key': key} if key else source)
    if 'optimizers' in content:
        raise UserError(f'{path} is a training state without weights; those are in the models folder beside it.')
    raise UserError(
        f'{path} has no weights under {" or ".join(key for key in dict.fromkeys(param_keys) if key)}; it has '
        f'{", ".join(f"{key!s:.40}" for key in list(content)[:8]) or "nothing"}.'
    )


def convert(
    checkpoint: str | PathLike,
    out: str | PathLike,
    network_opt: Mapping[str, Any] | None = None,
    param_key: str | None = None,
    store: str = 'fp32',
    notes: Mapping[str, str] | None = None,
    changes: Sequence[str] = (),
) -> dict[str, Any]:
    """Write the model file of a checkpoint.

    Args:
        checkpoint: See `read_checkpoint`.
        out: The model file.
        network_opt: The network's options, where the checkpoint does not say them; where it does, the same.
        param_key: `params` or `params_ema` of a BasicSR checkpoint; the averaged ones if there are any.
        store: 'fp32' or 'fp16', the number format of the weights in the file. A network always gets fp32.
        notes: Further metadata, beside or in place of what a model file that is converted again has.
        changes: Entries of `--force_yml` that change the options which the checkpoint says.

    Returns:
        The network's options.

    Raises:
        UserError: See `read_checkpoint` and `build`; the options are not those of the checkpoint; a weight is too large
            for fp16.
    """
    model = read_checkpoint(checkpoint, PARAM_KEYS if param_key is None else (param_key,))
    if not network_opt and not model.network_opt:
        raise UserError(f'{checkpoint} does not say which network it belongs to: name its options file with -opt.')
    if network_opt:
        network_opt = resolve_network(network_opt)
    if network_opt and model.network_opt and (found := differences(model.network_opt, network_opt)):
        raise UserError(
            f'{checkpoint} holds the options of its network, and others were given: {found}. Leave -opt out.'
        )
    data = {'network_g': copy.deepcopy(dict(network_opt or model.network_opt))}
    for entry in changes:
        if force(data, entry)[0] != 'network_g':
            raise UserError(
                f'--force_yml {entry}: without -opt only network_g can be changed, as in network_g:scale=4.'
            )
    network_opt = data['network_g']
    weights = build(network_opt, model.weights, str(checkpoint)).state_dict()
    stored = {name: value.to(STORES[store]) if value.is_floating_point() else value for name, value in weights.items()}
    for name, value in weights.items():
        if value.isfinite().all() and not stored[name].isfinite().all():
            raise UserError(
                f'{checkpoint}: {name} has a value of {value.abs().max():.3g}; fp16 goes to '
                f'{torch.finfo(torch.float16).max:.0f}. Store it as fp32.'
            )
    save_model(out, stored, network_opt, **{**model.metadata, **(notes or {})})
    return network_opt


def differences(known: Mapping[str, Any], given: Mapping[str, Any], within: str = 'network_g') -> str:
    """Where the options of a network differ from those that its weights were trained with; empty if nowhere.

    Much of it changes no shape (skip, granularity, the cell's limit): that the weights fit does not tell.
    """
    both = [with_defaults(known), with_defaults(given)]
    found = []
    for key in {**both[0], **both[1]}:
        first, second = (options.get(key) for options in both)
        if isinstance(first, Mapping) and isinstance(second, Mapping):
            found.append(differences(first, second, f'{within}: {key}'))
        elif json.dumps(first) != json.dumps(second) and first != second:  # the former for tuples
            found.append(f'{within}: {key} is {show(second)}, of the weights {show(first)}')
    return ', '.join(filter(None, found))


def with_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a network with the defaults of its class, or of any section."""
    entry = registered('ARCH').get(str(options.get('type')))
    arguments = {} if entry is None else inspect.signature(entry).parameters
    defaults = {name: value.default for name, value in arguments.items() if value.default is not value.empty}
    return {**defaults, **options}


def _read_safetensors(path: str | PathLike) -> Model:
    try:
        with safe_open(path, framework='pt') as file:
            weights, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, ValueError) as error:
        raise UserError(f'{path} is no whole safetensors file: it is damaged or was cut short ({error}).') from error
    if metadata.get('format') != FORMAT:
        return Model({}, weights, metadata)
    network_opt = _parse(metadata.get('network_g', '{}'), path)
    return Model(network_opt, weights, {key: value for key, value in metadata.items() if key not in RESERVED})
