"""Fused decode on x86-64 processors: gather, coordinates, expert MLP, local ensemble and output layer in one pass.

The C++ code (csrc/) groups the pixels of a small tile by expert and keeps each block of activations in cache. bf16
(bf16 operands, fp32 sums) runs on AVX512_BF16 or AMX; fp32 on AVX2, AVX-512, or on AMX with every number split into
three bf16 parts: 24 bits of mantissa, so the accuracy of fp32, at twice its speed. Results do not depend on threads, tiles or neighbours. Where it cannot run, `available()` is False and the callers use the torch code in `core`.

Legend: h x w output pixels, Ht x Wt cells of the LR tables, D width of an expert's first hidden layer, K frequencies
(LTE), J experts, C output channels.
"""
import ctypes
import logging
import os
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p
from functools import lru_cache
from typing import NamedTuple, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from moeisr_basicsr.core.coords import GridAxis
from moeisr_basicsr.kernels.build import BuildError, load_library

PAD = 32  # csrc/decode.h, kPad
# Ways to compute, in the order of csrc/api.cpp, enum Isa, from 1; for each precision the later is the faster.
ISAS = {'fp32': ('avx2', 'avx512', 'amx_fp32'), 'bf16': ('avx512_bf16', 'amx_bf16')}
ALL_ISAS = ISAS['fp32'] + ISAS['bf16']

Linear = tuple[Tensor, Tensor]  # weight (out, in), bias (out)


class LteTables(NamedTuple):
    """What LTE's experts share, per LR cell; fp32 (a bf16 frequency would be off by whole turns)."""
    coef: Tensor  # (Ht, Wt, 2K) coefficients of the K cosines, then of the K sines
    freq: Tensor  # (Ht, Wt, 2K) K row frequencies, then K column frequencies: the official channels 0::2, then 1::2
    phase: Tensor  # (K) constant of the image: the phase layer applied to cell times LR size


class _Layer(Structure):
    _fields_ = [('inp', c_int64), ('out', c_int64), ('weight', c_void_p), ('bias', c_void_p)]


class _Expert(Structure):
    _fields_ = [('width', c_int64), ('num_layers', c_int64), ('last_width', c_int64), ('w_rel', c_void_p),
                ('layers', POINTER(_Layer)), ('w_last', c_void_p), ('b_last', c_void_p)]


class _Table(Structure):
    _fields_ = [('data', c_void_p), ('stride', c_int64)]


class _Decode(Structure):
    _fields_ = [(name, c_int64) for name in ('num_experts', 'channels')]
    _fields_ += [('experts', POINTER(_Expert)), ('tables', POINTER(_Table)), ('table_is_bf16', c_int64)]
    _fields_ += [(name, c_void_p) for name in ('coef', 'freq', 'phase')]
    _fields_ += [(name, c_int64) for name in ('coef_stride', 'freq_stride', 'basis', 'table_width', 'height', 'width')]
    _fields_ += [(name, c_void_p) for name in ('row_index', 'col_index', 'row_rel', 'col_rel', 'expert_map')]
    _fields_ += [('map_stride', c_int64), ('out', c_void_p)]
    _fields_ += [(name, c_int64) for name in ('out_plane_stride', 'out_row_stride', 'tile_rows', 'tile_cols',
                                              'num_threads')]


class _Route(Structure):
    _fields_ = [('num_experts', c_int64), ('hidden', c_int64), ('table', c_void_p), ('table_stride', c_int64),
                ('table_width', c_int64)]
    _fields_ += [(name, c_void_p) for name in ('w_rel', 'w_out', 'b_out', 'score_bias')]
    _fields_ += [('height', c_int64), ('width', c_int64)]
    _fields_ += [(name, c_void_p) for name in ('row_index', 'col_index', 'row_rel', 'col_rel', 'expert_map')]
    _fields_ += [('map_stride', c_int64), ('logits', c_void_p), ('num_threads', c_int64)]


class _TableJob(Structure):
    _fields_ = [('layer', _Layer), ('window', c_void_p), ('channels', c_int64), ('height', c_int64),
                ('width', c_int64), ('out', c_void_p), ('out_stride', c_int64), ('out_is_bf16', c_int64),
                ('num_threads', c_int64)]


