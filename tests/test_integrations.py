"""Our model files in spandrel and ComfyUI: the same pictures as by our own path, and no more trust than there.

ComfyUI is not installed here: two of its modules have stand-ins with the calls that the node makes.
"""

import importlib
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from basicsr.archs import build_network
from safetensors.torch import load_file, save_file
from spandrel import MAIN_REGISTRY, ImageModelDescriptor, ModelLoader, ModelTiling

from moeisr_basicsr.archs.moeisr_arch import MoEISR
from moeisr_basicsr.checkpoint import load_model, options_tensor, read_model, save_model
from moeisr_basicsr.cli import main
from moeisr_basicsr.cli.expert_map import ExpertMapPicture
from moeisr_basicsr.errors import UserError
from moeisr_basicsr.inference import upscale
from moeisr_basicsr.integrations import spandrel
from moeisr_basicsr.safe_reading import OPTIONS

NETWORK = {
    'type': 'MoEISR',
    'encoder': {'type': 'EDSREncoder', 'num_feat': 6, 'num_block': 1},
    'experts': [[8], [8, 8]],
    'mapper': {'num_layers': 1, 'num_feat': 4},
    'cell_scale_max': 3,  # no weight shows it
    'skip': 'bilinear',  # nor this
}
REACH = 8  # LR pixels, beyond NETWORK's receptive radius: 4 of the encoder, 1 of the mapper, 2 of tables and corners
FIXED = {
    'type': 'FixedScale',
    'encoder': {
        'type': 'NetworkEncoder',
        'arch': {'type': 'SRVGGNetCompact', 'num_feat': 8, 'num_conv': 1, 'upscale': 2},
        'halo': 4,
    },
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('MOEISR_KERNELS', 'off')
    return tmp_path


def make(options, seed=0):
    """A network of random weights, whose decoder has something to say."""
    torch.manual_seed(seed)
    net = build_network(options).eval()
    with torch.no_grad():
        for parameter in net.decoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return net


def image(rows=7, cols=9):
    return torch.rand(1, 3, rows, cols, generator=torch.Generator().manual_seed(1))


def saved(name='m.safetensors', **changes):
    """A model file, and its network as our own path reads it."""
    options = {**NETWORK, **changes}
    save_model(name, make(options), options)
    return name, load_model(name)


@pytest.mark.parametrize('decoder', ['liif', 'lm'])
def test_the_same_picture_as_by_our_own_path(decoder):
    experts = [{'latent': [8], 'depth': 1}, {'latent': [8, 8], 'depth': 2}] if decoder == 'lm' else NETWORK['experts']
    name, net = saved(decoder=decoder, experts=experts)
    found = ModelLoader().load_from_file(name)
    assert isinstance(found, ImageModelDescriptor) and isinstance(found.model, MoEISR)
    assert (found.architecture.id, found.purpose, found.scale) == ('MoEISR', 'SR', 4)
    assert (found.input_channels, found.output_channels) == (3, 3)
    assert found.tags == ['EDSREncoder', decoder, '2 experts']
    for size in ((7, 9), (1, 1)):
        lq = image(*size)
        expected = upscale(net, lq, 4).image
        assert torch.equal(found(lq), expected.clamp(0, 1)) and expected.std() > 0.01
        assert torch.allclose(found.model(lq), expected, atol=1e-6)  # without spandrel's call
    lq = image(7, 9)
    for factor in (2.7, (1.5, 3.25)):
        assert torch.equal(upscale(found.model, lq, factor).image, upscale(net, lq, factor).image)


@pytest.mark.parametrize(
    ('changes', 'scale'),
    [({'scale': 3}, 3), ({'scale': 2.5}, 4), ({'scale': [2, 3]}, 4), (FIXED, 2), ({**FIXED, 'scale': 3.0}, 3)],
)
def test_its_whole_factor(changes, scale):
    options = changes if 'type' in changes else {**NETWORK, **changes}
    save_model('m.safetensors', make(options), options)
    found = ModelLoader().load_from_file('m.safetensors')
    assert found.scale == scale and isinstance(found.scale, int)
    lq = image(6, 5)
    assert found(lq).shape == (1, 3, 6 * scale, 5 * scale)
    assert torch.equal(found(lq), upscale(load_model('m.safetensors'), lq, scale).image.clamp(0, 1))


@pytest.mark.parametrize(('overlap', 'tolerance'), [(REACH, 1e-5), (0, None)])
def test_overlapping_tiles_are_the_whole_image(overlap, tolerance):
    """As programs cut: each tile by itself, overlapping by `overlap` pixels per side, which are cut off again."""
    found, lq, side, s = ModelLoader().load_from_file(saved()[0]), image(25, 20), 9, 4
    whole, tiled = found(lq), torch.zeros(1, 3, 25 * s, 20 * s)
    for top in range(0, 25, side):
        for left in range(0, 20, side):
            first, start = max(top - overlap, 0), max(left - overlap, 0)
            tile = found(lq[..., first : top + side + overlap, start : left + side + overlap])
            tile = tile[..., s * (top - first) :, s * (left - start) :][..., : s * side, : s * side]
            tiled[..., s * top : s * (top + side), s * left : s * (left + side)] = tile
    difference = (whole - tiled).abs().max()
    assert difference < tolerance if tolerance else difference > 1e-3  # without overlap seams show
    assert found.tiling == ModelTiling.SUPPORTED and found.size_requirements.none


def test_tiles_are_discouraged_where_the_reach_is_unknown():
    options = {**FIXED, 'encoder': {**FIXED['encoder'], 'halo': 'whole'}}
    save_model('m.safetensors', make(options), options)
    assert ModelLoader().load_from_file('m.safetensors').tiling == ModelTiling.DISCOURAGED


@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_in_16_bits(dtype, tolerance):
    name, net = saved(experts=[[8]])  # one expert: rounding cannot choose another
    found, lq = ModelLoader().load_from_file(name), image(8, 7)
    found.to(dtype)
    result = found(lq.to(dtype))
    assert found.dtype == result.dtype == dtype
    assert (result.float() - upscale(net, lq, 4).image.clamp(0, 1)).abs().max() < tolerance
    assert torch.equal(found.model.get_buffer(OPTIONS), load_file(name)[OPTIONS])


@pytest.mark.parametrize('way', ['safetensors', 'pth', 'half', 'mixed'])
def test_what_programs_save_can_be_loaded_again(way):
    """Tensors only, without metadata; some programs also change or mix the numbers."""
    name, net = saved()
    found = ModelLoader().load_from_file(name)
    state, lq = found.model.state_dict(), image()
    if way == 'pth':
        torch.save(state, 'again.pth')
        again = ModelLoader().load_from_file('again.pth')
        assert torch.equal(upscale(load_model('again.pth'), lq, 3).image, upscale(net, lq, 3).image)
    elif way == 'mixed':
        again = ModelLoader().load_from_state_dict({key: 0.3 * value + 0.7 * value for key, value in state.items()})
    else:
        state = found.half().model.state_dict() if way == 'half' else state
        save_file({key: value.clone() for key, value in state.items()}, 'again.safetensors')
        again = ModelLoader().load_from_file('again.safetensors')
        assert read_model('again.safetensors').network_opt == NETWORK
    difference = (again.float()(lq) - upscale(net, lq, 4).image.clamp(0, 1)).abs()
    assert difference.mean() < (1e-3 if way == 'half' else 1e-6)


def test_files_of_other_networks_are_left_to_spandrel():
    """Also in the registry's order: the network inside ours must not be taken for it, nor ours for another."""
    options = {'type': 'SRVGGNetCompact', 'num_feat': 8, 'num_conv': 1, 'upscale': 2}
    save_model('compact.safetensors', build_network(options), options)
    assert OPTIONS not in load_file('compact.safetensors')
    assert ModelLoader().load_from_file('compact.safetensors').architecture.id == 'Compact'
    assert MAIN_REGISTRY.architectures('detection')[0].architecture.id == 'MoEISR'
    count = len(MAIN_REGISTRY)
    importlib.reload(spandrel)  # a second import in one process, as programs that load plugins do
    assert len(MAIN_REGISTRY) == count


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        ({**NETWORK, 'encoder': {**NETWORK['encoder'], 'num_feat': 7}}, 'the weights do not fit the network MoEISR'),
        (
            {**NETWORK, 'encoder': {'type': 'NetworkEncoder', 'checkpoint': '/etc/passwd'}},
            "'checkpoint' of its network",
        ),
        ({**NETWORK, 'encoder': {**NETWORK['encoder'], 'num_feat': 40_000}}, 'much larger than the weights'),
        ({'type': 'DFDNet'}, "names the network 'DFDNet'"),
        ([1], 'must be a section'),
        (None, 'not JSON'),
    ],
)
def test_options_of_a_stranger(options, words):
    state = load_file(saved()[0])
    state[OPTIONS] = torch.tensor([7]) if options is None else options_tensor(options)
    with pytest.raises(UserError, match=words):
        ModelLoader().load_from_state_dict(state)


