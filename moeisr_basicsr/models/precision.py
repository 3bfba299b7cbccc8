"""Number formats and memory layout of the training step, from the YAML's `train` section."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from moeisr_basicsr.errors import UserError, did_you_mean

AMP_DTYPES = {'none': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}


class Precision:
    """Autocast, gradient scaler, TF32 and channels_last.

    Parameters, optimizer state, losses and EMA stay fp32; only the network's forward runs in the chosen format.

    Args:
        train_opt: Reads `amp` (none | bf16 | fp16), `tf32` (bool), `channels_last` (bool).
        device: Where the network runs.

    Raises:
        UserError: An unknown `amp`.
    """

    def __init__(self, train_opt: dict, device: torch.device):
        amp = train_opt.get('amp') or 'none'
        if amp not in AMP_DTYPES:
            allowed = ', '.join(AMP_DTYPES)
            raise UserError(f'train: amp must be one of {allowed}; got {amp!r}.{did_you_mean(amp, AMP_DTYPES)}')
        self.device_type = device.type
        self.dtype = AMP_DTYPES[amp]
        self.channels_last = bool(train_opt.get('channels_last', False))
        scaled = self.dtype is torch.float16
        if hasattr(torch.amp, 'GradScaler'):  # torch >= 2.3
            self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        else:
            self.scaler = torch.cuda.amp.GradScaler(enabled=scaled)
        if 'tf32' in train_opt:
            torch.backends.cuda.matmul.allow_tf32 = bool(train_opt['tf32'])
            torch.backends.cudnn.allow_tf32 = bool(train_opt['tf32'])

    def autocast(self) -> AbstractContextManager:
        """The context of the network's forward in training."""
        return nullcontext() if self.dtype is None else torch.autocast(self.device_type, self.dtype)

    def network(self, net: nn.Module) -> nn.Module:
        """`net` in the chosen memory layout."""
        if self.channels_last:
            net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's own stubs
        return net

    def images(self, images: Tensor) -> Tensor:
        """A batch (B, C, H, W) in the chosen memory layout."""
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images


def compile_network(net: nn.Module, options: bool | dict) -> None:
    """torch.compile in place, names of the parameters unchanged.

    Only the encoder is compiled where the network has one: which expert decodes which query depends on the data, and
    a compiled decoder would be made anew for every batch.

    Args:
        net: The network.
        options: True, or keyword arguments of torch.compile.
    """
    part = getattr(net, 'encoder', net)
    part.forward = torch.compile(part.forward, **(options if isinstance(options, dict) else {}))