class _Loaded(NamedTuple):
    library: ctypes.CDLL | None
    isas: tuple[str, ...]  # that run on this processor
    reason: str


@lru_cache(maxsize=None)
def _load() -> _Loaded:
    """Builds or loads the library once per process, and says once which path runs and why."""
    logger = logging.getLogger('basicsr.kernels')
    switch = os.environ.get('MOEISR_KERNELS', 'auto')
    if switch not in ('auto', 'off'):
        raise ValueError(f"MOEISR_KERNELS must be 'auto' or 'off'; got '{switch}'.")
    if switch == 'off':
        return _say(logger.info, _Loaded(None, (), 'torch code: MOEISR_KERNELS=off'))
    try:
        library = load_library()
    except BuildError as error:
        return _say(logger.warning, _Loaded(None, (), f'torch code, slower: {error}'))
    for name in ('moeisr_supported', 'moeisr_decode', 'moeisr_table', 'moeisr_route'):
        getattr(library, name).restype = c_int64
    bits = library.moeisr_supported()
    isas = tuple(isa for i, isa in enumerate(ALL_ISAS, start=1) if bits >> i & 1)
    if not isas:
        return _say(logger.warning, _Loaded(None, (), 'torch code, slower: the processor has no AVX2'))
    return _say(logger.info, _Loaded(library, isas, f'fused C++ kernels: fp32 by {_best(isas, "fp32")}, '
                                                    f'bf16 by {_best(isas, "bf16")}'))


def _say(log, loaded: _Loaded) -> _Loaded:
    log(f'CPU decode runs on {loaded.reason}.')
    return loaded


def _best(isas: Sequence[str], precision: str) -> str:
    """The fastest way; without bf16 instructions bf16 is computed in fp32."""
    preferred = {'fp32': ('amx_fp32', 'avx512', 'avx2'), 'bf16': ('amx_bf16', 'avx512_bf16', 'avx512', 'avx2')}
    return next(isa for isa in preferred[precision] if isa in isas)


def _choose_isa(precision: str, isa: str | None) -> str:
    if precision not in ('fp32', 'bf16'):
        raise ValueError(f"precision must be 'fp32' or 'bf16'; got '{precision}'.")
    if isa is not None and isa not in supported_isas():
        raise ValueError(f'isa must be one of {supported_isas()}; got {isa!r}.')
    return isa or _best(supported_isas(), precision)


def available() -> bool:
    """Whether the fused kernels run here. The first call may compile them (seconds)."""
    return _load().library is not None


def reason() -> str:
    """Which path runs and why, one line."""
    return _load().reason


def supported_isas() -> tuple[str, ...]:
    """Instruction sets that the library and this processor share, slowest first."""
    return _load().isas


