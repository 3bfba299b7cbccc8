"""The receptive field of an encoder, measured: how far a pixel acts, and from where windows of an image can be cut."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

EDGE = 64  # LR pixels at both ends of a strip that are marked, then cut off
LENGTHS = (256, 576)  # of the strips, for a radius below 64 and below 224 LR pixels
THICKNESS = 16
MULTIPLES = (1, 2, 4, 8, 16, 32)  # candidates for `tile_multiple`
OVERLAP = 64  # the halo that is tried where a pixel acts further
# Largest error of a window's features over the standard deviation of all: of rounding, and of one that shows nowhere.
ROUNDING, UNSEEN = 1e-4, 1e-3


class Field(NamedTuple):
    """What tiles of an encoder need."""

    halo: int | None  # None: tiles would show
    tile_multiple: int
    is_exact: bool  # whether no pixel beyond the halo acts on a feature
    error: float  # of a tile's features, or of OVERLAP's if there is no halo; over their standard deviation


@torch.no_grad()
def measure(encode: Callable[[Tensor], Tensor], like: Tensor) -> Field:
    """Measure on strips along both axes.

    A pixel that is not a number makes each feature that it acts on not a number, whatever the weights are. So the
    features that the ends of a strip, marked in this way, leave alone are those that a window without these ends
    gives exactly; a window that is really cut out confirms it.

    Args:
        encode: (1, C_in, H, W) in [-1, 1] -> (1, C, H, W).
        like: An image of type and device, (1, C_in, ...).
    """
    rows, cols = (_along(encode, like, axis) for axis in (-2, -1))
    halo = None if rows.halo is None or cols.halo is None else max(rows.halo, cols.halo)
    multiple = max(rows.tile_multiple, cols.tile_multiple)
    return Field(halo, multiple, rows.is_exact and cols.is_exact, max(rows.error, cols.error))


def _along(encode: Callable[[Tensor], Tensor], like: Tensor, axis: int) -> Field:
    for length in LENGTHS:
        strip = _strip(like, length, axis)
        if _reach(encode, strip, axis, 1) is not None:
            break
    whole = encode(strip)
    for multiple in MULTIPLES:
        reach = _reach(encode, strip, axis, multiple)
        halo = OVERLAP if reach is None else reach
        error = _error(encode, strip, whole, axis, multiple, halo)
        if error <= (UNSEEN if reach is None else ROUNDING):
            return Field(halo, multiple, reach is not None, error)
    return Field(None, 1, False, error)


def _strip(like: Tensor, length: int, axis: int) -> Tensor:
    """Noise whose brightness and contrast grow along the strip: what looks at the whole sees other values in a part."""
    noise = torch.rand(1, like.shape[1], THICKNESS, length, generator=torch.Generator().manual_seed(0))
    strip = 2 * torch.linspace(0, 1, length) * noise - 1
    return (strip if axis == -1 else strip.transpose(-2, -1)).contiguous().to(like)


def _ends(strip: Tensor, axis: int, multiple: int) -> tuple[int, int]:
    """Where the marked ends stop and start: at odd multiples, so that one that is too small by half does not pass."""
    return EDGE + multiple, strip.shape[axis] - EDGE - multiple


def _reach(encode: Callable[[Tensor], Tensor], strip: Tensor, axis: int, multiple: int) -> int | None:
    """How far the marked ends act, in LR pixels; None if on every feature between them."""
    start, stop = _ends(strip, axis, multiple)
    marked = strip.clone()
    marked.narrow(axis, 0, start).fill_(torch.nan)
    marked.narrow(axis, stop, start).fill_(torch.nan)
    clean = encode(marked).isfinite().all(dim=1).all(dim=-1 if axis == -2 else -2)[0].nonzero().flatten()
    return max(int(clean[0]) - start, stop - 1 - int(clean[-1])) if len(clean) else None


def _error(
    encode: Callable[[Tensor], Tensor], strip: Tensor, whole: Tensor, axis: int, multiple: int, halo: int
) -> float:
    """The largest error of the features of a window, without its halo, over the standard deviation of all."""
    start, stop = _ends(strip, axis, multiple)
    length = stop - start - 2 * halo
    window = encode(strip.narrow(axis, start, stop - start).contiguous())
    difference = window.narrow(axis, halo, length) - whole.narrow(axis, start + halo, length)
    return float(difference.abs().max() / whole.std())
