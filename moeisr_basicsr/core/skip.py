"""The image that the decoder's output is added to: the input, interpolated.

Both kernels interpolate without anti-aliasing, which an enlargement does not need. 'bilinear' repeats the border as
LTE's `grid_sample` does; 'bicubic' is Keys' kernel with a = -1/2 and mirrored borders: MATLAB's `imresize`, so a
network that adds nothing scores what the bicubic baseline scores. (PyTorch's own bicubic has a = -3/4.)

Shapes: B images, C channels, (H, W) LR size, (R, S) rows and columns of a grid, Q queries, K kernel taps.
"""

import torch
from torch import Tensor

SKIPS = ('none', 'bilinear', 'bicubic')


def keys_kernel(distance: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = -1/2 (IEEE TASSP 1981, equation 15)."""
    x = distance.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def axis_taps(coord: Tensor, n: int, mode: str) -> tuple[Tensor, Tensor]:
    """Pixels and weights that interpolate at `coord` on an axis of `n` pixels.

    Args:
        coord: (...) positions in [-1, 1].
        n: Pixels on the axis.
        mode: 'bilinear' (K = 2) or 'bicubic' (K = 4).

    Returns:
        Index int64 and weight fp32, both (K, ...).
    """
    position = ((coord + 1) * n - 1) / 2
    base = position.floor()
    first, end = (0, 2) if mode == 'bilinear' else (-1, 3)
    offsets = torch.arange(first, end, device=coord.device)
    offsets = offsets.view(-1, *[1] * coord.dim())
    distance = (position - base) - offsets
    index = base.long() + offsets  # (K, ...)
    if mode == 'bilinear':
        return index.clamp(0, n - 1), 1 - distance.abs()
    index = torch.where(index < 0, -1 - index, index)  # mirrored, the border pixel is repeated
    index = torch.where(index >= n, 2 * n - 1 - index, index).clamp(0, n - 1)  # the clamp is for 1 and 2 pixels only
    return index, keys_kernel(distance)


def skip_at(image: Tensor, coord: Tensor, mode: str) -> Tensor:
    """The interpolated image at scattered queries.

    Args:
        image: (B, C, H, W).
        coord: (B, Q, 2).
        mode: 'bilinear' or 'bicubic'.

    Returns:
        (B, Q, C).
    """
    height, width = image.shape[-2:]
    row_index, row_weight = axis_taps(coord[..., 0], height, mode)  # (K, B, Q)
    col_index, col_weight = axis_taps(coord[..., 1], width, mode)
    index = row_index[:, None] * width + col_index  # (K, K, B, Q)
    weight = row_weight[:, None] * col_weight
    batch = torch.arange(image.shape[0], device=image.device)[:, None]
    taps = image.flatten(2).transpose(1, 2)[batch, index]  # (K, K, B, Q, C)
    return (taps * weight.unsqueeze(-1)).sum(dim=(0, 1))


def skip_grid(image: Tensor, rows: Tensor, cols: Tensor, mode: str) -> Tensor:
    """The interpolated image on a grid, one axis after the other.

    Args:
        image: (B, C, H, W).
        rows: (R,) row positions in [-1, 1].
        cols: (S,) column positions.
        mode: 'bilinear' or 'bicubic'.

    Returns:
        (B, C, R, S).
    """
    index, weight = axis_taps(rows, image.shape[-2], mode)
    image = sum(image[..., i, :] * w[:, None] for i, w in zip(index, weight))  # (B, C, R, W)
    index, weight = axis_taps(cols, image.shape[-1], mode)
    return sum(image[..., i] * w for i, w in zip(index, weight))
