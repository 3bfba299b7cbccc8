"""Where the time, memory and multiply-adds of one upscale go, beside a dense decoder.

Shapes: (1, C, H, W) input, (R, S) output size, J experts.
"""

from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from torch import Tensor

from moeisr_basicsr.analysis.complexity import macs_per_pixel, most_expensive
from moeisr_basicsr.analysis.measure import StageClock
from moeisr_basicsr.analysis.routing_stats import expert_shares, lr_reads, mean_cost
from moeisr_basicsr.analysis.schema import scale_label
from moeisr_basicsr.archs.moeisr_arch import MoEISR
from moeisr_basicsr.core import MoEDecoder, render_image
from moeisr_basicsr.core.lm import LMExperts
from moeisr_basicsr.core.lte import LTEExperts
from moeisr_basicsr.core.render import TORCH
from moeisr_basicsr.errors import UserError
from moeisr_basicsr.inference import evaluation, make_control, target_size, upscale, upscale_strips
from moeisr_basicsr.kernels import fused_backend

from .rendering import CHUNK, plain_image
from .stages import measure_stages, mib_text, show_table

# stage of a row's `time_ms` -> parts of its `macs`; 'other' is the skip image
STAGES = {'encode': ['encoder'], 'map': ['mapper'], 'decode': ['tables', 'experts'], 'other': []}
WHOLES = {'total': ['total'], 'dense_folded': ['dense_folded'], 'dense_plain': ['dense_plain']}  # dense decoders alone


class Setting(NamedTuple):
    """How an image is upscaled, and what it is compared with."""

    precision: str
    cost_weight: float
    budget: float | None
    repeats: int
    plain: bool  # measure the plain dense decoder too
    dense_hidden: Sequence[int] | None  # of the dense decoder; None: as the most expensive expert


def profile_scales(net: MoEISR, lq: Tensor, scales: Sequence[tuple[float, float]], setting: Setting) -> list[dict]:
    """A row of a results document (see `analysis.schema`) for each factor.

    Args:
        net: `MoEISR`, `LIIF` or `LTE`.
        lq: (1, C, H, W) RGB in [0, 1] on the network's device.
        scales: (row factor, column factor).
        setting: How.

    Raises:
        UserError: A factor or the routing is wrong; nothing has been measured then.
    """
    lq_size = lq.shape[-2], lq.shape[-1]
    sizes = [target_size(lq_size, scale, None) for scale in scales]
    make_control(net, setting.cost_weight, setting.budget)
    return [{'scale': list(scale), **profile_size(net, lq, size, setting)} for scale, size in zip(scales, sizes)]


def profile_size(net: MoEISR, lq: Tensor, size: tuple[int, int], setting: Setting) -> dict:
    """The row of one output size, without its factor."""
    lq_size, device, precision = (lq.shape[-2], lq.shape[-1]), lq.device, setting.precision
    control = setting.cost_weight, setting.budget
    expert_map = upscale(net, lq, None, size, *control, precision=precision).expert_map
    shares = [1.0] if expert_map is None else expert_shares(expert_map, net.num_experts)
    reads = None if expert_map is None else lr_reads(net.decoder, expert_map[0], lq_size)
    dense = dense_decoder(net.decoder, setting.dense_hidden)
    if dense.family == 'lm':  # its published code runs the latent MLP at LR as this package does: nothing to compare
        setting = setting._replace(plain=False)
    backend, cell = fused_backend(dense, device, precision) or TORCH, net.test_cell(lq_size, size)
    with evaluation(net, device.type, precision):
        feat = net.encode(lq)

    def run(clock: StageClock) -> None:
        with clock('other'):
            for _ in upscale_strips(net, lq, size, *control, precision=precision, clock=clock):
                pass
        with clock('dense_folded'), evaluation(dense, device.type, precision):
            render_image(dense, feat, size, cell, backend=backend)
        if setting.plain:
            with clock('dense_plain'), evaluation(dense, device.type, 'fp32'):
                plain_image(dense, 0, feat.float(), size, cell, max_chunks=1)
        if setting.plain and dense.family == 'lte':
            with clock('lte_tables'), evaluation(dense, device.type, 'fp32'):
                dense.pool.tables(feat.float())

    times, peaks = measure_stages(run, device, setting.repeats)
    if setting.plain:  # one chunk was timed: all cost the same but for LTE's tables, which its own code makes once
        once = times.pop('lte_tables', 0.0)
        chunks = max(size[0] * size[1] / CHUNK, 1.0)  # the last one may be shorter
        times['dense_plain'] = once + (times['dense_plain'] - once) * chunks
    stages = [stage for stage in STAGES if stage in times]
    known = [peak for stage in stages if (peak := peaks[stage]) is not None]
    return {
        'case': 'profile',
        'lq_size': list(lq_size),
        'size': list(size),
        'precision': precision,
        'budget': setting.budget,
        'cost_weight': setting.cost_weight,
        'time_ms': {**times, 'total': sum(times[stage] for stage in stages)},
        'repeats': setting.repeats,
        'peak_mib': {**{stage: peaks[stage] for stage in stages}, 'total': max(known, default=None)},
        'macs': macs_per_pixel(net, lq_size, size, shares, dense, reads),
        'routing': {
            'loads': shares,
            'mean_cost': mean_cost(shares, net.decoder.expert_costs),
            **({'lr_reads': reads} if reads else {}),
        },
    }


