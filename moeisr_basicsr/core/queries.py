"""A flat set of queries with everything that a decoder needs to answer them.

The four corners of one query lie side by side: a decoder sees 4 N rows, and blending them is one small product per
query.

Shapes: N queries, 4 corners, T latent codes in the LR table that `index` points into, D hidden width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .coords import Corners


class Queries(NamedTuple):
    """N output positions and the four latent codes around each."""

    index: Tensor  # (N, 4) int64, rows of the LR table
    rel: Tensor  # (N, 4, 2) relative coordinate in units of LR cells
    weight: Tensor  # (N, 4) local-ensemble weight
    cell: Tensor  # (N, 2), or (1, 2) where one cell serves all, size of the output pixel in units of LR cells

    def select(self, which: Tensor) -> 'Queries':
        """The queries at the positions `which` (M,), in that order."""
        cell = self.cell if self.cell.shape[0] == 1 else self.cell[which]
        return Queries(self.index[which], self.rel[which], self.weight[which], cell)

    def split(self, size: int) -> list['Queries']:
        """Consecutive pieces of at most `size` queries."""
        count = self.index.shape[0]
        return [
            Queries(
                self.index[at : at + size],
                self.rel[at : at + size],
                self.weight[at : at + size],
                self.cell if self.cell.shape[0] == 1 else self.cell[at : at + size],
            )
            for at in range(0, max(count, 1), size)
        ]

    def gather(self, table: Tensor) -> Tensor:
        """Rows of an LR table (T, D) for every corner: (4 N, D)."""
        return table.index_select(0, self.index.flatten())

    def local(self) -> Tensor:
        """What a decoder reads beside the features, relative coordinate and cell: (4 N, 4)."""
        cell = self.cell.unsqueeze(1).expand(self.rel.shape[0], 4, 2)
        return torch.cat([self.rel, cell], dim=-1).flatten(0, 1)

    def blend(self, x: Tensor) -> Tensor:
        """Local ensemble of the corners' vectors: (4 N, D) -> (N, D)."""
        return torch.bmm(self.weight.unsqueeze(1).to(x), x.unflatten(0, (-1, 4))).squeeze(1)


def make_queries(corners: Corners, cell: Tensor, image: int = 0) -> Queries:
    """The queries of one image of a batch; `cell` is (N, 2) or (1, 2) in units of LR cells."""
    return Queries(
        corners.index[:, image].t().contiguous(),
        corners.rel[:, image].transpose(0, 1).contiguous(),
        corners.weight[:, image].t().contiguous(),
        cell,
    )
