"""The `basicsr` command. Each subcommand is one module with `add_parser` and `run`."""

import argparse
import importlib
import os
import sys
import traceback

from moeisr_basicsr.errors import UserError, did_you_mean

# name -> (module, what it does). A module is imported when its help or its work is asked for.
COMMANDS = {
    'train': ('train', 'train a network as an options file says'),
    'test': ('test', 'evaluate a network on datasets as an options file says'),
    'upscale': ('upscale', 'upscale images by any factor, or to any size'),
    'models': ('models', 'list the models that come with the package, or show one'),
    'profile': ('profile', 'measure multiply-adds, time and memory of a network, stage by stage'),
    'report': ('report', 'make one page of tables, charts and pictures of what tests and profiles measured'),
    'convert': ('convert', 'make one self-describing model file of a checkpoint'),
}
USER_ERROR = 2
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """argparse with one line for a mistake, and the nearest name for an unknown option or subcommand."""

    def error(self, message: str):
        raise UserError(f'{message}. See {self.prog} --help.')

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [option for parser in self.chain(parsed) for option in parser._option_string_actions]
            wrong = next((entry for entry in unknown if entry.startswith('-')), unknown[0])
            raise UserError(
                f'unknown argument {wrong}.{did_you_mean(wrong.partition("=")[0], known)} '
                f'See {self.chain(parsed)[-1].prog} --help.'
            )
        return parsed

    def chain(self, parsed: argparse.Namespace) -> list['_Parser']:
        """This parser and that of the chosen subcommand."""
        chosen = getattr(parsed, 'parser', None)
        return [self] if chosen is None else [self, chosen]


def build_parser(argv: list[str]) -> argparse.ArgumentParser:
    """The parser of the whole command, with the options of the subcommand that `argv` names."""
    parser = _Parser(
        prog='basicsr',
        description='Arbitrary-scale super-resolution on BasicSR: train, test, upscale.',
        epilog='basicsr COMMAND --help says more about a command.',
        allow_abbrev=False,
    )
    from moeisr_basicsr import __version__

    parser.add_argument('--version', action='version', version=f'moeisr_basicsr {__version__}')
    commands = parser.add_subparsers(metavar='COMMAND', dest='command', parser_class=_Parser)
    for name, (module, about) in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=about,
            description=f'{about[0].upper()}{about[1:]}.',
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(parser=sub)
        if name in argv[:1]:
            importlib.import_module(f'moeisr_basicsr.cli.{module}').add_parser(sub)
            sub.add_argument('--traceback', action='store_true', help='show where in the code an error arose')
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Its words, without the program's name; those of the process where not given.

    Returns:
        0 where all went well, 2 for a mistake of the user, 130 after Ctrl-C, else the subcommand's own code.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(argv)
    except KeyboardInterrupt:
        print('basicsr: interrupted.', file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, for example `| head`
        sys.stdout = open(os.devnull, 'w')
        return 1
    except (ValueError, OSError, ImportError) as error:  # UserError is a ValueError
        if '--traceback' in argv:
            traceback.print_exc()
        _report(error)
        return USER_ERROR


def _run(argv: list[str]) -> int:
    first = argv[0] if argv else ''
    if first and not first.startswith('-') and first not in COMMANDS:
        raise UserError(f"'{first}' is no command; there are {', '.join(COMMANDS)}.{did_you_mean(first, COMMANDS)}")
    parser = build_parser(argv)
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    module = importlib.import_module(f'moeisr_basicsr.cli.{COMMANDS[args.command][0]}')
    return int(module.run(args) or 0)


def _report(error: Exception) -> None:
    """One line for every mistake; of the ranks of a distributed run, only the first one speaks of the options."""
    problems = getattr(error, 'problems', None)
    if problems and os.environ.get('RANK', '0') != '0':
        return
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        problems = [f'{error.filename}: {error.strerror}']
    hint = '' if isinstance(error, (UserError, OSError)) else ' (--traceback shows where)'
    for problem in problems or [' '.join(str(error).split()) or type(error).__name__]:
        print(f'basicsr: error: {problem}{hint}', file=sys.stderr)
