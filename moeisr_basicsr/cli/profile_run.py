"""The work of `basicsr profile`: a network, measurements, tables.

Shapes: (H, W) input, (R, S) output, J experts.
"""

import argparse
import logging
from pathlib import Path

import torch
from basicsr.archs import build_network
from basicsr.utils import get_root_logger
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from moeisr_basicsr.analysis import schema
from moeisr_basicsr.analysis.chart import Bar, Panel, draw_chart
from moeisr_basicsr.analysis.complexity import parameters
from moeisr_basicsr.analysis.environment import environment
from moeisr_basicsr.analysis.stages import Setting, Stages
from moeisr_basicsr.analysis.training import PARTS, make_batch, profile_training
from moeisr_basicsr.checkpoint import load_model, read_model
from moeisr_basicsr.data.image_reader import read_image, to_float
from moeisr_basicsr.errors import UserError
from moeisr_basicsr.inference import make_control, target_size
from moeisr_basicsr.options import check_network, read_yaml

from .outputs import save_picture
from .upscale_run import choose_device

# stage of a row's `time_ms` -> (label, parts of its `macs`)
STAGES = {
    'encode': ('encode', ('encoder',)),
    'map': ('map', ('mapper',)),
    'decode': ('decode', ('tables', 'experts')),
    'total': ('all', ('total',)),
}
# what to know of the experts' shares where no picture was given and the routing is the network's own
NOTES = {
    'noise': 'The input is noise, which a trained network sends nearly all to its dearest experts; --image FILE '
    'gives the shares of a picture.',
    'random': 'The weights are random, and so are the shares; --model FILE gives those of a trained network.',
}
TRAIN_LABELS = {'chosen_experts': 'chosen experts', 'unchosen_experts': 'unchosen experts', 'tables': 'LR tables'}


