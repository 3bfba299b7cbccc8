"""Fused decode on x86-64 processors: gather, coordinates, expert MLP, local ensemble and output layer in one pass.

The C++ code (csrc/) groups the pixels of a small tile by expert and keeps each block of activations in cache. bf16
(bf16 operands, fp32 sums) runs on AVX512_BF16 or AMX; fp32 on AVX2, AVX-512, or on AMX with every number split into
three bf16 parts: 24 bits of mantissa, so the accuracy of fp32, at twice its speed. Results do not depend on threads,
tiles or neighbours. Where it cannot run, `available()` is False and the callers use the torch code in `core`.

Legend: h x w output pixels, Ht x Wt cells of the LR tables, D width of an expert's first hidden layer, K frequencies
(LTE), J experts, C output channels.
"""

from collections.abc import Sequence
from ctypes import Structure
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moeisr_basicsr.core.coords import GridAxis
from moeisr_basicsr.kernels.native import (
    ALL_ISAS,
    ISAS,
    Decode,
    Needed,
    Route,
    Table,
    available,
    call,
    reason,
    supported_isas,
)
from moeisr_basicsr.kernels.packed import PAD, PackedConv, PackedExperts, pad_halves, pad_to, round_up

__all__ = [
    'ALL_ISAS',
    'ISAS',
    'LteTables',
    'PackedConv',
    'PackedExperts',
    'available',
    'decode',
    'needed_cells',
    'reason',
    'route',
    'supported_isas',
]


MAX_TILE = 64  # csrc/decode.h, kMaxTileRows and kMaxTileCols
NO_MEMORY = 3  # csrc/decode.h, enum Error


class LteTables(NamedTuple):
    """What LTE's experts share, per LR pixel; fp32 (a bf16 frequency would be off by whole turns)."""

    coef: Tensor  # (Ht, Wt, 2K) coefficients of the K cosines, then of the K sines
    freq: Tensor  # (Ht, Wt, 2K) K row frequencies, then K column frequencies: the official channels 0::2, then 1::2
    phase: Tensor  # (K) constant of the image: the phase layer applied to cell times LR size


def decode(
    packed: PackedExperts,
    tables: Sequence[Tensor | None] | LteTables,
    rows: GridAxis,
    cols: GridAxis,
    expert_map: Tensor,
    out: Tensor,
    tile: tuple[int, int] | None = None,
) -> None:
    """Decodes one strip of one image into `out`.

    Args:
        packed: The experts.
        tables: LIIF: for each expert the pre-activation of hidden layer 1 without its coordinate part (bias and cell
            term included), (Ht, Wt, D) fp32, cells at a constant distance (a slice of the channels of one
            channels-last tensor will do); None for experts without layers or that no pixel takes. lm: the same with
            rows as `latent.latent_of` gives them. LTE: `LteTables`.
        rows: Output rows, index relative to the tables' first row.
        cols: Output columns, index relative to the tables' first column.
        expert_map: (h, w) uint8.
        out: (C, h, w) fp32, last dimension contiguous; may be a view of a larger image.
        tile: Output rows and columns per unit of work, 64 at most; the result does not depend on it.

    Raises:
        ValueError: Shapes, types or expert numbers that do not fit.
    """
    height, width = expert_map.shape
    keep: list[object] = []  # what the pointers in `args` point into
    args = Decode(num_experts=packed.num_experts, channels=packed.out_channels, experts=packed.array)
    args.modulated = packed.family == 'lm'
    if packed.family == 'lte':
        assert isinstance(tables, LteTables)
        size = _set_lte_tables(args, packed, tables, keep)
    else:
        size = _set_tables(args, packed, tables, keep)
    _check_axis('rows', rows, (2, height), size[0])
    _check_axis('cols', cols, (2, width), size[1])
    if expert_map.dtype != torch.uint8 or (width > 1 and expert_map.stride(1) != 1):
        raise ValueError(f'expert_map must be uint8 with contiguous rows; got {expert_map.dtype}.')
    if (
        out.shape != (packed.out_channels, height, width)
        or out.dtype != torch.float32
        or (width > 1 and out.stride(2) != 1)
    ):
        raise ValueError(
            f'out must be fp32 {(packed.out_channels, height, width)} with contiguous rows; got '
            f'{out.dtype} {tuple(out.shape)}.'
        )
    args.table_width = size[1]
    args.height, args.width = height, width
    _set_axes(args, rows, cols, keep)
    args.expert_map, args.map_stride = expert_map.data_ptr(), expert_map.stride(0)
    args.out, args.out_plane_stride, args.out_row_stride = out.data_ptr(), out.stride(0), out.stride(1)
    args.num_threads = torch.get_num_threads()
    args.tile_rows, args.tile_cols = tile or _tile_size(height, width, args.num_threads)
    assert 1 <= args.tile_rows <= MAX_TILE and 1 <= args.tile_cols <= MAX_TILE
    error = call('moeisr_decode', args, packed.isa)
    if error == NO_MEMORY:
        raise MemoryError('no memory for the activation blocks of the fused decode.')
    if error:
        raise ValueError(
            f'expert_map must hold 0 to {packed.num_experts - 1}, and each expert in it needs its table; '
            f'got {int(expert_map.max())} at most.'
        )


