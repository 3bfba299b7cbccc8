"""Which backend is chosen: kernels that fail at their first launch, and the switch. Triton is played by a stand-in."""

import logging
import subprocess
import sys
import types

import pytest
import torch

from moeisr_basicsr import kernels
from moeisr_basicsr.archs.moeisr_arch import MoEISR
from moeisr_basicsr.core import MoEDecoder
from moeisr_basicsr.core.render import TorchBackend
from moeisr_basicsr.inference import upscale
from moeisr_basicsr.kernels import cpu, fused_backend, select

EXPERTS = {'liif': [[8], [8, 8], [4]], 'lte': [[], [8], [4]]}


class Launches(TorchBackend):
    """A backend that can fail at a launch, as Triton does when it compiles: in `broken`, with `error`."""

    broken, error = '', None
    made, seen = 0, []

    def __init__(self, decoder, precision):
        type(self).made += 1

    def launch(self, name):
        self.seen.append(name)
        if name == self.broken:
            raise self.error

    def decode(self, decoder, tile):
        self.launch('decode')
        for j in range(decoder.num_experts):  # one compilation each
            assert tile.expert_map is None or (tile.expert_map == j).any()
        return super().decode(decoder, tile)

    def logits(self, *args):
        self.launch('logits')
        return super().logits(*args)

    def route(self, mapper, *args):
        self.launch('route')
        return super().logits(mapper, *args).argmax(dim=-1).to(torch.uint8)


@pytest.fixture
def triton(monkeypatch, caplog):
    """The stand-in's class, to be broken by the test; nothing has been tried yet in this process."""
    backend = type('TritonBackend', (Launches,), {'seen': []})
    module = types.SimpleNamespace(available=lambda device: True, TritonBackend=backend)
    monkeypatch.setitem(sys.modules, f'{kernels.__name__}.triton_decode', module)
    monkeypatch.setattr(kernels, 'triton_decode', module, raising=False)
    monkeypatch.setattr(select, '_RUNS', {})
    monkeypatch.delenv('MOEISR_KERNELS', raising=False)
    select._say.cache_clear()
    caplog.set_level(logging.INFO, logger='basicsr.kernels')
    return backend


def make_decoder(family='liif', experts=None):
    extra = {'hidden_dim': 8} if family == 'lte' else {}
    return MoEDecoder(6, 3, family, experts or EXPERTS[family], mapper={'num_layers': 1}, **extra).eval()


FAILURES = [
    ('decode', RuntimeError('Failed to find C compiler. Please specify via CC environment variable.')),
    ('decode', subprocess.CalledProcessError(1, ['gcc', 'main.c', '-I/usr/include'])),
    ('route', ImportError('main.so:\nundefined symbol')),
    ('logits', ValueError('at 3:1:\n  x = y\n^')),
]


@pytest.mark.parametrize(('broken', 'error'), FAILURES)
@pytest.mark.parametrize('family', ['liif', 'lte'])
def test_a_failing_launch_falls_back_to_torch(triton, caplog, family, broken, error):
    triton.broken, triton.error = broken, error
    decoders = make_decoder(family), make_decoder(family), make_decoder(family, [[4], [4]])  # the same sizes twice
    for precision in ('fp32', 'bf16'):
        for decoder in decoders:
            assert fused_backend(decoder, 'cuda', precision) is None
    assert triton.seen.count(broken) == 4, 'tried once for each precision and each set of sizes'
    assert len(caplog.records) == 1 and caplog.records[0].levelname == 'WARNING'
    text = caplog.text
    assert type(error).__name__ in text and 'runs on torch code' in text and text.count('\n') == 1


@pytest.mark.parametrize('experts', [None, [[8]]])
def test_kernels_that_run_are_tried_once(triton, caplog, experts):
    decoder = make_decoder(experts=experts)
    backends = [fused_backend(decoder, 'cuda') for _ in range(3)]
    assert all(isinstance(backend, triton) for backend in backends) and triton.made == 3
    assert triton.seen == (['decode'] if experts else ['route', 'logits', 'decode'])
    assert caplog.records == []


def test_lack_of_memory_is_no_failure_of_the_kernels(triton):
    triton.broken, triton.error = 'decode', torch.cuda.OutOfMemoryError('out of memory')
    with pytest.raises(torch.cuda.OutOfMemoryError):
        fused_backend(make_decoder(), 'cuda')
    triton.broken = ''
    assert fused_backend(make_decoder(), 'cuda') is not None


def test_upscale_survives_a_failing_launch(triton, monkeypatch):
    """The whole way: what is rendered afterwards is torch's image."""
    triton.broken, triton.error = FAILURES[0]
    net = MoEISR({'type': 'EDSREncoder', 'num_feat': 8, 'num_block': 1}, 'liif', [[16], [16, 16]])
    monkeypatch.setattr(
        'moeisr_basicsr.inference.fused_backend',
        lambda decoder, device, precision: fused_backend(decoder, 'cuda', precision),
    )
    lq = torch.rand(1, 3, 12, 12)
    got = upscale(net, lq, 2).image
    assert 'decode' in triton.seen
    monkeypatch.setenv('MOEISR_KERNELS', 'off')
    assert torch.equal(got, upscale(net, lq, 2).image)


def test_the_switch_reaches_every_kernel(triton, monkeypatch, caplog):
    decoder = make_decoder()
    assert fused_backend(decoder, 'cuda') is not None
    if cpu.available():  # loaded before the switch is set, which counts all the same
        assert fused_backend(decoder, 'cpu') is not None
    triton.seen.clear()
    caplog.clear()
    monkeypatch.setenv('MOEISR_KERNELS', 'off')
    assert fused_backend(decoder, 'cuda') is None and fused_backend(decoder, 'cpu') is None
    assert triton.seen == [] and [record.levelname for record in caplog.records] == ['INFO']
    monkeypatch.setenv('MOEISR_KERNELS', 'of')
    with pytest.raises(ValueError, match="one of auto, off, avx2, avx512, avx512_bf16; got 'of'"):
        fused_backend(decoder, 'cuda')
