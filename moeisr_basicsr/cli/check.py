"""`basicsr check`."""

import argparse
import os
from collections.abc import Iterable

from rich.console import Console
from rich.progress import track

from moeisr_basicsr.errors import ExitCode

from .options import add_import, import_modules

EPILOG = """\
examples:
  basicsr check -opt options/moeisr_edsr.yml

Decodes every image of every dataset of the file once, in parallel, and lists what is damaged, has no partner, does not
fit its partner, or is too small. Nothing is written.

exit codes: 0 all images can be used, 2 wrong options, 4 some cannot"""


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.epilog = EPILOG
    add = parser.add_argument
    add('-opt', metavar='YAML', required=True, help='options file of a training or a test')
    add(
        '--force_yml', nargs='+', metavar='KEY:KEY=VALUE', help='change the options file, for example datasets:val=none'
    )
    add_import(parser)


def run(args: argparse.Namespace) -> int:
    """Check the options, then the images."""
    from moeisr_basicsr.engine.data_check import check_datasets
    from moeisr_basicsr.options import parse_options, read_yaml

    import_modules(args.modules)
    args.launcher, args.auto_resume, args.debug = 'none', False, False
    opt = parse_options(args, os.getcwd(), is_train='train' in read_yaml(args.opt).data)
    bar, out = Console(stderr=True), Console(highlight=False, soft_wrap=True, markup=False)

    def show(images: Iterable, total: int) -> Iterable:
        return track(images, 'decoding', total, console=bar, disable=total == 0 or not bar.is_terminal)

    found = check_datasets(opt, show)
    for section, images, problems in found:
        out.print(f'{section} ({opt["datasets"][section]["name"]}): {images} images, {len(problems)} problems')
        for problem in problems:
            out.print(f'  {problem}')
    return ExitCode.IMAGES_FAILED if any(checked.problems for checked in found) else ExitCode.OK
