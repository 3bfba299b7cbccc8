"""A profile as a picture: horizontal stacked bars, drawn with Pillow."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from moeisr_basicsr.analysis.pictures import expert_colours
from moeisr_basicsr.analysis.schema import scale_label

# Okabe and Ito's palette: told apart with every kind of colour vision
COLOURS = ('#0072B2', '#E69F00', '#009E73', '#CC79A7', '#56B4E9', '#D55E00', '#F0E442', '#000000')
SHARES = 'Share of the pixels, %: yellow is the cheapest expert, red the most expensive'
INK, GRID, PAPER = '#222222', '#dddddd', '#ffffff'
WIDTH, BAR, GAP, MARGIN = 1000, 26, 14, 24  # pixels
LEGEND, FIRST_BAR, AXIS = 34, 66, 30  # below a panel's top, below its top, below its last bar
FONT, TITLE_FONT = ImageFont.load_default(15), ImageFont.load_default(19)


class Bar(NamedTuple):
    """One bar: its label and the parts from left to right."""

    label: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        """Its length."""
        return sum(self.parts.values())


class Panel(NamedTuple):
    """Bars on one axis."""

    title: str  # with the unit
    bars: Sequence[Bar]
    colours: Sequence[str] = COLOURS  # of the parts


def panels_of(rows: Sequence[dict]) -> list[Panel]:
    """What the rows of one profile have: times, multiply-adds, shares of the experts, speeds of the loader."""
    times, macs, shares, speeds = [], [], [], []
    of_experts: list[str] = []
    for row in rows:
        label = scale_label(row['scale']) if 'scale' in row else row['case']
        if 'time_ms' in row:
            wholes = ('total', 'dense_folded', 'dense_plain')
            times.append(Bar(label, {stage: ms for stage, ms in row['time_ms'].items() if stage not in wholes}))
        if 'macs' in row:
            counts = {name: value / 1e3 for name, value in row['macs'].items() if name != 'each_expert'}
            macs.append(Bar(label, {part: counts[part] for part in ('encoder', 'mapper', 'tables', 'experts')}))
            for name in sorted(counts.keys() & {'dense_folded', 'dense_plain'}):
                parts = {'encoder': counts['encoder'], 'dense decoder': counts[name]}
                macs.append(Bar(f'{label} {name.replace("_", " ")}', parts))
            routed = row['routing']['shares']
            if len(routed) > 1:  # in the colours of expert maps
                colours = expert_colours(len(routed), row['macs']['each_expert'])
                of_experts = ['#{2:02x}{1:02x}{0:02x}'.format(*colour) for colour in colours]
                shares.append(Bar(label, {f'expert {j}': 100 * share for j, share in enumerate(routed, 1)}))
        if 'data' in row:
            speeds.append(Bar(label, {'items/s': row['data']['items_per_second']}))
    titles = ('Time, ms', 'Thousand multiply-adds per output pixel', SHARES, 'Items per second')
    palettes = (COLOURS, COLOURS, of_experts, COLOURS)
    return [Panel(*panel) for panel in zip(titles, (times, macs, shares, speeds), palettes) if panel[1]]


def nice_step(largest: float, count: int = 5) -> float:
    """A distance of 1, 2 or 5 times a power of ten that gives at most `count` marks up to `largest`."""
    power = 10.0 ** math.floor(math.log10(largest / count))
    return next(power * factor for factor in (1, 2, 5, 10) if largest / (power * factor) <= count * (1 + 1e-9))


def draw_chart(panels: Sequence[Panel]) -> Image.Image:
    """The panels below each other."""
    left = int(MARGIN + max(FONT.getlength(bar.label) for panel in panels for bar in panel.bars) + 12)
    heights = [FIRST_BAR + len(panel.bars) * (BAR + GAP) + AXIS + MARGIN for panel in panels]
    image = Image.new('RGB', (WIDTH, sum(heights) + MARGIN), PAPER)
    draw = ImageDraw.Draw(image)
    for place, panel in enumerate(panels):
        _draw_panel(draw, panel, MARGIN + sum(heights[:place]), left)
    return image


def _draw_panel(draw: ImageDraw.ImageDraw, panel: Panel, top: int, left: int) -> None:
    draw.text((MARGIN, top), panel.title, INK, TITLE_FONT)
    names = dict.fromkeys(name for bar in panel.bars for name in bar.parts)
    colours = dict(zip(names, [*panel.colours] * len(names)))
    at = float(MARGIN)
    for name, colour in colours.items():
        draw.rectangle((at, top + LEGEND + 3, at + 13, top + LEGEND + 16), colour)
        draw.text((at + 20, top + LEGEND), name, INK, FONT)
        at += 44 + int(FONT.getlength(name))
    first, bottom = top + FIRST_BAR, top + FIRST_BAR + len(panel.bars) * (BAR + GAP)
    largest = max(bar.total for bar in panel.bars) or 1.0
    unit = (WIDTH - MARGIN - 70 - left) / largest  # room for the sum behind the longest bar
    step = nice_step(largest)
    for mark in range(int(largest / step) + 1):
        at = left + mark * step * unit
        draw.line((at, first - 4, at, bottom), GRID)
        draw.text((at, bottom + 4), f'{mark * step:g}', INK, FONT, anchor='ma')
    for place, bar in enumerate(panel.bars):
        high = first + place * (BAR + GAP)
        draw.text((left - 8, high + BAR / 2), bar.label, INK, FONT, anchor='rm')
        at = float(left)
        for name, value in bar.parts.items():
            end = at + value * unit
            if round(end) > round(at):
                draw.rectangle((round(at), high, round(end) - 1, high + BAR), colours[name])
            at = end
        text = f'{bar.total:,.0f}' if bar.total >= 100 else f'{bar.total:.3g}'
        draw.text((round(at) + 8, high + BAR / 2), text, INK, FONT, anchor='lm')
