"""RDN (Zhang et al., CVPR 2018, arXiv 1802.08797) up to its features, as LIIF and LTE use it.

Module names follow the official LIIF checkpoints. Shapes: B images, C_in channels in [-1, 1], (H, W) LR size.
"""

from typing import Literal

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from moeisr_basicsr.errors import UserError
from moeisr_basicsr.options.values import Positive

CONFIGS = {'A': (20, 6, 32), 'B': (16, 8, 64)}  # blocks D, convolutions per block C, growth rate G (RDN, section 5)


class DenseConv(nn.Module):
    """One convolution of a residual dense block: its input and its output side by side."""

    def __init__(self, num_in: int, growth: int):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(num_in, growth, 3, padding=1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(x)], dim=1)


class ResidualDenseBlock(nn.Module):
    """Dense convolutions, local feature fusion, local residual (RDN, section 3.2)."""

    def __init__(self, num_feat: int, growth: int, num_conv: int):
        super().__init__()
        self.convs = nn.Sequential(*(DenseConv(num_feat + i * growth, growth) for i in range(num_conv)))
        self.LFF = nn.Conv2d(num_feat + num_conv * growth, num_feat, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.LFF(self.convs(x)) + x


@ARCH_REGISTRY.register()
class RDNEncoder(nn.Module):
    """RDN without upsampler.

    Args:
        num_in_ch: C_in.
        config: 'A' (20 blocks, 6 convolutions, growth 32) or 'B' (16, 8, 64).
        num_feat: G0, channels of the features.
        num_block: D, in place of the config's.
        num_conv: C, in place of the config's.
        growth: G, in place of the config's.
    """

    def __init__(
        self,
        num_in_ch: Positive = 3,
        config: Literal['A', 'B'] = 'B',
        num_feat: Positive = 64,
        num_block: Positive | None = None,
        num_conv: Positive | None = None,
        growth: Positive | None = None,
    ):
        super().__init__()
        if config not in CONFIGS:
            raise UserError(f'RDNEncoder config must be one of {sorted(CONFIGS)}; got {config!r}.')
        given = (num_block, num_conv, growth)
        num_block, num_conv, growth = (own or default for own, default in zip(given, CONFIGS[config]))
        self.num_feat = num_feat
        self.halo = 3 + num_block * num_conv  # receptive radius in LR pixels: every 3x3 convolution adds one
        self.SFENet1 = nn.Conv2d(num_in_ch, num_feat, 3, padding=1)
        self.SFENet2 = nn.Conv2d(num_feat, num_feat, 3, padding=1)
        self.RDBs = nn.ModuleList(ResidualDenseBlock(num_feat, growth, num_conv) for _ in range(num_block))
        self.GFF = nn.Sequential(
            nn.Conv2d(num_block * num_feat, num_feat, 1), nn.Conv2d(num_feat, num_feat, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, num_feat, H, W)."""
        shallow = self.SFENet1(x)
        x = self.SFENet2(shallow)
        blocks = []
        for block in self.RDBs:
            x = block(x)
            blocks.append(x)
        return self.GFF(torch.cat(blocks, dim=1)) + shallow
