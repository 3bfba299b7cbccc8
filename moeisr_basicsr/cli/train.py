"""`basicsr train`."""

import argparse

from .options import add_options_file, options_of

EPILOG = """\
examples:
  basicsr train -opt options/moeisr_edsr.yml
  basicsr train -opt options/moeisr_edsr.yml --auto_resume
  torchrun --nproc_per_node=8 -m moeisr_basicsr train -opt options/moeisr_rdn.yml

Everything of the run goes to experiments/NAME in the current folder, where NAME is the options file's `name`.
The options file is checked as a whole before anything starts. Ctrl-C finishes the step and saves, and so does an
error of the data; --auto_resume goes on from there.

exit codes: 0 done, 1 a checkpoint could not be written, 2 wrong options or files, 3 a loss was not finite,
130 stopped by Ctrl-C, 143 stopped by SIGTERM; in both cases the state was saved."""


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    add_options_file(parser, is_train=True)
    parser.epilog = EPILOG


def run(args: argparse.Namespace) -> int:
    """Check the options, then train."""
    opt = options_of(args, is_train=True)
    if opt is None:
        return 0
    from moeisr_basicsr.engine.train_loop import train

    return train(opt)
