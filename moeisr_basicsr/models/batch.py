"""One batch as the training step sees it.

Shapes: B images, C channels, (h, w) LR patch, Q queries, (R, S) HR patch.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Queries with their true colours, or whole patches where the dataset gives no coordinates."""

    lq: Tensor  # (B, C, h, w) RGB in [0, 1]
    gt: Tensor | None  # (B, Q, C) with coordinates, (B, C, R, S) without
    coord: Tensor | None  # (B, Q, 2), rows first
    cell: Tensor | None  # (B, Q, 2), 2 / output size
    paths: list[str]  # of the HR images, or of the LR images where there are no others
    scale: Tensor | None  # (B, 2) effective (rows, columns), on the CPU

    @classmethod
    def from_data(cls, data: dict, device: torch.device) -> 'Batch':
        """From a collated item of any dataset that gives `lq`."""
        lq: Tensor = data['lq'].to(device, non_blocking=True)
        gt, coord, cell = (
            data[key].to(device, non_blocking=True) if key in data else None for key in ('gt', 'coord', 'cell')
        )
        return cls(lq, gt, coord, cell, data.get('gt_path') or data.get('lq_path') or [], data.get('scale'))

    @property
    def queries(self) -> int:
        """Number of output positions that the batch asks for."""
        if self.coord is not None:
            return self.coord.shape[0] * self.coord.shape[1]
        return 0 if self.gt is None else self.gt.numel() // self.gt.shape[1]

    def split(self, parts: int) -> list['Batch']:
        """At most `parts` batches of about the same size, in order."""
        images = self.lq.shape[0]
        edges = sorted({images * at // parts for at in range(parts + 1)})
        return [
            Batch._make(None if field is None else field[start:stop] for field in self)
            for start, stop in zip(edges, edges[1:])
        ]

    def describe(self) -> list[str]:
        """One line per image: its file and scale."""
        lines = self.paths or [f'image {index} of the batch' for index in range(self.lq.shape[0])]
        if self.scale is None:
            return lines
        return [f'{path} at scale {rows:.4g} x {cols:.4g}' for path, (rows, cols) in zip(lines, self.scale.tolist())]
