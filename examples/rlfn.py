"""RLFN (Kong et al., CVPRW 2022) as a class of one's own: its public weights then become an encoder.

    encoder: {type: NetworkEncoder, arch: {type: RLFN, upscale: 4}, weights: rlfn_x4.pth}

with `--import examples/rlfn.py` for every command. Written from the paper; modules are named as in its checkpoints.
"""

import torch.nn.functional as F
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn


class SpatialAttention(nn.Module):
    """Enhanced spatial attention (section 3.1): a gain per LR pixel from a map of a sixth of the size."""

    def __init__(self, num_feat, width=16):
        super().__init__()
        self.conv1 = nn.Conv2d(num_feat, width, 1)
        self.conv_f = nn.Conv2d(width, width, 1)
        self.conv2 = nn.Conv2d(width, width, 3, stride=2)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1)
        self.conv4 = nn.Conv2d(width, num_feat, 1)

    def forward(self, x):
        narrow = self.conv1(x)
        coarse = self.conv3(F.max_pool2d(self.conv2(narrow), 7, stride=3))
        coarse = F.interpolate(coarse, size=x.shape[-2:], mode='bilinear', align_corners=False)
        return x * self.conv4(coarse + self.conv_f(narrow)).sigmoid()


class ResidualLocalBlock(nn.Module):
    """Three convolutions with a residual, a 1x1 convolution, attention."""

    def __init__(self, num_feat):
        super().__init__()
        for name in ('c1_r', 'c2_r', 'c3_r'):
            self.add_module(name, nn.Conv2d(num_feat, num_feat, 3, padding=1))
        self.c5 = nn.Conv2d(num_feat, num_feat, 1)
        self.esa = SpatialAttention(num_feat)

    def forward(self, x):
        refined = x
        for conv in (self.c1_r, self.c2_r, self.c3_r):
            refined = F.leaky_relu(conv(refined), 0.05)
        return self.esa(self.c5(refined + x))


@ARCH_REGISTRY.register()
class RLFN(nn.Module):
    """From an RGB image in [0, 1] to one `upscale` times as large; its public weights work in [0, 255]."""

    def __init__(self, num_feat: int = 52, num_block: int = 6, upscale: int = 4, img_range: float = 255.0):
        super().__init__()
        self.img_range = img_range
        self.conv_1 = nn.Conv2d(3, num_feat, 3, padding=1)
        self.blocks = [f'block_{i + 1}' for i in range(num_block)]
        for name in self.blocks:
            self.add_module(name, ResidualLocalBlock(num_feat))
        self.conv_2 = nn.Conv2d(num_feat, num_feat, 3, padding=1)
        self.upsampler = nn.Sequential(nn.Conv2d(num_feat, 3 * upscale**2, 3, padding=1), nn.PixelShuffle(upscale))

    def forward(self, x):
        shallow = deep = self.conv_1(x * self.img_range)
        for name in self.blocks:
            deep = self.get_submodule(name)(deep)
        return self.upsampler(self.conv_2(deep) + shallow) / self.img_range