def test_a_network_for_one_factor_is_none_of_ours():
    options = {'type': 'SRVGGNetCompact', 'num_feat': 8, 'num_conv': 1, 'upscale': 2}
    state = {**build_network(options).state_dict(), OPTIONS: options_tensor(options)}
    with pytest.raises(UserError, match='SRVGGNetCompact is no network for any factor'):
        ModelLoader().load_from_state_dict(state)


def test_a_file_that_says_two_things():
    name, _ = saved()
    metadata = {'format': 'moeisr_basicsr', 'network_g': json.dumps({**NETWORK, 'skip': 'bicubic'})}
    save_file(load_file(name), name, metadata)
    with pytest.raises(UserError, match='m.safetensors: its metadata and its tensor network_g_json hold'):
        read_model(name)
    save_file(load_file(name), name, {**metadata, 'network_g': json.dumps(NETWORK)})
    assert read_model(name).network_opt == NETWORK and OPTIONS not in read_model(name).weights


@pytest.fixture
def node(folder, monkeypatch):
    """The class of the node, with ComfyUI's two modules replaced; models lie in `folder`."""
    paths = SimpleNamespace(
        get_filename_list=lambda kind: sorted(path.name for path in folder.glob('*.safetensors')),
        get_full_path_or_raise=lambda kind, name: str(folder / name),
    )
    management = SimpleNamespace(get_torch_device=lambda: torch.device('cpu'))
    monkeypatch.setitem(sys.modules, 'folder_paths', paths)
    monkeypatch.setitem(sys.modules, 'comfy', SimpleNamespace(model_management=management))
    monkeypatch.delitem(sys.modules, 'moeisr_basicsr.integrations.comfyui', raising=False)
    module = importlib.import_module('moeisr_basicsr.integrations.comfyui')
    (key,) = module.NODE_CLASS_MAPPINGS
    assert module.NODE_DISPLAY_NAME_MAPPINGS[key] == 'Upscale Image (any factor)'
    return module.NODE_CLASS_MAPPINGS[key]


