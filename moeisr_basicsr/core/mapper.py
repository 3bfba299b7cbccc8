"""The mapper M and the routing: features -> one logit per expert for every query -> one expert (MoEISR, section 3).

A stack of convolutions runs at LR resolution. A small layer per query then also sees the relative coordinate and
the cell, so that output pixels inside one LR pixel may take different experts. Its first linear layer is folded like
LIIF's: a 1x1 convolution at LR, a gather, and two coordinates per query.

The mapper always computes in fp32: near ties, rounding to 16 bit would flip the choice.

Shapes: B images, C feature channels, T = H * W latent codes, Q queries, J experts, D = num_feat.
"""

import hashlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .coords import Near
from .precision import full_fp32

GRANULARITIES = ('output_pixel', 'lr_pixel')
SMALLEST = torch.finfo(torch.float32).tiny  # the least exponential draw that Gumbel noise is made of


class Routing(NamedTuple):
    """Which expert answers which query; the same type in training and test."""

    expert: Tensor  # (B, Q) int64, the expert map
    gate: Tensor | None  # (B, Q, J) one-hot forward, softmax backward; None where nothing is learned


class Draw(NamedTuple):
    """What one training step decides about the routing."""

    noise: Tensor | None = None  # (B, Q, J) standard Gumbel noise; None for torch's generator
    tau: float = 1.0  # Gumbel temperature
    every_expert: bool = False  # whether all experts learn from each query, not only the chosen one


def gumbel_noise(shape: tuple[int, ...], seed: int, iteration: int, slot: int) -> Tensor:
    """Standard Gumbel noise that depends on its key only, so that resume and other rank counts draw it again.

    Args:
        shape: Shape of one sample's noise, (Q, J).
        seed: The run's `manual_seed`.
        iteration: Training iteration.
        slot: Position of the sample in the batch of all ranks.
    """
    digest = hashlib.blake2b(f'gumbel/{seed}/{iteration}/{slot}'.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, 'little') >> 1)
    # Without MKL one draw in 2^24 is 0: its noise would be infinite, and the softmax not a number.
    return torch.empty(shape).exponential_(generator=generator).clamp_(min=SMALLEST).log_().neg_()


def route_gumbel(logits: Tensor, draw: Draw) -> Routing:
    """Hard Gumbel-softmax with the straight-through gradient (Jang et al., arXiv 1611.01144).

    The gates are written hard + (p - sg p): exactly one-hot forward, the gradient of p = softmax((l + g) / tau)
    backward.

    Args:
        logits: (B, Q, J).
        draw: Noise g and temperature, above 0.
    """
    if draw.tau <= 0:
        raise ValueError(f'The Gumbel temperature tau must be above 0; got {draw.tau}.')
    noise = draw.noise
    if noise is None:
        noise = -torch.empty_like(logits).exponential_().clamp_(min=SMALLEST).log()
    prob = F.softmax((logits + noise.to(logits)) / draw.tau, dim=-1)
    expert = prob.argmax(dim=-1)
    hard = F.one_hot(expert, logits.shape[-1]).to(prob)
    return Routing(expert, hard + (prob - prob.detach()))


