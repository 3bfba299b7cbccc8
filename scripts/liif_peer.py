"""The official LIIF code (github.com/yinboc/liif) as a function, from a checkout that the user has."""

import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from moeisr_basicsr.core import MoEDecoder, make_cell, make_coord


def load_peer(folder: str, dense: MoEDecoder, device: torch.device) -> Callable[..., Tensor]:
    """Its decoder with the weights of `dense`, one LIIF expert of four hidden layers of 256 on 64 feature channels.

    Returns:
        A function (features (1, C, H, W), size, chunk, number of chunks) -> predictions (1, Q, 3) in row-major order.

    Raises:
        SystemExit: `folder` is no such checkout.
    """
    if not (Path(folder) / 'models' / 'liif.py').is_file():
        raise SystemExit(f'--peer {folder}: this is no checkout of yinboc/liif (there is no models/liif.py).')
    if device.type == 'cpu':
        torch.Tensor.cuda = lambda self, *args, **kwargs: self  # its methods call .cuda()
    writer = types.ModuleType('tensorboardX')  # its utils import it, for training only
    writer.SummaryWriter = None
    sys.modules.setdefault('tensorboardX', writer)
    sys.path.insert(0, str(Path(folder).resolve()))
    import models

    encoder = {'name': 'edsr-baseline', 'args': {'no_upsampling': True}}  # not run: both decode the same features
    imnet = {'name': 'mlp', 'args': {'out_dim': 3, 'hidden_list': [256] * 4}}
    peer = models.make({'name': 'liif', 'args': {'encoder_spec': encoder, 'imnet_spec': imnet}}).to(device).eval()
    peer.imnet.load_state_dict(dense.pool.experts[0].state_dict())

    @torch.no_grad()
    def decode(feat: Tensor, size: tuple[int, int], chunk: int, count: int) -> Tensor:
        coord = make_coord(size, device)[None].split(chunk, dim=1)[:count]
        peer.feat = feat
        return torch.cat([peer.query_rgb(at, make_cell(size, device).expand_as(at)) for at in coord], dim=1)

    return decode
