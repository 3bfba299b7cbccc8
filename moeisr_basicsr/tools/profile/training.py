"""Where the time and memory of one training step go.

Shapes: B images, Q queries.
"""

import copy
from collections.abc import Callable

import torch
from rich.console import Console

from moeisr_basicsr.analysis.measure import StageClock
from moeisr_basicsr.archs.moeisr_arch import MoEISR

from .stages import measure_stages, mib_text, show_table

PARTS = ('encoder', 'mapper', 'tables', 'chosen experts', 'unchosen experts', 'other', 'backward', 'optimizer')
SCALE = 2.5  # the mean factor of U(1, 4)


def profile_training(net: MoEISR, batch: int = 16, patch: int = 48, queries: int = 2304, repeats: int = 3) -> dict:
    """A row of a results document (see `analysis.schema`): one step with L1 and Adam, in the shapes of LIIF's recipe.

    The images are noise: the work is the same.

    Args:
        net: `MoEISR`, `LIIF` or `LTE`; it is not changed.
        batch: B.
        patch: LR pixels per side.
        queries: Q.
        repeats: Timed steps.
    """
    net = copy.deepcopy(net).train()  # its methods get clocks, its weights are trained
    clocks: list[StageClock] = []
    watch_network(net, clocks)
    device = next(net.parameters()).device
    lq = torch.rand(batch, net.in_channels, patch, patch, device=device)
    gt = torch.rand(batch, queries, net.decoder.out_channels, device=device)
    coord = torch.rand(batch, queries, 2, device=device) * 2 - 1
    cell = torch.full_like(coord, 2 / (patch * SCALE))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)

    def step(clock: StageClock) -> None:
        clocks[:] = [clock]
        with clock('other'):
            optimizer.zero_grad()
            loss = (net(lq, coord, cell) - gt).abs().mean()
        with clock('backward'):
            loss.backward()
        with clock('optimizer'):
            optimizer.step()

    times, peaks = measure_stages(step, device, repeats)
    known = [peak for peak in peaks.values() if peak is not None]
    return {
        'case': 'train',
        'lq_size': [patch, patch],
        'count': batch,
        'time_ms': {**{part: times[part] for part in PARTS if part in times}, 'total': sum(times.values())},
        'peak_mib': {**peaks, 'total': max(known, default=None)},
        'repeats': repeats,
        'notes': f'{batch} images, {queries} queries each, Adam, without data loading',
    }


def watch_network(net: MoEISR, clocks: list[StageClock]) -> None:
    """Make the parts of a network's forward tell `clocks[0]`. Unchosen experts are those that run without autograd."""
    pool, mapper = net.decoder.pool, net.decoder.mapper
    watched = [(net, 'encode', 'encoder'), (pool, 'tables', 'tables')]
    watched += [(pool, name, 'chosen experts') for name in ('predict', 'predict_all')]
    watched += [(mapper, name, 'mapper') for name in ('forward', 'table') if mapper is not None]

    def clocked(method: Callable, part: str) -> Callable:
        def call(*args, **kwargs):
            with clocks[0](part if torch.is_grad_enabled() else 'unchosen experts'):
                return method(*args, **kwargs)

        return call

    for owner, name, part in watched:
        setattr(owner, name, clocked(getattr(owner, name), part))


def show_training(console: Console, row: dict) -> None:
    """Time and memory of every part."""
    cells = [(part, f'{ms:.1f}', mib_text(row['peak_mib'][part])) for part, ms in row['time_ms'].items()]
    show_table(console, f'Training step: {row["notes"]}', ('part', 'ms', 'peak MiB'), cells)
