"""Checkpoints of BasicSR and of the official LIIF and LTE code become model files (see `checkpoint`).

Official layout: {'model': {'name', 'args', 'sd'}}, where `args` has the options of the encoder and of the MLP. The
encoder's names become ours; `sub_mean` and `add_mean`, which the official code never uses, are dropped.
"""
import re
import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from moeisr_basicsr.checkpoint import FORMAT, build, read_model, read_safetensors, save_model
from moeisr_basicsr.compat import load_torch_file
from moeisr_basicsr.errors import UserError, did_you_mean
from moeisr_basicsr.options import read_yaml

PARAM_KEYS = ('params_ema', 'params')  # the averaged weights are the better ones
EMBEDDED = 'network_g'  # where a checkpoint of this package says which network it belongs to

# Official encoders: our type, our arguments of theirs with their defaults, what we support one value of only.
ENCODERS: dict[str, tuple[str, dict[str, tuple[str, Any]], dict[str, Any]]] = {
    'edsr-baseline': ('EDSREncoder', {'num_block': ('n_resblocks', 16), 'num_feat': ('n_feats', 64),
                                      'res_scale': ('res_scale', 1)}, {}),
    'edsr': ('EDSREncoder', {'num_block': ('n_resblocks', 32), 'num_feat': ('n_feats', 256),
                             'res_scale': ('res_scale', 0.1)}, {}),
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


def convert(checkpoint: str | PathLike, out: str | PathLike, network_opt: Mapping[str, Any] | None = None,
            param_key: str | None = None) -> dict[str, Any]:
    """Write the model file of a checkpoint.

    Args:
        checkpoint: A .pth of BasicSR or of the official LIIF or LTE code, or safetensors.
        out: The model file.
        network_opt: The network's options, where the checkpoint and its folder do not tell them.
        param_key: `params` or `params_ema` of a BasicSR checkpoint; the averaged ones if there are any.

    Returns:
        The network's options.

    Raises:
        UserError: The file is damaged, holds code, is of an unknown kind, or does not fit the options.
        FileNotFoundError: There is no such file.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_file():
        raise UserError(f'there is no checkpoint {checkpoint}.')
    if checkpoint.suffix == '.safetensors':
        weights, metadata = read_safetensors(checkpoint)
        found = read_model(checkpoint).network_opt if metadata.get('format') == FORMAT else None
    else:
        content = load_checkpoint(checkpoint)
        if not isinstance(content, Mapping):
            raise UserError(f'{checkpoint} holds no weights but a {type(content).__name__}.')
        if isinstance(content.get('model'), Mapping) and 'sd' in content['model']:
            found, weights = official(content['model'], str(checkpoint))
        else:
            found, weights = content.get(EMBEDDED), basicsr_weights(content, str(checkpoint), param_key)
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
        save_model(out, net, options, source=checkpoint.name)
        return dict(options)
    raise UserError(f'{problems[0]} Name the options file that the network was trained with by -opt, and what '
                    '--force_yml changed.')


def load_checkpoint(path: Path) -> Any:
    """The tensors and plain values of a .pth file.

    Raises:
        UserError: It holds anything else, or is damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about pickle protocols; what cannot be read gets our own line
            return load_torch_file(path)
    except UserError as error:
        raise UserError(f'{path} is no checkpoint that can be converted: it is damaged, another kind of file, or holds '
                        'more than tensors and plain values. Nothing in it was run.') from error


def basicsr_weights(content: Mapping[str, Any], source: str, param_key: str | None) -> dict[str, Tensor]:
    """The state dict in a checkpoint of BasicSR, or in a file that is one.

    Raises:
        UserError: There is none.
    """
    if 'optimizers' in content and 'schedulers' in content:
        raise UserError(f'{source} is a training state without weights; those are in the models folder beside it.')
    key = param_key or next((key for key in PARAM_KEYS if key in content), None)
    if param_key is not None and param_key not in content:
        raise UserError(f'{source} has no {param_key}; it has {", ".join(map(str, list(content)[:8]))}.')
    weights = content if key is None else content[key]
    if not isinstance(weights, Mapping) or not weights or not all(isinstance(v, Tensor) for v in weights.values()):
        has = ', '.join(map(str, list(content)[:8])) or 'nothing'
        raise UserError(f'{source} is of an unknown kind: it has {has}. '
                        'Known are checkpoints of BasicSR (params, params_ema) and of the official LIIF and LTE code.')
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
        raise UserError(f"{source}: model '{name}' is not supported; liif and lte are."
                        f'{did_you_mean(str(name), ("liif", "lte"))}')
    if not isinstance(args, Mapping) or not isinstance(weights, Mapping):
        raise UserError(f'{source} is no official {name.upper()} checkpoint: its model has no args and sd.')
    for flag in ('local_ensemble', 'feat_unfold', 'cell_decode'):
        if args.get(flag, True) is not True:
            raise UserError(f'{source}: {flag} is {args[flag]}; only the full {name.upper()} is supported.')
    encoder, rename = official_encoder(args.get('encoder_spec'), source)
    mlp = args.get('imnet_spec')
    if not isinstance(mlp, Mapping) or mlp.get('name') != 'mlp' or not isinstance(mlp.get('args'), Mapping):
        raise UserError(f'{source}: its decoder is no MLP (imnet_spec).')
    options = {'type': name.upper(), 'encoder': encoder, 'hidden_list': list(mlp['args'].get('hidden_list', ())),
               'skip': 'bilinear' if name == 'lte' else 'none'}
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
        raise UserError(f"{source}: encoder '{name}' is not supported; {', '.join(ENCODERS)} are."
                        f'{did_you_mean(str(name), ENCODERS)}')
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
