"""Horizontal stacked bars as a PNG, drawn with Pillow."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

# Okabe and Ito's palette: told apart with every kind of colour vision
COLOURS = ('#0072B2', '#E69F00', '#009E73', '#CC79A7', '#56B4E9', '#D55E00', '#F0E442', '#000000')
INK, GRID, PAPER = '#222222', '#dddddd', '#ffffff'
WIDTH, BAR, GAP, MARGIN = 1000, 26, 14, 24  # pixels
FONT_SIZE, TITLE_SIZE = 15, 19


class Bar(NamedTuple):
    """One bar: its label and the parts from left to right."""

    label: str
    parts: dict[str, float]


class Panel(NamedTuple):
    """Bars on one axis."""

    title: str  # with the unit
    bars: Sequence[Bar]


def nice_step(largest: float, count: int = 5) -> float:
    """A distance of 1, 2 or 5 times a power of ten that gives at most `count` marks up to `largest`."""
    power = 10.0 ** math.floor(math.log10(largest / count))
    return next(power * factor for factor in (1, 2, 5, 10) if largest / (power * factor) <= count * (1 + 1e-9))


def draw_chart(panels: Sequence[Panel]) -> Image.Image:
    """The panels below each other."""
    font, title_font = ImageFont.load_default(FONT_SIZE), ImageFont.load_default(TITLE_SIZE)
    ruler = ImageDraw.Draw(Image.new('RGB', (1, 1)))
    label_width = max((ruler.textlength(bar.label, font) for panel in panels for bar in panel.bars), default=0)
    left, right = int(MARGIN + label_width + 12), WIDTH - MARGIN - 70  # room for the sum behind the longest bar
    heights = [_panel_height(panel) for panel in panels]
    image = Image.new('RGB', (WIDTH, sum(heights) + MARGIN), PAPER)
    draw = ImageDraw.Draw(image)
    top = MARGIN
    for panel, height in zip(panels, heights):
        draw.text((MARGIN, top), panel.title, INK, title_font)
        names = list(dict.fromkeys(name for bar in panel.bars for name in bar.parts))
        colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}
        _draw_legend(draw, colours, top + 34, font)
        _draw_bars(draw, panel.bars, colours, (left, right), top + 66, font)
        top += height
    return image


def _panel_height(panel: Panel) -> int:
    return 66 + len(panel.bars) * (BAR + GAP) + 30 + MARGIN


def _draw_legend(draw: ImageDraw.ImageDraw, colours: dict[str, str], top: int, font: ImageFont.ImageFont) -> None:
    at = MARGIN
    for name, colour in colours.items():
        draw.rectangle((at, top + 3, at + 13, top + 16), colour)
        draw.text((at + 20, top), name, INK, font)
        at += 20 + int(draw.textlength(name, font)) + 24


def _draw_bars(
    draw: ImageDraw.ImageDraw,
    bars: Sequence[Bar],
    colours: dict[str, str],
    span: tuple[int, int],
    top: int,
    font: ImageFont.ImageFont,
) -> None:
    left, right = span
    largest = max((sum(bar.parts.values()) for bar in bars), default=0.0) or 1.0
    bottom = top + len(bars) * (BAR + GAP)
    step = nice_step(largest)
    for mark in range(int(largest / step) + 1):
        at = left + (right - left) * mark * step / largest
        draw.line((at, top - 4, at, bottom), GRID)
        draw.text((at, bottom + 4), f'{mark * step:g}', INK, font, anchor='ma')
    for place, bar in enumerate(bars):
        y = top + place * (BAR + GAP)
        draw.text((left - 8, y + BAR / 2), bar.label, INK, font, anchor='rm')
        at = float(left)
        for name, value in bar.parts.items():
            end = at + (right - left) * value / largest
            if round(end) > round(at):
                draw.rectangle((round(at), y, round(end) - 1, y + BAR), colours[name])
            at = end
        total = sum(bar.parts.values())
        text = f'{total:,.0f}' if total >= 100 else f'{total:.3g}'
        draw.text((round(at) + 8, y + BAR / 2), text, INK, font, anchor='lm')
