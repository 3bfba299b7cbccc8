"""`basicsr report`."""

import argparse

from moeisr_basicsr.errors import UserError

EPILOG = """\
examples:
  basicsr report results/test_liif_edsr results/test_moeisr_edsr -o report.html
  basicsr report results/*/results.json -o report.html --csv report.csv --baseline test_liif_edsr

RESULTS are folders or files that `basicsr test` wrote, or files of `basicsr profile --json`. The page is one file that
needs no other. Models whose names differ only in an ending _seed1, _seed2, ... are one row with mean and spread.
Pictures appear where the tests ran with
  --force_yml val:save_img=true val:save_expert_map=true val:save_references=true"""


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument(
        'results', nargs='+', metavar='RESULTS', help='results files, or folders that hold a results.json'
    )
    parser.add_argument('-o', '--output', metavar='OUT.html', help='page to write; an earlier page is replaced')
    parser.add_argument(
        '--csv',
        metavar='FILE.csv',
        help='also write every row of the files, one line each; an earlier such table is replaced',
    )
    parser.add_argument(
        '--baseline',
        metavar='NAME',
        help='row that differences and shares of the dense cost refer to (default: the first one)',
    )
    parser.add_argument(
        '--images', type=parse_images, default=6, metavar='N', help='images to show crops of; 0 for none (default 6)'
    )
    parser.epilog = EPILOG


def parse_images(text: str) -> int:
    """A whole number, 0 among them."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of images: 0, 1, 2, ...")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Read, then write."""
    if not args.output and not args.csv:
        raise UserError('nothing to write: give -o OUT.html, --csv FILE.csv, or both.')
    from moeisr_basicsr.atomic_file import write_atomic
    from moeisr_basicsr.report.collect import collect, read_sources
    from moeisr_basicsr.report.flat import flat_csv, is_flat_csv
    from moeisr_basicsr.report.page import is_page, render

    from .outputs import check_output

    if args.output:
        check_output('-o', args.output, '.html', is_page)
    if args.csv:
        check_output('--csv', args.csv, '.csv', is_flat_csv)
    sources = read_sources(args.results)
    contents = {}
    if args.output:
        contents[args.output] = render(collect(sources), args.baseline, args.images)
    if args.csv:
        contents[args.csv] = flat_csv(sources)
    for name, content in contents.items():
        write_atomic(name, lambda file, content=content: file.write(content.encode()))
        print(f'{name}: {len(content.encode()) / 2**20:.1f} MiB from {len(sources)} file{"s" * (len(sources) > 1)}')
    return 0
