"""The compiled library: its C structures, which ways to compute this processor has, and which one runs.

Every structure mirrors csrc/decode.h; each field is eight bytes wide.
"""

import ctypes
import logging
import os
from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, c_int64, c_void_p
from functools import cache
from typing import NamedTuple

from moeisr_basicsr.kernels.build import BuildError, load_library

# Ways to compute, in the order of csrc/api.cpp, enum Isa, from 1; for each precision the later is the faster.
ISAS = {'fp32': ('avx2', 'avx512', 'amx_fp32'), 'bf16': ('avx512_bf16', 'amx_bf16')}
ALL_ISAS = ISAS['fp32'] + ISAS['bf16']
OLDER = {'avx2': ('avx2',), 'avx512': ('avx2', 'avx512'), 'avx512_bf16': ('avx2', 'avx512', 'avx512_bf16')}
SWITCH = 'MOEISR_KERNELS'  # environment variable: 'auto', 'off', or one of OLDER, the newest that may run
FUNCTIONS = ('moeisr_supported', 'moeisr_decode', 'moeisr_table', 'moeisr_needed', 'moeisr_route')


class Layer(Structure):
    _fields_ = [('inp', c_int64), ('out', c_int64), ('weight', c_void_p), ('bias', c_void_p)]


class Expert(Structure):
    _fields_ = [
        ('width', c_int64),
        ('num_layers', c_int64),
        ('last_width', c_int64),
        ('w_rel', c_void_p),
        ('layers', POINTER(Layer)),
        ('w_last', c_void_p),
        ('b_last', c_void_p),
    ]


class Table(Structure):
    _fields_ = [('data', c_void_p), ('stride', c_int64)]


class Decode(Structure):
    _fields_ = [(name, c_int64) for name in ('num_experts', 'channels')]
    _fields_ += [('experts', POINTER(Expert)), ('modulated', c_int64), ('tables', POINTER(Table))]
    _fields_ += [(name, c_void_p) for name in ('coef', 'freq', 'phase')]
    _fields_ += [(name, c_int64) for name in ('coef_stride', 'freq_stride', 'basis', 'table_width', 'height', 'width')]
    _fields_ += [(name, c_void_p) for name in ('row_index', 'col_index', 'row_rel', 'col_rel', 'expert_map')]
    _fields_ += [('map_stride', c_int64), ('out', c_void_p)]
    _fields_ += [
        (name, c_int64) for name in ('out_plane_stride', 'out_row_stride', 'tile_rows', 'tile_cols', 'num_threads')
    ]


class Route(Structure):
    _fields_ = [
        ('num_experts', c_int64),
        ('hidden', c_int64),
        ('table', c_void_p),
        ('table_stride', c_int64),
        ('table_width', c_int64),
    ]
    _fields_ += [(name, c_void_p) for name in ('w_rel', 'w_out', 'b_out')]
    _fields_ += [('height', c_int64), ('width', c_int64)]
    _fields_ += [(name, c_void_p) for name in ('row_index', 'col_index', 'row_rel', 'col_rel', 'expert_map')]
    _fields_ += [('map_stride', c_int64), ('logits', c_void_p), ('num_threads', c_int64)]


class TableJob(Structure):
    _fields_ = [
        ('layers', POINTER(Layer)),
        ('num_layers', c_int64),
        ('window', c_void_p),
        ('channels', c_int64),
        ('height', c_int64),
        ('width', c_int64),
        ('out', c_void_p),
        ('cells', c_void_p),
        ('num_cells', c_int64),
        ('num_threads', c_int64),
    ]


class Needed(Structure):
    _fields_ = [(name, c_int64) for name in ('num_experts', 'height', 'width')]
    _fields_ += [(name, c_void_p) for name in ('row_index', 'col_index', 'expert_map')]
    _fields_ += [(name, c_int64) for name in ('map_stride', 'table_height', 'table_width')]
    _fields_ += [('needed', c_void_p)]


class Loaded(NamedTuple):
    """What this process found."""

    library: ctypes.CDLL | None
    isas: tuple[str, ...]  # that run on this processor
    reason: str


def switch() -> str:
    """The environment variable MOEISR_KERNELS, checked.

    Raises:
        ValueError: It is not one of the allowed values.
    """
    value, allowed = os.environ.get(SWITCH, 'auto'), ('auto', 'off', *OLDER)
    if value not in allowed:
        raise ValueError(f"{SWITCH} must be one of {', '.join(allowed)}; got '{value}'.")
    return value


def switched_off() -> bool:
    """Whether MOEISR_KERNELS forbids every fused kernel, on any device.

    Raises:
        ValueError: As `switch`.
    """
    return switch() == 'off'


@cache
def load() -> Loaded:
    """Builds or loads the library once per process, and says once which path runs and why."""
    logger = logging.getLogger('basicsr.kernels')
    if switched_off():
        return _say(logger.info, Loaded(None, (), 'torch code: MOEISR_KERNELS=off'))
    try:
        library = load_library()
    except BuildError as error:
        return _say(logger.warning, Loaded(None, (), f'torch code, slower: {error}'))
    for name in FUNCTIONS:
        getattr(library, name).restype = c_int64
    bits = library.moeisr_supported()
    wanted = OLDER.get(switch(), ALL_ISAS)
    isas = tuple(isa for i, isa in enumerate(ALL_ISAS, start=1) if bits >> i & 1 and isa in wanted)
    if not isas:
        return _say(logger.warning, Loaded(None, (), 'torch code, slower: the processor has no AVX2'))
    return _say(
        logger.info,
        Loaded(library, isas, f'fused C++ kernels: fp32 by {best_isa(isas, "fp32")}, bf16 by {best_isa(isas, "bf16")}'),
    )


def _say(log: Callable[[str], None], loaded: Loaded) -> Loaded:
    log(f'CPU decode runs on {loaded.reason}.')
    return loaded


def best_isa(isas: Sequence[str], precision: str) -> str:
    """The fastest way; without bf16 instructions bf16 is computed in fp32."""
    preferred = {'fp32': ('amx_fp32', 'avx512', 'avx2'), 'bf16': ('amx_bf16', 'avx512_bf16', 'avx512', 'avx2')}
    return next(isa for isa in preferred[precision] if isa in isas)


def choose_isa(precision: str, isa: str | None = None) -> str:
    """`isa` if it runs here, else the fastest for this precision.

    Raises:
        ValueError: Unknown precision, or an instruction set that this processor lacks.
    """
    if precision not in ('fp32', 'bf16'):
        raise ValueError(f"precision must be 'fp32' or 'bf16'; got '{precision}'.")
    if isa is not None and isa not in supported_isas():
        raise ValueError(f'isa must be one of {supported_isas()}; got {isa!r}.')
    return isa or best_isa(supported_isas(), precision)


def available() -> bool:
    """Whether the fused kernels run here. The first call may compile them (seconds)."""
    return load().library is not None


def reason() -> str:
    """Which path runs and why, one line."""
    return load().reason


def supported_isas() -> tuple[str, ...]:
    """Instruction sets that the library and this processor share, slowest first."""
    return load().isas


def call(function: str, arguments: Structure, isa: str) -> int:
    """Runs one of `FUNCTIONS` on its structure; returns csrc/decode.h, enum Error."""
    return getattr(load().library, function)(ctypes.byref(arguments), c_int64(ALL_ISAS.index(isa) + 1))
