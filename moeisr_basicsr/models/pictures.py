"""Pictures of the routing."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from moeisr_basicsr.analysis.pictures import expert_colours


def expert_map_picture(expert_map: Tensor, num_experts: int, costs: Sequence[float] | None = None) -> np.ndarray:
    """The colour of each output pixel's expert.

    Args:
        expert_map: (H, W) integers below `num_experts`.
        num_experts: J.
        costs: As `expert_colours`.

    Returns:
        (H, W, 3) uint8 BGR.
    """
    return expert_colours(num_experts, costs)[expert_map.cpu().numpy()]
