"""Pictures side by side: the truth, bicubic, every model and its expert map, cut at one place.

The place is chosen by the truth alone: the window with the largest gradient energy. The images are chosen by their
order: the n-th dataset and scale shows its n-th image. No result has a say in either.
"""

import base64
import io
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from moeisr_basicsr.analysis.routing_stats import gradient_energy
from moeisr_basicsr.data.image_reader import read_image

from .experts import Share, shares
from .runs import Column, Entry, Measured, Metric, Report, Run, group_by, main_metric

SIDE = 96  # of the crop, output pixels
STRIDE = 8  # between the windows that are compared
ZOOM = 2  # of the crop on the page
RULE = (
    f'Crops of {SIDE} x {SIDE} output pixels, enlarged by {ZOOM} without interpolation. The window is the one with '
    f'the largest mean squared luma gradient of the truth, on a grid of {STRIDE} pixels, the topmost and leftmost '
    'of equals. The n-th dataset and scale shows its n-th image, from the start again at its end. Figures are '
    'those of the whole image.'
)


class Saved(NamedTuple):
    """What one run saved of an image."""

    measured: Measured
    run: Run
    row: dict

    def read(self, kind: str, size: tuple[int, ...] | None, notes: list[str]) -> np.ndarray | None:
        """A picture as (R, S, 3) uint8 RGB; None, and a note, where it cannot be read or has another size."""
        if kind not in self.row['pictures']:
            return None
        folder, name = self.run.source.folder, self.row['pictures'][kind]
        try:
            if not (folder / name).resolve().is_relative_to(folder.resolve()):
                problem = 'lies outside its folder'
            elif not (folder / name).is_file():
                problem = 'is not there'
            elif size not in (None, (picture := read_image(folder / name).rgb).shape):
                problem = 'has not the size of the truth'
            else:
                return picture
        except (OSError, RuntimeError, ValueError):  # UserError among them; a name may be no name at all
            problem = 'is damaged'
        notes.append(f'{self.run.source.path}: the picture {name} {problem} and is not shown.')
        return None

    def figure(self, metric: Metric | None, prefix: str = '') -> str:
        """The metric of the whole image."""
        value = (self.row.get('metrics') or {}).get(prefix + metric.name) if metric else None
        return '' if value is None else f'{value:.2f} dB'


class Shot(NamedTuple):
    """One image of one dataset and scale."""

    column: Column
    image: str
    metric: Metric | None
    saved: list[Saved]  # one per entry


class Tile(NamedTuple):
    """A picture above its label."""

    label: str
    figure: str  # of the whole image
    source: str  # data URL
    size: tuple[int, int]  # (columns, rows) on the page


class Comparison(NamedTuple):
    """All tiles of one image."""

    name: str
    place: str
    metric: Metric | None
    tiles: list[Tile]
    maps: list[Tile]
    legends: dict[Entry, list[Share]]  # colours of the maps, once for each network


def comparisons(report: Report, limit: int, notes: list[str]) -> list[Comparison]:
    """Comparisons of at most `limit` images; `notes` gets a line for each picture that cannot be shown."""
    found = [compare(report, shot, notes) for shot in take_turns(shots_of(report))[:limit]]
    return [comparison for comparison in found if comparison is not None]


def shots_of(report: Report) -> list[list[Shot]]:
    """Every image that a run saved beside its truth, per column."""
    shots: list[list[Shot]] = []
    for columns in report.datasets().values():
        metric = main_metric(one for entries in columns.values() for one in entries)
        for column, entries in columns.items():
            saved = [Saved(one, run, row) for one in entries for run in one.runs for row in run.rows]
            saved = [one for one in saved if 'result' in one.row.get('pictures', {})]
            shots.append([])
            for image, of_image in group_by(saved, lambda one: one.row.get('image') or '').items():
                if any('truth' in one.row['pictures'] for one in of_image):
                    of_entries = group_by(of_image, lambda one: one.run.entry).values()
                    shots[-1].append(Shot(column, image, metric, [first for first, *_ in of_entries]))
    return shots