def needed_cells(
    rows: GridAxis, cols: GridAxis, expert_map: Tensor, size: tuple[int, int], num_experts: int
) -> list[Tensor]:
    """The LR pixels that each expert's pixels read, as ascending row-major numbers: one (N,) int64 per expert.

    Args:
        rows, cols, expert_map: As for `decode`.
        size: (Ht, Wt).

    Raises:
        ValueError: An expert number that is too large, or indices outside the table.
    """
    _check_axis('rows', rows, (2, expert_map.shape[0]), size[0])
    _check_axis('cols', cols, (2, expert_map.shape[1]), size[1])
    needed = torch.zeros(num_experts, size[0] * size[1], dtype=torch.uint8)
    row_index, col_index = rows.index.contiguous(), cols.index.contiguous()
    args = Needed(
        num_experts,
        *expert_map.shape,
        row_index.data_ptr(),
        col_index.data_ptr(),
        expert_map.data_ptr(),
        expert_map.stride(0),
        *size,
        needed.data_ptr(),
    )
    if call('moeisr_needed', args, supported_isas()[0]):
        raise ValueError(f'expert_map must hold 0 to {num_experts - 1}; got {int(expert_map.max())} at most.')
    return [one.nonzero().squeeze(1) for one in needed]


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
        raise ValueError(
            f'{name}: index must be int64 and rel fp32, both {shape}; got {index.dtype} '
            f'{tuple(index.shape)} and {rel.dtype} {tuple(rel.shape)}.'
        )
    if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < cells):
        raise ValueError(
            f'{name}: indices {int(index.min())} to {int(index.max())} are outside a table of {cells} cells.'
        )


def _cell_stride(table: Tensor, name: str) -> int:
    """Distance between LR pixels in a (Ht, Wt, D) table."""
    height, width, channels = table.shape
    stride = table.stride(1) if width > 1 else table.stride(0)
    if (channels > 1 and table.stride(2) != 1) or (height > 1 and table.stride(0) != width * stride):
        raise ValueError(
            f'{name} must be channels-last with cells at a constant distance; got strides '
            f'{table.stride()} for {tuple(table.shape)}.'
        )
    return stride


def _set_tables(args: Decode, packed: PackedExperts, tables: Sequence[Tensor | None], keep: list) -> tuple[int, int]:
    used = [table for table in tables if table is not None]
    if len(tables) != packed.num_experts or not used:
        raise ValueError(f'tables: one per expert ({packed.num_experts}), at least one not None; got {len(tables)}.')
    size = used[0].shape[0], used[0].shape[1]
    entries = []
    for j, (table, width) in enumerate(zip(tables, packed.widths)):
        if table is None:
            entries.append(Table(None, 0))
            continue
        if table.shape != (*size, width) or table.dtype != torch.float32:
            raise ValueError(f'table {j} must be fp32 {(*size, width)}; got {table.dtype} {tuple(table.shape)}.')
        if width % PAD and not args.modulated:
            table = F.pad(table, (0, round_up(width) - width))
        keep.append(table)
        entries.append(Table(table.data_ptr(), _cell_stride(table, f'table {j}')))
    args.tables = (Table * packed.num_experts)(*entries)
    return size


