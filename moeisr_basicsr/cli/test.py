"""`basicsr test`."""

import argparse

from .options import add_options_file, options_of

EPILOG = """\
examples:
  basicsr test -opt options/test_moeisr_edsr.yml
  basicsr test -opt options/test_moeisr_edsr.yml --force_yml val:budget=0.3

Results and pictures go to results/NAME in the current folder, where NAME is the options file's `name`. An interrupted
test goes on where it was when the same command is given again.

exit codes: 0 done, 2 wrong options or files, 4 some images could not be used (the others are measured),
130 stopped by Ctrl-C, 143 stopped by SIGTERM"""


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    add_options_file(parser, is_train=False)
    parser.epilog = EPILOG


def run(args: argparse.Namespace) -> int:
    """Check the options, then evaluate."""
    opt = options_of(args, is_train=False)
    if opt is None:
        return 0
    from moeisr_basicsr.engine.test_loop import test

    return test(opt)