class Mapper(nn.Module):
    """Routes queries to experts.

    The paper gives the number of convolutions (1 to 5) but no widths; 32 keeps the mapper near 1 % of dense LIIF at x4.

    Args:
        in_channels: C.
        num_experts: J.
        num_layers: Convolutions at LR resolution, 1 to 5.
        num_feat: D, their width and that of the layer per query.
        granularity: 'output_pixel' decides for each output pixel as the paper does, 'lr_pixel' once for all output
            pixels of an LR pixel (ours).
    """

    def __init__(
        self,
        in_channels: int,
        num_experts: int,
        num_layers: int = 5,
        num_feat: int = 32,
        granularity: str = 'output_pixel',
    ):
        super().__init__()
        if not 1 <= num_layers <= 5:
            raise ValueError(f'mapper num_layers must be 1 to 5; got {num_layers}.')
        if granularity not in GRANULARITIES:
            raise ValueError(f'mapper granularity must be one of {GRANULARITIES}; got {granularity!r}.')
        self.granularity = granularity
        convs: list[nn.Module] = []
        for layer in range(num_layers):
            convs += [nn.Conv2d(num_feat if layer else in_channels, num_feat, 3, padding=1), nn.ReLU()]
        self.convs = nn.Sequential(*convs)
        self.query_in = nn.Linear(num_feat + 4, num_feat)  # features, relative coordinate, cell
        self.query_out = nn.Linear(num_feat, num_experts)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start from a routing that looks at the image.

        PyTorch's default initialisation fades over six layers to a thousandth of what coordinates and cell contribute:
        experts are then split by sub-pixel position and by scale. He's (arXiv 1502.01852) keeps the features' contrast,
        and a cell weight of zero keeps the scale from choosing the expert before the image does.
        """
        for parameter in self.parameters():
            if parameter.dim() == 1:  # a bias
                nn.init.zeros_(parameter)
            else:
                nn.init.kaiming_normal_(parameter, nonlinearity='relu')
        self.split_query_in()[1].zero_()

    @property
    def num_layers(self) -> int:
        """Number of convolutions, which is also the halo in LR pixels."""
        return len(self.convs) // 2

    def table(self, feat: Tensor) -> Tensor:
        """The part of the query layer that depends on the features only: (B, T, D), bias included."""
        with full_fp32(feat.device):
            x = self.convs(feat.to(self.query_in.weight.dtype))
            num_feat = x.shape[1]
            kernel = self.query_in.weight[:, :num_feat, None, None]
            return rearrange(F.conv2d(x, kernel, self.query_in.bias), 'b d h w -> b (h w) d')

    def split_query_in(self) -> tuple[Tensor, Tensor]:
        """Weights of the relative coordinate and of the cell, both (D, 2)."""
        return self.query_in.weight[:, -4:-2], self.query_in.weight[:, -2:]

    def forward(self, table: Tensor, near: Near, cell_lr: Tensor) -> Tensor:
        """The logits.

        Args:
            table: (B, T, D) from `table`.
            near: The LR pixels under the queries, of B images.
            cell_lr: (B, Q, 2), or one that broadcasts to it.

        Returns:
            (B, Q, J) fp32.
        """
        with full_fp32(table.device):
            index = near.index.unsqueeze(-1).expand(-1, -1, table.shape[-1])
            w_rel, w_cell = self.split_query_in()
            x = table.gather(1, index) + cell_lr.to(table) @ w_cell.t()  # (B, Q, D)
            if self.granularity == 'output_pixel':
                x = x + near.rel.to(x) @ w_rel.t()
            return self.query_out(F.relu(x))

    @torch.no_grad()
    def standardise(self, mean: Tensor, std: Tensor) -> None:
        """Rescale the last layer so that logits of this mean and deviation get mean 0 and deviation 1.

        Fresh logits hardly differ between queries: Gumbel noise (deviation 1.28) then routes at random in training, and
        argmax sends nearly everything to one or two experts at test. Starting from logits as wide as the noise, the
        experts specialise from the first step on and all are in use. (Data-dependent initialisation, Salimans and
        Kingma, arXiv 1602.07868; our choice, not the paper's.)

        Args:
            mean: (J,) over the queries of a batch.
            std: (J,) likewise; an expert whose logit is constant keeps its scale.
        """
        gain = torch.where(std > 0, 1 / std, torch.ones_like(std)).to(self.query_out.weight)
        self.query_out.weight.mul_(gain[:, None])
        self.query_out.bias.sub_(mean.to(gain)).mul_(gain)

    def macs(self) -> int:
        """Multiply-adds for one query."""
        w_rel = 0 if self.granularity == 'lr_pixel' else 2 * self.query_in.out_features
        return w_rel + self.query_out.weight.numel()

    def table_macs(self) -> int:
        """Multiply-adds for one LR pixel."""
        convs = sum(conv.weight.numel() for conv in self.convs if isinstance(conv, nn.Conv2d))
        return convs + (self.query_in.in_features - 4) * self.query_in.out_features
