"""Checkpoints of BasicSR and of the official LIIF and LTE code become model files (see `checkpoint`).

Official layout: {'model': {'name', 'args', 'sd'}}, where `args` has the options of the encoder and of the MLP. The
encoder's names become ours; `sub_mean` and `add_mean`, which the official code never uses, are dropped.
"""

import math
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moeisr_basicsr.checkpoint import FORMAT, RESERVED, build, read_model, read_safetensors, save_model
from moeisr_basicsr.errors import UserError, did_you_mean
from moeisr_basicsr.options import read_yaml
from moeisr_basicsr.safe_reading import load_torch_file

PARAM_KEYS = ('params_ema', 'params')  # the averaged weights are the better ones
STORES = {'fp32': torch.float32, 'fp16': torch.float16}  # number formats of the weights in a model file
EMBEDDED = 'network_g'  # where a checkpoint of this package says which network it belongs to

# Official encoders: our type, our arguments of theirs with their defaults, what we support one value of only.
ENCODERS: dict[str, tuple[str, dict[str, tuple[str, Any]], dict[str, Any]]] = {
    'edsr-baseline': (
        'EDSREncoder',
        {'num_block': ('n_resblocks', 16), 'num_feat': ('n_feats', 64), 'res_scale': ('res_scale', 1)},
        {},
    ),
    'edsr': (
        'EDSREncoder',
        {'num_block': ('n_resblocks', 32), 'num_feat': ('n_feats', 256), 'res_scale': ('res_scale', 0.1)},
        {},
    ),
    'rdn': ('RDNEncoder', {'num_feat': ('G0', 64), 'config': ('RDNconfig', 'B')}, {'RDNkSize': 3}),
    'swinir': ('SwinIREncoder', {}, {}),
}
IGNORED = ('scale', 'rgb_range', 'no_upsampling')  # of the upsampler and the mean shift, which are not used
EDSR_NAMES = (
    (re.compile(r'^head\.0\.'), 'conv_first.'),
    (re.compile(r'^body\.(\d+)\.body\.0\.'), r'body.\1.conv1.'),
    (re.compile(r'^body\.(\d+)\.body\.2\.'), r'body.\1.conv2.'),
    (re.compile(r'^body\.\d+\.(?=weight$|bias$)'), 'conv_after_body.'),
)


