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

from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from moeisr_basicsr.core.coords import EPS_AREA, Near
from moeisr_basicsr.core.decoder import MoEDecoder, group_by_expert
from moeisr_basicsr.core.liif import LIIFExperts
from moeisr_basicsr.core.lte import LTEExperts
from moeisr_basicsr.core.mapper import Mapper
from moeisr_basicsr.core.precision import full_fp32
from moeisr_basicsr.core.render import Tile, TorchBackend
from moeisr_basicsr.kernels.triton_kernel import decode_kernel, interpreted, route_kernel

MIN_WIDTH = 16  # the least inner size of a tensor core product
MAX_WIDTH = 512  # wider activations do not fit the registers of one program
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


def _padded(width: int) -> int:
    return max(MIN_WIDTH, triton.next_power_of_2(width))


def _pad(x: Tensor, *sizes: int) -> Tensor:
    """Zeros behind each of the first dimensions of `x` up to `sizes`."""
    pads = [pad for have, size in zip(x.shape, sizes) for pad in (size - have, 0)]
    return F.pad(x, [0, 0] * (x.dim() - len(sizes)) + pads[::-1])


def _pad_halves(x: Tensor, half: int) -> Tensor:
    """Zeros behind each half of the first dimension of `x`: (2 K, ...) -> (2 * half, ...)."""
    return torch.cat([_pad(part, half) for part in x.chunk(2)])


class PackedExpert(NamedTuple):
    """One expert in the kernel's layout."""

    weights: Tensor  # flat: each layer behind the table or basis as (inputs, outputs)
    biases: Tensor  # flat fp32
    w_rel: Tensor | None  # LIIF: (2, D_IN) fp32, relative row and column in the first layer; None for LTE
    w_cell: Tensor  # LIIF: (D_IN, 2) fp32; LTE: (D_IN / 2, 2) fp32, the phase
    bias: Tensor | None  # LIIF: (D_IN,) fp32, first layer
    d_in: int
    d: int
    layers: int
    relu_first: bool

    def coordinate_part(self, cell_lr: Tensor) -> Tensor:
        """What the kernel reads as `w_coord`, for the cell (2,) in units of LR pixels."""
        constant = (self.w_cell * cell_lr).sum(dim=1)
        if self.w_rel is None or self.bias is None:  # LTE
            return constant
        return torch.cat([self.w_rel, (constant + self.bias)[None]])


def _pack_layers(
    linears: list[tuple[Tensor, Tensor]], d_in: int, d_out: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, int]:
    """Weights (out, in) and biases, padded with zeros, transposed and laid end to end; and D."""
    d = max([_padded(weight.shape[0]) for weight, _ in linears[:-1]], default=MIN_WIDTH)
    widths = [d_in, *[d] * (len(linears) - 1), d_out]
    weights = [
        _pad(weight, fan_out, fan_in).t().flatten()
        for (weight, _), fan_in, fan_out in zip(linears, widths[:-1], widths[1:])
    ]
    biases = [_pad(bias, fan_out) for (_, bias), fan_out in zip(linears, widths[1:])]
    return torch.cat(weights).to(dtype), torch.cat(biases), d


def _pack_liif(pool: LIIFExperts, j: int, d_out: int, dtype: torch.dtype) -> PackedExpert:
    (_, bias), *linears = [(layer.weight.float(), layer.bias.float()) for layer in pool.linears(j)]
    d_in = _padded(bias.shape[0])
    w_rel, w_cell = _pad(pool.split_first(j)[1].float(), d_in).split(2, dim=1)  # (D_IN, 2) each
    relu_first = bool(linears)
    if not linears:  # one linear layer in all: the table holds the answers, and an identity passes them on
        linears = [(torch.eye(bias.shape[0], device=bias.device), torch.zeros_like(bias))]
    weights, biases, d = _pack_layers(linears, d_in, d_out, dtype)
    return PackedExpert(
        weights, biases, w_rel.t().contiguous(), w_cell, _pad(bias, d_in), d_in, d, len(linears), relu_first
    )


