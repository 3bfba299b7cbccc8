"""`basicsr test`."""
import argparse
import os

from .options import add_options_file, import_modules, require_options_file

EPILOG = """\
examples:
  basicsr test -opt options/test_moeisr_edsr.yml
  basicsr test -opt options/test_moeisr_edsr.yml --force_yml val:budget=0.3

Results and pictures go to results/NAME in the current folder, where NAME is the options file's `name`."""


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    add_options_file(parser)
    parser.epilog = EPILOG


def run(args: argparse.Namespace) -> int:
    """Check the options, then evaluate."""
    import_modules(args.modules)
    if args.keys:
        from .keys import print_keys
        return print_keys(is_train=False)
    require_options_file(args)
    from moeisr_basicsr.options import parse_options
    opt = parse_options(args, os.getcwd(), is_train=False)
    from moeisr_basicsr.engine.test_loop import test
    return test(opt)
