"""Pictures side by side: the truth, bicubic, every model and its expert map, cut at one place.

The place is chosen by the truth alone: the window with the largest gradient energy. The images are chosen by their
order: the n-th dataset and scale shows its n-th image. No result has a say in either.
"""

import base64
import io
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from moeisr_basicsr.analysis.routing_stats import gradient_energy

from .experts import Share, shares
from .runs import Column, Measured, Metric, Report, Run, group_by, main_metric

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
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            problem = 'lies outside its folder'
        else:
            try:
                picture = np.asarray(Image.open(folder / name).convert('RGB'))
            except OSError as error:  # Pillow's own are among them
                problem = 'is not there' if isinstance(error, FileNotFoundError) else 'is damaged'
            else:
                if size in (None, picture.shape):
                    return picture
                problem = 'has not the size of the truth'
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


class Window(NamedTuple):
    """A part of an image."""

    top: int
    left: int
    rows: int
    cols: int

    def cut(self, image: np.ndarray) -> np.ndarray:
        """The part of (R, S, 3) that the window shows."""
        return image[self.top : self.top + self.rows, self.left : self.left + self.cols]


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
    legends: dict[str, list[Share]]  # network -> colours of its map


def comparisons(report: Report, limit: int, notes: list[str]) -> list[Comparison]:
    """Comparisons of at most `limit` images; `notes` gets a line for each picture that cannot be shown."""
    found = [compare(report, shot, notes) for shot in take_turns(shots_of(report))[:limit]]
    return [comparison for comparison in found if comparison is not None]


def shots_of(report: Report) -> list[list[Shot]]:
    """Every image that a run saved beside its truth, per column."""
    shots = []
    for columns in report.datasets().values():
        metric = main_metric(one for entries in columns.values() for one in entries)
        for column, entries in columns.items():
            saved = [Saved(one, run, row) for one in entries for run in one.runs for row in run.rows]
            saved = [one for one in saved if 'result' in one.row.get('pictures', {})]
            images = group_by(saved, lambda one: one.row.get('image') or '')
            shots.append(
                [
                    Shot(column, image, metric, list({one.run.entry: one for one in reversed(of_image)}.values())[::-1])
                    for image, of_image in images.items()
                    if any('truth' in one.row['pictures'] for one in of_image)
                ]
            )
    return shots


def take_turns(columns: list[list[Shot]]) -> list[Shot]:
    """One of each column, then another of each, and so on; column n starts at its image n, so that images differ."""
    longest = max(map(len, columns), default=0)
    return [
        shots[(place + start) % len(shots)]
        for place in range(longest)
        for start, shots in enumerate(columns)
        if place < len(shots)
    ]


def compare(report: Report, shot: Shot, notes: list[str]) -> Comparison | None:
    """Whole image, truth, bicubic, models, maps; None without the truth."""
    name = f'{shot.image} of {shot.column.dataset} {shot.column.label}'

    def first(kind: str, size: tuple[int, ...] | None = None) -> np.ndarray | None:
        pictures = (one.read(kind, size, notes) for one in shot.saved)
        return next((picture for picture in pictures if picture is not None), None)

    truth = first('truth')
    if truth is None:
        return None
    window = busiest_window(truth)
    tiles = [overview(truth, window), tile('truth', window.cut(truth))]
    bicubic = first('bicubic', truth.shape)
    if bicubic is not None:
        figures = (one.figure(shot.metric, 'bicubic_') for one in shot.saved)
        tiles.append(tile('bicubic', window.cut(bicubic), next(filter(None, figures), '')))
    maps, legends = [], {}
    for one in shot.saved:
        label = report.labels[one.run.entry]
        result = one.read('result', truth.shape, notes)
        own_truth = one.read('truth', truth.shape, notes) if 'truth' in one.row['pictures'] else truth
        if own_truth is None or not np.array_equal(own_truth, truth):
            notes.append(f'{label} was measured on another truth of {name}; it is not shown there.')
        elif result is not None:
            tiles.append(tile(label, window.cut(result), one.figure(shot.metric)))
            chosen = one.read('expert_map', truth.shape, notes)
            if chosen is not None:
                maps.append(tile(f'experts of {label}', window.cut(chosen)))
                legends[one.run.entry.name] = shares(one.measured)
    place = f'window at row {window.top}, column {window.left}'
    return Comparison(name, place, shot.metric, tiles, maps, legends)


def busiest_window(truth: np.ndarray) -> Window:
    """The window of the largest gradient energy; see `RULE`.

    Args:
        truth: (R, S, 3) uint8 RGB.
    """
    rows, cols = (min(SIDE, size) for size in truth.shape[:2])
    energy = gradient_energy(torch.tensor(truth).permute(2, 0, 1) / 255, window=1)  # (R, S)
    means = F.avg_pool2d(energy.double()[None, None], (rows, cols), STRIDE)[0, 0]
    place = int(means.argmax())
    return Window(place // means.shape[1] * STRIDE, place % means.shape[1] * STRIDE, rows, cols)


def overview(truth: np.ndarray, window: Window) -> Tile:
    """The whole image, as large as the crops, with the window marked."""
    image = Image.fromarray(truth)
    factor = min(1.0, SIDE * ZOOM / max(image.size))
    small = image.resize([max(1, round(side * factor)) for side in image.size], Image.Resampling.BOX)
    right, bottom = window.left + window.cols - 1, window.top + window.rows - 1
    box = [round(value * factor) for value in (window.left, window.top, right, bottom)]
    ImageDraw.Draw(small).rectangle(box, outline='#ff0000', width=2)
    return Tile('whole image', '', embed(small, 'jpeg', quality=85), small.size)


def tile(label: str, crop: np.ndarray, figure: str = '') -> Tile:
    """A crop with its label."""
    source = embed(Image.fromarray(np.ascontiguousarray(crop)), 'png')
    return Tile(label, figure, source, (crop.shape[1] * ZOOM, crop.shape[0] * ZOOM))


def embed(image: Image.Image, kind: str, **options: int) -> str:
    """A picture as a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f'data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}'
