"""Where the time and memory of one upscale go: encode, map, decode.

Shapes: (1, C, H, W) input, (R, S) output size, J experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from moeisr_basicsr.core import MoEDecoder
from moeisr_basicsr.core.control import Budget
from moeisr_basicsr.core.render import TORCH, Backend, FeatureWindow, Renderer
from moeisr_basicsr.inference import evaluation, make_control, upscale_strips
from moeisr_basicsr.kernels import fused_backend

from .complexity import dense_decoder, heaviest, macs_per_pixel
from .environment import kernel_name
from .measure import interleaved_ms, peak_mib
from .plain import CHUNK, plain_image
from .rendering import render_fixed
from .routing_stats import expert_loads, mean_cost

STAGES = ('encode', 'map', 'decode', 'total')


class Setting(NamedTuple):
    """How an image is upscaled."""

    precision: str = 'fp32'
    cost_weight: float = 0.0
    budget: float | None = None
    fused: bool = True  # use the fused kernels where they run
    plain: bool = True  # measure the plain dense decoder too
    dense_hidden: tuple[int, ...] | None = None  # hidden widths of the dense decoder; None for the heaviest expert's
    repeats: int = 5


class Stages:
    """The stages of upscaling one image, each of them on its own.

    Args:
        net: `MoEISR`, `LIIF` or `LTE`.
        lq: (1, C, H, W) RGB in [0, 1] on the network's device.
        size: (R, S).
        setting: How.
    """

    def __init__(self, net: nn.Module, lq: Tensor, size: tuple[int, int], setting: Setting):
        self.net, self.lq, self.size, self.setting = net, lq, size, setting
        self.decoder, self.device = net.decoder, lq.device
        self.lq_size = tuple(lq.shape[-2:])
        self.cell = net.test_cell(self.lq_size, size)
        self.backend = self.backend_of(self.decoder)
        self.kernel = kernel_name(self.backend)
        # The decoder whose heaviest expert, on every pixel, is the baseline.
        self.dense = self.decoder if setting.dense_hidden is None else dense_decoder(self.decoder, setting.dense_hidden)
        self.dense_backend = self.backend_of(self.dense)
        self.feat = self.encode()
        self.expert_map = self.map()

    def backend_of(self, decoder: MoEDecoder) -> Backend:
        """The fused kernels where they run and are wanted, otherwise PyTorch."""
        return (fused_backend(decoder, self.device, self.setting.precision) if self.setting.fused else None) or TORCH

    def encode(self) -> Tensor:
        """Features (1, C, H, W) of the whole image."""
        with evaluation(self.net, self.device.type, self.setting.precision):
            return self.net.encode(self.lq)

    def map(self) -> Tensor | None:
        """The expert map, (R, S) uint8; None with one expert."""
        if self.decoder.num_experts == 1:
            return None
        control = make_control(self.net, self.setting.cost_weight, self.setting.budget)  # a budget is spent once
        window, everything = FeatureWindow(self.feat, 0, 0, self.lq_size), ((0, self.size[0]), (0, self.size[1]))
        with evaluation(self.net, self.device.type, self.setting.precision):
            renderer = Renderer(
                self.decoder, self.size, self.lq_size, self.cell, control, self.backend, device=self.device
            )
            if isinstance(control, Budget):
                renderer.observe(window, *everything)
            return torch.cat([strip for _, _, strip in renderer.strips(window, *everything)])

    def decode(self) -> Tensor:
        """LR tables and experts: (C_out, R, S)."""
        with evaluation(self.net, self.device.type, self.setting.precision):
            return render_fixed(self.decoder, self.feat, self.size, self.expert_map, self.cell, self.backend)

    def total(self) -> None:
        """The whole upscale as the `upscale` command does it, without files."""
        for _ in upscale_strips(
            self.net,
            self.lq,
            self.size,
            self.setting.cost_weight,
            self.setting.budget,
            precision=self.setting.precision,
        ):
            pass

    def dense_folded(self) -> None:
        """The dense baseline by the same code."""
        everywhere = (
            None
            if self.dense.num_experts == 1
            else torch.full(self.size, heaviest(self.dense), dtype=torch.uint8, device=self.device)
        )
        with evaluation(self.dense, self.device.type, self.setting.precision):
            render_fixed(self.dense, self.feat, self.size, everywhere, self.cell, self.dense_backend)

    def dense_plain_chunk(self) -> None:
        """One chunk of the dense baseline by the plain algorithm, fp32."""
        with evaluation(self.dense, self.device.type, 'fp32'):
            plain_image(self.dense, heaviest(self.dense), self.feat.float(), self.size, self.cell, max_chunks=1)

    def times(self) -> dict[str, float]:
        """Median milliseconds of every stage and of the dense baselines."""
        cases = {name: getattr(self, name) for name in (*STAGES, 'dense_folded')}
        if self.setting.plain:
            cases['dense_plain'] = self.dense_plain_chunk
        times = interleaved_ms(cases, self.setting.repeats, self.device)
        if self.setting.plain:  # chunks cost the same: the last one may be shorter
            pixels = self.size[0] * self.size[1]
            times['dense_plain'] *= pixels / min(CHUNK, pixels)
        return times

    def memory(self) -> dict[str, float | None]:
        """Peak MiB of every stage beyond what was in use before."""
        return {name: peak_mib(getattr(self, name), self.device) for name in STAGES}

    def loads(self) -> list[float]:
        """Each expert's share of the output pixels."""
        return [1.0] if self.expert_map is None else expert_loads(self.expert_map, self.decoder.num_experts)

    def row(self, scale: tuple[float, float]) -> dict:
        """One row of a results document (see `schema`): everything above."""
        loads = self.loads()
        return {
            'case': 'profile',
            'lq_size': list(self.lq_size),
            'size': list(self.size),
            'scale': list(scale),
            'precision': self.setting.precision,
            'budget': self.setting.budget,
            'cost_weight': self.setting.cost_weight,
            'time_ms': self.times(),
            'repeats': self.setting.repeats,
            'peak_mib': self.memory(),
            'macs': macs_per_pixel(self.net, self.lq_size, self.size, loads, self.dense),
            'routing': {'loads': loads, 'mean_cost': mean_cost(loads, self.decoder.expert_costs)},
        }
