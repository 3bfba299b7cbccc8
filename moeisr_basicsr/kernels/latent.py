"""What runs once per LR pixel, as the kernels run it: LIIF's first layer, lm's latent MLP.

The latent MLP's last layer gives what a kernel reads in place of scales, shifts and code: 1 + scale, shift, and the
render MLP's first layer applied to code and cell, a product of two weights. Each of these parts is padded.

Legend: C feature channels, L hidden layers of the render MLP, W their width, P the padded width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from moeisr_basicsr.core.liif import LIIFExperts
from moeisr_basicsr.core.lm import LMExperts


class Latent(NamedTuple):
    """Layers of one expert; ReLU stands between them."""

    weights: list[Tensor]  # (D, C, 3, 3), then (D_out, D_in)
    biases: list[Tensor]
    w_cell: list[Tensor]  # (D, 2), of each layer: what the cell adds to its bias

    def biases_at(self, cell_lr: Tensor) -> list[Tensor]:
        """Biases for the cell (2,) in units of LR pixels."""
        return [bias + w_cell @ cell_lr for bias, w_cell in zip(self.biases, self.w_cell)]


@torch.no_grad()
def first_of(pool: LIIFExperts, j: int) -> Latent:
    """Expert j's first layer without its coordinate part."""
    kernel, local = pool.split_first(j)
    return Latent([kernel], [pool.linears(j)[0].bias], [local[:, 2:]])


@torch.no_grad()
def latent_of(pool: LMExperts, j: int, padded: int) -> Latent:
    """Expert j's latent MLP with (2 L + 1) P outputs: scales of all layers, shifts, the render MLP's first layer.

    Args:
        pool: The experts.
        j: One with layers.
        padded: P.
    """
    first, width = pool.linears(j)[0], pool.render_width
    latent = [layer for layer in pool.latent(j) or () if isinstance(layer, nn.Linear)]
    parts = latent[-1].out_features // width
    w_first = first.weight.double()
    place = w_first.new_zeros(parts, padded, parts, width)
    for part in range(parts - 1):
        place[part, :width, part].fill_diagonal_(1)
    place[-1, :width, -1] = w_first[:, :width]
    place = place.flatten(2).flatten(0, 1)  # (parts P, parts W)
    offset = w_first.new_zeros(parts, padded)
    offset[: parts // 2, :width] = 1
    offset[-1, :width] = first.bias

    weights: list[Tensor] = [layer.weight for layer in latent]
    biases: list[Tensor] = [layer.bias for layer in latent]
    weights[-1] = (place @ weights[-1].double()).float()
    biases[-1] = (place @ biases[-1].double() + offset.flatten()).float()
    w_cell = [weight.new_zeros(weight.shape[0], 2) for weight in weights]
    w_cell[0] += weights[0][:, -2:]
    w_cell[-1].unflatten(0, (parts, padded))[-1, :width] += first.weight[:, -2:]
    weights[0] = weights[0][:, :-2].unflatten(1, (-1, 3, 3))  # as F.unfold orders them
    return Latent(weights, biases, w_cell)
