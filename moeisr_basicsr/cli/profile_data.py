"""The work of `basicsr profile --data`: the training loader of an options file, measured and shown."""

import argparse
import logging
import os

from basicsr.utils import get_root_logger
from rich.console import Console
from rich.table import Table

from moeisr_basicsr.analysis import schema
from moeisr_basicsr.analysis.chart import Bar, Panel, draw_chart
from moeisr_basicsr.analysis.environment import environment
from moeisr_basicsr.engine.data_profile import STAGES, loader_speed, open_loader, stage_times
from moeisr_basicsr.options import parse_options

from .outputs import save_picture

LABELS = {
    'read': 'read, decode',
    'resize': 'crop, shrink to LR',
    'queries': 'augment, draw queries',
    'tensor': 'LR patch to tensor',
}
DEFAULT_WORKERS = (0, 1, 2)
DEFAULT_ITEMS = 512


def profile_data(args: argparse.Namespace) -> int:
    """Measure, show, write; returns the exit code.

    Raises:
        UserError: The options file, its training data or an image of it is wrong.
    """
    get_root_logger(log_level=logging.WARNING)  # not one line for each dataset that is built
    args.launcher, args.auto_resume, args.debug = 'none', False, False
    opt = parse_options(args, os.getcwd(), is_train=True)
    train_opt = opt['datasets']['train']
    batch = train_opt['batch_size_per_gpu']
    needed = None if args.step_ms is None else 1e3 * batch / args.step_ms
    items, console = args.items or DEFAULT_ITEMS, Console(highlight=False)

    data = open_loader(opt, workers=0)
    console.print(f'{train_opt["name"]}: {len(data.dataset)} images, batches of {batch}.', markup=False)
    rows = [
        {
            'case': 'data-stages',
            'dataset': train_opt['name'],
            'count': -(-items // batch) * batch,
            'time_ms': stage_times(data, items),
        }
    ]
    show_stages(console, rows[0]['time_ms'])
    for workers in dict.fromkeys(args.workers or DEFAULT_WORKERS):
        speed = loader_speed(open_loader(opt, workers), items)
        rows.append(
            {
                'case': f'data-workers-{workers}',
                'dataset': train_opt['name'],
                'count': speed.items,
                'data': {
                    'workers': workers,
                    'batch_size': batch,
                    'items_per_second': speed.items_per_second,
                    'items_per_cpu_second': speed.items_per_cpu_second,
                    'needed_items_per_second': needed,
                },
            }
        )
    show_speeds(console, [row['data'] for row in rows[1:]])
    if needed is not None:
        console.print(f'A step of {args.step_ms:g} ms takes {batch} items: each process needs {needed:.1f} items/s.')
    if args.json:
        schema.save(args.json, schema.document('profile', environment('none'), rows))
    if args.plot:
        save_picture(args.plot, draw_chart(panels(rows)))
    return 0


def show_stages(console: Console, times: dict[str, float]) -> None:
    """The table of one item."""
    table = Table(title='One item, without workers', title_justify='left')
    table.add_column('stage')
    table.add_column('ms', justify='right')
    for stage in (*STAGES, 'other'):
        if stage in times:
            table.add_row(LABELS.get(stage, stage), f'{times[stage]:.2f}')
    table.add_section()
    table.add_row('total', f'{times["total"]:.2f}')
    console.print(table)


def show_speeds(console: Console, speeds: list[dict]) -> None:
    """The table of all worker counts."""
    needed = speeds[0]['needed_items_per_second']
    table = Table(title='Training loader', title_justify='left')
    verdict = () if needed is None else ('keeps up',)
    for column in ('workers', 'items/s', 'per worker', 'per CPU second', *verdict):
        table.add_column(column, justify='right')
    for speed in speeds:
        workers, rate, per_cpu = speed['workers'], speed['items_per_second'], speed['items_per_cpu_second']
        cells = [
            str(workers),
            f'{rate:.1f}',
            f'{rate / max(workers, 1):.1f}',
            '-' if per_cpu is None else f'{per_cpu:.1f}',
        ]
        if needed is not None:
            cells.append(('yes' if rate >= needed else 'no') + f', {rate / needed:.2f}x')
        table.add_row(*cells)
    console.print(table)


def panels(rows: list[dict]) -> list[Panel]:
    """The picture: stages of an item, and items per second."""
    times = rows[0]['time_ms']
    parts = {LABELS.get(stage, stage): times[stage] for stage in (*STAGES, 'other') if stage in times}
    return [
        Panel('One item, ms', [Bar('no workers', parts)]),
        Panel(
            'Items per second',
            [
                Bar(f'{row["data"]["workers"]} workers', {'items/s': row['data']['items_per_second']})
                for row in rows[1:]
            ],
        ),
    ]
