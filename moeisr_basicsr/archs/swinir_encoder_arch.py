"""SwinIR (Liang et al., ICCVW 2021, arXiv 2108.10257) up to its features, as LTE and MoEISR use it.

Shapes: B images, C_in channels in [-1, 1], (H, W) LR size.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from basicsr.archs.swinir_arch import SwinIR
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from moeisr_basicsr.errors import UserError
from moeisr_basicsr.options.values import Positive

NUM_FEAT = 64  # channels after SwinIR's own `conv_before_upsample`


@ARCH_REGISTRY.register()
class SwinIREncoder(SwinIR):
    """SwinIR without upsampler and without mean shift, for inputs of any size.

    The input is padded to whole windows inside, by repeating mirrored pixels, and the features are cut back.

    Args:
        num_in_ch: C_in.
        embed_dim: Channels inside the Transformer.
        depths: Layers of each residual Swin Transformer block.
        num_heads: Attention heads of each block.
        window_size: Side of an attention window in pixels.
        mlp_ratio: Hidden width of a layer's MLP over `embed_dim`.
        drop_path_rate: Stochastic depth.
        img_size: Training patch; only sets for which size attention masks are precomputed.
        resi_connection: '1conv' or '3conv'.
        use_checkpoint: Trade time for memory in training.

    Raises:
        UserError: The sizes do not fit together; see `unfit`.
    """

    def __init__(
        self,
        num_in_ch: Positive = 3,
        embed_dim: Positive = 180,
        depths: Sequence[Positive] = (6,) * 6,
        num_heads: Sequence[Positive] = (6,) * 6,
        window_size: Positive = 8,
        mlp_ratio: float = 2.0,
        drop_path_rate: float = 0.1,
        img_size: Positive = 48,
        resi_connection: Literal['1conv', '3conv'] = '1conv',
        use_checkpoint: bool = False,
    ):
        if problem := self.unfit(embed_dim, depths, num_heads, window_size, img_size):
            raise UserError(f'SwinIREncoder {problem}')
        super().__init__(
            img_size=img_size,
            in_chans=num_in_ch,
            embed_dim=embed_dim,
            depths=tuple(depths),
            num_heads=tuple(num_heads),
            window_size=window_size,
            mlp_ratio=mlp_ratio,
            drop_path_rate=drop_path_rate,
            resi_connection=resi_connection,
            use_checkpoint=use_checkpoint,
            upsampler='',
        )
        del self.conv_last  # of the upsampler '', which restores an image of the same size
        self.conv_before_upsample = nn.Sequential(nn.Conv2d(embed_dim, NUM_FEAT, 3, padding=1), nn.LeakyReLU())
        self.num_feat = NUM_FEAT
        self.window_size = self.tile_multiple = window_size  # tiles start at a window's corner
        # Receptive radius in LR pixels: a window and then half a window per layer, the 3x3 convolutions between the
        # layers lie within; three of them stand at the ends.
        self.halo = window_size + window_size // 2 * sum(depths)

    @staticmethod
    def unfit(
        embed_dim: int, depths: Sequence[int], num_heads: Sequence[int], window_size: int, img_size: int
    ) -> str | None:
        """Why no encoder can be built from these options, or None."""
        if len(depths) != len(num_heads):
            return f'depths and num_heads must be equally long; got {list(depths)} and {list(num_heads)}.'
        if embed_dim % 2 or any(embed_dim % heads for heads in num_heads):
            return f'embed_dim must be even and divisible by every num_heads; got {embed_dim} and {list(num_heads)}.'
        if img_size <= window_size:  # BasicSR's blocks then stop shifting their windows, without a word
            return f'img_size must be above window_size; got {img_size} and {window_size}.'
        return None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, 64, H, W)."""
        height, width = x.shape[-2:]
        x = self.conv_first(padded(x, self.window_size))
        x = self.conv_after_body(self.forward_features(x)) + x
        return self.conv_before_upsample(x)[..., :height, :width]


def padded(x: Tensor, multiple: int, minimum: int = 1) -> Tensor:
    """Mirror the image at its bottom and right edge up to multiples of `multiple`; the edge pixel is not repeated.

    `minimum`, such a multiple, is the smallest size. An image smaller than the padding is mirrored several times.
    """
    for axis in (-2, -1):
        size = x.shape[axis]
        if not torch.jit.is_tracing() and size % multiple == 0 and size >= minimum:
            continue
        wanted = size + -size % multiple
        wanted = wanted.clamp(min=minimum) if isinstance(wanted, Tensor) else max(wanted, minimum)  # the former traced
        period = 2 * size - 2 + (size == 1)  # one pixel has no mirror image: it is repeated
        index = torch.arange(wanted, device=x.device) % period
        x = x.index_select(axis, torch.minimum(index, period - index))
    return x
