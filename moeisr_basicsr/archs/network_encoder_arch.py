"""Any trained super-resolution network up to its features.

Shapes: B images, C_in channels in [-1, 1], (H, W) LR size, C channels of the features, s the network's own factor.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from basicsr.utils import get_root_logger
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from moeisr_basicsr.errors import UserError
from moeisr_basicsr.options.values import Count, Positive
from moeisr_basicsr.trained.files import build_arch, fill, from_spandrel, read_weights
from moeisr_basicsr.trained.receptive import OVERLAP, measure
from moeisr_basicsr.trained.tracing import features_and_image, trace

from .smfanet_encoder_arch import SMFANetEncoder, smfanet_options
from .swinir_encoder_arch import padded


class TrainedNetwork(nn.Module):
    """A super-resolution network, cut before its upsampler. `NetworkEncoder` makes it.

    Args:
        network: From (B, C_in, H, W) in [0, 1] to an image s times as large.
        options: What makes it anew, without any file: those of `NetworkEncoder`. Missing are filled in: `halo` and
            `tile_multiple`, which are measured.
        num_in_ch: C_in.
        tail: Keep what follows on the features, for `with_image`.

    Raises:
        UserError: See `trained.tracing.trace`.
    """

    def __init__(self, network: nn.Module, options: Mapping[str, Any], num_in_ch: int, tail: bool):
        super().__init__()
        name = str(options['arch']['type']).rpartition('.')[2]
        self.network = network
        traced = trace(network, num_in_ch, name, options.get('features'))
        self.cut, self.sides = traced.cut, (traced.multiple, traced.minimum)
        self.num_feat, self.scale = traced.num_feat, traced.scale
        if not tail:
            for module in traced.tail:
                network.set_submodule(module, nn.Identity())  # in its place the pass ends
        self.options = dict(options)
        first = next(network.parameters())
        if self.options.get('halo') is None and not first.is_meta:
            self.options.update(self.measured(torch.zeros(1, num_in_ch, 1, 1).to(first), name))
        halo = self.options.get('halo')
        self.halo = halo if isinstance(halo, int) else None
        self.tile_multiple = self.options.get('tile_multiple', 1)

    def measured(self, like: Tensor, name: str) -> dict[str, Any]:
        """`halo` and `tile_multiple`; a line in the log where tiles are not exact."""
        modes = {module: module.training for module in self.modules()}
        self.eval()
        field = measure(self.forward, like)
        for module, mode in modes.items():
            module.training = mode
        if not field.is_exact:
            outcome = (
                'large images are encoded whole, not in tiles; tiles that overlap by'
                if field.halo is None
                else '`halo: whole` encodes large images whole; tiles that overlap by'
            )
            get_root_logger().warning(
                f'{name} looks at the whole image, or far: {outcome} {OVERLAP} LR pixels change its features by up to '
                f'{field.error:.1e} of their standard deviation.'
            )
        if field.halo is None:
            return {'halo': 'whole'}
        return {'halo': field.halo, 'tile_multiple': field.tile_multiple}

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C, H, W)."""
        return self.run(x, tail=False)[0]

    def with_image(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The features and the network's own image, (B, C_in, s * H, s * W) in [0, 1]."""
        feat, image = self.run(x, tail=True)
        assert image is not None
        return feat, image

    def run(self, x: Tensor, tail: bool) -> tuple[Tensor, Tensor | None]:
        height, width = x.shape[-2:]
        # The pass ends by an exception, which torch.compile cannot follow. As a decorator this would import all of
        # torch's compiler with the package.
        one_pass = torch.compiler.disable(features_and_image, recursive=False)
        feat, image = one_pass(self.network, padded((x + 1) / 2, *self.sides), self.cut, tail)
        if image is not None:
            image = image[..., : height * self.scale, : width * self.scale]
        return feat[..., :height, :width], image


@ARCH_REGISTRY.register()
def NetworkEncoder(
    num_in_ch: Positive = 3,
    arch: dict[str, Any] | None = None,
    weights: str | None = None,
    checkpoint: str | None = None,
    features: str | None = None,
    halo: Count | Literal['whole'] | None = None,
    tile_multiple: Positive = 1,
    tail: bool = False,
) -> nn.Module:
    """The encoder of a trained network, cut before its upsampler; its `options` make it anew without any file.

    Args:
        num_in_ch: C_in.
        arch: `type`, the name of a network in BasicSR's ARCH_REGISTRY, and its arguments.
        weights: File with the weights of `arch`.
        checkpoint: File of a network that spandrel or this package recognises by its weights, in place of both.
        features: Module whose input are the features; found by tracing.
        halo: Receptive radius in LR pixels, or 'whole' for encoding images whole; measured.
        tile_multiple: Where tiles may begin, with a `halo` that is given.
        tail: Keep the layers that make the network's own image.

    Raises:
        UserError: The file cannot be used; or see `trained.tracing.trace`.
    """
    options: dict[str, Any] = {'type': 'NetworkEncoder', 'num_in_ch': num_in_ch}
    if features is not None:
        options['features'] = features
    if halo is not None:
        options.update(halo=halo, tile_multiple=tile_multiple)
    if (arch is None) == (checkpoint is None):
        raise UserError('NetworkEncoder needs either arch, a network and its arguments, or checkpoint, a file.')
    if arch is not None:
        network = build_arch(arch)
        if weights is not None:
            fill(network, read_weights(weights), weights)
        return TrainedNetwork(network, {**options, 'arch': dict(arch)}, num_in_ch, tail)
    assert checkpoint is not None
    if weights is not None:
        raise UserError('weights belongs to arch; a checkpoint has its own.')
    state = read_weights(checkpoint)
    if (found := smfanet_options(state)) is not None:
        encoder = SMFANetEncoder(**found, tail=True)
        fill(encoder, state, checkpoint)
        if not tail:
            del encoder.to_img
        encoder.options = {'type': 'SMFANetEncoder', **found}
        return encoder
    found, network = from_spandrel(state, checkpoint)
    return TrainedNetwork(network, {**options, 'arch': found}, num_in_ch, tail)
