"""Upscaling with a network in hand: any size, routing under the caller's control.

Shapes: B images, C channels, (H, W) LR size, (R, S) output size.
"""
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moeisr_basicsr.core import output_size
from moeisr_basicsr.errors import UserError


class Upscaled(NamedTuple):
    """The result of `upscale`."""
    image: Tensor  # (B, C, R, S) fp32, not clamped
    expert_map: Tensor | None  # (B, R, S) uint8, the expert of each output pixel; None for a dense decoder


def target_size(lq_size: tuple[int, int], scale: float | tuple[float, float] | None,
                size: tuple[int, int] | None) -> tuple[int, int]:
    """Output (rows, columns) from exactly one of `scale` and `size`.

    Raises:
        UserError: Both or none are given, a factor is below 1, or the size is smaller than the input.
    """
    if (scale is None) == (size is None):
        raise UserError(f'give either a scale or a size; got scale {scale} and size {size}.')
    if scale is not None:
        try:
            return output_size(lq_size, scale)
        except ValueError as error:
            raise UserError(str(error)) from None
    if size[0] < lq_size[0] or size[1] < lq_size[1]:
        raise UserError(f'the output size must be at least the input size of {lq_size[0]} x {lq_size[1]} '
                        f'(rows x columns); got {size[0]} x {size[1]}.')
    return int(size[0]), int(size[1])


@torch.no_grad()
def upscale(net: nn.Module, lq: Tensor, scale: float | tuple[float, float] | None = None,
            size: tuple[int, int] | None = None, cost_weight: float = 0.0) -> Upscaled:
    """Upscale a batch by any factor with a network of this package.

    Args:
        net: `MoEISR`, `LIIF` or `LTE`; its training mode is restored afterwards.
        lq: (B, C, H, W) RGB in [0, 1] on the network's device.
        scale: One factor of at least 1, or (rows, columns).
        size: Output (rows, columns), in place of `scale`.
        cost_weight: kappa; above 0 cheaper, below 0 dearer than the trained routing.

    Raises:
        UserError: See `target_size`.
    """
    size = target_size(tuple(lq.shape[-2:]), scale, size)
    was_training = net.training
    net.eval()
    try:
        rendered = net.render(lq, net.encode(lq), size, cost_weight=cost_weight)
    finally:
        net.train(was_training)
    return Upscaled(rendered.output, rendered.expert_map)
