"""Number formats and memory layout of the training step, from the YAML's `train` section."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from moeisr_basicsr.errors import UserError, did_you_mean

AMP_DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16}


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
        if amp != 'none' and amp not in AMP_DTYPES:
            raise UserError(
                f'train: amp must be one of none, {", ".join(AMP_DTYPES)}; got {amp!r}.'
                f'{did_you_mean(amp, ["none", *AMP_DTYPES])}'
            )
        self.device_type = device.type
        self.dtype = AMP_DTYPES.get(amp)
        self.channels_last = bool(train_opt.get('channels_last', False))
        self.scaler = _grad_scaler(device.type, enabled=self.dtype is torch.float16)
        if 'tf32' in train_opt:
            torch.backends.cuda.matmul.allow_tf32 = bool(train_opt['tf32'])
            torch.backends.cudnn.allow_tf32 = bool(train_opt['tf32'])

    def autocast(self) -> AbstractContextManager:
        """The context of the network's forward in training."""
        return nullcontext() if self.dtype is None else torch.autocast(self.device_type, self.dtype)

    def network(self, net: nn.Module) -> nn.Module:
        """`net` in the chosen memory layout."""
        return net.to(memory_format=torch.channels_last) if self.channels_last else net

    def images(self, images: Tensor) -> Tensor:
        """A batch (B, C, H, W) in the chosen memory layout."""
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images


def _grad_scaler(device_type: str, enabled: bool):
    if hasattr(torch.amp, 'GradScaler'):  # torch >= 2.3
        return torch.amp.GradScaler(device_type, enabled=enabled)
    if enabled and device_type != 'cuda':
        raise UserError(
            f'train: amp: fp16 on {device_type} needs torch 2.3 or newer; this is torch '
            f'{torch.__version__}. bf16 needs no scaler.'
        )
    return torch.cuda.amp.GradScaler(enabled=enabled)


def compile_network(net: nn.Module, options: bool | dict) -> None:
    """torch.compile in place, names of the parameters unchanged.

    Only the encoder is compiled where the network has one: which expert answers which query depends on the data, and
    a compiled decoder would be made anew for every batch.

    Args:
        options: True, or keyword arguments of torch.compile.
    """
    part = getattr(net, 'encoder', net)
    part.forward = torch.compile(part.forward, **(options if isinstance(options, dict) else {}))