def _pack_lte(pool: LTEExperts, j: int, d_out: int, dtype: torch.dtype) -> PackedExpert:
    linears = [(layer.weight.float(), layer.bias.float()) for layer in pool.linears(j)]
    half = _padded(pool.hidden_dim // 2)
    linears[0] = _pad_halves(linears[0][0].t(), half).t(), linears[0][1]
    weights, biases, d = _pack_layers(linears, 2 * half, d_out, dtype)
    phase = _pad(pool.phase.weight.float(), half)
    return PackedExpert(weights, biases, None, phase, None, 2 * half, d, len(linears), False)


class TableConv(NamedTuple):
    """The 3x3 convolution that makes the LR tables of all experts."""

    weight: Tensor  # LIIF: (sum of D_IN, C, 3, 3), or (D_IN, C, 3, 3) where the experts share their first layer;
    # LTE: (2 D_IN, C, 3, 3) fp32, coefficients before frequencies
    bias: Tensor | None  # LTE only; LIIF's goes into `PackedExpert.coordinate_part`, in fp32
    exact: bool  # without rounding fp32 operands to tf32

    def __call__(self, window: Tensor) -> Tensor:
        """(1, C, h + 2, w + 2) -> (T, channels): one row per latent code."""
        window = window.to(self.weight.dtype).contiguous(memory_format=torch.channels_last)
        with full_fp32(window.device) if self.exact else nullcontext():
            table = F.conv2d(window, self.weight, self.bias)  # (1, channels, h, w)
        return table[0].permute(1, 2, 0).flatten(0, 1).contiguous()  # no copy where the convolution is channels-last


def _liif_conv(pool: LIIFExperts, experts: list[PackedExpert], dtype: torch.dtype, exact: bool) -> TableConv:
    weight = torch.cat([_pad(pool.split_first(j)[0].float(), experts[j].d_in) for j in range(pool.num_tables)])
    return TableConv(weight.to(dtype).contiguous(memory_format=torch.channels_last), None, exact)


def _lte_conv(pool: LTEExperts, experts: list[PackedExpert]) -> TableConv:
    half = experts[0].d_in // 2
    assert pool.coef.bias is not None and pool.freq.bias is not None  # the default of nn.Conv2d
    # Official frequency channels alternate between row and column. Rounded frequencies would be off by whole turns.
    pairs = [
        (coef.float(), torch.cat([freq[0::2], freq[1::2]]).float())
        for coef, freq in ((pool.coef.weight, pool.freq.weight), (pool.coef.bias, pool.freq.bias))
    ]
    weight, bias = (torch.cat([_pad_halves(part, half) for part in pair]) for pair in pairs)
    return TableConv(weight.contiguous(memory_format=torch.channels_last), bias, True)


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
        self.lte = decoder.family == 'lte'
        self.one_table = not isinstance(pool, LIIFExperts) or pool.num_tables == 1  # for all experts
        self.configs = CONFIGS[precision]
        self.emulate_bf16 = interpreted() and precision == 'bf16'
        self.d_out = _padded(decoder.out_channels)
        with torch.no_grad():
            if isinstance(pool, LTEExperts):
                self.experts = [_pack_lte(pool, j, self.d_out, dtype) for j in range(num_experts)]
                self.conv = _lte_conv(pool, self.experts)
            else:
                assert isinstance(pool, LIIFExperts)
                self.experts = [_pack_liif(pool, j, self.d_out, dtype) for j in range(num_experts)]
                self.conv = _liif_conv(pool, self.experts, dtype, precision == 'fp32')
            widest = max(self.d_out, *(width for expert in self.experts for width in (expert.d_in, expert.d)))
            if widest > MAX_WIDTH:
                raise ValueError(
                    f'the Triton kernel takes layers of at most {MAX_WIDTH}; the widest, padded, has {widest}.'
                )
        self._accepted = [0] * num_experts  # position in `configs` of the first that the device took

    @torch.no_grad()
    def decode(self, decoder: MoEDecoder, tile: Tile) -> Tensor:
        """The tile's pixels, each from its expert: (C_out, R, S) fp32."""
        assert decoder is self.decoder, 'a TritonBackend holds the packed weights of one decoder'
        size = tile.rows.rel.shape[1], tile.cols.rel.shape[1]
        out = torch.empty(decoder.out_channels, *size, device=tile.window.device)
        if tile.expert_map is None:
            order, counts = torch.arange(size[0] * size[1], device=out.device), [size[0] * size[1]]
        else:
            order, counts = group_by_expert(tile.expert_map.flatten(), decoder.num_experts)
        with torch.autocast(out.device.type, enabled=False), torch.cuda.device_of(out):
            table = self.conv(tile.window)
            first = 0  # channel at which an expert's table starts
            for j, which in enumerate(order.split(counts)):
                if which.numel() > 0:
                    self._launch(j, tile, table, first, which, out)
                first += 0 if self.one_table else self.experts[j].d_in
        return out

    def _launch(self, j: int, tile: Tile, table: Tensor, first: int, which: Tensor, out: Tensor) -> None:
        """Expert j on the queries `which`, into `out`."""
        expert = self.experts[j]
        axes = [part.contiguous() for axis in (tile.rows, tile.cols) for part in axis]
        arguments = (
            out,
            which,
            *axes,
            table[:, first:],
            table[:, expert.d_in :] if self.lte else table,
            expert.coordinate_part(tile.cell_lr.float()),
            expert.weights,
            expert.biases,
            which.numel(),
            *out.shape[1:],
            tile.window.shape[-1] - 2,
            table.shape[1],
        )
        # Fused products and sums would round LTE's angles otherwise than the official code, by more than 1e-5 of a
        # cosine at high frequencies.
        options = dict(
            LTE=self.lte,
            RELU_FIRST=expert.relu_first,
            LAYERS=expert.layers,
            CHANNELS=out.shape[0],
            D_IN=expert.d_in,
            D=expert.d,
            D_OUT=self.d_out,
            DOT=self.dot,
            EMULATE_BF16=self.emulate_bf16,
            EPS=EPS_AREA,
            enable_fp_fusion=not self.lte,
        )
        for position in range(self._accepted[j], len(self.configs)):
            config = fit_config(self.configs[position], expert)
            try:
                decode_kernel[(triton.cdiv(which.numel(), config.block),)](
                    *arguments,
                    **options,
                    BLOCK=config.block,
                    CHUNK=config.chunk,
                    num_warps=config.num_warps,
                    num_stages=config.num_stages,
                )
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
