"""The Triton kernels against the plain twins; run by test_kernels_triton.py in a process of its own.

On the CPU, Triton's interpreter runs the kernels: it has to be chosen before Triton is first imported.
"""

import copy

import pytest
import torch
from reference import grid, mixture

from moeisr_basicsr.core import MoEDecoder, render_image
from moeisr_basicsr.core.control import Budget, CostWeight
from moeisr_basicsr.core.coords import grid_axis
from moeisr_basicsr.core.render import TORCH, Tile, crop_window
from moeisr_basicsr.kernels import fused_backend, select, triton_decode
from moeisr_basicsr.kernels.triton_decode import Config, TritonBackend

DEVICE = 'cpu' if triton_decode.interpreted() else 'cuda'
EXPERTS = {
    'liif': [[12], [8, 20], [16, 4, 8]],
    'lte': [[5], [12], [8, 20]],
    'lm': [{'latent': [], 'depth': 1}, {'latent': [20], 'depth': 3}, {'latent': [7, 12], 'depth': 2}],
}
FAMILIES = list(EXPERTS)
# Largest difference on the [0, 1] scale; networks scale the decoder's answers by a half.
TOLERANCE = {'fp32': 1e-5, 'tf32': 4e-3, 'fp16': 4e-3, 'bf16': 4e-3}
FACTORS = [(2, 2), (3, 3), (5, 1), (1.3, 2.7), (7, 7)]


def make_decoder(family='liif', experts=None, out_channels=3, hidden_dim=12, shared_layers=0, width=16, **mapper):
    torch.manual_seed(0)
    extra = {'lte': {'hidden_dim': hidden_dim}, 'lm': {'render_width': width}}.get(family, {})
    options = {'num_layers': 1, 'num_feat': 8, **mapper}
    decoder = MoEDecoder(
        6, out_channels, family, experts or EXPERTS[family], mapper=options, shared_layers=shared_layers, **extra
    )
    if decoder.mapper is not None:  # an even mixture, so that all experts are in use
        with torch.no_grad():
            decoder.mapper.query_in.weight.mul_(8)
            coord, cell = grid((20, 20))
            logits = decoder.logits(torch.randn(1, 6, 7, 8), coord, cell)
            decoder.mapper.query_out.bias.sub_(logits.mean(dim=(0, 1)))
    return decoder.eval().to(DEVICE)


def largest_difference(decoder, feat, size, rendered):
    """To the plain twin on the expert map that was rendered, [0, 1] scale."""
    coord, cell = grid(size, feat.shape[0])
    expert = torch.zeros(feat.shape[0], size[0] * size[1], dtype=torch.long)
    if rendered.expert_map is not None:
        expert = rendered.expert_map.flatten(1).long().cpu()
    gates = torch.nn.functional.one_hot(expert, decoder.num_experts).float()
    expected = mixture(decoder.cpu(), feat.cpu(), coord, cell, gates).transpose(1, 2).unflatten(-1, size)
    return (rendered.output.cpu() - expected).abs().max().item() / 2


@torch.no_grad()
def check(decoder, lr_size=(5, 4), factor=(2, 3.5), precision='fp32', configs=None, batch=1):
    feat = torch.randn(batch, 6, *lr_size, device=DEVICE)
    size = round(lr_size[0] * factor[0]), round(lr_size[1] * factor[1])
    backend = TritonBackend(decoder, precision)
    backend.configs = configs or backend.configs
    rendered = render_image(decoder, feat, size, backend=backend)
    difference = largest_difference(decoder, feat, size, rendered)
    assert difference <= TOLERANCE[precision], (precision, difference)
    return rendered, difference


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('factor', FACTORS)
def test_equals_the_plain_twin(family, factor):
    rendered, _ = check(make_decoder(family), (3, 4), factor, batch=2)
    assert len(rendered.expert_map.unique()) > 1, 'the case must use several experts to prove anything'


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('precision', ['tf32', 'fp16', 'bf16'])
def test_other_precisions(family, precision):
    _, difference = check(make_decoder(family), factor=(3, 3), precision=precision)
    if precision != 'tf32':  # which the interpreter computes in fp32
        assert difference > 1e-6, 'the products must have been rounded'


@pytest.mark.parametrize('family', ['liif', 'lte'])
@pytest.mark.parametrize('depth', [1, 2, 3, 4, 5])
def test_depths(family, depth):
    check(make_decoder(family, [[10, 7, 12, 9, 16][:depth]]), factor=(2, 3))


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
@pytest.mark.parametrize(('depth', 'latent', 'width'), [(6, [208], 16), (1, [], 20), (2, [5, 6], 3), (4, [9], 40)])
def test_lm_of_any_size(depth, latent, width, precision):
    check(make_decoder('lm', [{'latent': latent, 'depth': depth}], width=width), (3, 4), (2, 3), precision)


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('place', [0, 2])
def test_an_expert_without_layers(family, place):
    experts = [*EXPERTS[family]]
    experts[place] = []
    rendered, _ = check(make_decoder(family, experts), (5, 4), (3, 3))
    chosen = rendered.expert_map == place
    assert chosen.any() and not chosen.all() and (rendered.output.transpose(0, 1)[:, chosen] == 0).all()


