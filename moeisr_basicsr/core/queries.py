"""A flat set of queries with everything that a decoder needs to answer them.

Shapes: N queries, 4 corners, T latent codes in the LR table that `index` points into.
"""
from typing import NamedTuple

from torch import Tensor

from .coords import Corners


class Queries(NamedTuple):
    """N output positions and the four latent codes around each."""
    index: Tensor  # (4, N) int64, rows of the LR table
    rel: Tensor  # (4, N, 2) relative coordinate in units of LR cells
    weight: Tensor  # (4, N) local-ensemble weight
    cell: Tensor  # (N, 2), or (1, 2) where one cell serves all, size of the output pixel in units of LR cells

    def select(self, which: Tensor) -> 'Queries':
        """The queries at the positions `which` (M,), in that order."""
        cell = self.cell if self.cell.shape[0] == 1 else self.cell[which]
        return Queries(self.index[:, which], self.rel[:, which], self.weight[:, which], cell)

    def split(self, size: int) -> list['Queries']:
        """Consecutive pieces of at most `size` queries."""
        count = self.index.shape[1]
        return [Queries(self.index[:, at:at + size], self.rel[:, at:at + size], self.weight[:, at:at + size],
                        self.cell if self.cell.shape[0] == 1 else self.cell[at:at + size])
                for at in range(0, max(count, 1), size)]


def image_queries(corners: Corners, cell: Tensor, image: int) -> Queries:
    """The queries of one image of a batch; `cell` (B, Q, 2) already in units of LR cells."""
    return Queries(corners.index[:, image], corners.rel[:, image], corners.weight[:, image], cell[image])
