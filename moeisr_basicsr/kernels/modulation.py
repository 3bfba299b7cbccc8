"""The latent MLPs of the lm family as the kernels run them, once per LR pixel.

Its last layer gives what a kernel reads in place of scales, shifts and code: 1 + scale, shift, and the render MLP's
first layer applied to code and cell, a product of two weights. Each of these parts is padded.

Legend: C feature channels, L hidden layers of the render MLP, W their width, P the padded width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor


class Latent(NamedTuple):
    """One expert's latent MLP; ReLU stands between its layers."""

    weights: list[Tensor]  # (D, C, 3, 3), then (D_out, D_in); the last one has (2 L + 1) P outputs
    biases: list[Tensor]
    w_cell: list[Tensor]  # (D, 2), of each layer: what the cell adds to its bias

    def biases_at(self, cell_lr: Tensor) -> list[Tensor]:
        """Biases for the cell (2,) in units of LR pixels."""
        return [bias + w_cell @ cell_lr for bias, w_cell in zip(self.biases, self.w_cell)]


@torch.no_grad()
def fold_latent(
    latent: Sequence[tuple[Tensor, Tensor]], first: tuple[Tensor, Tensor], depth: int, padded: int
) -> Latent:
    """The latent MLP with the render MLP's first layer in it.

    Args:
        latent: Weights (out, in) and biases; the first reads 9 C unfolded features and the cell, the last gives L scales
            of W, L shifts of W and the code of W.
        first: The render MLP's first weight (W, W + 4) for code, relative coordinate and cell, and bias.
        depth: L.
        padded: P.
    """
    width, parts = first[0].shape[0], 2 * depth + 1
    w_first = first[0].double()
    place = w_first.new_zeros(parts, padded, parts, width)
    for part in range(2 * depth):
        place[part, :width, part] = torch.eye(width)
    place[-1, :width, -1] = w_first[:, :width]
    place = place.flatten(2).flatten(0, 1)  # (parts P, parts W)

    *hidden, (weight, bias) = [(weight.double(), bias.double()) for weight, bias in latent]
    offset = bias.new_zeros(parts, padded)
    offset[:depth, :width] = 1
    offset[-1, :width] = first[1]
    layers = [*hidden, (place @ weight, place @ bias + offset.flatten())]
    weights, biases = ([part.float() for part in both] for both in zip(*layers))
    w_cell = [weight.new_zeros(weight.shape[0], 2) for weight in weights]
    w_cell[0] += weights[0][:, -2:]
    w_cell[-1].unflatten(0, (parts, padded))[-1, :width] += w_first[:, -2:].float()
    weights[0] = rearrange(weights[0][:, :-2], 'd (c kh kw) -> d c kh kw', kh=3, kw=3)
    return Latent(weights, biases, w_cell)
