"""The method itself: coordinates, mapper, routing, experts. Read `reference` first. Needs torch only, never BasicSR."""

from .coords import make_cell, make_coord, output_size
from .decoder import Decoded, MoEDecoder, Predictions, mix
from .mapper import Draw, Routing, gumbel_noise
from .render import Rendered, render_image

__all__ = [
    'Decoded',
    'Draw',
    'MoEDecoder',
    'Predictions',
    'Rendered',
    'Routing',
    'gumbel_noise',
    'make_cell',
    'make_coord',
    'mix',
    'output_size',
    'render_image',
]
