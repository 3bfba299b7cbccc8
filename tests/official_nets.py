"""The official LIIF, LTE and LMF networks in their own layout, written plainly, for the conversion's tests.

Only the names of the parameters and the order of operations follow the published code; features go in as [-1, 1].
"""

import types

import torch
import torch.nn.functional as F
from reference import liif, lte
from torch import nn


def conv(fan_in, fan_out, size=3):
    return nn.Conv2d(fan_in, fan_out, size, padding=size // 2)


class ResBlock(nn.Module):
    def __init__(self, width, res_scale):
        super().__init__()
        self.body = nn.Sequential(conv(width, width), nn.ReLU(), conv(width, width))
        self.res_scale = res_scale

    def forward(self, x):
        return x + self.body(x) * self.res_scale


class EDSR(nn.Module):
    """`edsr-baseline` without upsampler; its mean shifts exist and are never used."""

    def __init__(self, n_resblocks=16, n_feats=64, res_scale=1):
        super().__init__()
        self.out_dim = n_feats
        self.sub_mean, self.add_mean = conv(3, 3, 1), conv(3, 3, 1)
        self.head = nn.Sequential(conv(3, n_feats))
        self.body = nn.Sequential(*(ResBlock(n_feats, res_scale) for _ in range(n_resblocks)), conv(n_feats, n_feats))

    def forward(self, x):
        x = self.head(x)
        return x + self.body(x)


class DenseConv(nn.Module):
    def __init__(self, fan_in, growth):
        super().__init__()
        self.conv = nn.Sequential(conv(fan_in, growth), nn.ReLU())

    def forward(self, x):
        return torch.cat([x, self.conv(x)], dim=1)


class DenseBlock(nn.Module):
    def __init__(self, width, growth, count):
        super().__init__()
        self.convs = nn.Sequential(*(DenseConv(width + i * growth, growth) for i in range(count)))
        self.LFF = conv(width + count * growth, width, 1)

    def forward(self, x):
        return x + self.LFF(self.convs(x))


class RDN(nn.Module):
    """`rdn` without upsampler."""

    def __init__(self, G0=64, RDNconfig='B'):
        super().__init__()
        blocks, count, growth = {'A': (20, 6, 32), 'B': (16, 8, 64)}[RDNconfig]
        self.out_dim = G0
        self.SFENet1, self.SFENet2 = conv(3, G0), conv(G0, G0)
        self.RDBs = nn.ModuleList(DenseBlock(G0, growth, count) for _ in range(blocks))
        self.GFF = nn.Sequential(conv(blocks * G0, G0, 1), conv(G0, G0))

    def forward(self, x):
        first = self.SFENet1(x)
        x, outputs = self.SFENet2(first), []
        for block in self.RDBs:
            x = block(x)
            outputs.append(x)
        return first + self.GFF(torch.cat(outputs, dim=1))


class MLP(nn.Module):
    def __init__(self, in_dim, hidden_list, out_dim=3):
        super().__init__()
        layers = []
        for hidden in hidden_list:
            layers += [nn.Linear(in_dim, hidden), nn.ReLU()]
            in_dim = hidden
        self.layers = nn.Sequential(*layers, nn.Linear(in_dim, out_dim))

    def forward(self, x):
        return self.layers(x)


ENCODERS = {'edsr-baseline': EDSR, 'edsr': EDSR, 'rdn': RDN}


def strengthen(net):
    """Weights behind the encoder that matter: PyTorch's own would let differences fade."""
    for key, parameter in net.named_parameters():
        if parameter.dim() > 1 and not key.startswith('encoder.'):
            nn.init.kaiming_normal_(parameter)


class OfficialNet(nn.Module):
    """`liif` or `lte` on `edsr-baseline` or `rdn`.

    Args:
        name: 'liif' or 'lte'.
        encoder: Official name of the encoder.
        encoder_args: Its official arguments.
        hidden_list: Hidden widths of the MLP.
        hidden_dim: LTE's width.
    """

    def __init__(self, name, encoder, encoder_args, hidden_list, hidden_dim=8):
        super().__init__()
        self.name = name
        self.encoder = ENCODERS[encoder](**encoder_args)
        width = self.encoder.out_dim
        if name == 'lte':
            self.coef, self.freq = conv(width, hidden_dim), conv(width, hidden_dim)
            self.phase = nn.Linear(2, hidden_dim // 2, bias=False)
        self.imnet = MLP(hidden_dim if name == 'lte' else width * 9 + 4, hidden_list)
        self.args = {
            'encoder_spec': {'name': encoder, 'args': {'no_upsampling': True, **encoder_args}},
            'imnet_spec': {'name': 'mlp', 'args': {'out_dim': 3, 'hidden_list': hidden_list}},
        }
        if name == 'lte':
            self.args['hidden_dim'] = hidden_dim
        strengthen(self)

    def forward(self, image, coord, cell):
        """RGB in [0, 1] to the predictions in [0, 1], (B, Q, 3)."""
        x = image * 2 - 1
        pool = types.SimpleNamespace(linears=lambda _: list(self.imnet.layers[::2]))
        if self.name == 'liif':
            return liif(pool, 0, self.encoder(x), coord, cell) / 2 + 0.5
        pool.coef, pool.freq, pool.phase = self.coef, self.freq, self.phase
        bilinear = F.grid_sample(x, coord.flip(-1)[:, None], padding_mode='border', align_corners=False)
        return (lte(pool, 0, self.encoder(x), coord, cell) + bilinear[:, :, 0].transpose(1, 2)) / 2 + 0.5

    def checkpoint(self):
        """As the official training code saves it."""
        return {
            'model': {'name': self.name, 'args': self.args, 'sd': self.state_dict()},
            'optimizer': {'name': 'adam', 'args': {'lr': 1e-4}, 'sd': {}},
            'epoch': 1000,
        }


class OfficialLM(nn.Module):
    """`lmliif`, of its own from the first line to the last: nothing of `core` is used.

    Args:
        encoder: Official name of the encoder.
        encoder_args: Its official arguments.
        hidden_list: Hidden widths of the latent MLP, the `hypernet`.
        hidden_dim: Width of the render MLP, the `imnet`.
        hidden_depth: Its hidden layers.
    """

    name = 'lmliif'
    checkpoint = OfficialNet.checkpoint

    def __init__(self, encoder, encoder_args, hidden_list, hidden_dim=5, hidden_depth=3):
        super().__init__()
        self.encoder = ENCODERS[encoder](**encoder_args)
        self.hidden_dim, self.mod_dim = hidden_dim, 2 * hidden_dim * hidden_depth
        self.hypernet = MLP(self.encoder.out_dim * 9 + 2, hidden_list, self.mod_dim + hidden_dim)
        self.imnet = MLP(hidden_dim + 4, [hidden_dim] * hidden_depth)
        render = {'out_dim': 3, 'hidden_dim': hidden_dim, 'hidden_depth': hidden_depth}
        self.args = {
            'encoder_spec': {'name': encoder, 'args': {'no_upsampling': True, **encoder_args}},
            'imnet_spec': {'name': 'lmmlp', 'args': {**render, 'mod_scale': True, 'mod_shift': True}},
            'hypernet_spec': {
                'name': 'mlp',
                'args': {'out_dim': self.mod_dim + hidden_dim, 'hidden_list': hidden_list},
            },
            **dict.fromkeys(('local_ensemble', 'feat_unfold', 'cell_decode', 'mod_input'), True),
        }
        strengthen(self)

    def forward(self, image, coord, cell):
        """RGB in [0, 1] to the predictions in [0, 1], (1, Q, 3)."""
        feat = self.encoder(image * 2 - 1)
        (height, width), size = feat.shape[-2:], torch.tensor(feat.shape[-2:])
        patches = F.pad(feat, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)  # (1, C, H, W, 3, 3)
        unfolded = patches.permute(0, 2, 3, 1, 4, 5).flatten(3)
        rel_cell = cell[:, :1] * size
        mod = self.hypernet(torch.cat([unfolded, rel_cell[:, :, None].expand(-1, height, width, -1)], dim=-1))
        preds, areas = [], []
        for row_side in (-1, 1):
            for col_side in (-1, 1):
                shifted = coord + torch.tensor([row_side / height + 1e-6, col_side / width + 1e-6])
                shifted = shifted.clamp(-1 + 1e-6, 1 - 1e-6)
                pixel = ((shifted + 1) * size / 2).floor().long()  # the LR pixel that it lies in
                rel = (coord - ((2 * pixel + 1) / size - 1)) * size
                mods = mod[0, pixel[0, :, 0], pixel[0, :, 1]][None]  # (1, Q, 2 L W + W)
                x = torch.cat([mods[..., self.mod_dim :], rel, rel_cell.expand_as(rel)], dim=-1)
                scales, shifts = mods[..., : self.mod_dim].chunk(2, dim=-1)
                for at, linear in enumerate(self.imnet.layers[:-1:2]):
                    part = slice(at * self.hidden_dim, (at + 1) * self.hidden_dim)
                    x = torch.relu(linear(x) * (scales[..., part] + 1) + shifts[..., part])
                preds.append(self.imnet.layers[-1](x))
                areas.append(rel.prod(dim=-1).abs() + 1e-9)
        total = sum(areas)
        return sum(pred * (area / total)[..., None] for pred, area in zip(preds, areas[::-1])) / 2 + 0.5
