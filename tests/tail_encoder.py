"""A small encoder with an image of its own, which `skip: network` needs."""

from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn


@ARCH_REGISTRY.register()
class TailEncoder(nn.Module):
    """Two convolutions; with a tail, a third one and a PixelShuffle make the image."""

    halo = 3

    def __init__(self, num_in_ch=3, num_feat=8, scale=3, tail=False):
        super().__init__()
        self.num_feat, self.scale = num_feat, scale
        self.body = nn.Sequential(
            nn.Conv2d(num_in_ch, num_feat, 3, padding=1), nn.Tanh(), nn.Conv2d(num_feat, num_feat, 3, padding=1)
        )
        if tail:
            self.tail = nn.Sequential(
                nn.Conv2d(num_feat, num_in_ch * scale**2, 3, padding=1), nn.PixelShuffle(scale), nn.Sigmoid()
            )

    def forward(self, x):
        return self.body(x)

    def with_image(self, x):
        feat = self.body(x)
        return feat, self.tail(feat)
