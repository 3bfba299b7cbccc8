"""`basicsr convert`."""

import argparse
import logging
from pathlib import Path

from moeisr_basicsr.errors import UserError

from .options import add_import, import_modules

EPILOG = """\
examples:
  basicsr convert experiments/moeisr_edsr/models/net_g_latest.pth -o moeisr_edsr.safetensors
  basicsr convert net_g.pth -opt options/moeisr_edsr.yml -o moeisr_edsr.safetensors
  basicsr convert edsr-baseline-liif.pth -o liif.safetensors
  basicsr convert moeisr_edsr.safetensors -o half.safetensors --store fp16 --metadata license=CC0-1.0 author=me

Known are checkpoints of BasicSR (params, params_ema) and of the official LIIF, LTE and LMF code. The file that is
written has the weights and the network's options: `basicsr upscale --model` needs nothing else. Nothing in a checkpoint
is ever run."""


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='.pth or .safetensors file')
    parser.add_argument('-o', '--output', required=True, metavar='OUT.safetensors', help='model file to write')
    parser.add_argument(
        '-opt', metavar='YAML', help='options file that describes the network, where the checkpoint does not'
    )
    parser.add_argument(
        '--force_yml',
        nargs='+',
        metavar='KEY:KEY=VALUE',
        help='changes of the options: those that the training had, or wanted ones of what the checkpoint says',
    )
    parser.add_argument(
        '--param-key',
        choices=('params', 'params_ema'),
        help='which weights of a BasicSR checkpoint (default: the averaged ones, params_ema, if any)',
    )
    parser.add_argument(
        '--store',
        choices=('fp32', 'fp16'),
        default='fp32',
        help='number format in the file; a network computes in fp32 from either',
    )
    parser.add_argument(
        '--metadata',
        nargs='+',
        default=[],
        metavar='KEY=VALUE',
        help='what else the file says of itself; `basicsr models OUT.safetensors --json` reads it',
    )
    parser.add_argument('--overwrite', action='store_true', help='replace the output file if it exists')
    add_import(parser)
    parser.epilog = EPILOG


def run(args: argparse.Namespace) -> int:
    """Convert one checkpoint."""
    import_modules(args.modules)
    out = Path(args.output)
    if out.exists() and not args.overwrite:
        raise UserError(f'{out} already exists: give --overwrite to replace it.')
    from basicsr.utils import get_root_logger

    from moeisr_basicsr.checkpoint import convert
    from moeisr_basicsr.options import force, read_yaml

    get_root_logger(log_level=logging.WARNING)  # not one line for each network that is built
    network_opt, changes = None, args.force_yml or []
    if args.opt:
        data = read_yaml(args.opt).data
        while changes:
            force(data, changes.pop(0))
        network_opt = data.get('network_g')
        if network_opt is None:
            raise UserError(f"{args.opt}: the key 'network_g' is missing.")
    notes = dict(parse_note(entry) for entry in args.metadata)
    options = convert(args.checkpoint, out, network_opt, args.param_key, args.store, notes, changes)
    encoder = options.get('encoder', {}).get('type', 'no encoder')
    size = f'{out.stat().st_size / 2**20:.1f} MiB'
    print(f'{out}: {options["type"]} with {encoder}, {size}; options of {args.opt or args.checkpoint}')
    return 0


def parse_note(entry: str) -> tuple[str, str]:
    """'KEY=VALUE' as (key, value).

    Raises:
        UserError: It is malformed, or the key is one that every model file has.
    """
    from moeisr_basicsr.checkpoint import RESERVED

    key, sign, value = entry.partition('=')
    if not key or not sign:
        raise UserError(f'--metadata {entry}: give KEY=VALUE.')
    try:
        entry.encode()
    except UnicodeEncodeError:
        raise UserError(f'--metadata {entry}: this is not text in UTF-8.') from None
    if key in RESERVED:
        raise UserError(f'--metadata {entry}: {key} is written by `basicsr convert` itself.')
    return key, value