def _round_up(n: int, multiple: int = PAD) -> int:
    return -(-n // multiple) * multiple


def _pad_to(x: Tensor, *sizes: int) -> Tensor:
    """Pads the last dimensions with zeros up to `sizes`; fp32, contiguous, on the CPU."""
    x = x.detach().to('cpu', torch.float32)
    pads = [n for size, have in zip(reversed(sizes), reversed(x.shape)) for n in (0, size - have)]
    return F.pad(x, pads).contiguous()


class PackedExperts:
    """Expert weights in the kernel's layout: prepared once per model and precision.

    Args:
        experts: For each expert a dict with
            `w_rel` (2, D): coefficients of the relative row and column in hidden layer 1 (LIIF); None for LTE;
            `hidden`: list of (weight (out, in), bias (out)): LIIF's hidden layers from the second on; all of LTE's;
            `last`: (weight (C, in), bias (C)).
        precision: 'fp32' or 'bf16' (bf16 activations and weights, fp32 sums; coordinates, blend and output layer in
            fp32). Falls back to fp32 arithmetic where the processor has no bf16 instructions.
        isa: One of `supported_isas()` instead of the fastest one.

    Raises:
        ValueError: Widths that do not fit each other, or an unknown precision or instruction set.
    """

    def __init__(self, experts: Sequence[dict], precision: str = 'fp32', isa: str | None = None) -> None:
        self.isa = _choose_isa(precision, isa)
        if not 1 <= len(experts) <= 256:
            raise ValueError(f'the kernels take 1 to 256 experts; got {len(experts)}.')
        self.num_experts = len(experts)
        self.out_channels = experts[0]['last'][0].shape[0]
        self.family = 'lte' if experts[0].get('w_rel') is None else 'liif'
        self.widths = [self._check(j, expert) for j, expert in enumerate(experts)]  # D of each; LTE: 2K
        self._keep: list = []  # the tensors and arrays that the structures below point into
        self._experts = (_Expert * len(experts))(*(self._pack(expert) for expert in experts))

    def _check(self, j: int, expert: dict) -> int:
        if (expert.get('w_rel') is None) != (self.family == 'lte'):
            raise ValueError(f'expert {j}: either all experts have w_rel (LIIF) or none (LTE).')
        chain = [*expert['hidden'], expert['last']]
        width = chain[0][0].shape[1] if self.family == 'lte' else expert['w_rel'].shape[1]
        have = width
        for n, (weight, bias) in enumerate(chain):
            if weight.shape[1] != have or bias.shape != weight.shape[:1]:
                raise ValueError(f'expert {j}, layer {n}: weight {tuple(weight.shape)} and bias {tuple(bias.shape)} '
                                 f'do not fit an input of width {have}.')
            have = weight.shape[0]
        if have != self.out_channels:
            raise ValueError(f'expert {j}: {have} output channels; expert 0 has {self.out_channels}.')
        return width

    def _hold(self, x: Tensor) -> int:
        self._keep.append(x)
        return x.data_ptr()

    def _pack(self, expert: dict) -> _Expert:
        last_weight, last_bias = expert['last']
        hidden = expert['hidden']
        if self.family == 'lte':  # cosine and sine half are padded each, as in the padded tables
            first = hidden[0] if hidden else expert['last']
            split = _pad_halves(first[0])
            width = split.shape[1]
            if hidden:
                hidden = [(split, first[1]), *hidden[1:]]
            else:
                last_weight = split
            w_rel = None
        else:
            width = _round_up(expert['w_rel'].shape[1])
            w_rel = self._hold(_pad_to(expert['w_rel'], 2, width))
        layers = (_Layer * len(hidden))(*(self._pack_layer(*layer) for layer in hidden))
        self._keep.append(layers)
        last_width = _round_up(last_weight.shape[1])
        return _Expert(width, len(hidden), last_width, w_rel, layers,
                       self._hold(_pad_to(last_weight, self.out_channels, last_width)),
                       self._hold(_pad_to(last_bias, self.out_channels)))

    def _pack_layer(self, weight: Tensor, bias: Tensor) -> _Layer:
        out, inp = (_round_up(n) for n in weight.shape)
        return _Layer(inp, out, self._hold(_pack_weight(weight, self.isa)), self._hold(_pad_to(bias, out)))


def _pack_weight(weight: Tensor, isa: str) -> Tensor:
    """A linear layer's weight (out, in) in the kernel's panels of output channels, padded."""
    out, inp = (_round_up(n) for n in weight.shape)
    weight = _pad_to(weight, out, inp)
    if isa in ('avx2', 'avx512'):
        panel = 16 if isa == 'avx2' else 32  # output channels: two vectors
        return weight.view(out // panel, panel, inp).transpose(1, 2).contiguous()  # (panels, in, panel)
    split = 3 if isa == 'amx_fp32' else 1
    parts = _split_bf16(weight, split).view(split, out // PAD, PAD, inp // PAD, PAD // 2, 2)
    return parts.permute(1, 3, 0, 4, 2, 5).contiguous()  # (panels, in / 32, split, 16, 32, 2)


def _split_bf16(x: Tensor, parts: int) -> Tensor:
    """bf16 numbers that add up to `x`, largest first: (parts, *x.shape)."""
    out = []
    for _ in range(parts):
        out.append(x.bfloat16())
        x = x - out[-1].float()
    return torch.stack(out)


class PackedConv:
    """A 3x3 convolution that makes LR tables, in the kernel's layout; in fp32 on AMX twice as fast as torch's.

    Args:
        weight: (D, C, 3, 3); of several experts: concatenated.
        precision, isa: As for `PackedExperts`.
    """

    def __init__(self, weight: Tensor, precision: str = 'fp32', isa: str | None = None) -> None:
        self.isa = _choose_isa(precision, isa)
        self.out_channels, self.in_channels = weight.shape[:2]
        self.padded = _round_up(self.in_channels)
        # Row, column, channel: in a channels-last window three neighbours of a row are contiguous.
        flat = F.pad(weight.detach().permute(0, 2, 3, 1), (0, self.padded - self.in_channels)).flatten(1)
        self.weight = _pack_weight(flat, self.isa)

    def __call__(self, window: Tensor, bias: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The tables of a window.

        Args:
            window: (C, Ht + 2, Wt + 2), with a halo of one code per side.
            bias: (D) fp32.
            dtype: Of the result, fp32 or bf16.

        Returns:
            (Ht, Wt, D), a view if D was padded.
        """
        if window.shape[0] != self.in_channels or bias.shape != (self.out_channels,):
            raise ValueError(f'the window must have {self.in_channels} channels and the bias {self.out_channels}; got '
                             f'{tuple(window.shape)} and {tuple(bias.shape)}.')
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f'tables must be fp32 or bf16; got {dtype}.')
        height, width = (n - 2 for n in window.shape[1:])
        window = window.detach().float().permute(1, 2, 0)  # (Ht + 2, Wt + 2, C)
        window = F.pad(window, (0, self.padded - self.in_channels)).contiguous()
        out_width = _round_up(self.out_channels)
        out = torch.empty(height, width, out_width, dtype=dtype)
        bias = _pad_to(bias, out_width)
        layer = _Layer(9 * self.padded, out_width, self.weight.data_ptr(), bias.data_ptr())
        job = _TableJob(layer, window.data_ptr(), self.padded, height, width, out.data_ptr(), out_width,
                        dtype == torch.bfloat16, torch.get_num_threads())
        if _load().library.moeisr_table(ctypes.byref(job), c_int64(ALL_ISAS.index(self.isa) + 1)):
            raise MemoryError('no memory for the activation blocks of the LR tables.')
        return out[..., :self.out_channels]


def _pad_halves(x: Tensor) -> Tensor:
    """Pads each half of the last dimension to the kernel's width: (..., 2K) -> (..., 2 * padded K)."""
    half = x.shape[-1] // 2
    return F.pad(x.unflatten(-1, (2, half)), (0, _round_up(half) - half)).flatten(-2)


def decode(packed: PackedExperts, tables: 'Sequence[Tensor | None] | LteTables', rows: GridAxis, cols: GridAxis,
           expert_map: Tensor, out: Tensor, tile: tuple[int, int] | None = None) -> None:
    """Decodes one strip of one image into `out`.

    Args:
        packed: The experts.
        tables: LIIF: for each expert the pre-activation of hidden layer 1 without its coordinate part (bias and cell
            term included), (Ht, Wt, D), all fp32 or all bf16, cells at a constant distance (a slice of the channels of
            one channels-last tensor will do); None for experts that no pixel takes. LTE: `LteTables`.
        rows: Output rows, index relative to the tables' first row.
        cols: Output columns, index relative to the tables' first column.
        expert_map: (h, w) uint8.
        out: (C, h, w) fp32, last dimension contiguous; may be a view of a larger image.
        tile: Output rows and columns per unit of work; the result does not depend on it.

    Raises:
        ValueError: Shapes, types or expert numbers that do not fit.
    """
    height, width = expert_map.shape
    keep, args = [], _Decode(num_experts=packed.num_experts, channels=packed.out_channels, experts=packed._experts)
    if packed.family == 'lte':
        size = _set_lte_tables(args, packed, tables, keep)
    else:
        size = _set_liif_tables(args, packed, tables, keep)
    _check_axis('rows', rows, (2, height), size[0])
    _check_axis('cols', cols, (2, width), size[1])
    if expert_map.dtype != torch.uint8 or (width > 1 and expert_map.stride(1) != 1):
        raise ValueError(f'expert_map must be uint8 with contiguous rows; got {expert_map.dtype}.')
    if out.shape != (packed.out_channels, height, width) or out.dtype != torch.float32 or (
            width > 1 and out.stride(2) != 1):
        raise ValueError(f'out must be fp32 {(packed.out_channels, height, width)} with contiguous rows; got '
                         f'{out.dtype} {tuple(out.shape)}.')
    args.table_width = size[1]
    args.height, args.width = height, width
    _set_axes(args, rows, cols, keep)
    args.expert_map, args.map_stride = expert_map.data_ptr(), expert_map.stride(0)
    args.out, args.out_plane_stride, args.out_row_stride = out.data_ptr(), out.stride(0), out.stride(1)
    args.num_threads = torch.get_num_threads()
    args.tile_rows, args.tile_cols = tile or _tile_size(height, width, args.num_threads)
    error = _load().library.moeisr_decode(ctypes.byref(args), c_int64(ALL_ISAS.index(packed.isa) + 1))
    if error == 3:  # csrc/decode.h, enum Error
        raise MemoryError('no memory for the activation blocks of the fused decode.')
    if error:
        raise ValueError(f'expert_map must hold 0 to {packed.num_experts - 1}, and each expert in it needs its table; '
                         f'got {int(expert_map.max())} at most.')


def _tile_size(height: int, width: int, num_threads: int) -> tuple[int, int]:
    """Large tiles leave few half-filled blocks per expert; small ones keep all threads busy."""
    for tile in ((32, 64), (32, 32), (16, 32)):
        if -(-height // tile[0]) * -(-width // tile[1]) >= 8 * num_threads:
            return tile
    return 16, 16


def _set_axes(args: Structure, rows: GridAxis, cols: GridAxis, keep: list) -> None:
    for name, axis in (('row', rows), ('col', cols)):
        index, rel = axis.index.contiguous(), axis.rel.contiguous()
        keep += [index, rel]
        setattr(args, f'{name}_index', index.data_ptr())
        setattr(args, f'{name}_rel', rel.data_ptr())


def _check_axis(name: str, axis: GridAxis, shape: tuple[int, ...], cells: int) -> None:
    index, rel = axis
    if index.shape != shape or rel.shape != shape or index.dtype != torch.int64 or rel.dtype != torch.float32:
        raise ValueError(f'{name}: index must be int64 and rel fp32, both {shape}; got {index.dtype} '
                         f'{tuple(index.shape)} and {rel.dtype} {tuple(rel.shape)}.')
    if index.numel() and not (0 <= int(index.min()) and int(index.max()) < cells):
        raise ValueError(f'{name}: indices {int(index.min())} to {int(index.max())} are outside a table of {cells} '
                         'cells.')


def _cell_stride(table: Tensor, name: str) -> int:
    """Distance between LR cells in a (Ht, Wt, D) table."""
    height, width, channels = table.shape
    stride = table.stride(1) if width > 1 else table.stride(0)
    if (channels > 1 and table.stride(2) != 1) or (height > 1 and table.stride(0) != width * stride):
        raise ValueError(f'{name} must be channels-last with cells at a constant distance; got strides '
                         f'{table.stride()} for {tuple(table.shape)}.')
    return stride


def _set_liif_tables(args: _Decode, packed: PackedExperts, tables: 'Sequence[Tensor | None]',
                     keep: list) -> tuple[int, int]:
    used = [table for table in tables if table is not None]
    if len(tables) != packed.num_experts or not used:
        raise ValueError(f'tables: one per expert ({packed.num_experts}), at least one not None; got {len(tables)}.')
    size, dtype = used[0].shape[:2], used[0].dtype
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f'tables must be fp32 or bf16; got {dtype}.')
    entries = []
    for j, (table, width) in enumerate(zip(tables, packed.widths)):
        if table is None:
            entries.append(_Table(None, 0))
            continue
        if table.shape != (*size, width) or table.dtype != dtype:
            raise ValueError(f'table {j} must be {dtype} {(*size, width)}; got {table.dtype} {tuple(table.shape)}.')
        if width % PAD:
            table = F.pad(table, (0, _round_up(width) - width))
        keep.append(table)
        entries.append(_Table(table.data_ptr(), _cell_stride(table, f'table {j}')))
    args.tables = (_Table * packed.num_experts)(*entries)
    args.table_is_bf16 = dtype == torch.bfloat16
    return size


def _set_lte_tables(args: _Decode, packed: PackedExperts, tables: LteTables, keep: list) -> tuple[int, int]:
    coef, freq, phase = tables
    size, width = coef.shape[:2], packed.widths[0]
    for name, table, shape in (('coef', coef, (*size, width)), ('freq', freq, (*size, width)),
                               ('phase', phase, (width // 2,))):
        if table.shape != shape or table.dtype != torch.float32:
            raise ValueError(f'{name} must be fp32 {shape}; got {table.dtype} {tuple(table.shape)}.')
    basis = _round_up(width // 2)
    if basis != width // 2:
        coef, freq, phase = _pad_halves(coef), _pad_halves(freq), F.pad(phase, (0, basis - width // 2))
    phase = phase.contiguous()
    keep += [coef, freq, phase]
    args.coef, args.coef_stride = coef.data_ptr(), _cell_stride(coef, 'coef')
    args.freq, args.freq_stride = freq.data_ptr(), _cell_stride(freq, 'freq')
    args.phase, args.basis = phase.data_ptr(), basis
    return size


def route(table: Tensor, rows: GridAxis, cols: GridAxis, w_rel: Tensor, w_out: Tensor, b_out: Tensor,
          expert_map: Tensor, score_bias: Tensor | None = None, logits: Tensor | None = None) -> None:
    """The mapper's per-pixel layers in fp32: logits = w_out relu(table[cell] + rel . w_rel) + b_out, then argmax.

    Args:
        table: (Ht, Wt, D) fp32, channels-last: the hidden layer's part that depends on the LR cell, bias and cell term
            included.
        rows: `index` (h) int64 nearest LR row, `rel` (h) fp32 relative row.
        cols: The same for the w columns.
        w_rel: (2, D) coefficients of the relative row and column.
        w_out: (J, D).
        b_out: (J).
        expert_map: (h, w) uint8, written: argmax of logits + score_bias, the lowest index among equals.
        score_bias: (J) fp32; -kappa * cost for cost-aware routing, since log softmax differs from the logits by the
            same amount for every expert.
        logits: (h, w, J) fp32, contiguous; written if given.

    Raises:
        ValueError: Shapes or types that do not fit.
    """
    (height, width), num_experts, hidden = expert_map.shape, w_out.shape[0], _round_up(w_rel.shape[1])
    _check_axis('rows', rows, (height,), table.shape[0])
    _check_axis('cols', cols, (width,), table.shape[1])
    if table.dtype != torch.float32 or table.shape[2] != w_rel.shape[1] or w_out.shape[1] != w_rel.shape[1]:
        raise ValueError(f'route: table {table.dtype} {tuple(table.shape)}, w_rel {tuple(w_rel.shape)} and w_out '
                         f'{tuple(w_out.shape)} must be fp32 with one hidden width.')
    if expert_map.dtype != torch.uint8 or (width > 1 and expert_map.stride(1) != 1):
        raise ValueError(f'expert_map must be uint8 with contiguous rows; got {expert_map.dtype}.')
    if logits is not None and (logits.shape != (height, width, num_experts) or not logits.is_contiguous()
                               or logits.dtype != torch.float32):
        raise ValueError(f'logits must be contiguous fp32 {(height, width, num_experts)}; got {tuple(logits.shape)}.')
    if hidden != table.shape[2]:
        table = F.pad(table, (0, hidden - table.shape[2]))
    bias = torch.zeros(num_experts) if score_bias is None else score_bias
    small = [_pad_to(w_rel, 2, hidden), _pad_to(w_out, num_experts, hidden), _pad_to(b_out, num_experts),
             _pad_to(bias, num_experts)]
    keep = [table, small]
    args = _Route(num_experts, hidden, table.data_ptr(), _cell_stride(table, 'table'), table.shape[1],
                  *(x.data_ptr() for x in small), height, width)
    _set_axes(args, rows, cols, keep)
    args.expert_map, args.map_stride = expert_map.data_ptr(), expert_map.stride(0)
    args.logits = None if logits is None else logits.data_ptr()
    args.num_threads = torch.get_num_threads()
    _load().library.moeisr_route(ctypes.byref(args), c_int64(ALL_ISAS.index('avx512' if 'avx512' in supported_isas() else 'avx2') + 1))
