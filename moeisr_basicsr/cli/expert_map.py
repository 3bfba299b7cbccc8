"""The picture of an expert map, drawn strip by strip: one colour per expert, and a legend with each expert's share."""

import cv2
import numpy as np

from moeisr_basicsr.analysis.pictures import expert_colours

FONT = cv2.FONT_HERSHEY_SIMPLEX
MARGIN = 6  # pixels


class ExpertMapPicture:
    """The picture of one image's expert map, RGB; the map of a large image is never held whole.

    Args:
        width: Columns of the map, S.
        costs: Each expert's multiply-adds over the most expensive's; colours and legend go by them.

    Attributes:
        width: Columns of the picture; more than S where a line of the legend is longer.
        legend_rows: Rows of the legend below the map.
    """

    def __init__(self, width: int, costs: list[float]):
        self.costs = costs
        self.colours = expert_colours(len(costs), costs)[:, ::-1]  # (experts, 3) RGB
        self.counts = np.zeros(len(costs), np.int64)
        self.font_size = float(np.clip(width / 1600, 0.45, 2.0))  # legible beside the picture
        extents = [cv2.getTextSize(self.text(expert, 1.0), FONT, self.font_size, 1)[0] for expert in range(len(costs))]
        self.text_height = max(height for _, height in extents)
        self.line_rows = self.text_height + 2 * MARGIN
        self.legend_rows = len(costs) * self.line_rows
        self.width = max(width, *(self.text_height + length + 4 * MARGIN for length, _ in extents))

    def text(self, expert: int, share: float) -> str:
        """What the legend says about an expert."""
        return f'{expert + 1}: {share:.1%} (cost {self.costs[expert]:#.2g})'

    def rows(self, expert_map: np.ndarray) -> np.ndarray:
        """A strip of the map, (r, S) integers, as (r, width, 3) uint8; counts its pixels."""
        self.counts += np.bincount(expert_map.ravel(), minlength=len(self.costs))
        picture = np.full((expert_map.shape[0], self.width, 3), 255, np.uint8)
        picture[:, : expert_map.shape[1]] = self.colours[expert_map]
        return picture

    def shares(self) -> list[float]:
        """Each expert's share of the pixels so far."""
        return (self.counts / self.counts.sum()).tolist()

    def legend(self) -> np.ndarray:
        """One line per expert, cheapest first: (legend_rows, width, 3) uint8."""
        canvas = np.full((self.legend_rows, self.width, 3), 255, np.uint8)
        shares, side = self.shares(), self.text_height
        for line, expert in enumerate(np.argsort(self.costs, kind='stable')):
            top = line * self.line_rows + MARGIN
            canvas[top : top + side, MARGIN : MARGIN + side] = self.colours[expert]
            text, place = self.text(expert, shares[expert]), (2 * MARGIN + side, top + side)
            cv2.putText(canvas, text, place, FONT, self.font_size, (0, 0, 0), 1, cv2.LINE_AA)
        return canvas