class Profiler:
    """One network and what to measure.

    Args:
        args: Of `basicsr profile`.

    Raises:
        UserError: The model, the device, the size or the routing is wrong.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        get_root_logger(log_level=logging.WARNING)  # not one line for each network that is built
        self.device = choose_device(args.device)
        self.net, self.network_opt = load_network(args.model, args.opt)
        self.net = self.net.to(self.device).eval()
        self.console = Console(highlight=False)

    def run(self) -> int:
        """Measure, show, write; returns the exit code."""
        rows, kernel, panels = self.training() if self.args.train else self.upscaling()
        results = schema.document('profile', environment(kernel, self.device), rows, self.model())
        where = results['environment']
        self.console.print(
            f'{where["device_name"]}, {where["threads"]} threads, torch {where["torch"]}, decoded by {kernel}.'
        )
        if self.args.json:
            schema.save(self.args.json, results)
        if self.args.plot:
            save_picture(self.args.plot, draw_chart(panels))
        return 0

    def model(self) -> dict:
        """The `model` of the results."""
        return {
            'name': Path(self.args.model or self.args.opt).stem,
            'file': self.args.model,
            'network_g': self.network_opt,
            'parameters': parameters(self.net)._asdict(),
        }

    def input(self) -> Tensor:
        """(1, C, H, W) RGB in [0, 1] on the device."""
        if self.args.image is None:
            generator = torch.Generator().manual_seed(0)
            return torch.rand(1, input_channels(self.net), *self.args.lq_size, generator=generator).to(self.device)
        rgb = read_image(self.args.image).rgb
        return torch.from_numpy(to_float(rgb)).permute(2, 0, 1)[None].to(self.device)

    def upscaling(self) -> tuple[list[dict], str, list[Panel]]:
        """Rows of all scales, which code decoded, and the panels of the picture."""
        args = self.args
        lq = self.input()
        sizes = [target_size(tuple(lq.shape[-2:]), scale, None) for scale in args.scale]
        make_control(self.net, args.cost_weight, args.budget)  # a wrong budget shows before anything is measured
        setting = Setting(
            args.precision,
            args.cost_weight,
            args.budget,
            plain=not args.no_plain,
            dense_hidden=args.dense_hidden and tuple(args.dense_hidden),
            repeats=args.repeats or 5,
        )
        self.show_parameters()
        rows, kernel = [], 'torch'
        for scale, size in zip(args.scale, sizes):
            stages = Stages(self.net, lq, size, setting)
            kernel = stages.kernel
            rows.append(stages.row(scale))
            self.show_stages(rows[-1])
        if self.net.num_experts > 1:
            self.show_experts(rows)
            if args.image is None and args.budget is None and not args.cost_weight:
                self.console.print(NOTES['random' if args.model is None else 'noise'])
        return rows, kernel, upscaling_panels(rows)

    def training(self) -> tuple[list[dict], str, list[Panel]]:
        """As `upscaling`, for one step of training."""
        args = self.args
        batch = make_batch(self.net, args.batch, args.patch, args.queries, input_channels(self.net))
        rows = profile_training(self.net, batch, args.repeats or 3)
        self.show_parameters()
        self.show_training(rows)
        bars = [Bar(kind(row), {TRAIN_LABELS.get(part, part): row['time_ms'][part] for part in PARTS}) for row in rows]
        return rows, 'torch', [Panel('Training step, ms', bars)]

    def show_parameters(self) -> None:
        """One line on the screen."""
        count = parameters(self.net)
        parts = [f'encoder {count.encoder:,}']
        parts += [f'{name} {value:,}' for name, value in (('mapper', count.mapper), ('shared', count.shared)) if value]
        parts.append(f'experts {" + ".join(f"{value:,}" for value in count.experts)}')
        self.console.print(f'Parameters: {", ".join(parts)}; in all {count.total:,}')

    def show_stages(self, row: dict) -> None:
        """The table of one scale."""
        times, peaks, macs = row['time_ms'], row['peak_mib'], row['macs']
        (height, width), (rows, cols) = row['lq_size'], row['size']
        table = Table(
            title=f'{factor(row["scale"])}: {height} x {width} to {rows} x {cols} (rows x columns), {row["precision"]}',
            title_justify='left',
        )
        for column in ('stage', 'thousand MACs / pixel', 'ms', 'peak MiB'):
            table.add_column(column, justify='left' if column == 'stage' else 'right')
        for stage, (label, parts) in STAGES.items():
            if stage == 'map' and self.net.num_experts == 1:
                continue
            table.add_row(
                label,
                thousands(sum(macs[part] for part in parts)),
                f'{times[stage]:.1f}',
                '-' if peaks[stage] is None else f'{peaks[stage]:.1f}',
            )
        self.console.print(table)
        decoder = macs['mapper'] + macs['tables'] + macs['experts']
        for name in ('folded', 'plain'):
            line = f'dense {name}: {thousands(macs[f"dense_{name}"])} thousand MACs, '
            line += f'{macs[f"dense_{name}"] / decoder:.2f}x those of mapper, tables and experts'
            if f'dense_{name}' in times:
                line += (
                    f'; {times[f"dense_{name}"]:.1f} ms, '
                    f'{times[f"dense_{name}"] / (times["map"] + times["decode"]):.2f}x their time'
                )
            self.console.print(line)

    def show_experts(self, rows: list[dict]) -> None:
        """Each expert's cost, and its share of the pixels at each scale."""
        table = Table(title='Experts', title_justify='left')
        for column in ('expert', 'hidden layers', 'thousand MACs', *(factor(row['scale']) for row in rows)):
            table.add_column(column, justify='right')
        for j, depth in enumerate(self.net.decoder.depths):
            table.add_row(
                str(j + 1),
                str(depth),
                thousands(rows[0]['macs']['each_expert'][j]),
                *(f'{100 * row["routing"]["loads"][j]:.1f} %' for row in rows),
            )
        table.add_section()
        table.add_row('mean', '', '', *(thousands(row['macs']['experts']) for row in rows))
        self.console.print(table)

    def show_training(self, rows: list[dict]) -> None:
        """Time and memory of every part."""
        table = Table(title=f'Training step: {rows[0]["notes"]}', title_justify='left')
        table.add_column('part')
        for row in rows:
            table.add_column(f'{kind(row)} ms', justify='right')
            table.add_column('MiB', justify='right')
        for part in (*PARTS, 'total'):
            if part == 'total':
                table.add_section()
            cells = []
            for row in rows:
                peak = row['peak_mib'].get(part)
                cells += [f'{row["time_ms"][part]:.1f}', '-' if peak is None else f'{peak:.0f}']
            table.add_row(TRAIN_LABELS.get(part, part), *cells)
        self.console.print(table)
        if len(rows) > 1:
            naive = next(row for row in rows if kind(row) == 'naive')['time_ms']['total']
            self.console.print(
                '; '.join(
                    f'{kind(row)} {naive / row["time_ms"]["total"]:.2f}x as fast as naive'
                    for row in rows
                    if kind(row) != 'naive'
                )
            )