def take_turns(columns: list[list[Shot]]) -> list[Shot]:
    """One of each column, then another of each, and so on; column n starts at its image n, so that images differ."""
    turned = [shots[n % len(shots) :] + shots[: n % len(shots)] for n, shots in enumerate(columns) if shots]
    return [shot for turn in zip_longest(*turned) for shot in turn if shot is not None]


def compare(report: Report, shot: Shot, notes: list[str]) -> Comparison | None:
    """Whole image, truth, bicubic, models, maps; None without the truth."""
    name = f'{shot.image} of {shot.column.dataset} {shot.column.label}'

    def first(kind: str, size: tuple[int, ...] | None = None) -> np.ndarray | None:
        pictures = (one.read(kind, size, notes) for one in shot.saved)
        return next((picture for picture in pictures if picture is not None), None)

    truth = first('truth')
    if truth is None:
        return None
    top, left = busiest_window(truth)

    def crop(label: str, picture: np.ndarray, figure: str = '') -> Tile:
        part = np.ascontiguousarray(picture[top : top + SIDE, left : left + SIDE])
        return Tile(label, figure, embed(Image.fromarray(part), 'png'), (part.shape[1] * ZOOM, part.shape[0] * ZOOM))

    tiles = [overview(truth, top, left), crop('truth', truth)]
    bicubic = first('bicubic', truth.shape)
    if bicubic is not None:
        figures = (one.figure(shot.metric, 'bicubic_') for one in shot.saved)
        tiles.append(crop('bicubic', bicubic, next(filter(None, figures), '')))
    maps: list[Tile] = []
    legends: dict[Entry, list[Share]] = {}
    for one in shot.saved:
        label = report.labels[one.run.entry]
        result = one.read('result', truth.shape, notes)
        own_truth = one.read('truth', truth.shape, notes) if 'truth' in one.row['pictures'] else truth
        if own_truth is None or not np.array_equal(own_truth, truth):
            notes.append(f'{label} was measured on another truth of {name}; it is not shown there.')
        elif result is not None:
            tiles.append(crop(label, result, one.figure(shot.metric)))
            chosen = one.read('expert_map', truth.shape, notes)
            if chosen is not None:
                maps.append(crop(f'experts of {label}', chosen))
                legends[one.run.entry._replace(budget=None, cost_weight=None)] = shares(one.measured)
    place = f'window at row {top}, column {left}'
    return Comparison(name, place, shot.metric, tiles, maps, legends)


def busiest_window(truth: np.ndarray) -> tuple[int, int]:
    """(top, left) of the window of the largest gradient energy; see `RULE`.

    Args:
        truth: (R, S, 3) uint8 RGB.
    """
    energy = gradient_energy(torch.tensor(truth).permute(2, 0, 1) / 255, window=1)  # (R, S)
    size = [min(SIDE, side) for side in energy.shape]
    means = F.avg_pool2d(energy.double()[None, None], size, STRIDE)[0, 0]
    row, col = np.unravel_index(int(means.argmax()), tuple(means.shape))
    return int(row) * STRIDE, int(col) * STRIDE


def overview(truth: np.ndarray, top: int, left: int) -> Tile:
    """The whole image, as large as the crops, with the window marked."""
    image = Image.fromarray(truth)
    factor = min(1.0, SIDE * ZOOM / max(image.size))
    small = image.resize([max(1, round(side * factor)) for side in image.size], Image.Resampling.BOX)
    right, bottom = min(left + SIDE, image.width) - 1, min(top + SIDE, image.height) - 1
    ImageDraw.Draw(small).rectangle([round(value * factor) for value in (left, top, right, bottom)], None, '#f00', 2)
    return Tile('whole image', '', embed(small, 'jpeg', quality=85), small.size)


def embed(image: Image.Image, kind: str, **options: int) -> str:
    """A picture as a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f'data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}'
