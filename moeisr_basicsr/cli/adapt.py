"""`basicsr adapt`."""

import argparse
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

from moeisr_basicsr.errors import ExitCode, UserError

from .options import add_import, import_modules

if TYPE_CHECKING:
    from moeisr_basicsr.engine.adapt import Compared, Job

EPILOG = """\
examples:
  basicsr adapt SMFANet_x4.pth --data DIV2K_train_HR -o smfanet_any.safetensors --minutes 60
  basicsr adapt rlfn_x4.pth --import rlfn.py --arch "{type: RLFN, upscale: 4}" --data PHOTOS -o rlfn_any.safetensors
  basicsr adapt --print-options > adapt.yml

Decoders learn what the network's own image, resampled to the wanted factor, lacks; the network itself is then trained
on with them. The run is that of experiments/adapt_NAME.yml, where NAME is that of the output file: the same command
goes on with an interrupted run, and `basicsr train -opt experiments/adapt_NAME.yml --auto_resume` does on any machine.
The comparison at the end is made on images that were not trained on. Where training has not improved on the resampled
image, the output file is the network with that image, and a line says so."""


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument(
        'checkpoint', nargs='?', metavar='CHECKPOINT', help='weights of the network (.pth, .safetensors)'
    )
    parser.add_argument('--data', metavar='FOLDER', help='folder or LMDB of HR images to train on')
    parser.add_argument('-o', '--output', metavar='OUT.safetensors', help='model file to write')
    parser.add_argument('--overwrite', action='store_true', help='replace the output file if it exists')
    parser.add_argument(
        '--val',
        metavar='FOLDER',
        help='folder or LMDB of HR images for the comparison (default: some of --data, which are held back)',
    )
    parser.add_argument(
        '--minutes',
        type=float,
        metavar='N',
        help='fit the training to this time; default: the iterations of the recipe',
    )
    parser.add_argument('--decoder', choices=('lm', 'liif', 'lte'), default='lm', help='decoder family (default: lm)')
    parser.add_argument(
        '--arch',
        metavar='OPTIONS',
        help='the network where the checkpoint does not tell, as in an options file, for example '
        '"{type: EDSR, num_in_ch: 3, num_out_ch: 3, upscale: 4}"; its class may come from --import',
    )
    parser.add_argument('--print-options', action='store_true', help='print the options file of the recipe, and stop')
    add_import(parser)
    parser.epilog = EPILOG


def run(args: argparse.Namespace) -> int:
    """Check, adapt, print the comparison."""
    started = time.monotonic()
    if args.print_options:
        print(Path(__file__).parents[1].joinpath('engine', 'adapt.yml').read_text(encoding='utf-8'), end='')
        return ExitCode.OK
    import_modules(args.modules)
    job = job_of(args)
    from moeisr_basicsr.engine.adapt import adapt

    code, rows, share = adapt(job, started)
    if code == ExitCode.OK:
        print_comparison(rows)
        if share:
            print(f'adapted: so far from its own weights to the trained ones. The file holds those at {share:.0%}.')
        else:
            print('Training has not improved on the resampled image: the file holds the network with that image.')
        imports = [word for module in args.modules for word in ('--import', module)]
        command = shlex.join(['basicsr', 'upscale', 'PHOTO', '--model', str(job.out), *imports, '--scale', '3.3'])
        print(f'{job.out}: {job.out.stat().st_size / 2**20:.1f} MiB; {command}')
    return code


def job_of(args: argparse.Namespace) -> 'Job':
    """What the arguments ask for.

    Raises:
        UserError: Something is missing or not allowed.
    """
    from moeisr_basicsr.engine.adapt import Job
    from moeisr_basicsr.options import parse_value

    given = {'CHECKPOINT': args.checkpoint, '--data FOLDER': args.data, '-o OUT.safetensors': args.output}
    if missing := [name for name, value in given.items() if value is None]:
        raise UserError(f'basicsr adapt needs {" and ".join(missing)}.')
    out = Path(args.output)
    if out.suffix != '.safetensors':
        raise UserError(f"-o {out}: the name of a model file must end in '.safetensors'.")
    if out.exists() and not args.overwrite:
        raise UserError(f'{out} already exists: give --overwrite to replace it.')
    if not out.parent.is_dir():
        raise UserError(f'-o {out}: the folder {out.parent} does not exist; make it first.')
    if not Path(args.checkpoint).is_file():
        raise UserError(f'there is no checkpoint {args.checkpoint}.')
    for option, folder in (('--data', args.data), ('--val', args.val)):
        if folder is not None and not Path(folder).is_dir():
            raise UserError(f'{option}: {folder} is not a folder.')
    if args.minutes is not None and not 0 < args.minutes < float('inf'):
        raise UserError(f'--minutes must be above 0; got {args.minutes}.')
    checkpoint = str(Path(args.checkpoint).resolve())
    encoder: dict = {'type': 'NetworkEncoder', 'checkpoint': checkpoint}
    if args.arch is not None:
        arch = parse_value(args.arch, '--arch')
        if not isinstance(arch, dict) or 'type' not in arch:
            raise UserError(
                f'--arch must be a section with a type, such as "{{type: EDSR, upscale: 4}}"; got {args.arch}.'
            )
        encoder = {'type': 'NetworkEncoder', 'arch': arch, 'weights': checkpoint}
    validation = None if args.val is None else str(Path(args.val).resolve())
    return Job(encoder, str(Path(args.data).resolve()), out, args.decoder, validation, args.minutes)


def print_comparison(rows: 'list[Compared]') -> None:
    """PSNR and cost of the networks at each factor."""
    from rich.console import Console
    from rich.table import Table

    factors = list(rows[0].psnr)
    table = Table('', *factors, title='PSNR of luma in dB (thousand multiply-adds per output pixel, encoder included)')
    for row in rows:
        costs = {factor: f' ({macs:.1f})' for factor, macs in row.macs.items()}
        table.add_row(row.network, *(f'{row.psnr[factor]:.2f}{costs.get(factor, "")}' for factor in factors))
    Console().print(table)
    print('On images that were not trained on; "resampled" is the network\'s own image, by anti-aliased bicubic.')
