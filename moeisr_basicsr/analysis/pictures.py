"""What stands beside a network's pictures: bicubic interpolation, and the experts' colours."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moeisr_basicsr.data.resize import imresize

# Yellow, green, blue, red from the cheapest to the most expensive expert, as in the paper's figures; BGR.
ANCHORS = np.array([[0, 220, 255], [60, 180, 60], [220, 110, 30], [40, 40, 220]], dtype=np.float64)


def bicubic(lq: Tensor, size: tuple[int, int]) -> Tensor:
    """The baseline of every table: `lq` as an 8-bit image, enlarged as MATLAB does it. Published figures are so.

    Args:
        lq: (C, h, w) RGB in [0, 1] on the CPU.
        size: (R, S).

    Returns:
        (C, R, S) fp32, 8-bit values.
    """
    image = lq.mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()  # (h, w, C)
    enlarged = imresize(np.ascontiguousarray(image), size=size)
    return torch.from_numpy(enlarged.transpose(2, 0, 1).astype(np.float32) / 255)


def expert_colours(num_experts: int, costs: Sequence[float] | None = None) -> np.ndarray:
    """The colour of each expert, in maps and charts alike: (J, 3) uint8 BGR.

    Args:
        num_experts: J; colours between the four anchors are mixed where J is not 4.
        costs: Of each expert, J; without them the experts stand from cheapest to most expensive.
    """
    place = np.linspace(0, len(ANCHORS) - 1, num_experts)
    colours = np.stack([np.interp(place, range(len(ANCHORS)), ANCHORS[:, channel]) for channel in range(3)], axis=1)
    if costs is not None:
        colours = colours[np.argsort(np.argsort(costs, kind='stable'))]
    return colours.round().astype(np.uint8)
