"""`basicsr profile`."""

import argparse
import gc
import logging
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from basicsr.utils import get_root_logger
from rich.console import Console

from moeisr_basicsr.analysis import schema
from moeisr_basicsr.analysis.complexity import parameters
from moeisr_basicsr.analysis.environment import environment, kernel_name
from moeisr_basicsr.atomic_file import write_atomic
from moeisr_basicsr.errors import UserError
from moeisr_basicsr.kernels import fused_backend
from moeisr_basicsr.options import parse_options
from moeisr_basicsr.shipped import find_model
from moeisr_basicsr.tools.profile import loader, network, training, upscaling
from moeisr_basicsr.tools.profile.chart import draw_chart, panels_of

from .options import add_device, add_import, add_model, add_routing, import_modules
from .outputs import add_overwrite, check_output
from .upscale import parse_scale
from .upscale_run import choose_device

EPILOG = """\
examples:
  basicsr profile --model model.safetensors --lq-size 180x320 --scale 2 4 8
  basicsr profile -opt options/moeisr_edsr.yml --scale 4 --budget 0.3 --json profile.json --plot profile.png
  basicsr profile -opt options/moeisr_edsr.yml --train
  basicsr profile --data -opt options/moeisr_edsr.yml --workers 0 2 4 8 --step-ms 120

Multiply-adds are those of linear layers, convolutions and attention, one per multiply-add, per output pixel. Times are
medians; memory is the peak of a stage beyond what was in use before. 'dense' is one decoder for every pixel, as deep
as the most expensive expert or of the widths that --dense-hidden says: folded by this package's code, plain as
published (one chunk timed, times their number). The published LIIF decoder is --dense-hidden 256 256 256 256, LTE's
256 256 256.
With -opt the weights are random, and so is the routing. The input is noise unless --image names one; trained networks
send nearly all of it to their most expensive experts.

--data measures the loader that training would build, on the CPU. One batch is not timed, nor what workers load ahead;
files that the system has not in memory yet count with the time of the disk, and `cache: memory` with the time that
filling it takes. Without workers, training itself waits for each item."""
# Options that belong to one kind of profile
ONLY = {'data': ('workers', 'items', 'step_ms', 'force_yml'), 'train': ('batch', 'patch', 'queries')}
# What to know of the experts' shares where no picture was given and the routing is the network's own
NOISE = 'The input is noise, which a trained network sends nearly all to its most expensive experts; --image FILE '
NOISE += 'gives the shares of a picture.'
RANDOM = 'The weights are random, and so are the shares; --model FILE gives those of a trained network.'


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.epilog = EPILOG
    model = parser.add_mutually_exclusive_group(required=True)
    add_model(model)
    model.add_argument('-opt', metavar='YAML', help='options file whose network_g is built with random weights')
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument('--train', action='store_true', help='profile a training step by part instead')
    kind.add_argument('--data', action='store_true', help="measure the training loader of -opt's file instead")
    add = parser.add_argument
    add('--json', metavar='FILE.json', help='write the results')
    add('--plot', metavar='FILE.png', help='draw the results')
    add_overwrite(parser)
    add_device(parser)
    add('--repeats', type=whole(1), metavar='N', help='timed runs behind each median (default 5, with --train 3)')
    add_import(parser)

    group = parser.add_argument_group('upscaling')
    source = group.add_mutually_exclusive_group()
    size = 'input rows x columns (default 128x128)'
    source.add_argument('--lq-size', type=rows_cols, default=(128, 128), metavar='HxW', help=size)
    source.add_argument('--image', metavar='FILE', help='an input image in place of noise')
    add, scales = group.add_argument, [(2.0, 2.0), (4.0, 4.0)]
    add('--scale', type=parse_scale, nargs='+', default=scales, metavar='S', help='such as 2 3.3 2x4 (default 2 4)')
    add_routing(group)
    widths = "hidden widths of the dense decoder to compare with (default: the most expensive expert's)"
    add('--dense-hidden', type=whole(1), nargs='+', metavar='N', help=widths)
    add('--no-plain', action='store_true', help='do not time the plain dense decoder')

    add = parser.add_argument_group('with --train').add_argument
    add('--batch', type=whole(1), metavar='N', help='images of a step (default 16)')
    add('--patch', type=whole(1), metavar='N', help='input pixels per side (default 48)')
    add('--queries', type=whole(1), metavar='N', help='output pixels per image (default 2304)')

    add = parser.add_argument_group('with --data').add_argument
    add('--workers', type=whole(0), nargs='+', metavar='N', help='loader processes to compare (default 0 1 2)')
    add('--items', type=whole(1), metavar='N', help='behind each figure, rounded up to whole batches (default 512)')
    add('--step-ms', type=whole(1), metavar='MS', help='time of a training step: whether the loader keeps up')
    force = 'change the options file, for example datasets:train:cache=memory'
    add('--force_yml', nargs='+', metavar='KEY:KEY=VALUE', help=force)


