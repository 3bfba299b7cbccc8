"""SMFANet (Zheng et al., ECCV 2024) up to its features, written from the paper.

Module names follow the official checkpoints. Shapes: B images, C_in channels in [-1, 1], (H, W) LR size, C channels of
the features, (H', W') = (ceil(H / 8), ceil(W / 8)) cells of 8 x 8 LR pixels.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from moeisr_basicsr.options.values import Positive, PositiveNumber

CELL = 8  # LR pixels per side of a cell, over which self-modulation takes the maximum
# Of the local variance, in cells: windows of 56 x 56 are near to the patches of 64 x 64 that its authors trained on.
RADIUS = 3


class LocalDetail(nn.Module):
    """The branch of local detail (section 3.2): two depthwise channels of each, mixed."""

    def __init__(self, num_feat: int):
        super().__init__()
        self.conv_0 = nn.Sequential(
            nn.Conv2d(num_feat, 2 * num_feat, 3, padding=1, groups=num_feat), nn.Conv2d(2 * num_feat, 2 * num_feat, 1)
        )
        self.conv_1 = nn.Conv2d(2 * num_feat, num_feat, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_1(F.gelu(self.conv_0(x)))


class SelfModulation(nn.Module):
    """Self-modulation feature aggregation (section 3.2): detail plus features modulated by maximum and variance."""

    def __init__(self, num_feat: int, local: bool):
        super().__init__()
        self.local = local
        self.linear_0 = nn.Conv2d(num_feat, 2 * num_feat, 1)
        self.linear_1 = nn.Conv2d(num_feat, num_feat, 1)
        self.linear_2 = nn.Conv2d(num_feat, num_feat, 1)
        self.lde = LocalDetail(num_feat)
        self.dw_conv = nn.Conv2d(num_feat, num_feat, 3, padding=1, groups=num_feat)
        self.alpha = nn.Parameter(torch.ones(1, num_feat, 1, 1))
        self.belt = nn.Parameter(torch.zeros(1, num_feat, 1, 1))  # the paper's beta

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        detail, x = self.linear_0(x).chunk(2, dim=1)
        if self.local:
            largest = F.max_pool2d(x, CELL, ceil_mode=True)  # (B, C, H', W')
            variance = local_variance(x)  # (B, C, H', W')
        else:
            largest = F.adaptive_max_pool2d(x, (height // CELL, width // CELL))
            variance = x.var(dim=(-2, -1), keepdim=True)
        gain = F.gelu(self.linear_1(self.dw_conv(largest) * self.alpha + variance * self.belt))
        if self.local:
            gain = F.interpolate(gain, scale_factor=CELL)[..., :height, :width]
        else:
            gain = F.interpolate(gain, size=(height, width))
        return self.linear_2(x * gain + self.lde(detail))


def local_variance(x: Tensor) -> Tensor:
    """The variance around each cell, over the cells within RADIUS that lie in the image: (B, C, H', W')."""
    rows, cols = (-size % CELL for size in x.shape[-2:])

    def around(values: Tensor) -> Tensor:
        """The mean over a window of 2 RADIUS + 1 cells, in which what lies outside the image counts as 0."""
        cells = F.avg_pool2d(F.pad(values, (0, cols, 0, rows)), CELL)
        return F.avg_pool2d(cells, 2 * RADIUS + 1, stride=1, padding=RADIUS)

    x = x.float() if x.dtype.itemsize < 4 else x  # a difference of squares; no autocast lowers what follows
    inside = around(torch.ones_like(x[:1, :1]))  # share of the window that lies in the image
    variance = around(x.square()) / inside - (around(x) / inside).square()
    pixels = inside * ((2 * RADIUS + 1) * CELL) ** 2
    return variance * pixels / (pixels - 1).clamp(min=1)  # as torch.var


class PartialFeedForward(nn.Module):
    """Partial convolution-based feed-forward network (section 3.3): a quarter of the hidden channels is convolved."""

    def __init__(self, num_feat: int, ffn_scale: float):
        super().__init__()
        hidden = int(num_feat * ffn_scale)
        self.split = [hidden // 4, hidden - hidden // 4]
        self.conv_0 = nn.Conv2d(num_feat, hidden, 1)
        self.conv_1 = nn.Conv2d(hidden // 4, hidden // 4, 3, padding=1)
        self.conv_2 = nn.Conv2d(hidden, num_feat, 1)

    def forward(self, x: Tensor) -> Tensor:
        convolved, passed = F.gelu(self.conv_0(x)).split(self.split, dim=1)
        return self.conv_2(torch.cat([F.gelu(self.conv_1(convolved)), passed], dim=1))


class ModulationBlock(nn.Module):
    """Feature modulation block: both parts on features of unit length per LR pixel, each with its residual."""

    def __init__(self, num_feat: int, ffn_scale: float, local: bool):
        super().__init__()
        self.smfa = SelfModulation(num_feat, local)
        self.pcfn = PartialFeedForward(num_feat, ffn_scale)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.smfa(F.normalize(x))
        return x + self.pcfn(F.normalize(x))


@ARCH_REGISTRY.register()
class SMFANetEncoder(nn.Module):
    """SMFANet without upsampler; the defaults are SMFANet, 48 channels and 12 blocks are SMFANet+.

    As published, self-modulation looks at the whole map: it adds the variance of each channel, and pools to
    (H // 8, W // 8) cells, irregular where 8 does not divide the size and impossible below 8 pixels. The local form
    (ours) has the same weights, cells of 8 x 8 LR pixels and the variance of the cells around, so that its receptive
    field is bounded, tiles are exact and any size works. With the published weights its image has 38.06 and 32.25 dB on
    Set5 at x2 and x4 (Y) where the published form has 38.06 and 32.26; a smaller window of 24 x 24 costs 0.06 dB.
    SMFANet+ at x4: 32.41 and 32.44. B100 at x4: 27.63 and 27.62.

    Args:
        num_in_ch: C_in.
        num_feat: C.
        num_block: Feature modulation blocks.
        ffn_scale: Hidden width of a feed-forward part over C.
        scale: Factor of the tail's image.
        local: The local form, or the published one, which encodes images whole.
        tail: Keep the layers that make the image of `with_image`.
    """

    options: dict[str, Any]  # what makes it anew, where `NetworkEncoder` read it from a file

    def __init__(
        self,
        num_in_ch: Positive = 3,
        num_feat: Positive = 36,
        num_block: Positive = 8,
        ffn_scale: PositiveNumber = 2,
        scale: Positive = 4,
        local: bool = True,
        tail: bool = False,
    ):
        super().__init__()
        self.num_feat = num_feat
        self.scale = scale
        if local:
            self.tile_multiple = CELL
            # Receptive radius in LR pixels: the variance's window, and one cell more, into which the 3x3 convolutions
            # of a block lead; the 3x3 convolution in front.
            self.halo = CELL * (RADIUS + 1) * num_block + 1
        self.to_feat = nn.Conv2d(num_in_ch, num_feat, 3, padding=1)
        self.feats = nn.Sequential(*(ModulationBlock(num_feat, ffn_scale, local) for _ in range(num_block)))
        if tail:
            self.to_img = nn.Sequential(nn.Conv2d(num_feat, num_in_ch * scale**2, 3, padding=1), nn.PixelShuffle(scale))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C, H, W)."""
        x = self.to_feat((x + 1) / 2)  # trained on [0, 1]
        return x + self.feats(x)

    def with_image(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The features and the network's own image, (B, C_in, scale * H, scale * W) in [0, 1]."""
        feat = self.forward(x)
        return feat, self.to_img(feat)


def smfanet_options(weights: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The options of the network whose state dict this is; None if it is another network's."""
    try:
        num_feat, num_in_ch = weights['to_feat.weight'].shape[:2]
        hidden = weights['feats.0.pcfn.conv_0.weight'].shape[0]
        num_out = weights['to_img.0.weight'].shape[0]
    except (KeyError, ValueError):
        return None
    blocks = {name.split('.')[1] for name in weights if name.startswith('feats.')}
    return {
        'num_in_ch': num_in_ch,
        'num_feat': num_feat,
        'num_block': len(blocks),
        'ffn_scale': hidden / num_feat,
        'scale': math.isqrt(num_out // num_in_ch),
    }
