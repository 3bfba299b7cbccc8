"""What the routing did to an image: shares, cost, and whether depth follows texture.

Shapes: (R, S) output size, J experts.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moeisr_basicsr.core import MoEDecoder
from moeisr_basicsr.core.coords import grid_axis

from .complexity import check_shares

LUMA = (0.299, 0.587, 0.114)  # BT.601, as every edge detector uses it


def expert_shares(expert_map: Tensor, num_experts: int) -> list[float]:
    """Each expert's share of the pixels of an expert map of any shape."""
    counts = torch.bincount(expert_map.flatten().long(), minlength=num_experts)
    if len(counts) > num_experts:
        raise ValueError(f'the expert map names expert {len(counts) - 1}; there are {num_experts}.')
    return (counts.double() / counts.sum()).tolist()


def lr_reads(decoder: MoEDecoder, expert_map: Tensor, lq_size: tuple[int, int]) -> list[float] | None:
    """Each expert's share of the LR pixels, those that its pixels read; None for a family that leaves none out.

    Args:
        expert_map: (R, S).
        lq_size: (H, W).
    """
    if not decoder.pool.skips_unread:
        return None
    device = expert_map.device
    rows, cols = (grid_axis(n_out, n_lr, device=device).index for n_out, n_lr in zip(expert_map.shape, lq_size))
    reads = torch.zeros(decoder.num_experts, *lq_size, dtype=torch.bool, device=device)
    for row, experts in zip(rows.t(), expert_map):  # row by row: the indices of a large image take gigabytes
        reads[experts.long(), row[:, None, None], cols] = True  # (2, 2, S) corners
    return reads.double().mean(dim=(1, 2)).tolist()


def mean_cost(shares: Sequence[float], costs: Tensor) -> float:
    """Mean relative cost of a pixel; `costs` (J,) are `decoder.expert_costs`."""
    check_shares(shares, len(costs))
    return float((torch.tensor(shares, dtype=torch.float64) * costs.double().cpu()).sum())


def gradient_energy(image: Tensor, window: int = 5) -> Tensor:
    """Squared luma gradient, averaged over a window around each pixel: (3, R, S) -> (R, S).

    Central differences; the border pixel is repeated.

    Args:
        image: RGB.
        window: Side of the averaging window, odd.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f'window must be odd and positive; got {window}.')
    luma = (image.float() * image.new_tensor(LUMA, dtype=torch.float32)[:, None, None]).sum(0)
    padded = F.pad(luma[None, None], (1, 1, 1, 1), mode='replicate')[0, 0]
    row = (padded[2:, 1:-1] - padded[:-2, 1:-1]) / 2
    col = (padded[1:-1, 2:] - padded[1:-1, :-2]) / 2
    energy = F.pad((row.square() + col.square())[None, None], (window // 2,) * 4, mode='replicate')
    return F.avg_pool2d(energy, window, stride=1)[0, 0]


def depth_correlation(expert_map: Tensor, image: Tensor, depths: Sequence[int], window: int = 5) -> float | None:
    """Spearman's correlation of the chosen expert's depth with the local gradient energy; None if either is constant.

    Args:
        expert_map: (R, S).
        image: (3, R, S) RGB.
        depths: Hidden layers of each expert.
        window: See `gradient_energy`.
    """
    from scipy.stats import spearmanr  # a second of imports, and only validation with routing statistics needs it

    depth = torch.tensor(depths)[expert_map.long().cpu()]
    energy = gradient_energy(image.cpu(), window)
    if depth.min() == depth.max() or energy.min() == energy.max():
        return None
    return float(spearmanr(depth.flatten().numpy(), energy.flatten().numpy())[0])
