"""Encoders from their options: built, tried out, and described without the file that one was read from."""

from collections.abc import Mapping
from typing import Any

import torch
from basicsr.archs import build_network
from torch import nn

from moeisr_basicsr.errors import UserError

PROBE = (8, 12)  # size of the image on which an encoder is tried


def build_encoder(options: dict, in_channels: int, tail: bool = False) -> tuple[nn.Module, int]:
    """The registered network that `encoder` names, and the number of its feature channels.

    Args:
        options: `type` and the arguments of its class.
        in_channels: Channels of the image.
        tail: Keep what the encoder's own image needs (`with_image`).

    Raises:
        UserError: It names none, or one that is no encoder.
    """
    name = options.get('type') if isinstance(options, Mapping) else None
    if not isinstance(name, str):
        raise UserError(f"encoder needs a type, for example {{'type': 'EDSREncoder'}}; got {options!r}.")
    try:
        encoder = build_network({'num_in_ch': in_channels, **options, **({'tail': True} if tail else {})})
    except TypeError as error:
        if tail and "'tail'" in str(error):
            raise UserError(
                f'{name} has no image of its own, which skip: network needs; SMFANetEncoder and NetworkEncoder do.'
            ) from error
        raise UserError(f'encoder {name} cannot be built: {error}') from error
    num_feat = getattr(encoder, 'num_feat', None)
    if not isinstance(num_feat, int):
        raise UserError(
            f'{name} is no encoder: it must keep the size of the image and have `num_feat`, the number of '
            'its feature channels; EDSREncoder, RDNEncoder and SwinIREncoder do. NetworkEncoder makes an encoder of a '
            'network that upscales.'
        )
    probe_encoder(encoder, name, in_channels)
    return encoder, num_feat


@torch.no_grad()
def probe_encoder(encoder: nn.Module, name: str, in_channels: int) -> None:
    """Run an encoder once, on a tiny image.

    Raises:
        UserError: It fails, changes the size, or has other channels than its `num_feat`.
    """
    first = next(encoder.parameters(), torch.zeros(1))
    image = torch.zeros(1, in_channels, *PROBE, device=first.device, dtype=first.dtype)
    modes = [(module, module.training) for module in encoder.modules()]
    try:
        shape = tuple(encoder.eval()(image).shape)
    except Exception as error:
        if first.is_meta:  # not every encoder's code runs without data
            return
        reason = ' '.join(str(error).split())
        raise UserError(f'encoder {name} fails on an image of {PROBE[0]} x {PROBE[1]}: {reason}') from error
    finally:
        for module, mode in modes:
            module.training = mode
    if shape != (1, encoder.num_feat, *PROBE):
        raise UserError(
            f'encoder {name} must make (1, num_feat = {encoder.num_feat}, {PROBE[0]}, {PROBE[1]}) of an image of '
            f'{PROBE[0]} x {PROBE[1]}; it makes {shape}.'
        )


def resolve_network(network_opt: Mapping[str, Any], net: nn.Module | None = None) -> dict[str, Any]:
    """`network_g` in which an encoder that was read from a file is described by what makes it anew without the file.

    Args:
        network_opt: The options; they are not changed.
        net: The network that was made from them, where it is at hand; the encoder is built otherwise.
    """
    encoder = network_opt.get('encoder')
    if not isinstance(encoder, Mapping) or encoder.get('type') != 'NetworkEncoder':
        return dict(network_opt)
    in_channels = network_opt.get('in_channels', 3)
    built: Any = build_encoder(dict(encoder), in_channels)[0] if net is None else net.encoder
    return {**network_opt, 'encoder': built.options}
