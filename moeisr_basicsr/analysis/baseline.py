"""The baseline of every table: MATLAB's bicubic interpolation.

Shapes: (C, h, w) LR image, (C, R, S) output image, RGB in [0, 1].
"""

import numpy as np
import torch
from torch import Tensor

from moeisr_basicsr.data.resize import imresize


def bicubic(lq: Tensor, size: tuple[int, int]) -> Tensor:
    """`lq` as an 8-bit image, enlarged to `size` as MATLAB does it: (C, R, S) fp32, 8-bit values.

    Published bicubic figures are of 8-bit results.

    Args:
        lq: On the CPU.
        size: (rows, columns).
    """
    image = lq.mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()  # (h, w, C)
    enlarged = imresize(np.ascontiguousarray(image), size=size)
    return torch.from_numpy(enlarged.transpose(2, 0, 1).astype(np.float32) / 255)
