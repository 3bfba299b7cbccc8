"""Whole images by the published decoders as their official code runs them: what speed and equality are measured with.

The method is `core.reference`; here are the chunks of queries in which the official test scripts call it.
"""

import torch
from torch import Tensor

from moeisr_basicsr.analysis import plain as reference
from moeisr_basicsr.core import MoEDecoder, make_coord

CHUNK = 30000  # queries; the official test and demo scripts' default


@torch.no_grad()
def plain_image(
    decoder: MoEDecoder,
    j: int,
    feat: Tensor,
    size: tuple[int, int],
    cell: Tensor,
    chunk: int = CHUNK,
    max_chunks: int | None = None,
) -> Tensor:
    """Expert j's predictions for a whole image, (1, Q, C_out) in row-major order.

    Args:
        feat: (1, C, H, W).
        size: (R, S).
        cell: (2,), 2 / size, or what the network is shown in its place.
        chunk: Queries at once.
        max_chunks: Stop after that many chunks. All chunks cost the same, so a part is enough to know the time.
    """
    coord = make_coord(size, feat.device)[None].split(chunk, dim=1)[:max_chunks]
    parts = [reference.predict(decoder, j, feat, at, cell.to(feat).expand_as(at)) for at in coord]
    return torch.cat(parts, dim=1)
