"""Where the time and memory of one training step go.

Shapes: B images, (h, w) LR patch, Q queries, J experts.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moeisr_basicsr.core import gumbel_noise

EXPERT_GRADS = ()

from .measure import PeakMeter, medians, synchronize

PARTS = ('encoder', 'mapper', 'tables', 'chosen_experts', 'unchosen_experts', 'other', 'backward', 'optimizer')


class Batch(NamedTuple):
    """A made-up training batch; the loss does not know that it is noise, and the work is the same."""

    lq: Tensor  # (B, C, h, w)
    gt: Tensor  # (B, Q, C_out)
    coord: Tensor  # (B, Q, 2)
    cell: Tensor  # (B, Q, 2)
    noise: Tensor | None  # (B, Q, J)


def make_batch(
    net: nn.Module,
    batch_size: int = 16,
    patch: int = 48,
    queries: int = 2304,
    channels: int = 3,
    scale: float = 2.5,
    seed: int = 0,
) -> Batch:
    """Noise in the shapes of LIIF's recipe: 16 patches of 48x48, 2304 queries each, at the mean factor of U(1, 4)."""
    generator = torch.Generator().manual_seed(seed)
    device = next(net.parameters()).device
    coord = torch.rand(batch_size, queries, 2, generator=generator) * 2 - 1
    noise = None
    if net.num_experts > 1:
        noise = torch.stack([gumbel_noise((queries, net.num_experts), seed, 0, slot) for slot in range(batch_size)])
        noise = noise.to(device)
    return Batch(
        torch.rand(batch_size, channels, patch, patch, generator=generator).to(device),
        torch.rand(batch_size, queries, net.decoder.out_channels, generator=generator).to(device),
        coord.to(device),
        torch.full_like(coord, 2 / (patch * scale)).to(device),
        noise,
    )


class PartClock:
    """Adds up the milliseconds of named parts; a part inside another one counts for itself only.

    Args:
        device: It is waited for at both ends of every part, so the parts add up but cannot overlap.
        meter: Notes each part's highest memory too.
    """

    def __init__(self, device: torch.device, meter: PeakMeter | None = None):
        self.device, self.meter = device, meter
        self.times: dict[str, float] = {}
        self.peaks: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The time of the block belongs to `name`."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        if self._open:
            name = self._open[-1]
            self.times[name] = self.times.get(name, 0.0) + (now - self._since) * 1e3
            if self.meter is not None:
                self.peaks[name] = max(self.peaks.get(name, 0.0), self.meter.read())
        if self.meter is not None:
            self.meter.start()
        self._since = time.perf_counter()

    @contextmanager
    def watching(self, owner: Any, method: str, name: Callable[[], str]) -> Iterator[None]:
        """Calls of `owner.method` belong to the part `name()`."""
        original = getattr(owner, method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.part(name()):
                return original(*args, **kwargs)

        setattr(owner, method, watched)
        try:
            yield
        finally:
            delattr(owner, method)  # the class's own method shows again


@contextmanager
def watch_network(net: nn.Module, clock: PartClock) -> Iterator[None]:
    """The parts of a network's forward.

    Experts that run without autograd are the unchosen ones of 'exact' and 'sampled'. 'naive', and 'exact' where all
    hidden layers are shared, run every expert on every query under autograd: all their time is that of chosen experts.
    """
    decoder = net.decoder
    with (
        clock.watching(net.encoder, 'forward', lambda: 'encoder'),
        clock.watching(decoder.pool, 'tables', lambda: 'tables'),
        clock.watching(decoder.pool, 'evaluate_all', lambda: 'chosen_experts'),
        clock.watching(
            decoder.pool, 'evaluate', lambda: 'chosen_experts' if torch.is_grad_enabled() else 'unchosen_experts'
        ),
    ):
        if decoder.mapper is None:
            yield
            return
        with (
            clock.watching(decoder.mapper, 'forward', lambda: 'mapper'),
            clock.watching(decoder.mapper, 'table', lambda: 'mapper'),
        ):
            yield


def run_step(net: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, clock: PartClock) -> None:
    """One step: forward, L1 loss, backward, update."""
    with watch_network(net, clock), clock.part('other'):
        optimizer.zero_grad()
        output = net(batch.lq, batch.coord, batch.cell, noise=batch.noise)
        loss = (output - batch.gt).abs().mean()
    with clock.part('backward'):
        loss.backward()
    with clock.part('optimizer'):
        optimizer.step()


def profile_training(
    net: nn.Module, batch: Batch, repeats: int = 3, kinds: tuple[str, ...] = EXPERT_GRADS
) -> list[dict]:
    """Rows of a results document (see `schema`), one per `expert_grad`; a dense network has one row, 'dense'.

    The kinds take turns. Memory is measured in steps of their own. The network's weights and mode are restored.

    Args:
        net: `MoEISR`, `LIIF` or `LTE`.
        batch: From `make_batch`.
        repeats: Timed steps of each kind.
        kinds: Which of 'exact', 'naive', 'sampled'.
    """
    device = batch.lq.device
    if net.num_experts == 1:
        kinds = ('dense',)
    saved = {key: value.detach().clone() for key, value in net.state_dict().items()}
    mode, grad_kind = net.training, net.decoder.expert_grad
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)
    net.train()
    times: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    peaks: dict[str, dict[str, float]] = {}
    try:
        for repeat in range(-2, repeats):  # two rounds before: one warms up and makes Adam's state, one is for memory
            for kind in kinds:
                if kind != 'dense':
                    net.decoder.expert_grad = kind
                meter = PeakMeter(device) if repeat == -1 else None
                clock = PartClock(device, meter if meter is not None and meter.works else None)
                run_step(net, batch, optimizer, clock)
                if repeat == -1:
                    peaks[kind] = clock.peaks
                elif repeat >= 0:
                    times[kind].append({part: clock.times.get(part, 0.0) for part in PARTS})
    finally:
        net.decoder.expert_grad = grad_kind
        net.train(mode)
        net.zero_grad()
        net.load_state_dict(saved)
    return [_row(kind, medians(times[kind]), peaks[kind], batch, repeats) for kind in kinds]


def _row(kind: str, times: dict[str, float], peaks: dict[str, float], batch: Batch, repeats: int) -> dict:
    peak_mib = {part: peaks.get(part) for part in PARTS if not peaks or part in peaks}
    peak_mib['total'] = max(peaks.values()) if peaks else None
    return {
        'case': f'train-{kind}',
        'lq_size': list(batch.lq.shape[-2:]),
        'count': len(batch.lq),
        'time_ms': {**times, 'total': sum(times.values())},
        'peak_mib': peak_mib,
        'repeats': repeats,
        'notes': f'{len(batch.lq)} images, {batch.coord.shape[1]} queries each, Adam, without data loading',
    }
