"""The `basicsr` command. Each subcommand is a module of its name with `add_parser` and `run`."""

import argparse
import importlib
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moeisr_basicsr.errors import ExitCode, UserError, did_you_mean, printable

COMMANDS = {
    'train': 'train a network as an options file says',
    'test': 'evaluate a network on datasets as an options file says',
    'check': 'decode all images of an options file before a long run, and list what is wrong with them',
    'upscale': 'upscale images by any factor, or to any size',
    'adapt': 'make a network of any factor out of a trained fixed-scale one',
    'convert': 'make one self-describing model file of a checkpoint',
    'export': 'make one ONNX file of a network, for any image and output size',
    'models': 'list the models that come with the package, or show one',
    'report': 'make one page of tables, charts and pictures of what tests and profiles measured',
    'demo': 'show a page in the browser to try a network on pictures of yours',
    'profile': 'measure multiply-adds, time and memory of a network, stage by stage',
}
BUG = 1  # what Python itself returns after a traceback


class _Parser(argparse.ArgumentParser):
    """argparse, with one line for a mistake, and with numbers such as -1e-3, which it took for an option until 3.14."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = re.compile(r'-\.?\d')

    def error(self, message: str):
        raise UserError(f'{message}. See {self.prog} --help.')


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Its words, without the program's name; those of the process by default.

    Returns:
        An `ExitCode`, or 1 after a bug, whose traceback is printed.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')  # file names may be no UTF-8, a terminal may know less
    try:
        with _orderly_end():
            args = _parse(sys.argv[1:] if argv is None else argv)
            return args.run(args)
    except KeyboardInterrupt:
        print('basicsr: interrupted.', file=sys.stderr)
        return ExitCode.INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, for example `| head`
        sys.stdout = open(os.devnull, 'w')
        return 1
    except Exception as error:
        lines = mistakes(error)
        if not lines:
            traceback.print_exc()
            advice = 'please report it with the lines above'
            print(f'basicsr: this is a bug, unless the machine or another process failed; {advice}.', file=sys.stderr)
            return BUG
        # Of the processes of a distributed run, only the first one speaks of the options file.
        if not hasattr(error, 'problems') or os.environ.get('RANK', '0') == '0':
            for line in lines:
                print(f'basicsr: error: {line}', file=sys.stderr)
        return ExitCode.USER_ERROR


def _parse(argv: list[str]) -> argparse.Namespace:
    """The arguments. Only the module of the command that is named is imported, for its options."""
    from moeisr_basicsr import __version__

    parser = _Parser(
        prog='basicsr',
        description='Arbitrary-scale super-resolution on BasicSR: train, test, upscale.',
        epilog='basicsr COMMAND --help says more about a command.',
        allow_abbrev=False,
    )
    parser.set_defaults(parser=parser)
    parser.add_argument('--version', action='version', version=f'moeisr_basicsr {__version__}')
    commands = parser.add_subparsers(metavar='COMMAND', dest='command', required=True)
    for name, about in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=about,
            description=f'{about[0].upper()}{about[1:]}.',
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(parser=sub)
        if name in argv[:1]:
            module = importlib.import_module(f'{__name__}.{name}')
            module.add_parser(sub)
            sub.set_defaults(run=module.run)
    args, unknown = parser.parse_known_args(argv or ['--help'])
    if unknown:
        wrong = next((word for word in unknown if word.startswith('-')), unknown[0])
        hint = did_you_mean(wrong.partition('=')[0], args.parser._option_string_actions)
        raise UserError(f'unknown argument {wrong}.{hint} See {args.parser.prog} --help.')
    return args


@contextmanager
def _orderly_end() -> Iterator[None]:
    """Let SIGTERM end a command by an exception, so that it leaves no temporary files; `engine.signals` does more."""
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers nowhere else
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def mistakes(error: Exception) -> list[str]:
    """What the user can fix, one line each; none where the error is a bug."""
    if isinstance(error, UserError):
        return [printable(' '.join(line.split())) for line in getattr(error, 'problems', [str(error)])]
    if isinstance(error, OSError) and error.strerror:  # the system's: no permission, the disk is full
        return [printable(': '.join(str(part) for part in (error.filename, error.strerror) if part))]
    return []
