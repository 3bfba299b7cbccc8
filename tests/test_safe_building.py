"""Model files of strangers: what they name and how much they ask for is looked at before anything is built."""

import json
import os
import time

import pytest
import torch
from basicsr.archs import build_network
from basicsr.utils.registry import ARCH_REGISTRY
from safetensors.torch import save_file
from torch import nn

from moeisr_basicsr.checkpoint import FORMAT, convert, load_model, save_model
from moeisr_basicsr.errors import UserError
from moeisr_basicsr.safe_building import Bounded, build_bounded, is_spandrel

ENCODER = {'type': 'EDSREncoder', 'num_feat': 6, 'num_block': 1}
NETWORK = {'type': 'LIIF', 'encoder': ENCODER, 'hidden_list': [4]}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def hostile(**network):
    """A model file of one number."""
    options = json.dumps({**NETWORK, **network})
    save_file({'x': torch.zeros(1)}, 'm.safetensors', metadata={'format': FORMAT, 'network_g': options})
    return 'm.safetensors'


@pytest.fixture
def built(monkeypatch):
    """Every convolution that is made."""
    made = []
    init = nn.Conv2d.__init__
    monkeypatch.setattr(
        nn.Conv2d, '__init__', lambda self, *args, **kwargs: (made.append(1), init(self, *args, **kwargs))[1]
    )
    return made


@pytest.mark.parametrize(
    'network',
    [
        {'encoder': {**ENCODER, 'num_block': 20_000}},
        {'encoder': {**ENCODER, 'num_feat': 4000}},
        {'encoder': {'type': 'SwinIREncoder', 'window_size': 24}},
        {'encoder': {'type': 'SwinIREncoder', 'embed_dim': 6, 'num_heads': [1], 'depths': [10_000_000]}},
        {'hidden_list': [2_000_000_000, 2_000_000_000]},
    ],
)
def test_a_small_file_does_not_build_a_large_network(network, built):
    start = time.perf_counter()
    with pytest.raises(
        UserError, match='m.safetensors: LIIF cannot be built .* much larger than the weights'
    ) as caught:
        load_model(hostile(**network))
    assert '\n' not in str(caught.value) and len(str(caught.value)) < 400
    assert len(built) < 1000 and time.perf_counter() - start < 60


def test_memory_is_asked_for_before_it_is_taken():
    """Factories, and what unfolds small tensors; the bound is on the sum."""
    for make in (
        lambda: torch.zeros(1 << 40),
        lambda: torch.arange(1 << 40),
        lambda: torch.empty(1 << 20)[:, None] - torch.empty(1 << 20)[None],
        lambda: torch.ones(1).repeat(1 << 40),
        lambda: [torch.empty(1 << 20) for _ in range(100)],
        lambda: [value.item() for value in torch.empty(1 << 20)],
    ):
        with pytest.raises(ValueError, match='much larger'), Bounded([torch.zeros(4)]):
            make()
    with Bounded([torch.zeros(1).expand(1 << 40)]) as bounded:  # one number in the file
        kept = torch.zeros(1 << 20).view(2, -1).expand(7, -1, -1)
        assert torch.linspace(0, 1, 5)[4].item() == 1 and kept.numel() == 7 << 20
    assert bounded.elements > 1 << 25


@pytest.mark.parametrize(
    'kind', ['SpyNet', 'BasicVSR', 'VGGFeatureExtractor', 'DFDNet', 'EDVR', 'StyleGAN2Generator', 'os.system']
)
def test_only_networks_for_images_are_built(kind, folder):
    """SpyNet would wait for ever at a FIFO, VGGFeatureExtractor would fetch its weights."""
    os.mkfifo('fifo')
    for network in ({'encoder': {'type': kind, 'load_path': 'fifo'}}, {'type': kind, 'load_path': 'fifo'}):
        with pytest.raises(
            UserError, match=f"m.safetensors names the network '{kind}'; a model file may name .*EDSREnc"
        ):
            load_model(hostile(**network))
    deeper = {'type': 'NetworkEncoder', 'arch': {'type': kind, 'load_path': 'fifo'}}
    with pytest.raises(UserError, match=f"names the network '{kind}'"):
        load_model(hostile(encoder=deeper))


def test_no_other_file_is_opened():
    for key in ('checkpoint', 'weights'):
        with pytest.raises(UserError, match=f"m.safetensors: '{key}' of its network names the file '/dev/zero'"):
            load_model(hostile(encoder={**ENCODER, key: '/dev/zero'}))
    os.mkfifo('fifo.safetensors')
    with pytest.raises(UserError, match='there is no model file'):
        load_model('fifo.safetensors')


def test_spandrel_networks_by_name():
    pytest.importorskip('spandrel')
    found = 'spandrel.architectures.ESRGAN.ESRGAN'
    assert is_spandrel(found)
    for name in (
        'spandrel.architectures.ESRGAN.nn',
        'spandrel.architectures.ESRGAN.gone',
        'spandrel.ModelLoader',
        'os.system',
    ):
        assert not is_spandrel(name)
    assert not is_spandrel('spandrel.architectures.ESRGAN.ESRGANArch')  # a class, but no network


@pytest.mark.parametrize(
    'options',
    [
        {'type': 'MSRResNet', 'num_block': 1, 'num_feat': 8},
        {
            'type': 'ECBSR',
            'num_in_ch': 3,
            'num_out_ch': 3,
            'num_block': 1,
            'num_channel': 4,
            'with_idt': True,
            'act_type': 'prelu',
            'scale': 2,
        },
        {'type': 'LIIF', 'encoder': {'type': 'SwinIREncoder', 'depths': [2], 'num_heads': [2], 'embed_dim': 12}},
    ],
)
def test_honest_networks_keep_their_weights(options):
    net = build_network(options)
    save_model('m.safetensors', net, options)
    loaded = load_model('m.safetensors')
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in net.state_dict().items())


def test_a_network_of_ones_own(monkeypatch):
    class Mine(nn.Module):
        def __init__(self, width: int = 3):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(width))
            [][width]

    monkeypatch.setitem(ARCH_REGISTRY._obj_map, 'Mine', Mine)
    with pytest.raises(UserError, match='f.pth: Mine cannot be built from its options: list index out of range'):
        build_bounded({'type': 'Mine'}, {'weight': torch.zeros(3)}, 'f.pth')


def bombs():
    """Checkpoints of a few bytes that unfold when they are read."""
    import pickle
    import zipfile

    class Bytes:
        def __reduce__(self):
            return bytearray, (50_000_000,)

    torch.save({'params': {'x': torch.zeros(1_000_000)}}, 'plain.pth')
    with zipfile.ZipFile('plain.pth') as plain, zipfile.ZipFile('zip.pth', 'w', zipfile.ZIP_DEFLATED) as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    torch.save({'params': {'x': Bytes()}}, 'bytes.pth')
    with open('legacy.pth', 'wb') as file:
        pickle.dump(Bytes(), file, 2)
    return 'zip.pth', 'bytes.pth', 'legacy.pth'


def test_checkpoints_do_not_unfold():
    for name in bombs():
        assert os.path.getsize(name) < 20_000
        with pytest.raises(UserError, match=f'{name} is compressed or makes more of itself in memory'):
            convert(name, 'm.safetensors', NETWORK)
