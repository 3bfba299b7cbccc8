"""Pictures side by side: the truth, bicubic, every model and its expert map, cut at one place.

The place is chosen by the truth alone: the window with the largest gradient energy. The images are chosen by their
order: the n-th dataset and scale shows its n-th image. No result has a say in either.
"""

import base64
import io
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from moeisr_basicsr.analysis.routing_stats import gradient_energy
from moeisr_basicsr.data.image_reader import read_image, to_float
from moeisr_basicsr.data.image_writer import to_unsigned

from .charts import hex_colours, swatches
from .collect import BICUBIC, Column, Report, Run, columns_of, main_metric, scale_label
from .costs import expert_names
from .markup import Markup, number, tag, void
from .quality import BICUBIC_LABEL, decimals_of

SIDE = 96  # of the crop, output pixels
STRIDE = 8  # between the windows that are compared
ZOOM = 2  # of the crop on the page
OVERVIEW = SIDE * ZOOM  # largest side of the whole image with the window marked
MAX_BYTES = 24 << 20  # of all pictures; a report stays a file that can be mailed
RULE = (
    f'Crops of {SIDE} x {SIDE} output pixels, enlarged by {ZOOM} without interpolation. The window is the one with '
    f'the largest mean squared luma gradient of the truth, on a grid of {STRIDE} pixels, the topmost and leftmost '
    'of equals. The n-th dataset and scale shows its n-th image, from the start again at its end. Figures are '
    'those of the whole image.'
)


class Shot(NamedTuple):
    """One image of one dataset and scale."""

    column: Column
    image: str
    rows: list[tuple[Run, dict]]  # the runs that saved it, one per entry, with their rows


class Window(NamedTuple):
    """A part of an image."""

    top: int
    left: int
    rows: int
    cols: int

    def cut(self, image: np.ndarray) -> np.ndarray:
        """The part of (R, S, 3) that the window shows."""
        return image[self.top : self.top + self.rows, self.left : self.left + self.cols]


def picture_section(report: Report, limit: int) -> tuple[list[Markup], list[str]]:
    """Figures of at most `limit` images, and notes on what could not be shown."""
    figures, notes, size = [], [], 0
    for shot in take_turns(shots_of(report))[:limit]:
        figure = Comparison(report, shot, notes).figure()
        if figure is None:
            continue
        size += len(figure)
        if size > MAX_BYTES:
            notes.append(f'Pictures beyond {MAX_BYTES >> 20} MiB are left out.')
            break
        figures.append(figure)
    return figures, notes


def shots_of(report: Report) -> list[list[Shot]]:
    """Every image that a run saved beside its truth, per column."""
    columns = []
    for runs in report.datasets().values():
        for column in columns_of(runs):
            images: dict[str, dict] = {}
            for run in runs:
                for row in run.images if run.column == column else ():
                    if 'result' in (row.get('pictures') or {}):
                        images.setdefault(row.get('image') or '', {}).setdefault(run.entry, (run, row))
            shots = [Shot(column, image, list(found.values())) for image, found in images.items()]
            columns.append([shot for shot in shots if any('truth' in row['pictures'] for _, row in shot.rows)])
    return columns


def take_turns(columns: list[list[Shot]]) -> list[Shot]:
    """One of each column, then another of each, and so on; column n starts at its image n, so that images differ."""
    longest = max(map(len, columns), default=0)
    return [
        shots[(place + start) % len(shots)]
        for place in range(longest)
        for start, shots in enumerate(columns)
        if place < len(shots)
    ]


