"""`core.reference`, the plain truth, in the forms that the tests need it."""

from types import SimpleNamespace

import torch

from moeisr_basicsr.core import decoder, reference
from moeisr_basicsr.core.reference import mixture, mlp

__all__ = ['FAMILIES', 'grid', 'liif', 'lte', 'mixture', 'mlp']


def _family(name):
    def predict(pool, j, feat, coord, cell):
        return reference.predict(SimpleNamespace(family=name, pool=pool), j, feat, coord, cell)

    return predict


FAMILIES = {name: _family(name) for name in decoder.FAMILIES}


def grid(size, batch=1):
    """Coordinates and cells of a whole image of `size`, row-major: two of (B, H * W, 2)."""
    coord = reference.centres(torch.empty(1, 1, *size)).flatten(2).transpose(1, 2).expand(batch, -1, -1).contiguous()
    return coord, torch.tensor([2 / size[0], 2 / size[1]]).expand_as(coord).contiguous()


liif, lte = FAMILIES['liif'], FAMILIES['lte']
