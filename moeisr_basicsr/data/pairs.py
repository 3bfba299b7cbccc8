"""LR and HR images of the same area: who belongs to whom, and patches at any real factor.

HR pixel borders need not fall on LR pixel borders. Shapes: (h, w) LR image, (H, W) HR image.
"""

import difflib
import os
from collections import Counter
from collections.abc import Iterable
from fractions import Fraction
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moeisr_basicsr.core.coords import pixel_centres
from moeisr_basicsr.errors import ImageError, UserError

from .image_source import ImageSource
from .sampling import round_half_up

MOST_ARE_EVEN = 0.5  # share of a folder's pairs from which on the others are taken for mistakes: nobody mixes both
ONE_FACTOR = 0.9  # as above; folders of several factors exist


class PatchAxis(NamedTuple):
    """One axis of an HR patch that belongs to an LR patch."""

    start: int  # first HR position whose centre lies in the LR patch
    stop: int  # one past the last
    coord: Tensor  # (stop - start,) fp32 positions of their centres in the LR patch, in [-1, 1]
    cell: float  # size of an HR pixel in the same units


class PairsError(UserError):
    """HR images without a partner of their own. Its message is the first line of `each`; `sources` are all images."""

    def __init__(self, message: str, each: list[str] | None = None):
        super().__init__(message)
        self.each, self.sources = each or [], tuple[ImageSource, ...]()


def find_pairs(lq: ImageSource, gt: ImageSource, template: str) -> list[tuple[str, str]]:
    """(LR name, HR name) for every HR image. Suffixes need not agree: a JPEG may have a PNG partner.

    The k-th LR folder belongs to the k-th HR folder.

    Args:
        template: Name of the LR image without suffix, with {} for that of its HR image.

    Raises:
        PairsError: An HR image has no partner, or two images have the same.
    """
    problems: list[str] = []
    by_key: dict[tuple[int, str], str] = {}
    for name in lq.names:
        if (other := by_key.setdefault(lq.key(name), name)) != name:
            problems.append(f'{name} and {other} could both be the partner of one HR image.')
    pairs: list[tuple[str, str]] = []
    taken: dict[str, str] = {}  # LR name -> its HR image
    for name in gt.names:
        number, stem = gt.key(name)
        folder, _, stem = stem.rpartition('/') if gt.recursive else ('', '', stem)
        wanted = f'{folder}/{template.format(stem)}' if folder else template.format(stem)
        if (number, wanted) not in by_key:
            problem = f'{name} has no partner {wanted} in {lq.roots[number]}.'
            if not problems:  # the search takes long in a large folder
                near = difflib.get_close_matches(wanted, [key for root, key in by_key if root == number], n=1)
                found = os.path.basename(by_key[number, near[0]]) if near else ''
                problem += f" Nearest: '{found}'; check filename_tmpl." if near else ''
            problems.append(problem)
            continue
        partner = by_key[number, wanted]
        if taken.setdefault(partner, name) != name:
            problems.append(f'{name} and {taken[partner]} would both have the partner {partner}.')
        if os.path.realpath(partner) == os.path.realpath(name):
            problems.append(f'{name} would be its own LR image: dataroot_lq must be another folder than dataroot_gt.')
        pairs.append((partner, name))
    if problems:
        more = f' {len(problems) - 1} more: `basicsr check` lists them.' if len(problems) > 1 else ''
        raise PairsError(problems[0] + more, problems)
    return pairs


class Pair(NamedTuple):
    """Sizes (rows, columns) and files of an LR and an HR image."""

    lq_size: tuple[int, int]
    gt_size: tuple[int, int]
    lq_path: str
    gt_path: str

    @property
    def factors(self) -> tuple[float, float]:
        """HR / LR of rows and columns."""
        return self.gt_size[0] / self.lq_size[0], self.gt_size[1] / self.lq_size[1]

    @property
    def nominal(self) -> tuple[float, float]:
        """`factors`, as whole numbers where the sizes allow it."""
        whole = round(self.factors[0]), round(self.factors[1])
        return whole if self.has(whole) else self.factors

    def has(self, factors: tuple[float, float]) -> bool:
        """Whether the sizes are those of `factors`, but for less than a pixel that was rounded or cut off."""
        sizes = zip(self.lq_size, self.gt_size, factors)
        return all(abs(high - low * factor) <= factor + 1 for low, high, factor in sizes)

    def is_even(self) -> bool:
        """Whether both factors are the same."""
        mean = sum(self.factors) / 2
        return self.has((mean, mean))


class FolderRule(NamedTuple):
    """What the pairs of one folder have in common; a pair that is rotated, or no pair at all, breaks it."""

    even: bool  # rows and columns have the same factor
    factors: tuple[float, float] | None  # of all pairs; None where they differ
    source: str  # what says so, for messages

    @classmethod
    def of(cls, pairs: list[Pair], scale: tuple[float, float] | None) -> 'FolderRule':
        """The rule of a folder; `scale` is the options', which wins."""
        if scale is not None:
            return cls(False, scale, f'the scale of the options is {show_factors(scale)}')
        even = [pair for pair in pairs if pair.is_even()]
        is_even = len(even) >= 2 and len(even) > MOST_ARE_EVEN * len(pairs)
        rest = even if is_even else pairs
        middle = tuple(median(values) for values in zip(*(pair.factors for pair in rest))) if rest else (0.0, 0.0)
        fitting = sum(pair.has(middle) for pair in rest)
        is_common = len(rest) >= 2 and fitting >= ONE_FACTOR * len(rest)
        counted = [text for text, _ in count_factors(rest).most_common(3)]
        return cls(is_even, middle if is_common else None, f'the other pairs of its folder have {", ".join(counted)}')

    def check(self, pair: Pair) -> None:
        """Raises:
        ImageError: The pair breaks the rule.
        """
        if (self.even and not pair.is_even()) or (self.factors is not None and not pair.has(self.factors)):
            (low, high), advice = (pair.lq_size, pair.gt_size), 'pairs of another factor go into a folder of their own'
            raise ImageError(
                f'{pair.lq_path} ({low[0]} x {low[1]} rows x columns) does not fit {pair.gt_path} ({high[0]} x '
                f'{high[1]}): a factor of {show_factors(pair.factors)}, but {self.source}. Perhaps one is rotated, or '
                f'they are no pair; {advice}.'
            )


def show_factors(factors: tuple[float, float]) -> str:
    """'4', or '3 x 1.3' for rows and columns that differ."""
    return ' x '.join(dict.fromkeys(f'{factor:.1f}'.removesuffix('.0') for factor in factors))


def count_factors(pairs: Iterable[Pair]) -> Counter[str]:
    """How many pairs have which factors, as people read them."""
    return Counter(show_factors(pair.nominal) for pair in pairs)


def align_pair(
    lq_size: tuple[int, ...], gt_size: tuple[int, ...], scale: tuple[float, float] | None, paths: dict[str, str]
) -> tuple[int, ...]:
    """(rows, columns) of the HR image that the LR image shows; the rest at the lower and right border is cut off.

    Raises:
        ImageError: The HR image is smaller than the LR image, or smaller than the LR image times `scale`.
    """
    shown = lq_size if scale is None else tuple(round_half_up(n * s) for n, s in zip(lq_size, scale))
    if any(n < m for n, m in zip(gt_size, shown)):
        times = '' if scale is None else f' times the scale of {scale[0]:g} x {scale[1]:g}'
        raise ImageError(
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