def dense_decoder(decoder: MoEDecoder, hidden: Sequence[int] | None) -> MoEDecoder:
    """A decoder like `decoder`, of one expert of these hidden widths and random weights, to measure against."""
    pool, j = decoder.pool, most_expensive(decoder)
    expert: Sequence[int] | dict = hidden or [layer.out_features for layer in pool.linears(j)[:-1]]
    family_options = {'hidden_dim': pool.hidden_dim} if isinstance(pool, LTEExperts) else {}
    if isinstance(pool, LMExperts):
        if hidden:
            raise UserError("--dense-hidden belongs to the decoders 'liif' and 'lte'; this network's is 'lm'.")
        latent = [layer.out_features for layer in pool.latent_linears(j)[:-1]]
        expert, family_options = {'latent': latent, 'depth': len(expert)}, {'render_width': pool.render_width}
    dense = MoEDecoder(pool.in_channels, decoder.out_channels, decoder.family, [expert], None, **family_options)
    return dense.to(next(decoder.parameters()).device).eval()


def show_upscaling(console: Console, decoder: MoEDecoder, rows: list[dict]) -> None:
    """A table for each factor; of several experts, one of each expert's cost and share of the output pixels."""
    for row in rows:
        show_scale(console, row)
    if decoder.num_experts > 1:
        macs, shares = rows[0]['macs']['each_expert'], [row['routing']['loads'] for row in rows]
        cells = [
            [str(j + 1), str(depth), thousands(macs[j]), *(f'{100 * of[j]:.1f} %' for of in shares)]
            for j, depth in enumerate(decoder.depths)
        ]
        mean = ['mean', '', '', *(thousands(row['macs']['experts']) for row in rows)]
        columns = ['expert', 'hidden layers', 'thousand MACs', *(scale_label(row['scale']) for row in rows)]
        show_table(console, 'Experts', columns, [*cells, mean])


def show_scale(console: Console, row: dict) -> None:
    """The table of one factor."""
    times, peaks, macs = row['time_ms'], row['peak_mib'], row['macs']
    (height, width), (rows, cols) = row['lq_size'], row['size']
    title = f'{scale_label(row["scale"])}: {height} x {width} to {rows} x {cols} (rows x columns), {row["precision"]}'
    cells = [
        (stage, thousands(sum(macs[part] for part in parts)), f'{times[stage]:.1f}', mib_text(peaks.get(stage)))
        for stage, parts in {**STAGES, **WHOLES}.items()
        if stage in times
    ]
    show_table(console, title, ('stage', 'thousand MACs / pixel', 'ms', 'peak MiB'), cells)


def thousands(macs: float) -> str:
    """Multiply-adds in thousands."""
    return f'{macs / 1e3:,.1f}'
