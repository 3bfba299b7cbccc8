"""Encoders from trained networks: where they are cut, their receptive field, what becomes of files, bad files."""

import copy
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from basicsr.archs import build_network
from basicsr.models import build_model
from helpers import pretrained, set5_psnr
from tiny_runs import model_options
from torch import nn

import moeisr_basicsr  # noqa: F401  before BasicSR, which needs its shims
from moeisr_basicsr.analysis.complexity import encoder_macs
from moeisr_basicsr.archs.encoders import build_encoder, resolve_network
from moeisr_basicsr.archs.moeisr_arch import FixedScale
from moeisr_basicsr.archs.network_encoder_arch import NetworkEncoder
from moeisr_basicsr.checkpoint import load_model, save_model
from moeisr_basicsr.errors import UserError
from moeisr_basicsr.inference import upscale
from moeisr_basicsr.options import check_network

sys.path.append(str(Path(__file__).resolve().parents[1] / 'examples'))
import rlfn  # noqa: F401  registers RLFN

SMALL = {'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8}
EDSR = {'type': 'EDSR', **SMALL, 'num_block': 2, 'upscale': 2}
RRDB = {'type': 'RRDBNet', **SMALL, 'scale': 4, 'num_block': 1, 'num_grow_ch': 4}
SWINIR = {'type': 'SwinIR', 'upscale': 2, 'img_size': 16, 'window_size': 8, 'depths': [2], 'embed_dim': 12}
SWINIR |= {'num_heads': [2], 'mlp_ratio': 2, 'upsampler': 'pixelshuffle'}
RCAN = {'type': 'RCAN', **SMALL, 'num_group': 1, 'num_block': 1, 'squeeze_factor': 4, 'upscale': 2}
MSR = {'type': 'MSRResNet', **SMALL, 'num_block': 2, 'upscale': 4}
# What goes into the upsampler, by the networks' forward passes (x in [0, 1]).
FEATURES = {
    'EDSR': lambda net, x: (
        (shallow := net.conv_first((x - net.mean) * net.img_range)) + net.conv_after_body(net.body(shallow))
    ),
    'RRDBNet': lambda net, x: (shallow := net.conv_first(x)) + net.conv_body(net.body(shallow)),
    'SwinIR': lambda net, x: (
        (shallow := net.conv_first(x - net.mean)) + net.conv_after_body(net.forward_features(shallow))
    ),
    'RCAN': lambda net, x: (
        (shallow := net.conv_first((x - net.mean) * net.img_range)) + net.conv_after_body(net.body(shallow))
    ),
    'MSRResNet': lambda net, x: net.body(net.lrelu(net.conv_first(x))),
    'RLFN': lambda net, x: (
        (shallow := net.conv_1(255 * x)) + net.conv_2(nn.Sequential(net.block_1, net.block_2)(shallow))
    ),
}
ALL = [EDSR, RRDB, SWINIR, RCAN, MSR, {'type': 'RLFN', 'num_feat': 8, 'num_block': 2, 'upscale': 3}]


@pytest.mark.parametrize('arch', ALL, ids=lambda arch: arch['type'])
def test_cut(arch):
    """The features before the upsampler; the image of the uncut network; without the tail, the same features."""
    whole = build_network(arch).eval()
    with_tail = NetworkEncoder(arch=arch, halo=1, tail=True).eval()
    with_tail.network.load_state_dict(whole.state_dict())
    x = torch.rand(2, 3, 16, 24)
    with torch.no_grad():
        feat, image = with_tail.with_image(x * 2 - 1)
        expected = FEATURES[arch['type']](whole, x)
        torch.testing.assert_close(feat, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(image, whole(x), rtol=0, atol=1e-6)
        encoder = NetworkEncoder(arch=arch, halo=1).eval()
        state = encoder.state_dict()
        encoder.load_state_dict({name: value for name, value in with_tail.state_dict().items() if name in state})
        torch.testing.assert_close(encoder(x * 2 - 1), expected, rtol=0, atol=1e-6)
        assert (encoder.num_feat, encoder.scale) == (feat.shape[1], image.shape[-1] // 24)
        tiny = with_tail.with_image(torch.rand(1, 3, 3, 5))
        assert (tiny[0].shape[-2:], tiny[1].shape[-2:]) == ((3, 5), (3 * encoder.scale, 5 * encoder.scale))
    dropped = with_tail.state_dict().keys() - state.keys()
    assert dropped and all(name.startswith(('network.up', 'network.conv_')) for name in dropped)
    encoder.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())  # DDP waits for each


@pytest.mark.parametrize(
    ('arch', 'halo', 'multiple'),
    [(EDSR, 2 * 2 + 2, 1), (RRDB, 15 + 2, 1), (MSR, 2 * 2 + 1, 1), (SWINIR, 1 + 7 + 4 + 2, 8)],
    ids=lambda value: value['type'] if isinstance(value, dict) else '',
)
def test_halo_is_measured(arch, halo, multiple):
    """Counted from the convolutions; a window and half of the next one for each pair of SwinIR's layers."""
    encoder = NetworkEncoder(arch=arch)
    assert (encoder.halo, encoder.tile_multiple) == (halo, multiple)
    assert encoder.options == {
        'type': 'NetworkEncoder',
        'num_in_ch': 3,
        'arch': arch,
        'halo': halo,
        'tile_multiple': multiple,
    }


def test_a_network_that_looks_at_the_whole(caplog):
    encoder = NetworkEncoder(arch=RCAN)
    assert (encoder.halo, encoder.options['halo']) == (None, 'whole')
    (record,) = [record for record in caplog.records if 'RCAN' in record.getMessage()]
    assert 'encoded whole' in record.getMessage()
    again = {key: value for key, value in encoder.options.items() if key != 'type'}
    caplog.clear()
    assert NetworkEncoder(**again).halo is None  # measured once
    assert not caplog.records


@pytest.mark.parametrize('arch', [EDSR, RRDB], ids=lambda arch: arch['type'])
def test_multiply_adds_end_at_the_cut(arch):
    encoder = NetworkEncoder(arch=arch, halo=1)
    weights = sum(parameter.numel() for parameter in encoder.parameters() if parameter.dim() == 4)
    assert encoder_macs(encoder, (21, 30)) == 21 * 30 * weights


def test_features_override():
    """What goes into the module; modules behind it go."""
    encoder = NetworkEncoder(arch=EDSR, features='conv_after_body', halo=5).eval()
    x = torch.rand(1, 3, 9, 8)
    net = encoder.network
    with torch.no_grad():
        expected = net.body(net.conv_first((x - net.mean) * net.img_range))
        torch.testing.assert_close(encoder(x * 2 - 1), expected, rtol=0, atol=1e-6)
    assert not any(name.startswith('network.conv_after_body') for name in encoder.state_dict())
    with pytest.raises(UserError, match="no module 'conv_afterbody' for `features`. Did you mean 'conv_after_body'"):
        NetworkEncoder(arch=EDSR, features='conv_afterbody')
    with pytest.raises(UserError, match='no features of the size'):
        NetworkEncoder(arch=EDSR, features='conv_last')


def test_copies_and_compiles():
    """EMA copies, DDP's processes pickle, torch.compile may stop where the pass ends."""
    encoder = NetworkEncoder(arch=RRDB, halo=1).eval()
    x = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        expected = encoder(x)
        for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
            assert torch.equal(other(x), expected)
        torch.nn.init.zeros_(other.network.conv_first.weight)
        assert torch.equal(encoder(x), expected)  # a copy of its own
        compiled = torch.compile(encoder.forward, backend='eager')
        torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-6)


def network_opt(**encoder):
    encoder = {'type': 'NetworkEncoder', **encoder}
    return {'type': 'MoEISR', 'encoder': encoder, 'experts': [[4], [4, 4]], 'mapper': {'num_layers': 1, 'num_feat': 4}}


def spandrel_checkpoint(path, upscale=2):
    """A random network of an architecture that only spandrel has here."""
    from spandrel.architectures.Compact import Compact

    net = Compact(num_in_ch=3, num_out_ch=3, num_feat=8, num_conv=2, upscale=upscale)
    torch.save({'params_ema': net.state_dict()}, path)
    return net


@pytest.mark.parametrize('kind', ['spandrel', 'registered'])
def test_from_checkpoint_to_model_file(tmp_path, kind):
    """It trains a step, and its model file upscales where the checkpoint is gone."""
    path = tmp_path / 'net.pth'
    if kind == 'spandrel':
        start = spandrel_checkpoint(path)
        options = network_opt(checkpoint=str(path))
    else:
        start = build_network(EDSR)
        torch.save({'params': start.state_dict()}, path)
        options = network_opt(arch=EDSR, weights=str(path))
    check_network(options, 'here')
    model = build_model(model_options(network_g=options))
    encoder = model.net_g.encoder
    own = encoder.network.state_dict()
    assert own and all(torch.equal(value, start.state_dict()[name]) for name, value in own.items())
    assert all(torch.equal(a, b) for a, b in zip(model.net_g.parameters(), model.net_g_ema.parameters()))
    queries = {'coord': torch.rand(2, 5, 2) * 1.8 - 0.9, 'cell': torch.full((2, 5, 2), 0.1)}
    model.feed_data({'lq': torch.rand(2, 3, 9, 8), 'gt': torch.rand(2, 5, 3), **queries})
    model.optimize_parameters(1)
    assert any(not torch.equal(value, start.state_dict()[name]) for name, value in encoder.network.state_dict().items())
    resolved = model.opt['network_g']
    assert str(path) not in json.dumps(resolved) and resolve_network(resolved) == resolved
    save_model(tmp_path / 'model.safetensors', model.net_g, resolved)
    path.unlink()
    again = load_model(tmp_path / 'model.safetensors')
    lq = torch.rand(1, 3, 40, 21)
    expected = upscale(model.net_g, lq, 2.5, tile=0).image
    torch.testing.assert_close(upscale(again, lq, 2.5, tile=16).image, expected, rtol=0, atol=1e-5)


def test_smfanet_is_recognised():
    encoder = NetworkEncoder(checkpoint=str(pretrained('SMFANet_plus_DIV2K_100w_x2SR.pth')))
    assert type(encoder).__name__ == 'SMFANetEncoder'
    expected = {'num_in_ch': 3, 'num_feat': 48, 'num_block': 12, 'ffn_scale': 2, 'scale': 2}
    assert encoder.options == {'type': 'SMFANetEncoder', **expected}
    assert not hasattr(encoder, 'to_img')


def test_public_weights_by_a_class_of_the_users():
    """RLFN as published: 32.24 dB."""
    arch = {'type': 'RLFN', 'upscale': 4}
    encoder = NetworkEncoder(arch=arch, weights=str(pretrained('rlfn_x4.pth')), halo='whole', tail=True)
    assert round(set5_psnr(encoder.eval(), 4), 2) == 32.24


class Upsampled(nn.Module):
    """Without features of LR size."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 3, 1))

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2))


def test_networks_that_do_not_fit(monkeypatch):
    from moeisr_basicsr.archs import network_encoder_arch

    for arch, message in [
        ({'type': 'EDSRR'}, "EDSRR is no registered network. Did you mean 'EDSR'"),
        ({'type': 'EDSR', 'num_feats': 8}, "EDSR cannot be built: .*'num_feats'"),
        ({'type': 'RIDNet', 'in_channels': 3, 'mid_channels': 16, 'out_channels': 3}, 'no super-resolution network'),
        ({'type': 'VGGFeatureExtractor', 'layer_name_list': ['relu1_1']}, 'not allowed'),
        ({'type': 'SpyNet', 'load_path': '/etc/passwd'}, 'not allowed'),
        ({'type': 'spandrel.architectures.Nothing.Here'}, 'no such network'),
        ({'type': 'spandrel.architectures.Compact.CompactArch'}, 'is no network'),
        ({'num_feat': 8}, 'needs a type'),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            NetworkEncoder(arch=arch)
        assert '\n' not in str(caught.value)
    monkeypatch.setattr(network_encoder_arch, 'build_arch', lambda arch: Upsampled())
    with pytest.raises(UserError, match='no features of the input'):
        NetworkEncoder(arch={'type': 'Upsampled'})
    for options in ({}, {'arch': EDSR, 'checkpoint': 'x'}):
        with pytest.raises(UserError, match='either arch'):
            NetworkEncoder(**options)


class Hostile:
    def __reduce__(self):
        return (open, ('run', 'w'))


def face_network(path):
    from spandrel.architectures.RestoreFormer import RestoreFormer

    sizes = {'ch': 32, 'ch_mult': (1, 1), 'z_channels': 32, 'embed_dim': 32, 'n_embed': 8, 'num_res_blocks': 1}
    rest = {'attn_resolutions': (16,), 'in_channels': 3, 'out_ch': 3, 'resolution': 512, 'double_z': False}
    net = RestoreFormer(**sizes, **rest, dropout=0.0, enable_mid=True, head_size=8)
    torch.save(net.state_dict(), path)


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda path: path.write_bytes(pickle.dumps({'params': Hostile()})), 'Nothing in it was run'),
        (lambda path: torch.save({'params': Hostile()}, path), 'Nothing in it was run'),
        (lambda path: (spandrel_checkpoint(path), path.write_bytes(path.read_bytes()[:-900])), 'damaged'),
        (lambda path: path.mkdir(), 'is a folder'),
        (lambda path: None, 'does not exist'),
        (lambda path: spandrel_checkpoint(path, upscale=1), 'restoration at the same size'),
        (face_network, 'for faces'),
        (lambda path: torch.save({'a.weight': torch.ones(2)}, path), 'knows no architecture'),
        (
            lambda path: torch.save({'body.0.weight': torch.ones(2), 'body.1.weight': torch.ones(2)}, path),
            'cannot read',
        ),
        (lambda path: torch.save({'params': 3}, path), 'no weights'),
    ],
)
def test_files_that_cannot_be_used(tmp_path, monkeypatch, make, message):
    """One line each, which names the file, for the encoder and for a network that has it; nothing is run."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / 'net.pth'
    make(path)
    for use in (
        lambda: NetworkEncoder(checkpoint=str(path)),
        lambda: FixedScale({'type': 'NetworkEncoder', 'checkpoint': str(path)}),
    ):
        with pytest.raises(UserError, match=message) as caught:
            use()
        assert '\n' not in str(caught.value) and str(path) in str(caught.value)
    assert not Path('run').exists()


def test_weights_of_another_network(tmp_path):
    path = tmp_path / 'net.pth'
    torch.save({'params': build_network({**EDSR, 'num_feat': 6}).state_dict()}, path)
    with pytest.raises(UserError, match=r'net.pth: the weights do not fit EDSR: \d+ of another shape'):
        NetworkEncoder(arch=EDSR, weights=str(path))


class Odd(nn.Module):
    num_feat = 4

    def __init__(self, num_in_ch, stride=1, width=4, smallest=1):
        super().__init__()
        self.smallest = smallest
        self.conv = nn.Conv2d(num_in_ch, width, 3, stride, padding=1)

    def forward(self, x):
        if x.shape[-1] < self.smallest:
            raise RuntimeError('too small')
        return self.conv(x)


@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_an_encoder_is_tried_when_it_is_built(monkeypatch, device):
    """Another size, another width, a failure: one line each, before any training."""
    monkeypatch.setattr('moeisr_basicsr.archs.encoders.build_network', lambda options: Odd(**options['odd']))
    with torch.device(device):
        assert build_encoder({'type': 'Odd', 'odd': {'num_in_ch': 3}}, 3)[1] == 4
        for odd, message in [({'stride': 2}, r'\(1, 4, 4, 6\)'), ({'width': 5}, r'num_feat = 4.*\(1, 5, 8, 12\)')]:
            with pytest.raises(UserError, match=f'Odd must make .*{message}'):
                build_encoder({'type': 'Odd', 'odd': {'num_in_ch': 3, **odd}}, 3)
        options = {'type': 'Odd', 'odd': {'num_in_ch': 3, 'smallest': 99}}
        if device == 'meta':  # where the failure may be that of an operation without data
            assert build_encoder(options, 3)[0].training
        else:
            with pytest.raises(UserError, match='encoder Odd fails on an image of 8 x 12: too small'):
                build_encoder(options, 3)
