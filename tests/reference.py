"""The plain, obviously right twins of the decoders: unfold, sample, one full MLP pass per corner, no folding.

They follow the published algorithms (LIIF, CVPR 2021; LTE, CVPR 2022) step by step with PyTorch's own `unfold` and
`grid_sample`, and read the same module's weights as the fast code under test.
"""

import math

import torch
import torch.nn.functional as F


def centres(size):
    # In fp32 as published: at odd integer factors the areas at the border are rounding noise, so this is part of the
    # method.
    rows, cols = (-1 + 1 / n + (2 / n) * torch.arange(n).float() for n in size)
    return torch.stack(torch.meshgrid(rows, cols, indexing='ij'), dim=-1)  # (H, W, 2)


def sample_nearest(image, coord):
    """(B, C, H, W) at (B, Q, 2) -> (B, Q, C)."""
    sampled = F.grid_sample(image, coord.flip(-1).unsqueeze(1), mode='nearest', align_corners=False)  # (B, C, 1, Q)
    return sampled[:, :, 0].transpose(1, 2)


def corners(feat, coord):
    """Shifted positions of the four corners and their ensemble areas, in the published order."""
    size = feat.shape[-2:]
    positions = centres(size).permute(2, 0, 1).expand(feat.shape[0], -1, -1, -1).to(feat)
    result = []
    for row_shift in (-1, 1):
        for col_shift in (-1, 1):
            shift = coord.new_tensor([row_shift / size[0] + 1e-6, col_shift / size[1] + 1e-6])
            at = (coord + shift).clamp(-1 + 1e-6, 1 - 1e-6)
            rel = (coord - sample_nearest(positions, at)) * coord.new_tensor(size)
            result.append((at, rel, rel.prod(dim=-1).abs() + 1e-9))
    return result


def ensemble(feat, coord, answer):
    """Blend `answer(position, relative coordinate)` over the corners by the diagonally opposite areas."""
    parts = corners(feat, coord)
    total = sum(area for _, _, area in parts)
    return sum(answer(at, rel) * (parts[3 - i][2] / total).unsqueeze(-1) for i, (at, rel, _) in enumerate(parts))


def mlp(linears, x):
    """Linear layers with ReLU between them."""
    for linear in linears[:-1]:
        x = F.relu(linear(x))
    return linears[-1](x)


def liif(pool, j, feat, coord, cell):
    """Expert j of a `LIIFExperts` on all queries: (B, Q, C)."""
    unfolded = F.unfold(feat, 3, padding=1).view(feat.shape[0], -1, *feat.shape[-2:])
    rel_cell = cell * cell.new_tensor(feat.shape[-2:])

    def answer(at, rel):
        inputs = torch.cat([sample_nearest(unfolded, at), rel, rel_cell], dim=-1)
        return mlp(pool.linears(j), inputs)

    return ensemble(feat, coord, answer)


def lte(pool, j, feat, coord, cell):
    """Expert j of an `LTEExperts` on all queries: (B, Q, C)."""
    coef, freq = pool.coef(feat), pool.freq(feat)
    rel_cell = cell * cell.new_tensor(feat.shape[-2:])

    def answer(at, rel):
        frequency = sample_nearest(freq, at)
        angle = frequency[..., 0::2] * rel[..., :1] + frequency[..., 1::2] * rel[..., 1:] + pool.phase(rel_cell)
        basis = torch.cat([torch.cos(math.pi * angle), torch.sin(math.pi * angle)], dim=-1)
        return mlp(pool.linears(j), sample_nearest(coef, at) * basis)

    return ensemble(feat, coord, answer)


FAMILIES = {'liif': liif, 'lte': lte}


def mixture(decoder, feat, coord, cell, gates):
    """sum_j g_j f_j with every expert on every query: (B, Q, C)."""
    answer = FAMILIES[decoder.family]
    return sum(gates[..., j : j + 1] * answer(decoder.pool, j, feat, coord, cell) for j in range(decoder.num_experts))


def grid(size, batch=1):
    """Coordinates and cells of a whole image of `size`, row-major: two of (B, H * W, 2)."""
    coord = centres(size).flatten(0, 1).expand(batch, -1, -1).contiguous()
    return coord, torch.tensor([2 / size[0], 2 / size[1]]).expand_as(coord).contiguous()
