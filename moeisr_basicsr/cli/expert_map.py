"""The picture of an expert map: one colour per expert, and a legend with each expert's share.

It is drawn strip by strip, so that the map of a large image is never held whole.

Shapes: (R, S) rows and columns of the output image, J experts.
"""

import cv2
import numpy as np

from moeisr_basicsr.analysis.expert_colours import expert_colours

FONT = cv2.FONT_HERSHEY_SIMPLEX
MARGIN = 6  # pixels


class ExpertMapPicture:
    """The picture of one image's expert map, RGB.

    Args:
        width: S.
        costs: Each expert's multiply-adds over the dearest's; colours and legend go from cheap to dear.

    Attributes:
        width: Columns of the picture; more than S where a line of the legend is longer.
        legend_rows: Rows of the legend below the map.
    """

    def __init__(self, width: int, costs: list[float]):
        self.costs = costs
        self.order = np.argsort(costs, kind='stable')
        self.colors = expert_colours(len(costs), costs)[:, ::-1]  # (J, 3) RGB
        self.counts = np.zeros(len(costs), np.int64)
        self.size = float(np.clip(width / 1600, 0.45, 2.0))  # of the letters: legible beside the picture
        self.thickness = max(1, round(self.size))
        extents = [cv2.getTextSize(self.text(j, 1.0), FONT, self.size, self.thickness)[0] for j in self.order]
        self.height = max(extent[1] for extent in extents)
        entries = [self.height + extent[0] + 4 * MARGIN for extent in extents]
        self.width = max(width, *entries)
        self.places, line, col = [], 0, 0
        for entry in entries:
            if col and col + entry > self.width:
                line, col = line + 1, 0
            self.places.append((line, col))
            col += entry
        self.legend_rows = (line + 1) * (self.height + 2 * MARGIN) + MARGIN

    def text(self, expert: int, share: float) -> str:
        """What the legend says about an expert."""
        return f'{expert + 1}: {share:.1%} (cost {self.costs[expert]:.2f})'

    def rows(self, expert_map: np.ndarray) -> np.ndarray:
        """A strip of the map, (r, S) integers, as (r, width, 3) uint8; counts its pixels."""
        self.counts += np.bincount(expert_map.ravel(), minlength=len(self.costs))
        picture = np.full((expert_map.shape[0], self.width, 3), 255, np.uint8)
        picture[:, : expert_map.shape[1]] = self.colors[expert_map]
        return picture

    def shares(self) -> list[float]:
        """Each expert's fraction of the pixels so far."""
        return (self.counts / max(self.counts.sum(), 1)).tolist()

    def legend(self) -> np.ndarray:
        """(legend_rows, width, 3) uint8."""
        canvas = np.full((self.legend_rows, self.width, 3), 255, np.uint8)
        shares = self.shares()
        for expert, (line, col) in zip(self.order, self.places):
            top, left = line * (self.height + 2 * MARGIN) + MARGIN, col + MARGIN
            canvas[top : top + self.height, left : left + self.height] = self.colors[expert]
            cv2.putText(
                canvas,
                self.text(expert, shares[expert]),
                (left + self.height + MARGIN, top + self.height),
                FONT,
                self.size,
                (0, 0, 0),
                self.thickness,
                cv2.LINE_AA,
            )
        return canvas
