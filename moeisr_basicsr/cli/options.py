"""Arguments that several subcommands share."""

import argparse
import contextlib
import importlib
import math
import os
import sys
from pathlib import Path

from moeisr_basicsr.errors import UserError


def add_options_file(parser: argparse.ArgumentParser, is_train: bool) -> None:
    """What `basicsr train` and `basicsr test` take; the names and meanings are BasicSR's."""
    options, changes = (
        ('moeisr_edsr', 'train:ema_decay=0.999 datasets:train:batch_size_per_gpu=4')
        if is_train
        else ('test_moeisr_edsr', 'val:budget=0.3 path:pretrain_network_g=mine.pth')
    )
    parser.add_argument('-opt', metavar='YAML', help=f'options file, for example options/{options}.yml')
    parser.add_argument(
        '--launcher',
        choices=('none', 'pytorch', 'slurm'),
        help='how processes are started: none for one, pytorch under torchrun (found by itself), slurm under srun',
    )
    if is_train:
        parser.add_argument('--auto_resume', action='store_true', help='go on from the newest checkpoint of this run')
        parser.add_argument(
            '--debug',
            action='store_true',
            help='a short trial: the name gets the prefix debug_, all happens every 8 iterations',
        )
    else:
        parser.set_defaults(auto_resume=False, debug=False)
    parser.add_argument(
        '--force_yml',
        nargs='+',
        metavar='KEY:KEY=VALUE',
        help=f'change the options file for this run, for example {changes}; KEY=~ removes a key',
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument('--keys', action='store_true', help='list the keys that an options file may have, and stop')
    parser.add_argument('--markdown', action='store_true', help='with --keys: as a page of Markdown')
    add_import(parser)


def add_model(parser: argparse._ActionsContainer, help_end: str = '') -> None:
    """`--model`; `shipped.find_model` says which file it means."""
    parser.add_argument(
        '--model',
        metavar='NAME_OR_FILE',
        help=f'a model that comes with the package, a model file, or a checkpoint of training{help_end}',
    )


def add_routing(parser: argparse._ActionsContainer) -> None:
    """How an image is routed and computed, as `upscale` and `profile` take it."""
    routing = parser.add_mutually_exclusive_group()
    weight = 'above 0 cheaper, below 0 more expensive than the trained routing (default 0)'
    routing.add_argument('--cost-weight', type=parse_number, default=0.0, metavar='K', help=weight)
    budget = 'decoder cost, as a fraction of the most expensive expert everywhere, in (0, 1]'
    routing.add_argument('--budget', type=parse_number, metavar='F', help=budget)
    number_format = 'number format of encoder and experts (default fp32)'
    parser.add_argument('--precision', choices=('fp32', 'bf16', 'fp16'), default='fp32', help=number_format)


def add_device(parser: argparse._ActionsContainer) -> None:
    """`--device`."""
    parser.add_argument('--device', metavar='D', help='cpu, cuda, cuda:1 (default: a GPU if there is one)')


def parse_number(text: str) -> float:
    """A finite number."""
    with contextlib.suppress(ValueError):
        if math.isfinite(value := float(text)):
            return value
    raise argparse.ArgumentTypeError(f"'{text}' is not a number")


def add_import(parser: argparse.ArgumentParser) -> None:
    """`--import`, for classes that users register."""
    parser.add_argument(
        '--import',
        action='append',
        default=[],
        dest='modules',
        metavar='MODULE',
        help='a Python module of yours to import first: a file, or a dotted name; what it registers can be named in '
        'options files',
    )


def import_modules(names: list[str]) -> None:
    """Import the modules of `--import`.

    Raises:
        UserError: There is no such module, or it fails.
    """
    for name in names:
        path = Path(name)
        is_file = path.suffix == '.py'
        if is_file and not path.is_file():
            raise UserError(f'--import {name}: there is no such file.')
        folder = str(path.resolve().parent if is_file else Path.cwd())
        if folder not in sys.path:
            sys.path.insert(0, folder)
        try:
            module = importlib.import_module(path.stem if is_file else name)
        except Exception as error:  # whatever the user's own code raises
            raise UserError(f'--import {name}: {type(error).__name__}: {error}') from error
        found = getattr(module, '__file__', None)
        if is_file and (found is None or Path(found).resolve() != path.resolve()):
            raise UserError(f'--import {name}: another module is called {path.stem} ({found}); give it another name.')


def options_of(args: argparse.Namespace, is_train: bool) -> dict | None:
    """The checked options of the arguments of `add_options_file`; None where they ask for the list of keys only.

    Raises:
        UserError: There is no options file, or it has mistakes.
    """
    import_modules(args.modules)
    if args.keys:
        from .keys import keys_markdown, keys_text

        print(keys_markdown(is_train) if args.markdown else keys_text(is_train))
        return None
    if not args.opt:
        raise UserError(f'basicsr {args.command} needs an options file: -opt options/NAME.yml.')
    from moeisr_basicsr.engine.distributed import find_launcher
    from moeisr_basicsr.options import parse_options

    args.launcher = find_launcher(args.launcher)
    return parse_options(args, os.getcwd(), is_train)
