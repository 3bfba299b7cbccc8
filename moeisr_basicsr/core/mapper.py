"""The mapper M: implicit representation -> one logit per expert for every query (MoEISR, section 3).

A stack of convolutions runs at LR resolution. A small layer per query then also sees the relative coordinate and
the cell, so that output pixels inside one LR cell may take different experts. Its first linear layer is folded like
LIIF's: a 1x1 convolution at LR, a gather, and two coordinates per query.

The mapper always computes in fp32: near ties, rounding to 16 bit would flip the choice.

Shapes: B images, C feature channels, T = H * W latent codes, Q queries, J experts, D hidden width.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .coords import nearest_index, pixel_centres
from .precision import full_fp32

GRANULARITIES = ('pixel', 'cell')


class Mapper(nn.Module):
    """Routes queries to experts.

    The paper gives the number of convolutions (1 to 5) but no widths; 32 keeps the mapper near 1 % of dense LIIF at x4.

    Args:
        in_channels: C.
        num_experts: J.
        num_layers: Convolutions at LR resolution, 1 to 5.
        num_feat: Their width.
        hidden: D.
        granularity: 'pixel' decides for each output pixel, 'cell' once for all pixels of an LR cell.
    """

    def __init__(
        self,
        in_channels: int,
        num_experts: int,
        num_layers: int = 5,
        num_feat: int = 32,
        hidden: int = 32,
        granularity: str = 'pixel',
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
        self.query_in = nn.Linear(num_feat + 4, hidden)  # features, relative coordinate, cell
        self.query_out = nn.Linear(hidden, num_experts)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start from a routing that looks at the image.

        PyTorch's default initialisation fades over six layers to a thousandth of what coordinates and cell contribute:
        experts are then split by sub-pixel position and by scale. He's (arXiv 1502.01852) keeps the features' contrast,
        and a cell weight of zero keeps the scale from choosing the expert before the image does.
        """
        for layer in (*self.convs[::2], self.query_in, self.query_out):
            nn.init.kaiming_normal_(layer.weight, nonlinearity='relu')
            nn.init.zeros_(layer.bias)
        self.split_query_in()[1].zero_()

    @property
    def num_layers(self) -> int:
        """Number of convolutions, which is also the halo in LR cells."""
        return len(self.convs) // 2

    @property
    def offset(self) -> Tensor:
        """(J,) what is added to an expert's score everywhere."""
        return self.query_out.bias

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

    def forward(self, table: Tensor, coord: Tensor, cell: Tensor, lr_size: tuple[int, int]) -> Tensor:
        """Logits of scattered queries.

        Args:
            table: (B, T, D) from `table`.
            coord: (B, Q, 2).
            cell: (B, Q, 2) in units of LR cells.
            lr_size: (H, W).

        Returns:
            (B, Q, J) fp32.
        """
        with full_fp32(coord.device):
            rows = nearest_axis(coord[..., 0], lr_size[0])
            cols = nearest_axis(coord[..., 1], lr_size[1])
            index = (rows[0] * lr_size[1] + cols[0]).unsqueeze(-1)  # (B, Q, 1)
            x = table.gather(1, index.expand(-1, -1, table.shape[-1]))  # (B, Q, D)
            w_rel, w_cell = self.split_query_in()
            x = x + cell.to(x) @ w_cell.t()
            if self.granularity == 'pixel':
                x = x + torch.stack([rows[1], cols[1]], dim=-1).to(x) @ w_rel.t()
            return self.query_out(F.relu(x))

    @torch.no_grad()
    def standardise(self, mean: Tensor, std: Tensor, spread: float = 1.0) -> None:
        """Rescale the last layer so that logits of this mean and deviation get mean 0 and deviation `spread`.

        Fresh logits hardly differ between queries: Gumbel noise (deviation 1.28) then routes at random in training, and
        argmax sends nearly everything to one or two experts at test. Starting from logits as wide as the noise, the
        experts specialise from the first step on and all are in use. (Data-dependent initialisation, Salimans and
        Kingma, arXiv 1602.07868; our choice, not the paper's.)

        Args:
            mean: (J,) over the queries of a batch.
            std: (J,) likewise; an expert whose logit is constant keeps its scale.
            spread: Deviation afterwards.
        """
        gain = torch.where(std > 0, spread / std, torch.ones_like(std)).to(self.query_out.weight)
        self.query_out.weight.mul_(gain[:, None])
        self.query_out.bias.sub_(mean.to(gain)).mul_(gain)

    def macs(self) -> int:
        """Multiply-adds for one query."""
        w_rel = 0 if self.granularity == 'cell' else 2 * self.query_in.out_features
        return w_rel + self.query_out.weight.numel()

    def table_macs(self) -> int:
        """Multiply-adds for one LR cell."""
        convs = sum(conv.weight.numel() for conv in self.convs[::2])
        return convs + (self.query_in.in_features - 4) * self.query_in.out_features


def nearest_axis(coord: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Nearest LR cell on one axis and the distance to its centre in LR cells, both shaped like `coord`."""
    index = nearest_index(coord, n)
    return index, (coord - pixel_centres(n, coord.device)[index]) * n
