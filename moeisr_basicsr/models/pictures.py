"""Pictures of the routing."""
from collections.abc import Sequence

import numpy as np
from torch import Tensor

# Yellow, green, blue, red from the cheapest to the dearest expert, as in the paper's figures; BGR.
ANCHORS = np.array([[0, 220, 255], [60, 180, 60], [220, 110, 30], [40, 40, 220]], dtype=np.float64)


def expert_map_picture(expert_map: Tensor, num_experts: int, costs: Sequence[float] | None = None) -> np.ndarray:
    """The colour of each output pixel's expert.

    Args:
        expert_map: (H, W) integers below `num_experts`.
        num_experts: J; colours between the four anchors are mixed where J is not 4.
        costs: Of each expert, J; without them the experts stand from cheap to dear.

    Returns:
        (H, W, 3) uint8 BGR.
    """
    place = np.linspace(0, len(ANCHORS) - 1, num_experts)
    colors = np.stack([np.interp(place, range(len(ANCHORS)), ANCHORS[:, channel]) for channel in range(3)], axis=1)
    if costs is not None:
        colors = colors[np.argsort(np.argsort(costs, kind='stable'))]
    return colors.round().astype(np.uint8)[expert_map.cpu().numpy()]
