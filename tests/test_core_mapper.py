"""The mapper: folded against unfolded, one decision per LR pixel, grid against scattered, fp32 under autocast."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import CORE_ALONE
from reference import grid

from moeisr_basicsr.core import MoEDecoder, render_image
from moeisr_basicsr.core import reference as method
from moeisr_basicsr.core.coords import Near, make_near, near_axis, pixel_centres
from moeisr_basicsr.core.mapper import Mapper
from moeisr_basicsr.core.precision import full_fp32
from moeisr_basicsr.core.render import TORCH, FeatureWindow, Renderer


def make_mapper(granularity='output_pixel', num_layers=3):
    torch.manual_seed(0)
    mapper = Mapper(6, 4, num_layers=num_layers, num_feat=12, granularity=granularity)
    with torch.no_grad():
        mapper.query_in.weight[:, -4:].normal_()  # let position and cell count
    return mapper


def unfolded(mapper, feat, coord, cell):
    return method.logits(SimpleNamespace(mapper=mapper), feat, coord, cell)


def folded(mapper, feat, coord, cell):
    size = tuple(feat.shape[-2:])
    return mapper(mapper.table(feat), make_near(coord, size), cell * cell.new_tensor(size))


def near_axes(size, lr_size):
    return [near_axis(pixel_centres(n_out), n) for n_out, n in zip(size, lr_size)]


@pytest.mark.parametrize('granularity', ['output_pixel', 'lr_pixel'])
@pytest.mark.parametrize('num_layers', [1, 3, 5])
@pytest.mark.parametrize('size', [(5, 7), (1, 1), (1, 6)])
def test_folded_equals_unfolded(granularity, num_layers, size):
    mapper = make_mapper(granularity, num_layers)
    assert mapper.num_layers == num_layers
    feat = torch.randn(2, 6, *size)
    coord = torch.rand(2, 41, 2) * 2 - 1
    cell = torch.rand(2, 41, 2) * 0.3
    logits = folded(mapper, feat, coord, cell)
    assert logits.shape == (2, 41, 4)
    torch.testing.assert_close(logits, unfolded(mapper, feat, coord, cell), rtol=0, atol=2e-6)
    assert float(logits.detach().std(dim=1).min()) > 1e-4, 'logits that do not vary prove nothing'


def test_gradients_reach_every_parameter():
    mapper = make_mapper().double()
    feat = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    coord = torch.rand(2, 30, 2, dtype=torch.float64) * 2 - 1
    cell = torch.rand(2, 30, 2, dtype=torch.float64)
    pull = torch.randn(2, 30, 4, dtype=torch.float64)
    grads = []
    for logits in (folded(mapper, feat, coord, cell), unfolded(mapper, feat, coord, cell)):
        grads.append(torch.autograd.grad((logits * pull).sum(), list(mapper.parameters())))
    for (name, _), fast, plain in zip(mapper.named_parameters(), *grads):
        assert plain.abs().max() > 0, name
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))


@pytest.mark.parametrize(('granularity', 'constant'), [('lr_pixel', True), ('output_pixel', False)])
def test_granularity(granularity, constant):
    """'lr_pixel': all pixels of an LR pixel share one decision; 'output_pixel' can tell them apart."""
    mapper = make_mapper(granularity)
    feat = torch.randn(1, 6, 4, 3)
    coord, cell = grid((20, 15))
    logits = folded(mapper, feat, coord, cell)
    cells = logits.detach().view(4, 5, 3, 5, 4).transpose(1, 2)  # (4, 3, 5, 5, J): LR row, LR column, pixels inside, J
    same = (cells == cells[:, :, :1, :1]).all()
    assert bool(same) is constant
    assert not (cells[0, 0, 0, 0] == cells[2, 1, 0, 0]).all()
    assert mapper.macs() == (0 if constant else 2 * 12) + 12 * 4


@pytest.mark.parametrize('granularity', ['output_pixel', 'lr_pixel'])
@pytest.mark.parametrize('size', [(14, 21), (9, 16), (7, 7)])
def test_grid_logits_equal_scattered_logits(granularity, size):
    mapper = make_mapper(granularity)
    feat = torch.randn(1, 6, 7, 5)
    coord, cell = grid(size)
    unit = torch.tensor([7.0, 5.0])
    table = mapper.table(feat)
    scattered = folded(mapper, feat, coord, cell).view(*size, 4)
    rows, cols = near_axes(size, (7, 5))
    on_grid = TORCH.logits(mapper, table[0].view(7, 5, -1), rows, cols, cell[0, 0] * unit)
    torch.testing.assert_close(on_grid, scattered, rtol=1e-6, atol=1e-6)
    strip = TORCH.logits(
        mapper,
        table[0].view(7, 5, -1),
        Near(*(part[2:5] for part in rows)),
        Near(*(part[1:4] for part in cols)),
        cell[0, 0] * unit,
    )
    torch.testing.assert_close(strip, scattered[2:5, 1:4], rtol=0, atol=1e-6)


def test_fp32_under_autocast():
    """16-bit logits would flip near ties: in training and on the grid, autocast must not change a bit."""
    mapper = make_mapper()
    feat = torch.randn(1, 6, 7, 5)
    coord, cell = grid((14, 10))
    near = make_near(coord, (7, 5))
    plain = mapper(mapper.table(feat), near, cell * 5)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.nn.functional.linear(coord, torch.ones(2, 2)).dtype == torch.bfloat16, 'autocast must be at work'
        table = mapper.table(feat)
        mixed = mapper(table, near, cell * 5)
        on_grid = TORCH.logits(mapper, table[0].view(7, 5, -1), *near_axes((14, 10), (7, 5)), cell[0, 0] * 5)
        from_bf16 = mapper.table(feat.bfloat16())
    assert table.dtype == mixed.dtype == on_grid.dtype == from_bf16.dtype == torch.float32
    assert torch.equal(mixed, plain)
    torch.testing.assert_close(on_grid.view_as(plain), plain, rtol=0, atol=1e-6)


def test_render_makes_the_same_map_under_autocast():
    torch.manual_seed(0)
    decoder = MoEDecoder(6, 3, experts=[[8], [8, 8]], mapper={'num_layers': 1, 'num_feat': 8}).eval()
    with torch.no_grad():
        decoder.mapper.query_out.bias.zero_()
        decoder.mapper.query_out.weight.mul_(0.01)  # near ties everywhere
        difference = decoder.mapper.query_out.weight[0] - decoder.mapper.query_out.weight[1]
        hidden = decoder.mapper.query_in.bias
        decoder.mapper.query_out.bias[1] = (hidden.relu() * difference).sum()
    feat = torch.randn(1, 6, 9, 9)
    plain = render_image(decoder, feat, (36, 36)).expert_map
    with torch.autocast('cpu', dtype=torch.bfloat16):
        mixed = render_image(decoder, feat, (36, 36)).expert_map
    assert plain.unique().numel() == 2
    assert torch.equal(plain, mixed)


@pytest.mark.parametrize('pixels', [1, 40, 200])
def test_the_table_of_a_large_window_is_made_in_bands(pixels, monkeypatch):
    torch.manual_seed(1)
    decoder = MoEDecoder(6, 3, experts=[[8], [8, 8]], mapper={'num_layers': 3, 'num_feat': 8})
    feat = torch.randn(1, 6, 23, 17)
    renderer = Renderer(decoder, (46, 34), (23, 17))
    whole = decoder.mapper.table(feat).view(23, 17, 8)
    heights = []
    convolve = decoder.mapper.table
    monkeypatch.setattr(sys.modules[Renderer.__module__], 'MAPPER_PIXELS', pixels)
    monkeypatch.setattr(decoder.mapper, 'table', lambda band: (heights.append(band.shape[-2]), convolve(band))[1])
    torch.testing.assert_close(renderer.mapper_table(FeatureWindow(feat, 0, 0, (23, 17))), whole, rtol=0, atol=1e-6)
    assert len(heights) > 1 and max(heights) <= pixels / 17 + 1 + 2 * 3  # rows of a band and a halo on each side


def test_table_macs_by_hand():
    mapper = Mapper(64, 4, num_layers=5, num_feat=32)
    assert mapper.table_macs() == 9 * 64 * 32 + 4 * 9 * 32 * 32 + 32 * 32
    assert mapper.macs() == 2 * 32 + 32 * 4


def test_standardise_gives_the_logits_mean_zero_and_deviation_one():
    torch.manual_seed(3)
    mapper = Mapper(5, 4, num_layers=2, num_feat=8)
    feat = torch.randn(2, 5, 6, 7)
    coord, cell = torch.rand(2, 200, 2) * 2 - 1, torch.rand(2, 200, 2)
    before = folded(mapper, feat, coord, cell).flatten(0, 1)
    assert (before.std(dim=0) - 1).abs().min() > 0.01
    mapper.standardise(before.mean(dim=0), before.std(dim=0, correction=0))
    after = folded(mapper, feat, coord, cell).flatten(0, 1)
    torch.testing.assert_close(after.mean(dim=0), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(after.std(dim=0, correction=0), torch.ones(4), rtol=1e-3, atol=0)
    mapper.standardise(torch.zeros(4), torch.zeros(4))  # a constant logit keeps its scale, without a division by zero
    assert torch.equal(folded(mapper, feat, coord, cell).flatten(0, 1), after)


def test_tf32_is_off_for_the_mapper_and_comes_back():
    """The flags exist without a GPU; what they do can only be seen on one."""
    flags = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [flag.allow_tf32 for flag in flags]
    try:
        for flag in flags:
            flag.allow_tf32 = True
        with full_fp32(torch.device('cuda')):
            assert [flag.allow_tf32 for flag in flags] == [False, False]
        assert [flag.allow_tf32 for flag in flags] == [True, True]
    finally:
        for flag, value in zip(flags, before):
            flag.allow_tf32 = value


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, 'fp32_precision'), reason='PyTorch before 2.9')
def test_tf32_by_its_newer_names():
    """In a process of its own: who has used them cannot go back."""
    subprocess.run(
        [
            sys.executable,
            '-c',
            CORE_ALONE
            + """
import torch
from moeisr_basicsr.core.precision import full_fp32
settings = torch.backends.cuda.matmul, torch.backends.cudnn.conv
for setting in settings:
    setting.fp32_precision = 'tf32'
with full_fp32(torch.device('cuda')):
    assert [setting.fp32_precision for setting in settings] == ['ieee', 'ieee']
assert [setting.fp32_precision for setting in settings] == ['tf32', 'tf32']
""",
        ],
        check=True,
    )