@torch.no_grad()
def test_a_latent_mlp_runs_where_its_queries_read():
    decoder, seen = make_decoder('lm'), []
    backend = TritonBackend(decoder, 'fp32')
    latent = backend.latents[1]
    backend.latents[1] = lambda window, cell_lr, reads: seen.append(reads) or latent(window, cell_lr, reads)
    expert_map = torch.zeros(24, 24, dtype=torch.uint8, device=DEVICE)
    expert_map[10, 13] = 1
    tile = make_tile((6, 6), (24, 24), expert_map)
    torch.testing.assert_close(backend.decode(decoder, tile), plain_decode(decoder, tile), rtol=0, atol=2e-5)
    assert len(seen) == 1 and seen[0].nonzero().flatten().tolist() == [12 + 2, 12 + 3, 18 + 2, 18 + 3]


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
@pytest.mark.parametrize('family', ['liif', 'lte'])
def test_several_chunks_of_wide_layers(family, precision):
    experts = [[40], [70, 33], [64, 20, 50, 65]]
    configs = (Config(8, 16, 4, 1),)
    check(make_decoder(family, experts, hidden_dim=66), (3, 3), (3, 3), precision, configs)


@pytest.mark.parametrize('out_channels', [1, 3, 17])
def test_output_channels(out_channels):
    check(make_decoder(out_channels=out_channels), factor=(2, 3))
    check(make_decoder('lm', out_channels=out_channels), factor=(2, 3))


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('lr_size', [(1, 1), (1, 5), (2, 1)])
def test_tiny_images(family, lr_size):
    check(make_decoder(family), lr_size, (5, 4))


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_shared_first_layer(precision):
    rendered, _ = check(make_decoder(experts=[[12], [12, 20], [12, 4, 8]], shared_layers=1), precision=precision)
    assert len(rendered.expert_map.unique()) > 1


def make_tile(lr_size, size, expert_map):
    feat = torch.randn(1, 6, *lr_size, device=DEVICE)
    axes = [grid_axis(n_out, n_lr, device=DEVICE) for n_out, n_lr in zip(size, lr_size)]
    window, rows, cols = crop_window(feat, *axes)
    cell = torch.tensor([2 * n_lr / n_out for n_out, n_lr in zip(size, lr_size)], device=DEVICE)
    return Tile(window, rows, cols, cell, expert_map)


def plain_decode(decoder, tile):
    """The torch code on the CPU: on a GPU, cuDNN would round its fp32 convolutions to tf32."""
    axes = [type(axis)(*(part.cpu() for part in axis)) for axis in (tile.rows, tile.cols)]
    expert_map = None if tile.expert_map is None else tile.expert_map.cpu()
    tile = Tile(tile.window.cpu(), *axes, tile.cell_lr.cpu(), expert_map)
    return TORCH.decode(copy.deepcopy(decoder).cpu(), tile).to(DEVICE)


@torch.no_grad()
@pytest.mark.parametrize('used', [[0], [2], [0, 2]])
@pytest.mark.parametrize('family', ['liif', 'lm'])
def test_idle_experts(family, used):
    decoder = make_decoder(family)
    expert_map = torch.full((7, 9), used[0], dtype=torch.uint8, device=DEVICE)
    expert_map[3, 5] = used[-1]  # one query of its own, or none
    tile = make_tile((3, 4), (7, 9), expert_map)
    torch.testing.assert_close(
        TritonBackend(decoder, 'fp32').decode(decoder, tile), plain_decode(decoder, tile), rtol=0, atol=2e-5
    )


@torch.no_grad()
@pytest.mark.parametrize('family', ['liif', 'lm'])
def test_tiles_equal_the_whole(family):
    decoder = make_decoder(family)
    feat = torch.randn(1, 6, 9, 7, device=DEVICE)
    backend = TritonBackend(decoder, 'fp32')
    whole = render_image(decoder, feat, (21, 20), backend=backend, tile=16)
    tiled = render_image(decoder, feat, (21, 20), backend=backend, tile=4)
    assert torch.equal(tiled.expert_map, whole.expert_map)
    torch.testing.assert_close(tiled.output, whole.output, rtol=0, atol=2e-6)


