"""`basicsr profile`."""

import argparse
import re
from functools import partial

from moeisr_basicsr.errors import UserError

from .options import add_import, add_model, import_modules
from .upscale import parse_number, parse_scale

EPILOG = """\
examples:
  basicsr profile --model model.safetensors --lq-size 180x320 --scale 2 4 8
  basicsr profile -opt options/moeisr_edsr.yml --scale 4 --budget 0.3 --json profile.json --plot profile.png
  basicsr profile -opt options/moeisr_edsr.yml --train
  basicsr profile --data -opt options/moeisr_edsr.yml --workers 0 2 4 8 --step-ms 120

Multiply-adds are those of linear layers, convolutions and attention, one per multiply-add, per output pixel. Times are
medians of runs that take turns; memory is the peak beyond what was in use before the stage. 'dense' is the decoder's
heaviest expert on every pixel, or one of the widths that --dense-hidden says: folded by this package's code, plain as
published (one chunk timed, times their number). The published LIIF decoder is --dense-hidden 256 256 256 256, LTE's
256 256 256.
With -opt the weights are random, and so is the routing. The input is noise unless --image names one; trained networks
send nearly all of it to their dearest experts.

--data measures the loader that training would build, on the CPU. One batch is not timed, nor what workers load ahead;
files that the system has not in memory yet count with the time of the disk, and `cache: memory` with the time that
filling it takes. Without workers, training itself waits for each item."""
DATA_ONLY = ('workers', 'items', 'step_ms', 'force_yml')


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    model = parser.add_mutually_exclusive_group(required=True)
    add_model(model)
    model.add_argument('-opt', metavar='YAML', help='options file whose network_g is built with random weights')
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        '--lq-size',
        type=parse_rows_cols,
        default=(128, 128),
        metavar='HxW',
        help='input rows x columns (default 128x128)',
    )
    source.add_argument('--image', metavar='FILE', help='an input image in place of noise')
    parser.add_argument(
        '--scale',
        type=parse_scale,
        nargs='+',
        default=[(2.0, 2.0), (4.0, 4.0)],
        metavar='S',
        help='factors, for example 2 3.3 2x4 (default 2 4)',
    )
    routing = parser.add_mutually_exclusive_group()
    routing.add_argument(
        '--cost-weight',
        type=parse_number,
        default=0.0,
        metavar='K',
        help='above 0 cheaper, below 0 dearer than the trained routing (default 0)',
    )
    routing.add_argument(
        '--budget',
        type=parse_number,
        metavar='F',
        help='decoder cost, as a fraction of the dearest expert everywhere, in (0, 1]',
    )
    parser.add_argument('--device', metavar='D', help='cpu, cuda, cuda:1 (default: a GPU if there is one)')
    parser.add_argument(
        '--precision',
        choices=('fp32', 'bf16', 'fp16'),
        default='fp32',
        help='number format of encoder and experts (default fp32)',
    )
    parser.add_argument(
        '--repeats', type=parse_count, metavar='N', help='timed runs behind each median (default 5, with --train 3)'
    )
    parser.add_argument(
        '--dense-hidden',
        type=parse_count,
        nargs='+',
        metavar='N',
        help="hidden widths of the dense decoder to compare with (default: the heaviest expert's)",
    )
    parser.add_argument('--no-plain', action='store_true', help='do not time the plain dense decoder')
    parser.add_argument('--json', metavar='FILE.json', help='write the results; an earlier profile is replaced')
    parser.add_argument('--plot', metavar='FILE.png', help='draw the results; an earlier such picture is replaced')
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        '--train',
        action='store_true',
        help="profile a training step by part instead, with every form of the experts' gradient",
    )
    kind.add_argument('--data', action='store_true', help="measure the training loader of -opt's file instead")
    parser.add_argument(
        '--batch', type=parse_count, default=16, metavar='N', help='images of a training step (default 16)'
    )
    parser.add_argument(
        '--patch', type=parse_count, default=48, metavar='N', help='input pixels per side in training (default 48)'
    )
    parser.add_argument(
        '--queries',
        type=parse_count,
        default=2304,
        metavar='N',
        help='output pixels per image in training (default 2304)',
    )
    add_data_arguments(parser.add_argument_group('with --data'))
    add_import(parser)
    parser.epilog = EPILOG


def add_data_arguments(group: argparse._ArgumentGroup) -> None:
    """What only `--data` takes."""
    group.add_argument(
        '--workers',
        type=parse_workers,
        nargs='+',
        metavar='N',
        help='numbers of loader processes to compare (default 0 1 2)',
    )
    group.add_argument(
        '--items',
        type=parse_count,
        metavar='N',
        help='items behind each figure, rounded up to whole batches (default 512)',
    )
    group.add_argument(
        '--step-ms',
        type=parse_step,
        metavar='MS',
        help='time of a training step: says whether the loader keeps up with it',
    )
    group.add_argument(
        '--force_yml',
        nargs='+',
        metavar='KEY:KEY=VALUE',
        help='change the options file, for example datasets:train:cache=memory',
    )


def parse_rows_cols(text: str) -> tuple[int, int]:
    """'180x320' as (180, 320)."""
    match = re.fullmatch(r'(\d+)[xX×](\d+)', text.strip())
    if match is None or not (int(match[1]) and int(match[2])):
        raise argparse.ArgumentTypeError(f"'{text}' is not a size such as 180x320, rows x columns")
    return int(match[1]), int(match[2])


def parse_count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def parse_workers(text: str) -> int:
    """A whole number, 0 among them."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of workers: 0, 1, 2, ...")
    return int(text)


def parse_step(text: str) -> float:
    """Milliseconds above 0."""
    value = parse_number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a time above 0 ms")
    return value


def run(args: argparse.Namespace) -> int:
    """Measure, then show and write."""
    import_modules(args.modules)
    from .outputs import check_output, is_picture, is_results_of

    if args.json:
        check_output('--json', args.json, '.json', partial(is_results_of, 'profile'))
    if args.plot:
        check_output('--plot', args.plot, '.png', is_picture)
    if args.data:
        if args.model:
            raise UserError('--data measures the training data of an options file: -opt instead of --model.')
        from .profile_data import profile_data

        return profile_data(args)
    for name in DATA_ONLY:
        if getattr(args, name) is not None:
            raise UserError(f'--{name.replace("step_ms", "step-ms")} needs --data.')
    if args.train and args.dense_hidden:
        raise UserError('--dense-hidden belongs to the profile of upscaling; with --train there is no dense decoder.')
    from moeisr_basicsr.shipped import find_model

    from .profile_run import Profiler

    if args.model is not None:
        args.model = str(find_model(args.model))
    return Profiler(args).run()
