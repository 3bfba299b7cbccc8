"""Our model files in spandrel (https://github.com/chaiNNer-org/spandrel), and so in the programs that read with it.

    import moeisr_basicsr.integrations.spandrel
    from spandrel import ModelLoader

    upscaler = ModelLoader().load_from_file('model.safetensors')
    image = upscaler(lq)  # (1, 3, H, W) in [0, 1] -> (1, 3, s H, s W), s = upscaler.scale
    image = moeisr_basicsr.inference.upscale(upscaler.model, lq, 2.7).image  # any factor

spandrel hands over tensors only, and knows no factor but a whole one. Importing this module registers the architecture.
"""

import torch
from spandrel import MAIN_REGISTRY, Architecture, ArchSupport, ImageModelDescriptor, ModelTiling, StateDict
from spandrel.util import KeyCondition

from moeisr_basicsr.archs.moeisr_arch import MoEISR
from moeisr_basicsr.checkpoint import build, options_tensor, read_options
from moeisr_basicsr.errors import UserError
from moeisr_basicsr.inference import upscale
from moeisr_basicsr.safe_reading import OPTIONS

SOURCE = 'the model file'  # spandrel does not say which
SCALE = 4  # of a network that does not say one: what most networks in these programs have
PRECISION = {torch.float32: 'fp32', torch.float16: 'fp16', torch.bfloat16: 'bf16'}


class MoEISRArch(Architecture[MoEISR]):
    """Every network of `save_model` that is a `MoEISR`: any encoder, decoder and experts."""

    def __init__(self) -> None:
        super().__init__(id='MoEISR', detect=KeyCondition.has_all(OPTIONS))

    def load(self, state_dict: StateDict) -> ImageModelDescriptor[MoEISR]:
        """The network and what spandrel wants to know of it; its `scale` is that of `whole_scale`.

        Raises:
            UserError: See `checkpoint.build`; or it is no `MoEISR`.
        """
        weights = {name: value.cpu() for name, value in state_dict.items()}
        options = read_options(weights.pop(OPTIONS), SOURCE)
        net = build(options, weights, SOURCE)
        if not isinstance(net, MoEISR):
            raise UserError(f'{SOURCE}: {options["type"]} is no network for any factor.')
        net.register_buffer(OPTIONS, options_tensor(options))  # what is saved from `model` can be loaded again
        net.scale = scale = whole_scale(net)
        return ImageModelDescriptor(
            net,
            net.state_dict(),
            architecture=self,
            purpose='SR',
            tags=[options['encoder']['type'], net.decoder.family, f'{net.num_experts} experts'],
            supports_half=True,
            supports_bfloat16=True,
            scale=scale,
            input_channels=net.in_channels,
            output_channels=net.decoder.out_channels,
            # A network without a known receptive radius looks at the whole image.
            tiling=ModelTiling.DISCOURAGED if getattr(net.encoder, 'halo', None) is None else ModelTiling.SUPPORTED,
            # positions and mapper are fp32 in all three
            call_fn=lambda net, lq: upscale(net, lq, scale, precision=PRECISION[lq.dtype]).image.to(lq.dtype),
        )


def whole_scale(net: MoEISR) -> int:
    """The options' `scale` if it is whole; else the factor of the base image that an encoder makes; else `SCALE`."""
    if isinstance(net.scale, (int, float)) and net.scale == int(net.scale):
        return int(net.scale)
    return net.encoder.scale if net.skip == 'network' else SCALE


MAIN_REGISTRY.add(
    # First: networks of other architectures may be encoders of ours, and `OPTIONS` is in our files only.
    ArchSupport.from_architecture(MoEISRArch(), before=tuple(entry.architecture.id for entry in MAIN_REGISTRY)),
    ignore_duplicates=True,
)
