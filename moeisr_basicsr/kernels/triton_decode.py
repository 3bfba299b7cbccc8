"""Fused decode on CUDA in Triton: gather, coordinates, expert MLP, output layer and local ensemble in one kernel.

`TritonBackend` builds the LR tables of a tile, sorts its queries by expert in torch and launches the decode kernel
(`triton_kernel`) once per expert; routing is one kernel too, in fp32. This module imports Triton: import it only where
Triton is wanted.

What has run: on CPU, Triton's interpreter on the kernels as they are, against the torch code and the plain twins; the
compiler for compute capability 8.0 and 9.0, down to machine code. Nothing here has been run on a GPU yet: neither the
speed nor the block sizes in `CONFIGS` are measured, and the code around the launch has only seen CPU tensors.

Legend: (R, S) output rows and columns, T latent codes, C feature channels, D_IN width of an expert's first hidden
layer (LIIF) or of the Fourier basis (LTE), D hidden width, D_OUT output channels, J experts; the widths are padded to
powers of two.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from moeisr_basicsr.core.coords import EPS_AREA, Near, grid_corners
from moeisr_basicsr.core.decoder import MoEDecoder, group_by_expert
from moeisr_basicsr.core.liif import LIIFExperts
from moeisr_basicsr.core.lm import LMExperts
from moeisr_basicsr.core.lte import LTEExperts
from moeisr_basicsr.core.mapper import Mapper
from moeisr_basicsr.core.render import Tile, TorchBackend
from moeisr_basicsr.kernels.triton_kernel import decode_kernel, interpreted, render_kernel, route_kernel
from moeisr_basicsr.kernels.triton_pack import (
    PackedExpert,
    liif_conv,
    lm_table,
    lte_conv,
    pack_liif,
    pack_lm,
    pack_lte,
    padded,
)

MAX_WIDTH = 512  # wider activations do not fit the registers of one program
MAX_RENDER_WIDTH = 64  # of lm, whose layers are in registers whole
MAX_ROUTED = 16  # experts; the routing kernel is unrolled over them
PRECISIONS = {  # operand type, and how tl.dot multiplies fp32 operands
    'fp32': (torch.float32, 'ieee'),
    'tf32': (torch.float32, 'tf32'),
    'fp16': (torch.float16, 'ieee'),
    'bf16': (torch.bfloat16, 'ieee'),
}


class Config(NamedTuple):
    """Block sizes of one launch."""

    block: int  # queries of one program
    chunk: int  # inputs or outputs of a layer that are on chip at a time
    num_warps: int
    num_stages: int  # chunks of weights in flight


# From the largest blocks (each read of the weights serves 4 * block rows) to what small shared memories hold; the
# first that the device accepts is used. Chosen by the compiler's report for widths of 256 on compute capability 9.0:
# hardly any spilled register, and 128, 64, 64, 10 KiB of shared memory for the 16-bit ones. Not measured.
HALF_CONFIGS = (Config(32, 64, 8, 2), Config(32, 32, 8, 2), Config(16, 32, 4, 2), Config(16, 16, 4, 1))
CONFIGS = {
    'bf16': HALF_CONFIGS,
    'fp16': HALF_CONFIGS,
    'tf32': (Config(16, 32, 8, 2), Config(16, 16, 8, 2), Config(8, 16, 8, 2), Config(8, 16, 4, 1)),
    'fp32': (Config(16, 16, 8, 2), Config(16, 16, 8, 1), Config(8, 16, 8, 2), Config(8, 16, 4, 1)),
}


def reason(device: torch.device | str = 'cuda') -> str:
    """Why the kernel cannot run on `device`; empty where it can."""
    if interpreted():
        return ''
    if torch.device(device).type != 'cuda' or not torch.cuda.is_available():
        return f'the Triton kernel needs a CUDA device; got {device}'
    if torch.version.hip is not None:
        return 'the Triton kernel is written for CUDA; this PyTorch is built for ROCm'
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f'the Triton kernel needs compute capability 8.0; the device has {capability[0]}.{capability[1]}'
    return ''


def available(device: torch.device | str = 'cuda') -> bool:
    """Whether the kernel can run on `device`."""
    return not reason(device)


class TritonBackend(TorchBackend):
    """Routes and decodes the tiles of one decoder with fused kernels.

    Weights are packed here, once: build another one after the decoder's weights or device have changed.

    Args:
        decoder: On a CUDA device, or anywhere under Triton's interpreter.
        precision: Operands of the products between layers and of LIIF's tables: 'fp32', 'tf32', 'fp16' or 'bf16'.
            Sums, coordinates, ensemble weights, LTE's tables and angles, and the blend are fp32 in all of them.

    Raises:
        ValueError: An unknown precision, a device that cannot run the kernel, or a width above `MAX_WIDTH`.
    """

    tile = 128  # the LR tables of four 256-wide experts take 32 MiB in bf16, less than an H100's L2

    def __init__(self, decoder: MoEDecoder, precision: str = 'bf16'):
        if precision not in PRECISIONS:
            raise ValueError(f'precision must be one of {list(PRECISIONS)}; got {precision!r}.')
        pool, num_experts = decoder.pool, decoder.num_experts
        device = next(pool.parameters()).device
        if reason(device):
            raise ValueError(f'{reason(device)}.')
        dtype, self.dot = PRECISIONS[precision]
        self.decoder = decoder
        self.configs = CONFIGS[precision]
        self.emulate_bf16 = interpreted() and precision == 'bf16'
        self.d_out = padded(decoder.out_channels)
        layered, exact = [j for j in range(num_experts) if pool.linears(j)], precision == 'fp32'
        widest = MAX_WIDTH
        with torch.no_grad():
            if isinstance(pool, LMExperts):
                self.experts = {j: pack_lm(pool, j, self.d_out, dtype) for j in layered}
                self.latents = {j: lm_table(pool, j, dtype, exact) for j in layered}
                widest = MAX_RENDER_WIDTH
            elif isinstance(pool, LTEExperts):
                self.experts = {j: pack_lte(pool, j, self.d_out, dtype) for j in layered}
                self.conv = lte_conv(pool)
            else:
                assert isinstance(pool, LIIFExperts)
                self.experts = {j: pack_liif(pool, j, self.d_out, dtype) for j in layered}
                self.conv = liif_conv(pool, dtype, exact)
        width = max(self.d_out, *(width for expert in self.experts.values() for width in (expert.d_in, expert.d)))
        if width > widest:
            raise ValueError(f'the Triton kernel takes layers of at most {widest}; the widest, padded, has {width}.')
        self._accepted = [0] * num_experts  # position in `configs` of the first that the device took

    @torch.no_grad()
    def decode(self, decoder: MoEDecoder, tile: Tile) -> Tensor:
        """The tile's pixels, each from its expert: (C_out, R, S) fp32."""
        assert decoder is self.decoder, 'a TritonBackend holds the packed weights of one decoder'
        size = tile.rows.rel.shape[1], tile.cols.rel.shape[1]
        out = torch.zeros(decoder.out_channels, *size, device=tile.window.device)  # what experts without layers predict
        if tile.expert_map is None:
            order, counts = torch.arange(size[0] * size[1], device=out.device), [size[0] * size[1]]
        else:
            order, counts = group_by_expert(tile.expert_map.flatten(), decoder.num_experts)
        with torch.autocast(out.device.type, enabled=False), torch.cuda.device_of(out):
            table_of = self._tables(tile)
            for j, which in enumerate(order.split(counts)):
                if which.numel() > 0 and j in self.experts:
                    self._launch(j, tile, table_of(j, which), which, out)
        return out

    def _tables(self, tile: Tile) -> Callable[[int, Tensor], Tensor]:
        """A function of an expert and its queries, which gives the LR table that it reads: (T, channels)."""
        pool, cell_lr = self.decoder.pool, tile.cell_lr.float()
        if not isinstance(pool, LMExperts):
            table = self.conv(tile.window)
            if not isinstance(pool, LIIFExperts) or len(pool.owners) == 1:
                return lambda j, which: table
            parts = dict(zip(pool.owners, table.split([expert.d_in for expert in self.experts.values()], dim=1)))
            return lambda j, which: parts[j]
        height, width = tile.window.shape[-2] - 2, tile.window.shape[-1] - 2
        index = grid_corners(tile.rows, tile.cols, width).index[:, 0]  # (4, N)

        def latent_table(j: int, which: Tensor) -> Tensor:
            reads = None
            if tile.expert_map is not None:
                reads = torch.zeros(height * width, dtype=torch.bool, device=which.device)
                reads[index[:, which]] = True
            return self.latents[j](tile.window, cell_lr, reads)

        return latent_table

    def _launch(self, j: int, tile: Tile, table: Tensor, which: Tensor, out: Tensor) -> None:
        """Expert j on the queries `which`, into `out`."""
        expert, family = self.experts[j], self.decoder.family
        axes = [part.contiguous() for axis in (tile.rows, tile.cols) for part in axis]
        w_coord = expert.coordinate_part(tile.cell_lr.float())
        sizes = which.numel(), *out.shape[1:], tile.window.shape[-1] - 2, table.stride(0)
        options = dict(
            LAYERS=expert.layers,
            CHANNELS=out.shape[0],
            D=expert.d,
            D_OUT=self.d_out,
            DOT=self.dot,
            EMULATE_BF16=self.emulate_bf16,
            EPS=EPS_AREA,
            # Fused products and sums would round LTE's angles otherwise than the official code, by more than 1e-5 of a
            # cosine at high frequencies.
            enable_fp_fusion=family != 'lte',
        )
        for position in range(self._accepted[j], len(self.configs)):
            config = fit_config(self.configs[position], expert)
            options |= dict(BLOCK=config.block, num_warps=config.num_warps, num_stages=config.num_stages)
            programs = (triton.cdiv(which.numel(), config.block),)
            try:
                if family == 'lm':
                    arguments = out, which, *axes, table, w_coord, expert.weights, expert.biases, *sizes
                    render_kernel[programs](*arguments, **options)
                else:
                    freq = table[:, expert.d_in :] if family == 'lte' else table
                    arguments = out, which, *axes, table, freq, w_coord, expert.weights, expert.biases, *sizes
                    shape = dict(LTE=family == 'lte', D_IN=expert.d_in, CHUNK=config.chunk)
                    decode_kernel[programs](*arguments, **options, **shape)
            except (OutOfResources, PTXASError):  # too much shared memory, too many registers
                if position + 1 == len(self.configs):
                    raise
                continue
            self._accepted[j] = position
            return

    def logits(self, mapper: Mapper, table: Tensor, rows: Near, cols: Near, cell_lr: Tensor) -> Tensor:
        """(R, S, J) fp32."""
        if mapper.query_out.out_features > MAX_ROUTED:
            return super().logits(mapper, table, rows, cols, cell_lr)
        return _launch_route(mapper, table, rows, cols, cell_lr, want_logits=True)

    def route(self, mapper: Mapper, table: Tensor, rows: Near, cols: Near, cell_lr: Tensor) -> Tensor:
        """(R, S) uint8."""
        if mapper.query_out.out_features > MAX_ROUTED:
            return super().route(mapper, table, rows, cols, cell_lr)
        return _launch_route(mapper, table, rows, cols, cell_lr, want_logits=False)


