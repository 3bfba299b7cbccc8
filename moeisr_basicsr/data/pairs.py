"""LR and HR images of the same area: who belongs to whom, and patches at any real factor.

HR pixel borders need not fall on LR pixel borders. Shapes: (h, w) LR image, (H, W) HR image.
"""

import difflib
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moeisr_basicsr.core.coords import pixel_centres
from moeisr_basicsr.errors import UserError

from .image_source import ImageSource
from .sampling import round_half_up


class PatchAxis(NamedTuple):
    """One axis of an HR patch that belongs to an LR patch."""

    start: int  # first HR position whose centre lies in the LR patch
    stop: int  # one past the last
    coord: Tensor  # (stop - start,) fp32 positions of their centres in the LR patch, in [-1, 1]
    cell: float  # size of an HR pixel in the same units


def find_pairs(lq: ImageSource, gt: ImageSource, template: str) -> list[tuple[str, str]]:
    """(LR name, HR name) for every HR image. Suffixes need not agree: a JPEG may have a PNG partner.

    Args:
        template: Name of the LR image without suffix, with {} for that of its HR image.

    Raises:
        UserError: An HR image has no partner, or two images have the same.
    """
    by_stem: dict[str, str] = {}
    for name in lq.names:
        if (other := by_stem.setdefault(lq.stem(name), name)) != name:
            raise UserError(f'{lq.path(name)} and {other} could both be the partner of one HR image.')
    pairs: list[tuple[str, str]] = []
    taken: dict[str, str] = {}  # LR name -> its HR image
    for name in gt.names:
        wanted = template.format(gt.stem(name))
        if wanted not in by_stem:
            near = difflib.get_close_matches(wanted, by_stem, n=1)
            raise UserError(
                f'{gt.path(name)} has no partner {wanted} in {lq.root}.'
                + (f" Nearest: '{by_stem[near[0]]}'; check filename_tmpl." if near else '')
            )
        partner = by_stem[wanted]
        if taken.setdefault(partner, name) != name:
            raise UserError(f'{gt.path(name)} and {taken[partner]} would both have the partner {lq.path(partner)}.')
        pairs.append((partner, name))
    return pairs


def align_pair(
    lq_size: tuple[int, ...], gt_size: tuple[int, ...], scale: tuple[float, float] | None, paths: dict[str, str]
) -> tuple[int, ...]:
    """(rows, columns) of the HR image that the LR image shows; the rest at the lower and right border is cut off.

    Raises:
        UserError: The HR image is smaller than the LR image, or smaller than the LR image times `scale`.
    """
    shown = lq_size if scale is None else tuple(round_half_up(n * s) for n, s in zip(lq_size, scale))
    if any(n < m for n, m in zip(gt_size, shown)):
        times = '' if scale is None else f' times the scale of {scale[0]:g} x {scale[1]:g}'
        raise UserError(
            f'{paths["gt_path"]} ({gt_size[0]} x {gt_size[1]} rows x columns): smaller than its LR image '
            f'{paths["lq_path"]} ({lq_size[0]} x {lq_size[1]}){times}.'
        )
    if scale is not None:
        return shown
    whole = [n // m for n, m in zip(gt_size, lq_size)]
    # The same whole factor on both axes, and floor(HR / factor) is the LR size: a rest that the LR image lacks.
    if whole[0] == whole[1] and all(n // whole[0] == m for n, m in zip(gt_size, lq_size)):
        return lq_size[0] * whole[0], lq_size[1] * whole[1]
    return gt_size


def patch_axis(first: int, count: int, n_lr: int, n_hr: int, flip: bool = False) -> PatchAxis:
    """The HR positions whose centres lie in `count` LR positions from `first` on, decided in whole numbers.

    Args:
        first: First LR position.
        count: LR positions of the patch.
        n_lr: LR size of the image.
        n_hr: HR size of the image, at least `n_lr`.
        flip: The coordinates are those of the reversed axis.
    """
    # The centre of HR position i lies at (2 i + 1) n_lr / (2 n_hr) LR pixels.
    start, stop = (-((n_lr - 2 * edge * n_hr) // (2 * n_lr)) for edge in (first, first + count))
    cell = Fraction(2 * n_lr, count * n_hr)
    if (first * n_hr) % n_lr == 0 and (count * n_hr) % n_lr == 0:
        coord = pixel_centres(stop - start)  # pixel borders meet: bit for bit the coordinates of the HR patch alone
    else:
        position = (2 * np.arange(start, stop) + 1) * (n_lr / n_hr) - 2 * first  # (R,) twice the distance to `first`
        coord = torch.from_numpy((position / count - 1).astype(np.float32))
        coord = -coord.flip(0) if flip else coord
    return PatchAxis(start, stop, coord, float(cell))
