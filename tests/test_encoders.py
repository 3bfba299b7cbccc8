"""Encoders: sizes from the papers, forward passes in plain operations, receptive radius, SwinIR's padding."""

import moeisr_basicsr  # noqa: F401, I001  before BasicSR, which needs its shims
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moeisr_basicsr.archs.edsr_encoder_arch import EDSREncoder
from moeisr_basicsr.archs.rdn_encoder_arch import RDNEncoder
from moeisr_basicsr.archs.swinir_encoder_arch import SwinIREncoder


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def conv(num_in, num_out, side=3):
    return num_in * num_out * side * side + num_out


def test_edsr_baseline_parameters():
    """3 -> 64, 16 blocks of two 64 -> 64, one more: the 1.2 M of the EDSR-baseline features."""
    assert count(EDSREncoder()) == conv(3, 64) + 33 * conv(64, 64) == 1220416
    assert EDSREncoder(num_in_ch=1, num_feat=5, num_block=2)(torch.rand(2, 1, 7, 4)).shape == (2, 5, 7, 4)


def test_rdn_parameters():
    """Configurations A and B of the RDN paper, section 5; B has 22 M."""
    for config, blocks, convs, growth in (('A', 20, 6, 32), ('B', 16, 8, 64)):
        block = sum(conv(64 + i * growth, growth) for i in range(convs)) + conv(64 + convs * growth, 64, 1)
        expected = conv(3, 64) + conv(64, 64) + blocks * block + conv(blocks * 64, 64, 1) + conv(64, 64)
        assert count(RDNEncoder(config=config)) == expected
    assert 21.9e6 < expected < 22.2e6
    assert RDNEncoder(4, num_feat=6, num_block=2, num_conv=3, growth=5)(torch.rand(1, 4, 5, 3)).shape == (1, 6, 5, 3)


def test_swinir_parameters():
    width, window, heads = 180, 8, 6
    attention = 3 * width * (width + 1) + width * (width + 1) + (2 * window - 1) ** 2 * heads
    layer = 4 * width + attention + 2 * width * (width + 1) + width * (2 * width + 1)
    body = 6 * (6 * layer + conv(width, width)) + conv(width, width)
    norms = 2 * width + 2 * width  # after the patch embedding and after the body
    assert count(SwinIREncoder()) == conv(3, width) + norms + body + conv(width, 64)


def test_rdn_and_edsr_in_plain_operations():
    """The forward passes written out from the papers."""
    torch.manual_seed(0)
    x = torch.randn(1, 3, 6, 5)
    edsr = EDSREncoder(num_feat=6, num_block=2, res_scale=0.5)
    weights = dict(edsr.named_parameters())

    def apply(name, x, padding=1):
        return F.conv2d(x, weights[f'{name}.weight'], weights[f'{name}.bias'], padding=padding)

    head = body = apply('conv_first', x)
    for i in range(2):
        body = body + 0.5 * apply(f'body.{i}.conv2', apply(f'body.{i}.conv1', body).relu())
    torch.testing.assert_close(edsr(x), head + apply('conv_after_body', body), rtol=0, atol=1e-6)

    rdn = RDNEncoder(num_feat=6, num_block=2, num_conv=3, growth=4)
    weights = dict(rdn.named_parameters())
    shallow = apply('SFENet1', x)
    at, blocks = apply('SFENet2', shallow), []
    for i in range(2):
        dense = at
        for j in range(3):
            dense = torch.cat([dense, apply(f'RDBs.{i}.convs.{j}.conv.0', dense).relu()], dim=1)
        at = at + apply(f'RDBs.{i}.LFF', dense, padding=0)
        blocks.append(at)
    fused = apply('GFF.1', apply('GFF.0', torch.cat(blocks, dim=1), padding=0))
    torch.testing.assert_close(rdn(x), fused + shallow, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ('encoder', 'options', 'halo'),
    [
        (EDSREncoder, {}, 34),
        (EDSREncoder, {'num_block': 3}, 8),
        (RDNEncoder, {'growth': 2}, 131),
        (RDNEncoder, {'config': 'A', 'growth': 2}, 123),
    ],
)
def test_halo_is_the_receptive_radius(encoder, options, halo):
    """All weights positive, so that nothing cancels: exactly the pixels within the halo act on a feature."""
    encoder = encoder(num_feat=4, **options).double()
    assert encoder.halo == halo
    with torch.no_grad():
        for parameter in encoder.parameters():  # averages over three taps: sums stay finite in an image one pixel thin
            parameter.fill_(1 / (parameter.shape[1] * parameter.shape[2]) if parameter.dim() == 4 else 0)
    side = 2 * halo + 5
    for shape in ((1, 3, 1, side), (1, 3, side, 1)):
        x = torch.rand(shape, dtype=torch.float64, requires_grad=True)
        feat = encoder(x).flatten(2)[..., halo + 2]
        (grad,) = torch.autograd.grad(feat.sum(), x)
        acts = grad.sum(dim=1).flatten() > 0
        assert acts[2:-2].all(), 'smaller than claimed'
        assert not acts[:2].any() and not acts[-2:].any(), 'larger than claimed'


def numpy_padded(x):
    size = [(0, -n % 8) for n in x.shape[-2:]]
    return torch.from_numpy(np.pad(x.numpy(), [(0, 0), (0, 0), *size], mode='reflect'))


@pytest.mark.parametrize('size', [(1, 1), (7, 9), (16, 16), (3, 8), (2, 17), (8, 1)])
def test_swinir_takes_any_size(size):
    """Padding inside = padding outside by NumPy's reflection, then cutting; nothing at whole windows."""
    torch.manual_seed(0)
    encoder = SwinIREncoder(embed_dim=12, depths=[2, 2], num_heads=[2, 3]).eval()
    x = torch.rand(2, 3, *size)
    padded = numpy_padded(x)
    assert (padded.shape == x.shape) == (size == (16, 16))
    with torch.no_grad():
        shallow = encoder.conv_first(padded)
        deep = encoder.conv_after_body(encoder.forward_features(shallow)) + shallow
        feat = encoder(x)
        expected = F.leaky_relu(encoder.conv_before_upsample[0](deep), 0.01)[..., : size[0], : size[1]]
    assert feat.shape == (2, 64, *size)
    assert torch.equal(feat, expected)


def test_swinir_attention_shifts_between_layers():
    """A change in one window reaches the neighbouring window, also at another size than `img_size`."""
    torch.manual_seed(0)
    encoder = SwinIREncoder(embed_dim=12, depths=[2], num_heads=[2], img_size=48).eval()
    x = torch.rand(1, 3, 24, 24, requires_grad=True)
    (grad,) = torch.autograd.grad(encoder(x)[..., 12, 12].sum(), x)
    acts = grad.abs().sum(dim=(0, 1)) > 0
    assert acts[8:16, 8:16].all()
    assert acts[:6, :6].any() or acts[18:, 18:].any()