def convert(
    checkpoint: str | PathLike,
    out: str | PathLike,
    network_opt: Mapping[str, Any] | None = None,
    param_key: str | None = None,
    store: str = 'fp32',
    notes: Mapping[str, str] | None = None,
    cost_weight: float = 0.0,
) -> dict[str, Any]:
    """Write the model file of a checkpoint.

    Args:
        checkpoint: A .pth of BasicSR or of the official LIIF or LTE code, or safetensors.
        out: The model file.
        network_opt: The network's options, where the checkpoint and its folder do not tell them.
        param_key: `params` or `params_ema` of a BasicSR checkpoint; the averaged ones if there are any.
        store: 'fp32' or 'fp16', the number format of the weights in the file. A network always gets fp32.
        notes: Further metadata, beside or in place of what a model file that is converted again has.
        cost_weight: Moves the routing that the file calls its own, as `upscale --cost-weight` moves it for one run.

    Returns:
        The network's options.

    Raises:
        UserError: The file is damaged, holds code, is of an unknown kind, or does not fit the options; a weight is
            too large for fp16.
        FileNotFoundError: There is no such file.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_file():
        raise UserError(f'there is no checkpoint {checkpoint}.')
    found, weights, own_notes = read_checkpoint(checkpoint, param_key)
    candidates = [(str(checkpoint), option) for option in (network_opt, found) if option is not None][:1]
    candidates = candidates or options_nearby(checkpoint)
    if not candidates:
        raise UserError(f'{checkpoint} does not say which network it belongs to: name its options file with -opt.')
    problems = []
    for source, options in candidates:
        try:
            net = build(options, weights, source)
        except UserError as error:
            problems.append(str(error))
            continue
        if cost_weight:
            move_routing(net, cost_weight, str(checkpoint))
            own_notes['cost_weight'] = str(float(own_notes.get('cost_weight', 0)) + cost_weight)
        save_model(out, stored(net.state_dict(), store, str(checkpoint)), options, **{**own_notes, **(notes or {})})
        return dict(options)
    raise UserError(
        f'{problems[0]} Name the options file that the network was trained with by -opt, and what --force_yml changed.'
    )


@torch.no_grad()
def move_routing(net: nn.Module, cost_weight: float, source: str) -> None:
    """Take `cost_weight` times each expert's relative cost off the mapper's logits.

    Raises:
        UserError: The weight is no finite number, or the network has no experts to choose from.
    """
    if not math.isfinite(cost_weight):
        raise UserError(f'--cost-weight must be a finite number; got {cost_weight}.')
    mapper = getattr(getattr(net, 'decoder', None), 'mapper', None)
    if mapper is None:
        raise UserError(f'{source}: the network has no experts to choose from; --cost-weight does not fit it.')
    mapper.query_out.bias.sub_(cost_weight * net.expert_costs)


def read_checkpoint(
    checkpoint: Path, param_key: str | None
) -> tuple[dict[str, Any] | None, dict[str, Tensor], dict[str, str]]:
    """The network's options if the file has them, its weights, and metadata that says where they come from.

    Raises:
        UserError: The file is damaged, holds code, or is of an unknown kind.
    """
    source = {'source': checkpoint.name}
    if checkpoint.suffix == '.safetensors':
        weights, metadata = read_safetensors(checkpoint)
        if metadata.get('format') != FORMAT:
            return None, weights, source
        notes = {key: value for key, value in metadata.items() if key not in RESERVED}
        return read_model(checkpoint).network_opt, weights, {**source, **notes}
    content = load_torch_file(checkpoint)
    if not isinstance(content, Mapping):
        raise UserError(f'{checkpoint} holds no weights but a {type(content).__name__}.')
    if isinstance(content.get('model'), Mapping) and 'sd' in content['model']:
        return *official(content['model'], str(checkpoint)), source
    key = weights_key(content, str(checkpoint), param_key)
    weights = basicsr_weights(content, str(checkpoint), key)
    return content.get(EMBEDDED), weights, source if key is None else {**source, 'param_key': key}


def stored(weights: Mapping[str, Tensor], store: str, source: str) -> dict[str, Tensor]:
    """The weights in the number format of the file; whole numbers stay as they are.

    Raises:
        UserError: A weight is too large for it.
    """
    dtype = STORES[store]
    result = {name: value.to(dtype) if value.is_floating_point() else value for name, value in weights.items()}
    for name, value in result.items():
        if value.is_floating_point() and not value.isfinite().all() and weights[name].isfinite().all():
            raise UserError(
                f'{source}: {name} has a value of {weights[name].abs().max():.3g}; fp16 goes to '
                f'{torch.finfo(dtype).max:.0f}. Store it as fp32.'
            )
    return result


def weights_key(content: Mapping[str, Any], source: str, param_key: str | None) -> str | None:
    """Under which key a checkpoint of BasicSR has its weights; None where the file is the state dict itself.

    Raises:
        UserError: It has no weights, or not those of `param_key`.
    """
    if 'optimizers' in content and 'schedulers' in content:
        raise UserError(f'{source} is a training state without weights; those are in the models folder beside it.')
    if param_key is not None and param_key not in content:
        raise UserError(f'{source} has no {param_key}; it has {", ".join(map(str, list(content)[:8]))}.')
    return param_key or next((key for key in PARAM_KEYS if key in content), None)


def basicsr_weights(content: Mapping[str, Any], source: str, key: str | None) -> dict[str, Tensor]:
    """The state dict under `key` in a checkpoint of BasicSR, or in a file that is one.

    Raises:
        UserError: There is none.
    """
    weights = content if key is None else content[key]
    if not isinstance(weights, Mapping) or not weights or not all(isinstance(v, Tensor) for v in weights.values()):
        has = ', '.join(map(str, list(content)[:8])) or 'nothing'
        raise UserError(
            f'{source} is of an unknown kind: it has {has}. '
            'Known are checkpoints of BasicSR (params, params_ema) and of the official LIIF and LTE code.'
        )
    return {str(name).removeprefix('module.'): value for name, value in weights.items()}


def options_nearby(checkpoint: Path) -> list[tuple[str, dict[str, Any]]]:
    """`network_g` of the options files beside a checkpoint or one folder above, where training puts a copy."""
    result = []
    for folder in (checkpoint.resolve().parent, checkpoint.resolve().parent.parent):
        for path in sorted([*folder.glob('*.yml'), *folder.glob('*.yaml')]):
            try:
                options = read_yaml(path).data.get('network_g')
            except UserError:
                continue  # some other YAML file
            if isinstance(options, dict):
                result.append((str(path), options))
    return result


def official(model: Mapping[str, Any], source: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Our options and our state dict of an official LIIF or LTE model.

    Raises:
        UserError: A variant that this package does not have.
    """
    name, args, weights = (model.get(key) for key in ('name', 'args', 'sd'))
    if name not in ('liif', 'lte'):
        raise UserError(
            f"{source}: model '{name}' is not supported; liif and lte are.{did_you_mean(str(name), ('liif', 'lte'))}"
        )
    if not isinstance(args, Mapping) or not isinstance(weights, Mapping):
        raise UserError(f'{source} is no official {name.upper()} checkpoint: its model has no args and sd.')
    for flag in ('local_ensemble', 'feat_unfold', 'cell_decode'):
        if args.get(flag, True) is not True:
            raise UserError(f'{source}: {flag} is {args[flag]}; only the full {name.upper()} is supported.')
    encoder, rename = official_encoder(args.get('encoder_spec'), source)
    mlp = args.get('imnet_spec')
    if not isinstance(mlp, Mapping) or mlp.get('name') != 'mlp' or not isinstance(mlp.get('args'), Mapping):
        raise UserError(f'{source}: its decoder is no MLP (imnet_spec).')
    options = {
        'type': name.upper(),
        'encoder': encoder,
        'hidden_list': list(mlp['args'].get('hidden_list', ())),
        'skip': 'bilinear' if name == 'lte' else 'none',
    }
    if mlp['args'].get('out_dim', 3) != 3:
        options['out_channels'] = mlp['args']['out_dim']
    if name == 'lte':
        options['hidden_dim'] = args.get('hidden_dim', 256)
    result = {}
    for key, value in weights.items():
        part, _, rest = key.removeprefix('module.').partition('.')
        if part == 'encoder':
            if not rest.startswith(('sub_mean.', 'add_mean.')):
                result[f'encoder.{rename(rest)}'] = value
        elif part == 'imnet':
            result[f'decoder.pool.experts.0.{rest}'] = value
        else:
            result[f'decoder.pool.{part}.{rest}'] = value
    return options, result


