"""The colours of the experts, in maps and charts alike."""

from collections.abc import Sequence

import numpy as np

# Yellow, green, blue, red from the cheapest to the dearest expert, as in the paper's figures; BGR.
ANCHORS = np.array([[0, 220, 255], [60, 180, 60], [220, 110, 30], [40, 40, 220]], dtype=np.float64)


def expert_colours(num_experts: int, costs: Sequence[float] | None = None) -> np.ndarray:
    """The colour of each expert: (J, 3) uint8 BGR.

    Args:
        num_experts: J; colours between the four anchors are mixed where J is not 4.
        costs: Of each expert, J; without them the experts stand from cheap to dear.
    """
    place = np.linspace(0, len(ANCHORS) - 1, num_experts)
    colours = np.stack([np.interp(place, range(len(ANCHORS)), ANCHORS[:, channel]) for channel in range(3)], axis=1)
    if costs is not None:
        colours = colours[np.argsort(np.argsort(costs, kind='stable'))]
    return colours.round().astype(np.uint8)
