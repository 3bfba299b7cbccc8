"""`basicsr export`: the file in onnxruntime against the package's own tiled upscaling, experts' work counted."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from basicsr.archs import build_network
from basicsr.utils.registry import ARCH_REGISTRY
from PIL import Image
from torch import nn

from moeisr_basicsr.checkpoint import save_model
from moeisr_basicsr.cli import main
from moeisr_basicsr.inference import upscale

EDSR = {'type': 'EDSREncoder', 'num_feat': 8, 'num_block': 1}
SWINIR = {'type': 'SwinIR', 'img_size': 16, 'window_size': 4, 'depths': [2], 'num_heads': [2], 'embed_dim': 12}
MAPPER = {'num_layers': 1, 'num_feat': 8}
NETWORKS = {
    'liif': {'encoder': EDSR, 'experts': [[12], [16, 24], []], 'mapper': MAPPER, 'skip': 'bicubic'},
    'lte': {
        'encoder': {'type': 'RDNEncoder', 'num_feat': 8, 'num_block': 2, 'num_conv': 2, 'growth': 4},
        'decoder': 'lte',
        'experts': [[16], [16, 16]],
        'hidden_dim': 16,
        'mapper': {**MAPPER, 'granularity': 'lr_pixel'},
        'skip': 'bilinear',
    },
    'lm': {
        'encoder': {'type': 'SMFANetEncoder', 'num_feat': 8, 'num_block': 1, 'scale': 2},
        'decoder': 'lm',
        'experts': [[], {'latent': [8], 'depth': 2}, {'latent': [], 'depth': 1}],
        'mapper': MAPPER,
    },
    'network': {
        'encoder': {
            'type': 'NetworkEncoder',
            'halo': 'whole',
            'arch': {**SWINIR, 'mlp_ratio': 2, 'upscale': 3, 'upsampler': 'pixelshuffle'},
        },
        'experts': [[], [16, 16]],
        'mapper': MAPPER,
        'skip': 'network',
    },
}
DENSE = {'encoder': EDSR, 'decoder': 'lm', 'experts': [{'latent': [8], 'depth': 2}]}
# Input, output, cost weight: below a window of attention and a cell of SMFANet; at x2.5 queries between two LR pixels;
# several tiles; no enlargement; idle experts.
CASES = [
    ((13, 9), (26, 18), 0),
    ((20, 32), (50, 80), 0),
    ((7, 5), (30, 11), 0.3),
    ((33, 50), (140, 300), -0.5),
    ((16, 17), (16, 17), 1000),
    ((3, 70), (31, 269), -1000),
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv('MOEISR_KERNELS', 'off')  # nothing is compiled here
    monkeypatch.chdir(tmp_path)
    return tmp_path


@torch.no_grad()
def make_model(options):
    """A network whose experts differ, as `m.safetensors`."""
    net = build_network({'type': 'MoEISR', **options}).eval()
    parameters = [
        *net.decoder.pool.parameters(),
        *([] if net.decoder.mapper is None else [net.decoder.mapper.query_in.weight]),
    ]
    for parameter in parameters:
        parameter.add_(torch.randn_like(parameter) * 0.2)
    save_model('m.safetensors', net, {'type': 'MoEISR', **options}, license='CC0-1.0', scale_range='[1, 4]')
    return net


def open_session(**options):
    onnxruntime = pytest.importorskip('onnxruntime', reason='the extra [onnx] is not installed')
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    for name, value in options.items():
        setattr(settings, name, value)
    return onnxruntime.InferenceSession('m.onnx', settings, providers=['CPUExecutionProvider'])


def run(session, image, size, cost_weight=0.0):
    inputs = {'image': image.numpy(), 'size': np.array(size), 'cost_weight': np.array(cost_weight, np.float32)}
    return session.run(None, inputs)


@pytest.mark.parametrize('name', NETWORKS)
def test_the_file_upscales_as_the_package_does(name, folder, capsys):
    onnx = pytest.importorskip('onnx', reason='the extra [onnx] is not installed')
    net = make_model(NETWORKS[name])
    assert main(['export', 'm.safetensors', '-o', 'm.onnx']) == 0
    printed = capsys.readouterr().out
    assert printed.startswith('m.onnx: opset 17, ') and float(re.search(r'difference is (\S+),', printed)[1]) < 1e-5
    session, counts = open_session(enable_profiling=True, profile_file_prefix=str(folder / 'profile')), 0
    for lq_size, size, cost_weight in CASES:
        image = torch.rand(1, 3, *lq_size)
        expected = upscale(net, image, size=size, cost_weight=cost_weight)
        upscaled, experts = run(session, image, size, cost_weight)
        assert upscaled.shape == (1, 3, *size) and experts.shape == (1, *size)
        same = experts == expected.expert_map.numpy()
        assert same.mean() > 0.999  # ties
        assert np.abs(upscaled - expected.image.numpy()).max(axis=1)[same].max() < 1e-5
        counts = counts + np.bincount(experts.ravel(), minlength=net.num_experts)
    assert all(counts)
    profile = session.end_profiling()
    if name == 'liif':  # the second layer of expert 1 runs on the four corners of its own pixels only
        assert rows_multiplied(profile, [16, 24]) == 4 * counts[1]
    model = onnx.load('m.onnx')
    notes = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(notes['network_g']) == {'type': 'MoEISR', **NETWORKS[name]}
    assert (notes['license'], notes['scale_range']) == ('CC0-1.0', '[1, 4]')
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in model.graph.input
    }
    assert shapes == {'image': [1, 3, 'H', 'W'], 'size': [2], 'cost_weight': []}


def rows_multiplied(profile, weight):
    """How many rows products with a matrix of this shape had, in the events of onnxruntime's profile."""
    events = [
        event['args'].get('input_type_shape', []) for event in json.loads(Path(profile).read_text()) if 'args' in event
    ]
    shapes = [[next(iter(entry.values())) for entry in event] for event in events]
    return sum(first[0][0] for first in shapes if weight in first[1:] or weight[::-1] in first[1:])