@torch.no_grad()
@pytest.mark.parametrize('granularity', ['output_pixel', 'lr_pixel'])
@pytest.mark.parametrize('num_feat', [6, 32])
def test_routing(granularity, num_feat):
    decoder = make_decoder(granularity=granularity, num_feat=num_feat)
    feat = torch.randn(1, 6, 5, 6, device=DEVICE)
    size = (23, 25)  # more than one block, and a last one that is not full
    backend = TritonBackend(decoder, 'bf16')
    expected, actual = (render_image(decoder, feat, size, backend=b).expert_map for b in (TORCH, backend))
    assert len(expected.unique()) > 1
    assert torch.equal(actual, expected)

    cheaper = [
        render_image(decoder, feat, size, control=CostWeight(100.0), backend=b).expert_map for b in (TORCH, backend)
    ]
    assert torch.equal(*cheaper)
    assert not torch.equal(cheaper[1], expected)

    seen = {}

    class Watched(Budget):
        def observe(self, logits):
            seen[current] = logits
            super().observe(logits)

    for current, b in enumerate((TORCH, backend)):  # noqa: B007  read by `Watched`
        render_image(decoder, feat, size, control=Watched(0.8, decoder.expert_costs), backend=b)
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_equal_logits_take_the_first_expert():
    decoder = make_decoder(experts=[[4]] * 3)
    for parameter in decoder.mapper.query_out.parameters():
        parameter.zero_()
    feat = torch.randn(1, 6, 3, 3, device=DEVICE)
    assert render_image(decoder, feat, (5, 5), backend=TritonBackend(decoder, 'fp32')).expert_map.max() == 0


@torch.no_grad()
def test_many_experts_are_routed_by_torch():
    check(make_decoder(experts=[[4]] * (triton_decode.MAX_ROUTED + 1)), factor=(2, 2))


class Refusing:
    """A kernel that the device has no shared memory for until `chunk` is small enough."""

    def __init__(self, kernel, chunk):
        self.kernel, self.chunk, self.tried = kernel, chunk, []

    def __getitem__(self, programs):
        def launch(*args, **options):
            self.tried.append(options['CHUNK'])
            if options['CHUNK'] > self.chunk:
                raise triton_decode.OutOfResources(2, 1, 'shared memory')
            return self.kernel[programs](*args, **options)

        return launch


@torch.no_grad()
def test_smaller_blocks_where_the_device_refuses(monkeypatch):
    decoder = make_decoder(experts=[[64, 64]])
    backend = TritonBackend(decoder, 'bf16')
    tile = make_tile((3, 4), (4, 5), None)
    refusing = Refusing(triton_decode.decode_kernel, 16)
    monkeypatch.setattr(triton_decode, 'decode_kernel', refusing)
    expected = plain_decode(decoder, tile)
    for _ in range(2):
        assert (backend.decode(decoder, tile) - expected).abs().max() / 2 <= TOLERANCE['bf16']
    assert refusing.tried == [64, 32, 32, 16, 16], 'the second call must not try again what was refused'
    refusing.chunk = 8
    with pytest.raises(triton_decode.OutOfResources):
        backend.decode(decoder, tile)


class Failing:
    """A kernel whose first launch cannot compile."""

    def __init__(self):
        self.tried = 0

    def __getitem__(self, programs):
        def launch(*args, **options):
            self.tried += 1
            raise RuntimeError('Failed to find C compiler.\nPlease specify via CC.')

        return launch


@pytest.mark.parametrize(
    ('family', 'kernel'),
    [('liif', 'decode_kernel'), ('lte', 'decode_kernel'), ('lm', 'render_kernel'), ('lte', 'route_kernel')],
)
def test_a_launch_that_fails_is_found_before_the_first_image(monkeypatch, caplog, family, kernel):
    decoder = make_decoder(family)
    monkeypatch.setattr(select, '_RUNS', {})
    select._say.cache_clear()
    failing = Failing()
    with monkeypatch.context() as broken:
        broken.setattr(triton_decode, kernel, failing)
        assert fused_backend(decoder, 'cuda', 'bf16') is None and fused_backend(decoder, 'cuda', 'bf16') is None
    assert failing.tried == 1 and len(caplog.records) == 1 and 'Failed to find C compiler. Please' in caplog.text
    assert isinstance(fused_backend(decoder, 'cuda', 'fp32'), TritonBackend), 'other code, which has not failed'


@torch.no_grad()
@pytest.mark.parametrize('experts', [None, [[12]]])
def test_the_trial_launches_every_expert(monkeypatch, experts):
    decoder, launched = make_decoder(experts=experts), []
    launch = TritonBackend._launch
    monkeypatch.setattr(select, '_RUNS', {})
    monkeypatch.setattr(TritonBackend, '_launch', lambda self, j, *args: launched.append(j) or launch(self, j, *args))
    assert fused_backend(decoder, 'cuda') is not None and fused_backend(decoder, 'cuda') is not None
    assert launched == list(range(decoder.num_experts))


def test_wrong_arguments(monkeypatch):
    decoder = make_decoder()
    with pytest.raises(ValueError, match=r"precision must be one of .*'bf16'.*; got 'fp8'"):
        TritonBackend(decoder, 'fp8')
    with pytest.raises(ValueError, match='at most 512; the widest, padded, has 1024'):
        TritonBackend(make_decoder(experts=[[8, 600]]))
    with pytest.raises(ValueError, match='at most 64; the widest, padded, has 128'):
        TritonBackend(make_decoder('lm', width=65))
    monkeypatch.setattr(triton_decode, 'interpreted', lambda: False)
    with pytest.raises(ValueError, match='needs a CUDA device; got cpu'):
        TritonBackend(decoder.cpu())
    assert not triton_decode.available('cpu')