class Comparison:
    """The figure of one image.

    Args:
        report: All results.
        shot: The image.
        notes: Gets a line for each picture that cannot be shown.
    """

    def __init__(self, report: Report, shot: Shot, notes: list[str]):
        self.report, self.shot, self.notes = report, shot, notes
        self.name = f'{shot.image} of {shot.column.dataset} {scale_label(shot.column.scale)}'
        self.metric, self.protocol = main_metric([run for run, _ in shot.rows]) or ('', '')

    def figure(self) -> Markup | None:
        """Whole image, truth, bicubic, models, maps; None without the truth."""
        truth = self.first('truth')
        if truth is None:
            return None
        window = busiest_window(truth)
        tiles = [overview(truth, window), tile('truth', window.cut(truth))]
        enlarged = self.first('bicubic', truth)
        if enlarged is not None:
            values = [(row.get('metrics') or {}).get(BICUBIC + self.metric) for _, row in self.shot.rows]
            tiles.append(tile(BICUBIC_LABEL, window.cut(enlarged), self.figures(next(filter(None, values), None))))
        maps, legends = [], {}
        for run, row in self.shot.rows:
            result = self.read(run, row, 'result', truth)
            if result is None or not self.same_truth(run, row, truth):
                continue
            label = self.report.labels[run.entry]
            value = (row.get('metrics') or {}).get(self.metric)
            tiles.append(tile(label, window.cut(result), self.figures(value)))
            chosen = self.read(run, row, 'expert_map', truth)
            if chosen is not None:
                maps.append(tile(f'experts of {label}', window.cut(chosen)))
                legends[run.entry.network] = self.legend(run, row)
        place = f'window at row {window.top}, column {window.left}'
        told = ', '.join(filter(None, (self.name, place, self.metric, self.protocol)))
        caption = tag('figcaption', tag('b', self.name), told.removeprefix(self.name))
        shown = tag('div', tag('div', maps, cls='tiles'), list(legends.values()), cls='maps') if maps else None
        return tag('figure', caption, tag('div', tiles, cls='tiles'), shown, cls='wide')

    def first(self, kind: str, like: np.ndarray | None = None) -> np.ndarray | None:
        """The picture of a kind by the first run that has it."""
        found = (self.read(run, row, kind, like) for run, row in self.shot.rows)
        return next((picture for picture in found if picture is not None), None)

    def read(self, run: Run, row: dict, kind: str, like: np.ndarray | None) -> np.ndarray | None:
        """A saved picture as (R, S, 3) uint8 RGB; None where there is none of the truth's size."""
        if kind not in row['pictures']:
            return None
        source = self.report.sources[run.source]
        inside = PurePosixPath(row['pictures'][kind])
        if inside.is_absolute() or '..' in inside.parts:
            self.notes.append(f'{source.path}: the picture {inside} lies outside its folder and is not shown.')
            return None
        path = source.folder / inside
        if not path.is_file():
            self.notes.append(f'{source.path}: the picture {inside} is not there.')
            return None
        picture = to_unsigned(read_image(path).rgb)
        if like is not None and picture.shape != like.shape:
            self.notes.append(f'{source.path}: the picture {inside} has not the size of the truth and is not shown.')
            return None
        return picture

    def same_truth(self, run: Run, row: dict, truth: np.ndarray) -> bool:
        """Whether a run was measured on this truth, as far as it saved its own."""
        own = self.read(run, row, 'truth', truth) if 'truth' in row['pictures'] else truth
        same = own is not None and np.array_equal(own, truth)
        if not same:
            self.notes.append(
                f'{self.report.labels[run.entry]} was measured on another truth of {self.name}; it is not shown there.'
            )
        return same

    def figures(self, value: float | None) -> str:
        """A metric of the whole image."""
        return '' if value is None else f'{number(value, decimals_of(self.metric))} dB'

    def legend(self, run: Run, row: dict) -> Markup:
        """Names of the map's colours."""
        count = len(run.loads)
        colours = hex_colours(count, (row.get('macs') or {}).get('each_expert'))
        return swatches(expert_names(run.entry, count), colours, run.entry.name)


def busiest_window(truth: np.ndarray) -> Window:
    """The window of the largest gradient energy; see `RULE`.

    Args:
        truth: (R, S, 3) uint8 RGB.
    """
    rows, cols = (min(SIDE, size) for size in truth.shape[:2])
    energy = gradient_energy(torch.from_numpy(to_float(truth)).permute(2, 0, 1), window=1)  # (R, S)
    means = F.avg_pool2d(energy.double()[None, None], (rows, cols), STRIDE)[0, 0]
    place = int(means.argmax())
    return Window(place // means.shape[1] * STRIDE, place % means.shape[1] * STRIDE, rows, cols)


def overview(truth: np.ndarray, window: Window) -> Markup:
    """The whole image, small, with the window marked."""
    image = Image.fromarray(truth)
    factor = min(1.0, OVERVIEW / max(image.size))
    small = image.resize([max(1, round(side * factor)) for side in image.size], Image.Resampling.BOX)
    box = [
        round(value * factor)
        for value in (window.left, window.top, window.left + window.cols - 1, window.top + window.rows - 1)
    ]
    ImageDraw.Draw(small).rectangle(box, outline='#ff0000', width=2)
    return figure_tile('whole image', embed(small, 'jpeg', quality=85), small.size, '')


def tile(label: str, crop: np.ndarray, figures: str = '') -> Markup:
    """A crop with its label."""
    return figure_tile(
        label,
        embed(Image.fromarray(np.ascontiguousarray(crop)), 'png'),
        (crop.shape[1] * ZOOM, crop.shape[0] * ZOOM),
        figures,
        cls='pixels',
    )


def figure_tile(label: str, source: str, size: tuple[int, int], figures: str, cls: str | None = None) -> Markup:
    """A picture above its label; `size` is (columns, rows) on the page."""
    picture = void('img', src=source, alt=label, width=size[0], height=size[1], cls=cls)
    return tag('div', picture, tag('span', label), tag('span', figures) if figures else None, cls='tile')


def embed(image: Image.Image, kind: str, **options: int) -> str:
    """A picture as a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f'data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}'