def official_encoder(spec: Any, source: str) -> tuple[dict[str, Any], Any]:
    """Our encoder options, and the function that renames a weight."""
    name = spec.get('name') if isinstance(spec, Mapping) else None
    if name not in ENCODERS:
        raise UserError(
            f"{source}: encoder '{name}' is not supported; {', '.join(ENCODERS)} are."
            f'{did_you_mean(str(name), ENCODERS)}'
        )
    args = spec.get('args') or {}
    kind, arguments, fixed = ENCODERS[name]
    known = {theirs for theirs, _ in arguments.values()} | fixed.keys() | set(IGNORED)
    for key, value in args.items():
        if key not in known or value != fixed.get(key, value):
            raise UserError(f"{source}: {key} = {value!r} of the encoder '{name}' is not supported.")
    if not args.get('no_upsampling', name == 'swinir'):
        raise UserError(f"{source}: the encoder '{name}' has an upsampler (no_upsampling is not true).")
    options = {'type': kind, **{ours: args.get(theirs, default) for ours, (theirs, default) in arguments.items()}}
    return options, _rename_edsr if kind == 'EDSREncoder' else str


def _rename_edsr(name: str) -> str:
    for pattern, replacement in EDSR_NAMES:
        name, count = pattern.subn(replacement, name)
        if count:
            break
    return name