@torch.no_grad()
def _launch_route(mapper: Mapper, table: Tensor, rows: Near, cols: Near, cell_lr: Tensor, want_logits: bool) -> Tensor:
    """Logits (R, S, J), or the expert map (R, S)."""
    size, num_experts = (rows.rel.shape[0], cols.rel.shape[0]), mapper.query_out.out_features
    w_rel, w_cell = mapper.split_query_in()
    w_rel = w_rel.t().contiguous() if mapper.granularity == 'output_pixel' else torch.zeros_like(w_rel.t()).contiguous()
    table = (table + (w_cell * cell_lr).sum(dim=1)).contiguous()  # (h, w, WIDTH)
    out = (
        torch.empty(*size, num_experts, device=table.device)
        if want_logits
        else torch.empty(size, dtype=torch.uint8, device=table.device)
    )
    count, block = size[0] * size[1], 128
    with torch.cuda.device_of(out):
        route_kernel[(triton.cdiv(count, block),)](
            out,
            out,
            table,
            *(part.contiguous() for axis in (rows, cols) for part in axis),
            w_rel,
            mapper.query_out.weight,
            mapper.query_out.bias,
            count,
            size[1],
            table.shape[1],
            WANT_LOGITS=want_logits,
            J=num_experts,
            WIDTH=table.shape[2],
            PADDED=triton.next_power_of_2(table.shape[2]),
            BLOCK=block,
        )
    return out


def fit_config(config: Config, expert: PackedExpert) -> Config:
    """`config`, which is written for widths of 256, for the widths of `expert`."""
    block = config.block if max(expert.d_in, expert.d) <= 256 else max(4, config.block // 2)
    half = expert.d_in if expert.w_rel is not None else expert.d_in // 2  # LTE takes cosines and sines in turn
    return config._replace(block=block, chunk=min(config.chunk, half, expert.d))
