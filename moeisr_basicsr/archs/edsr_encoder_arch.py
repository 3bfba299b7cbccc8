"""EDSR (Lim et al., CVPRW 2017, arXiv 1707.02921) up to its features, as LIIF and LTE use it.

Shapes: B images, C_in channels in [-1, 1], (H, W) LR size.
"""

from basicsr.archs.arch_util import ResidualBlockNoBN, make_layer
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from moeisr_basicsr.options.values import Positive


@ARCH_REGISTRY.register()
class EDSREncoder(nn.Module):
    """EDSR without upsampler and without mean shift; the defaults are EDSR-baseline.

    Args:
        num_in_ch: C_in.
        num_feat: Channels of the features.
        num_block: Residual blocks.
        res_scale: Factor on each residual.
    """

    def __init__(
        self, num_in_ch: Positive = 3, num_feat: Positive = 64, num_block: Positive = 16, res_scale: float = 1.0
    ):
        super().__init__()
        self.num_feat = num_feat
        self.halo = 2 * num_block + 2  # receptive radius in LR pixels: every 3x3 convolution adds one
        self.conv_first = nn.Conv2d(num_in_ch, num_feat, 3, padding=1)
        # pytorch_init: the official LIIF code keeps PyTorch's default initialisation
        self.body = make_layer(ResidualBlockNoBN, num_block, num_feat=num_feat, res_scale=res_scale, pytorch_init=True)
        self.conv_after_body = nn.Conv2d(num_feat, num_feat, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, num_feat, H, W)."""
        x = self.conv_first(x)
        return x + self.conv_after_body(self.body(x))