def rows_cols(text: str) -> tuple[int, int]:
    """'180x320' as (180, 320)."""
    match = re.fullmatch(r'(\d+)[xX×](\d+)', text.strip())
    if match is None or not (int(match[1]) and int(match[2])):
        raise argparse.ArgumentTypeError(f"'{text}' is not a size such as 180x320, rows x columns")
    return int(match[1]), int(match[2])


def whole(least: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number of at least `least`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least {least}")
        return int(text)

    return parse


def run(args: argparse.Namespace) -> int:
    """Measure, then show and write."""
    import_modules(args.modules)
    if args.json:
        check_output('--json', args.json, '.json', args.overwrite)
    if args.plot:
        check_output('--plot', args.plot, '.png', args.overwrite)
    if args.data and args.model:
        raise UserError('--data measures the training data of an options file: -opt instead of --model.')
    if args.train and args.dense_hidden:
        raise UserError('--dense-hidden belongs to the profile of upscaling; with --train there is no dense decoder.')
    for kind, names in ONLY.items():
        given = [name for name in names if getattr(args, name) is not None]
        if given and not getattr(args, kind):
            raise UserError(f'--{given[0].replace("step_ms", "step-ms")} needs --{kind}.')
    get_root_logger(log_level=logging.WARNING)  # not one line for each network or dataset that is built
    console = Console(highlight=False)
    rows, where, model = (profile_data if args.data else profile_network)(args, console)
    if args.json:
        schema.save(args.json, schema.document('profile', where, rows, model))
    if args.plot:
        write_atomic(args.plot, partial(draw_chart(panels_of(rows)).save, format='PNG'))
    return 0


def profile_data(args: argparse.Namespace, console: Console) -> tuple[list[dict], dict, None]:
    """Rows, environment and model of `--data`."""
    args.launcher, args.auto_resume, args.debug = 'none', False, False
    opt = parse_options(args, os.getcwd(), is_train=True)
    rows = loader.profile_loader(opt, args.workers or (0, 1, 2), args.items or 512, args.step_ms)
    loader.show_loader(console, rows)
    return rows, environment('none'), None


def profile_network(args: argparse.Namespace, console: Console) -> tuple[list[dict], dict, dict]:
    """The same of a network, upscaling or training."""
    gc.freeze()  # else the collection before each stage looks through all that was imported
    device = choose_device(args.device)
    args.model = args.model and str(find_model(args.model))
    net, network_opt = network.load_network(args.model, args.opt)
    net = net.to(device).eval()
    network.show_parameters(console, net)
    if args.train:
        shape = {name: value for name in ONLY['train'] if (value := getattr(args, name))}
        rows = [training.profile_training(net, repeats=args.repeats or 3, **shape)]
        training.show_training(console, rows[0])
        kernel = 'torch'
    else:
        setting = upscaling.Setting(
            args.precision, args.cost_weight, args.budget, args.repeats or 5, not args.no_plain, args.dense_hidden
        )
        lq = network.input_image(net, args.image, args.lq_size).to(device)
        rows = upscaling.profile_scales(net, lq, args.scale, setting)
        upscaling.show_upscaling(console, net.decoder, rows)
        kernel = kernel_name(fused_backend(net.decoder, device, args.precision))
        if net.num_experts > 1 and not (args.image or args.budget or args.cost_weight):
            console.print(NOISE if args.model else RANDOM)
    where = environment(kernel, device)
    console.print(f'{where["device_name"]}, {where["threads"]} threads, torch {where["torch"]}, decoded by {kernel}.')
    name, count = Path(args.model or args.opt).stem, parameters(net)
    return rows, where, {'name': name, 'file': args.model, 'network_g': network_opt, 'parameters': count}