def test_the_program_of_the_documentation(folder):
    net = make_model(DENSE)
    pytest.importorskip('onnx', reason='the extra [onnx] is not installed')
    assert main(['export', 'm.safetensors', '-o', 'moeisr.onnx']) == 0
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)).save('photo.png')
    page = Path(__file__).resolve().parents[1] / 'docs/export.md'
    (code,) = re.findall(r'^```python\n(.*?)^```$', page.read_text(encoding='utf-8'), re.M | re.S)
    names = {}
    exec(compile(code, str(page), 'exec'), names)
    expected = upscale(net, torch.from_numpy(names['image']).permute(2, 0, 1)[None], size=(30, 40)).image
    np.testing.assert_allclose(names['upscaled'], expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        np.asarray(Image.open('large.png')), names['upscaled'][0].transpose(1, 2, 0).clip(0, 1) * 255, atol=0.51
    )
    assert not names['expert_map'].any()


class FrozenEncoder(nn.Module):
    """Computes with the size of the image in Python."""

    num_feat = 4

    def __init__(self, num_in_ch=3):
        super().__init__()
        self.conv = nn.Conv2d(num_in_ch, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(x) * float(x.shape[-1])


class UnknownEncoder(FrozenEncoder):
    """Uses an operation that ONNX does not have."""

    def forward(self, x):
        return torch.special.bessel_j0(self.conv(x))


@pytest.mark.parametrize(
    ('encoder', 'message'),
    [
        (FrozenEncoder, 'FrozenEncoder may compute with sizes in Python'),
        (UnknownEncoder, 'UnknownEncoder has no ONNX form'),
    ],
)
def test_an_encoder_without_onnx_form(encoder, message, folder, monkeypatch, capsys):
    pytest.importorskip('onnx', reason='the extra [onnx] is not installed')
    monkeypatch.setattr(ARCH_REGISTRY, '_obj_map', {**ARCH_REGISTRY._obj_map, encoder.__name__: encoder})
    make_model({**DENSE, 'encoder': {'type': encoder.__name__}})
    assert main(['export', 'm.safetensors', '-o', 'm.onnx']) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0] and lines[0].startswith('basicsr: error: m.safetensors: ')
    assert [path.name for path in folder.iterdir()] == ['m.safetensors']


@pytest.mark.parametrize(
    ('model', 'out', 'message'),
    [
        ('m.safetensors', 'm.pt', "-o m.pt: the name must end in '.onnx'"),
        ('m.safetensors', 'old.onnx', '-o old.onnx: this file exists; give --overwrite'),
        ('m.safetensors', 'none/m.onnx', 'the folder none does not exist'),
        ('gone.safetensors', 'm.onnx', 'there is no model file gone.safetensors'),
    ],
)
def test_mistakes(model, out, message, folder, capsys):
    (folder / 'm.safetensors').touch()
    (folder / 'old.onnx').write_text('mine')
    assert main(['export', model, '-o', out]) == 2
    assert message in capsys.readouterr().err
    assert (folder / 'old.onnx').read_text() == 'mine' and len(list(folder.iterdir())) == 2


@pytest.mark.parametrize('package', ['onnx', 'onnxruntime'])
def test_without_the_extra(package, folder, monkeypatch, capsys):
    (folder / 'm.safetensors').touch()
    monkeypatch.setitem(sys.modules, package, None)
    assert main(['export', 'm.safetensors', '-o', 'm.onnx']) == 2
    assert capsys.readouterr().err == (
        'basicsr: error: basicsr export needs the packages onnx and onnxruntime: pip install onnx onnxruntime\n'
    )