def run(node, batch, **given):
    """The node's outputs with the defaults of its widgets."""
    widgets = node.INPUT_TYPES()['required']
    assert list(widgets) == ['image', 'model_name', 'factor', 'width', 'height', 'cost_weight', 'tile']
    values = {name: widget[1]['default'] for name, widget in widgets.items() if len(widget) > 1}
    return getattr(node(), node.FUNCTION)(**{**values, 'image': batch, 'model_name': 'm.safetensors', **given})


def test_the_node_of_comfyui(node):
    name, net = saved()
    batch = torch.cat([image(21, 17), image(21, 17).flip(-1)]).movedim(1, -1)  # (2, 21, 17, 3)
    assert node.INPUT_TYPES()['required']['model_name'] == (['moeisr_edsr_light', name],)
    assert node.RETURN_TYPES == ('IMAGE', 'IMAGE')
    for given, size in (
        ({'factor': 2.7}, (57, 46)),
        ({'width': 40}, (49, 40)),
        ({'width': 33, 'height': 60, 'factor': 9.0}, (60, 33)),
        ({'height': 42, 'cost_weight': 3.0, 'tile': 16}, (42, 34)),
    ):
        result, picture = run(node, batch, **given)
        expected = upscale(net, batch.movedim(-1, 1), size=size, cost_weight=given.get('cost_weight', 0.0))
        assert result.shape == (2, *size, 3) and result.dtype == torch.float32
        assert torch.allclose(result.movedim(-1, 1), expected.image.clamp(0, 1), atol=1e-5)
        for drawn, expert_map in zip(picture, expected.expert_map.numpy()):
            known = ExpertMapPicture(size[1], net.expert_costs.tolist())
            known = np.concatenate([known.rows(expert_map), known.legend()])
            assert np.array_equal((drawn * 255).round().byte().numpy(), known)
    cheap, plain = (run(node, batch[:1, :6, :5], cost_weight=weight)[1] for weight in (30.0, 0.0))
    assert not torch.equal(cheap, plain)


def test_the_node_takes_networks_with_one_expert_and_for_one_factor(node):
    for options in ({**NETWORK, 'experts': [[8]]}, FIXED):
        save_model('m.safetensors', make(options), options)
        result, picture = run(node, image(6, 5).movedim(1, -1), factor=2.5)
        expected = upscale(load_model('m.safetensors'), image(6, 5), 2.5).image.clamp(0, 1)
        assert torch.allclose(result.movedim(-1, 1), expected)
        assert picture[0, :15, :13].unique(dim=0).shape[0] == 1  # one colour
        with pytest.raises(UserError, match='one expert'):
            run(node, image(6, 5).movedim(1, -1), cost_weight=1.0)


def test_mistakes_in_the_node(node):
    saved()
    with pytest.raises(UserError, match='3 channels; it has 4'):
        run(node, torch.rand(1, 6, 5, 4))
    with pytest.raises(UserError, match='at least the input size of 6 x 5'):
        run(node, torch.rand(1, 6, 5, 3), width=9, height=3)
    with pytest.raises(UserError, match='at least 16'):
        run(node, torch.rand(1, 6, 5, 3), tile=8)


def test_the_factor_that_a_file_says(folder):
    """As docs/integrations.md tells."""
    saved()
    assert main(['convert', 'm.safetensors', '-o', 'x3.safetensors', '--force_yml', 'network_g:scale=3']) == 0
    assert ModelLoader().load_from_file('x3.safetensors').scale == 3
