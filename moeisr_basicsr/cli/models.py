"""`basicsr models`."""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from .options import add_import, import_modules

EPILOG = """\
examples:
  basicsr models
  basicsr models NAME
  basicsr train -opt mine.yml --force_yml path:pretrain_network_g=NAME

NAME is one of the list, or a model file of yours. `basicsr upscale` and `basicsr profile` take it after --model.
Multiply-adds are the decoder's per output pixel at x4, by the shares of the experts that were measured; dense is its
most expensive expert for every pixel."""


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument('model', nargs='?', metavar='NAME', help='show the model card, file and options of one model')
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        '--path', action='store_true', help='print the path of the model file only (default: of the default model)'
    )
    form.add_argument('--json', action='store_true', help='print everything that is known as JSON')
    add_import(parser)
    parser.epilog = EPILOG


def run(args: argparse.Namespace) -> int:
    """List the shipped models, or show one."""
    from moeisr_basicsr import shipped

    import_modules(args.modules)
    if args.path:
        print(shipped.find_model(args.model))
        return 0
    from basicsr.utils import get_root_logger

    from moeisr_basicsr.tools.model_summary import summarize_model

    get_root_logger(log_level=logging.WARNING)  # not one line for each network that is built
    paths = [shipped.find_model(args.model)] if args.model else [shipped.shipped_file(name) for name in shipped.names()]
    default = shipped.shipped_file(shipped.DEFAULT)
    summaries = [{'default': path == default, **summarize_model(path)} for path in paths]
    if args.json:
        print(json.dumps(summaries[0] if args.model else summaries, indent=2))
    elif args.model:
        show(summaries[0])
    elif summaries:
        print('\n\n'.join(overview(summary) for summary in summaries))
    else:
        print('No model comes with this installation. `basicsr convert` makes a model file of a checkpoint.')
    return 0


def show(summary: dict[str, Any]) -> None:
    """One model in full."""
    import yaml

    card = Path(summary['file']).with_suffix('.md')
    print(card.read_text(encoding='utf-8').rstrip() if card.is_file() else overview(summary))
    options = yaml.safe_dump({'network_g': summary['network_g']}, sort_keys=False, default_flow_style=None)
    print(f'\nFile: {summary["file"]}\n\n{options.rstrip()}')


def overview(summary: dict[str, Any]) -> str:
    """Three lines or so about one model."""
    from moeisr_basicsr.tools.model_summary import psnr_of

    kind = summary['network_g']['type']
    if summary['decoder'] is not None:
        experts = f'{summary["experts"]} expert' + 's' * (summary['experts'] > 1)
        kind += f' with {summary["encoder"]}, decoder {summary["decoder"]}, {experts}'
    facts = [f'{summary["parameters"]:,} parameters', f'{summary["bytes"] / 2**20:.1f} MiB']
    if summary['scale_range'] is not None:
        facts.append('trained on x{:g} to x{:g}'.format(*summary['scale_range']))
    lines = [f'{summary["name"]}{" (default)" * summary["default"]}: {kind}', f'  {", ".join(facts)}']
    if summary['macs_x4'] is not None:
        routed, dense = summary['macs_x4']['routed'], summary['macs_x4']['dense']
        thousands = f'dense {dense / 1e3:.1f}' if routed is None else f'{routed / 1e3:.1f} (dense {dense / 1e3:.1f})'
        lines.append(f'  decoder at x4: {thousands} thousand multiply-adds per output pixel')
    numbers = [
        f'{row["dataset"]} {psnr[0]:.2f}' + ('' if psnr[1] is None else f' ({psnr[1]:+.2f})')
        for row in summary['results']
        if (psnr := psnr_of(row)) is not None
    ]
    if numbers:
        lines.append(f'  PSNR in dB (gain over bicubic): {", ".join(numbers)}')
    return '\n'.join(lines)