def _set_lte_tables(args: Decode, packed: PackedExperts, tables: LteTables, keep: list) -> tuple[int, int]:
    coef, freq, phase = tables
    size, width = (coef.shape[0], coef.shape[1]), max(packed.widths)
    for name, table, shape in (
        ('coef', coef, (*size, width)),
        ('freq', freq, (*size, width)),
        ('phase', phase, (width // 2,)),
    ):
        if table.shape != shape or table.dtype != torch.float32:
            raise ValueError(f'{name} must be fp32 {shape}; got {table.dtype} {tuple(table.shape)}.')
    basis = round_up(width // 2)
    if basis != width // 2:
        coef, freq, phase = pad_halves(coef), pad_halves(freq), F.pad(phase, (0, basis - width // 2))
    phase = phase.contiguous()
    keep += [coef, freq, phase]
    args.coef, args.coef_stride = coef.data_ptr(), _cell_stride(coef, 'coef')
    args.freq, args.freq_stride = freq.data_ptr(), _cell_stride(freq, 'freq')
    args.phase, args.basis = phase.data_ptr(), basis
    return size


def route(
    table: Tensor,
    rows: GridAxis,
    cols: GridAxis,
    w_rel: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    expert_map: Tensor,
    logits: Tensor | None = None,
) -> None:
    """The mapper's per-pixel layers in fp32: logits = w_out relu(table[cell] + rel . w_rel) + b_out, then argmax.

    Args:
        table: (Ht, Wt, D) fp32, channels-last: the hidden layer's part that depends on the LR pixel, bias and cell term
            included.
        rows: `index` (h) int64 nearest LR row, `rel` (h) fp32 relative row.
        cols: The same for the w columns.
        w_rel: (2, D) coefficients of the relative row and column.
        w_out: (J, D).
        b_out: (J).
        expert_map: (h, w) uint8, written: argmax of the logits, the lowest index among equals.
        logits: (h, w, J) fp32, contiguous; written if given.

    Raises:
        ValueError: Shapes or types that do not fit.
    """
    (height, width), num_experts, hidden = expert_map.shape, w_out.shape[0], round_up(w_rel.shape[1])
    _check_axis('rows', rows, (height,), table.shape[0])
    _check_axis('cols', cols, (width,), table.shape[1])
    if table.dtype != torch.float32 or table.shape[2] != w_rel.shape[1] or w_out.shape[1] != w_rel.shape[1]:
        raise ValueError(
            f'route: table {table.dtype} {tuple(table.shape)}, w_rel {tuple(w_rel.shape)} and w_out '
            f'{tuple(w_out.shape)} must be fp32 with one hidden width.'
        )
    if expert_map.dtype != torch.uint8 or (width > 1 and expert_map.stride(1) != 1):
        raise ValueError(f'expert_map must be uint8 with contiguous rows; got {expert_map.dtype}.')
    if logits is not None and (
        logits.shape != (height, width, num_experts) or not logits.is_contiguous() or logits.dtype != torch.float32
    ):
        raise ValueError(f'logits must be contiguous fp32 {(height, width, num_experts)}; got {tuple(logits.shape)}.')
    if hidden != table.shape[2]:
        table = F.pad(table, (0, hidden - table.shape[2]))
    small = [pad_to(w_rel, 2, hidden), pad_to(w_out, num_experts, hidden), pad_to(b_out, num_experts)]
    keep = [table, small]
    args = Route(
        num_experts,
        hidden,
        table.data_ptr(),
        _cell_stride(table, 'table'),
        table.shape[1],
        *(x.data_ptr() for x in small),
        height,
        width,
    )
    _set_axes(args, rows, cols, keep)
    args.expert_map, args.map_stride = expert_map.data_ptr(), expert_map.stride(0)
    args.logits = None if logits is None else logits.data_ptr()
    args.num_threads = torch.get_num_threads()
    call('moeisr_route', args, 'avx512' if 'avx512' in supported_isas() else 'avx2')
