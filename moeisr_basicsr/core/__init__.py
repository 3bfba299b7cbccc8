"""The method itself: coordinates, mapper, routing, experts, dispatch. Needs torch only, never BasicSR."""

from .coords import make_cell, make_coord, output_size
from .decoder import Decoded, MoEDecoder
from .render import Rendered, render
from .routing import Routing, gumbel_noise

__all__ = [
    'Decoded',
    'MoEDecoder',
    'Rendered',
    'Routing',
    'gumbel_noise',
    'make_cell',
    'make_coord',
    'output_size',
    'render',
]
