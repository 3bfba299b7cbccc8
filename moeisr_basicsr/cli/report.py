"""`basicsr report`."""

import argparse
from operator import methodcaller

from moeisr_basicsr.errors import UserError

from .outputs import add_overwrite, check_output

EPILOG = """\
examples:
  basicsr report results/test_liif_edsr results/test_moeisr_edsr -o report.html
  basicsr report results/*/results.json -o report.html --csv report.csv --baseline test_liif_edsr

RESULTS are folders or files that `basicsr test` wrote, or files of `basicsr profile --json`. Models whose names differ
only in _seed1, _seed2, ... are one row with mean and spread. Pictures appear where the tests ran with
  --force_yml val:save_img=true val:save_expert_map=true val:save_references=true"""


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    add = parser.add_argument
    add('results', nargs='+', metavar='RESULTS', help='results files, or folders that hold a results.json')
    add('-o', '--output', metavar='OUT.html', help='page to write')
    add('--csv', metavar='FILE.csv', help='also write every row of the files')
    add(
        '--baseline', metavar='NAME', help='row that differences and shares of the dense cost refer to (default: first)'
    )
    add('--images', type=int, default=6, metavar='N', help='images to show crops of; 0 for none (default 6)')
    add_overwrite(parser)
    parser.epilog = EPILOG


def run(args: argparse.Namespace) -> int:
    """Read, then write."""
    from moeisr_basicsr.atomic_file import write_atomic
    from moeisr_basicsr.tools.report import collect, page, rows_csv

    if not args.output and not args.csv:
        raise UserError('nothing to write: give -o OUT.html, --csv FILE.csv, or both.')
    if args.images < 0:
        raise UserError(f'--images must be 0 or more; got {args.images}.')
    if args.output:
        check_output('-o', args.output, '.html', args.overwrite)
    if args.csv:
        check_output('--csv', args.csv, '.csv', args.overwrite)
    sources, contents = collect.read_sources(args.results), {}
    if args.output:
        contents[args.output] = page.render(collect.collect(sources), args.baseline, args.images)
    if args.csv:
        contents[args.csv] = rows_csv.rows_csv(sources)
    for name, text in contents.items():
        content = text.encode(errors='backslashreplace')  # of file names that are no UTF-8
        write_atomic(name, methodcaller('write', content))
        print(f'{name}: {len(content) / 2**20:.1f} MiB')
    return 0
