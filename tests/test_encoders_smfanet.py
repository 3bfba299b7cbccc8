"""SMFANet: its published figures, both forms written out cell by cell, and the local form's receptive radius."""

import moeisr_basicsr  # noqa: F401, I001  before BasicSR, which needs its shims
import pytest
import torch
import torch.nn.functional as F
from helpers import pretrained, set5_psnr

from moeisr_basicsr.analysis.complexity import encoder_macs
from moeisr_basicsr.archs.smfanet_encoder_arch import SMFANetEncoder
from moeisr_basicsr.inference import aligned

PLUS = {'num_feat': 48, 'num_block': 12}


def small(**options):
    """With every parameter at work: its authors start beta at zero."""
    torch.manual_seed(0)
    encoder = SMFANetEncoder(**{'num_feat': 8, 'num_block': 2, 'scale': 2, **options}).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


@pytest.mark.parametrize(
    ('name', 'options', 'scale', 'psnr'),
    [
        ('SMFANet_DIV2K_100w', {}, 2, 38.04),
        ('SMFANet_DIV2K_100w', {}, 4, 32.25),
        ('SMFANet_plus_DIV2K_100w', PLUS, 4, 32.43),
    ],
)
def test_published_figures(name, options, scale, psnr):
    """Luma of images saved in 8 bits, shave = scale; the local form costs less than 0.01 dB at x4, of SMFANet+ 0.03."""
    weights = torch.load(pretrained(f'{name}_x{scale}SR.pth'), weights_only=True)['params']
    measured = []
    for local in (False, True) if scale == 4 else (False,):
        encoder = SMFANetEncoder(**options, scale=scale, local=local, tail=True).eval()
        encoder.load_state_dict(weights)
        measured.append(set5_psnr(encoder, scale))
    assert round(measured[0], 2) == psnr
    assert measured[-1] > measured[0] - (0.03 if options else 0.01)


def test_number_of_parameters():
    """186 K and 197 K at x2 and x4, 480 K and 496 K with the larger options."""
    counts = [
        sum(parameter.numel() for parameter in SMFANetEncoder(**options, scale=scale, tail=True).parameters())
        for options in ({}, PLUS)
        for scale in (2, 4)
    ]
    assert [round(count, -3) for count in counts] == [186_000, 197_000, 480_000, 496_000]
    assert not any(name.startswith('to_img') for name in SMFANetEncoder().state_dict())
    convs = sum(
        weight.numel() for name, weight in small().named_parameters() if weight.dim() == 4 and weight.numel() > 8
    )
    coarse = sum(block.smfa.dw_conv.weight.numel() + block.smfa.linear_1.weight.numel() for block in small().feats)
    assert encoder_macs(small(), (16, 24)) == 16 * 24 * (convs - coarse) + 2 * 3 * coarse


def modulated(x, apply, weights, cells, radius):
    """One self-modulation, cell by cell; `cells` are the spans of rows and columns."""
    detail, x = apply('linear_0', x).chunk(2, dim=1)
    largest, variance = (torch.zeros(1, x.shape[1], len(cells[0]), len(cells[1]), dtype=x.dtype) for _ in range(2))
    for i, (top, bottom) in enumerate(cells[0]):
        for j, (left, right) in enumerate(cells[1]):
            largest[..., i, j] = x[..., top:bottom, left:right].amax(dim=(-2, -1))
            rows, cols = (axis[max(k - radius, 0) :][: radius + min(k, radius) + 1] for axis, k in zip(cells, (i, j)))
            around = x[..., rows[0][0] : rows[-1][1], cols[0][0] : cols[-1][1]].flatten(2)
            variance[..., i, j] = around.var(dim=-1) if around.shape[-1] > 1 else 0
    gain = F.gelu(apply('linear_1', apply('dw_conv', largest) * weights['alpha'] + variance * weights['belt']))
    gains = torch.zeros_like(x)
    for i, (top, bottom) in enumerate(cells[0]):
        for j, (left, right) in enumerate(cells[1]):
            gains[..., top:bottom, left:right] = gain[..., i : i + 1, j : j + 1]
    detail = apply('lde.conv_1', F.gelu(apply('lde.conv_0.1', apply('lde.conv_0.0', detail))))
    return apply('linear_2', x * gains + detail)


@pytest.mark.parametrize('local', [True, False])
@pytest.mark.parametrize('size', [(72, 80), (24, 8), (61, 9), (5, 70), (1, 1)])
def test_in_plain_operations(local, size):
    """Both forms, the local one with cells cut off at the border and windows that do not reach every cell."""
    if not local and any(n % 8 for n in size):
        pytest.skip('irregular cells; the published figures cover them')
    encoder = small(local=local).double()
    x = torch.rand(1, 3, *size, dtype=torch.float64) * 2 - 1
    cells = [[(start, min(start + 8, n)) for start in range(0, n, 8)] for n in size]
    feat = shallow = encoder.to_feat((x + 1) / 2)
    for block in encoder.feats:
        weights, modules = dict(block.smfa.named_parameters()), dict(block.smfa.named_modules())
        unit = feat / feat.square().sum(dim=1, keepdim=True).sqrt()
        feat = feat + modulated(unit, lambda name, x: modules[name](x), weights, cells, 3 if local else 99)
        hidden = F.gelu(block.pcfn.conv_0(feat / feat.square().sum(dim=1, keepdim=True).sqrt()))
        hidden[:, :4] = F.gelu(block.pcfn.conv_1(hidden[:, :4]))
        feat = feat + block.pcfn.conv_2(hidden)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), feat + shallow, rtol=0, atol=1e-9)


def test_halo():
    """A window with its halo gives the features of the whole; a pixel acts as far as the halo, nowhere beyond."""
    encoder = small(num_block=1).double()
    assert encoder.halo == 33
    assert SMFANetEncoder().halo == 257
    x = torch.rand(1, 3, 150, 141, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        whole = encoder(x)
        for (top, bottom), (left, right) in [((0, 70), (65, 141)), ((69, 71), (40, 97)), ((55, 90), (0, 30))]:
            rows, cols = (
                aligned(start - encoder.halo, stop + encoder.halo, size, encoder.tile_multiple)
                for start, stop, size in ((top, bottom, 150), (left, right, 141))
            )
            part = encoder(x[..., slice(*rows), slice(*cols)])[..., top - rows[0] :, left - cols[0] :]
            expected = whole[..., top:bottom, left:right]
            torch.testing.assert_close(part[..., : bottom - top, : right - left], expected, rtol=0, atol=1e-12)
    reach = 0
    for pixel in range(64, 72):
        changed = x.clone()
        changed[..., pixel, 70] += 0.5
        with torch.no_grad():
            moved = (encoder(changed) - whole).abs().amax(dim=(0, 1, 3)).nonzero().flatten() - pixel
        reach = max(reach, moved.max().item(), -moved.min().item())
    assert reach == encoder.halo
