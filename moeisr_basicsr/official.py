"""Checkpoints of the official LIIF, LTE and LMF code in our options and our parameters' names.

Official layout: {'model': {'name', 'args', 'sd'}}, where `args` has the options of the encoder and of the MLPs.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moeisr_basicsr.errors import UserError, did_you_mean

# Official encoders: our type; our arguments, as theirs with their defaults. Of what else their `args` may hold, nothing
# changes the output without changing the weights' shapes, which are compared when the network is built.
ENCODERS: dict[str, tuple[str, dict[str, tuple[str, Any]]]] = {
    'edsr-baseline': (
        'EDSREncoder',
        {'num_block': ('n_resblocks', 16), 'num_feat': ('n_feats', 64), 'res_scale': ('res_scale', 1)},
    ),
    'edsr': (
        'EDSREncoder',
        {'num_block': ('n_resblocks', 32), 'num_feat': ('n_feats', 256), 'res_scale': ('res_scale', 0.1)},
    ),
    'rdn': ('RDNEncoder', {'num_feat': ('G0', 64), 'config': ('RDNconfig', 'B')}),
    'swinir': ('SwinIREncoder', {}),
}
# Their names as patterns and ours, the first that matches.
NAMES = (
    (r'^imnet\.', 'decoder.pool.experts.0.'),
    (r'^hypernet\.', 'decoder.pool.experts.0.latent.'),
    (r'^(?!encoder\.)', 'decoder.pool.'),
    (r'^encoder\.head\.0\.', 'encoder.conv_first.'),  # from here on EDSR
    (r'^encoder\.body\.(\d+)\.body\.0\.', r'encoder.body.\1.conv1.'),
    (r'^encoder\.body\.(\d+)\.body\.2\.', r'encoder.body.\1.conv2.'),
    (r'^encoder\.body\.\d+\.(?=weight$|bias$)', 'encoder.conv_after_body.'),
)


def official(model: Mapping[str, Any], source: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Our options and our state dict of an official model.

    Args:
        model: What the checkpoint has under 'model'.
        source: The file, for messages.

    Raises:
        UserError: A variant that this package does not have.
    """
    try:
        name, args, weights = model['name'], model['args'], model['sd']
        _known(name, ('liif', 'lte', 'lmliif'), 'model', source)
        encoder, mlp = args['encoder_spec'], args['imnet_spec']['args']
        kind, arguments = ENCODERS[_known(encoder['name'], ENCODERS, 'encoder', source)]
        if name == 'lmliif':
            latent = list(args['hypernet_spec']['args']['hidden_list'])
            decoder = {'latent': latent, 'depth': mlp['hidden_depth'], 'render_width': mlp['hidden_dim']}
        else:
            decoder = {'hidden_list': list(mlp['hidden_list'])}
    except (KeyError, TypeError) as error:
        raise UserError(f'{source} is no official LIIF, LTE or LMF checkpoint: {error!r}.') from error
    if args.get('local_ensemble', True) is not True:
        raise UserError(f'{source}: local_ensemble is off; only the full {name.upper()} is supported.')
    given = encoder.get('args') or {}
    options = {
        'type': name.upper(),
        'encoder': {
            'type': kind,
            **{ours: given.get(theirs, default) for ours, (theirs, default) in arguments.items()},
        },
        **decoder,
        'skip': 'bilinear' if name == 'lte' else 'none',
    }
    if name == 'lte':
        options['hidden_dim'] = args.get('hidden_dim', 256)
    # The official code never uses its encoder's mean shifts.
    kept = [key for key in weights if not re.match(r'encoder\.(sub|add)_mean\.', key)]
    return options, {_our_name(key): weights[key] for key in kept}


def _known(name: Any, known: Any, what: str, source: str) -> Any:
    if name in known:
        return name
    raise UserError(
        f"{source}: {what} '{name}' is not supported; {', '.join(known)} are.{did_you_mean(str(name), known)}"
    )


def _our_name(name: str) -> str:
    for pattern, replacement in NAMES:
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    return name