def load_network(model: str | None, options: str | None) -> tuple[nn.Module, dict]:
    """The network of a model file, or of an options file with random weights, and its options.

    Raises:
        UserError: The file is wrong, or its network has no decoder of this package.
    """
    if model is not None:
        net, network_opt = load_model(model), read_model(model).network_opt
    else:
        data = read_yaml(options).data
        if 'network_g' not in data:
            raise UserError(f"{options} has no section 'network_g'.")
        network_opt = data['network_g']
        check_network(network_opt, options)
        try:
            net = build_network(dict(network_opt))
        except (TypeError, ValueError) as error:
            reason = ' '.join(str(error).split())
            raise UserError(f'{options}: {network_opt["type"]} cannot be built: {reason}') from error
    if not hasattr(net, 'decoder'):
        raise UserError(
            f'{model or options}: {type(net).__name__} has no decoder to profile; MoEISR, LIIF and LTE have one.'
        )
    return net, network_opt


def input_channels(net: nn.Module) -> int:
    """C of the images that the network takes: what its encoder's first convolution reads."""
    return next(module for module in net.encoder.modules() if isinstance(module, nn.Conv2d)).in_channels


def upscaling_panels(rows: list[dict]) -> list[Panel]:
    """Time, multiply-adds and shares of the experts at every scale."""
    times, macs, shares = [], [], []
    for row in rows:
        label = factor(row['scale'])
        times.append(Bar(label, {name: row['time_ms'][name] for name in ('encode', 'map', 'decode')}))
        counts = {name: row['macs'][name] / 1e3 for name in ('encoder', 'mapper', 'tables', 'experts')}
        macs += [Bar(label, counts)] + [
            Bar(
                f'{label} dense {name}',
                {'encoder': counts['encoder'], 'dense decoder': row['macs'][f'dense_{name}'] / 1e3},
            )
            for name in ('folded', 'plain')
        ]
        shares.append(Bar(label, {f'expert {j}': 100 * load for j, load in enumerate(row['routing']['loads'], 1)}))
    panels = [Panel('Time, ms', times), Panel('Thousand multiply-adds per output pixel', macs)]
    return panels + ([Panel('Share of the pixels, %', shares)] if len(rows[0]['routing']['loads']) > 1 else [])


def factor(scale: tuple[float, float]) -> str:
    """'x4', or 'x2x3.5' for rows and columns that differ."""
    row, col = (f'{value:g}' for value in scale)
    return f'x{row}' if row == col else f'x{row}x{col}'


def kind(row: dict) -> str:
    """'exact' of the case 'train-exact'."""
    return row['case'].removeprefix('train-')


def thousands(macs: float) -> str:
    """Multiply-adds in thousands."""
    return f'{macs / 1e3:,.1f}'
