"""Model files and the conversion into them: exact, complete or absent, and never running what a file holds."""

import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from basicsr.archs import build_network
from official_nets import OfficialLM, OfficialNet
from reference import grid
from safetensors import safe_open
from safetensors.torch import save_file

from moeisr_basicsr import atomic_file
from moeisr_basicsr.checkpoint import FORMAT, convert, load_model, read_model, save_model
from moeisr_basicsr.errors import UserError

ENCODER = {'type': 'EDSREncoder', 'num_feat': 6, 'num_block': 1}
NETWORK = {
    'type': 'MoEISR',
    'encoder': ENCODER,
    'experts': [[4], [4, 4]],
    'mapper': {'num_layers': 1, 'num_feat': 4},
    'skip': 'none',  # an untrained network is more than its skip
}


class Touch:
    """Unpickling an instance makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_net(seed=0, options=NETWORK):
    torch.manual_seed(seed)
    return build_network(options).eval()


def predict(net, size=(5, 9), lq_size=(4, 3)):
    lq = torch.rand(1, 3, *lq_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return net(lq, *grid(size))


@pytest.mark.parametrize('network', [NETWORK, {**NETWORK, 'shared_layers': 1}], ids=['separate', 'shared'])
def test_round_trip(network):
    net = make_net(options=network)
    save_model('m.safetensors', net, network, source='test')
    model = read_model('m.safetensors')
    assert model.network_opt == network
    assert model.metadata == {'source': 'test'}
    with safe_open('m.safetensors', 'pt') as file:
        assert file.metadata() == {'source': 'test', 'format': FORMAT, 'network_g': json.dumps(network, sort_keys=True)}
    loaded = load_model('m.safetensors')
    assert not loaded.training and torch.equal(predict(loaded), predict(net))
    save_model('again.safetensors', loaded.state_dict(), network)
    assert torch.equal(predict(load_model('again.safetensors')), predict(net))


def test_a_truncated_file_is_an_error_at_every_length():
    save_model('m.safetensors', make_net(), NETWORK)
    content = open('m.safetensors', 'rb').read()
    for length in [0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1]:
        open('cut.safetensors', 'wb').write(content[:length])
        with pytest.raises(UserError, match='cut.safetensors is no whole safetensors file'):
            load_model('cut.safetensors')


def test_foreign_files_say_what_they_lack():
    net = make_net()
    state = {name: value.contiguous() for name, value in net.state_dict().items()}
    save_file(state, 'plain.safetensors', metadata={'format': 'pt'})
    with pytest.raises(UserError, match='does not say which network .*`basicsr convert plain.safetensors -opt YAML'):
        load_model('plain.safetensors')
    for content, words in (
        ('{', 'not JSON'),
        ('[1]', 'must be a section'),
        ('[' * 900 + ']' * 900, 'must be a section'),
        ('{"a": ' * 900 + '1' + '}' * 900, 'nested too deeply'),
        ('{"a": ' * 90_000, 'not JSON'),
        (json.dumps({**NETWORK, 'scale': 10**400}), 'does not fit into 64 bits'),
        (f'{{"type": "MoEISR", "scale": {"1" * 5000}}}', 'not JSON'),
        (json.dumps({**NETWORK, 'cell_scale_max': float('nan')}), 'nan is no number'),
        (json.dumps({**NETWORK, 'encoder': {**ENCODER, 'res_scale': 'x'}}), 'res_scale'),
        ('{"skip": "none"}', "the key 'type' is missing"),
        ('{}', 'does not say which network'),
        (json.dumps({**NETWORK, 'type': 'MoEIRS'}), "Did you mean 'MoEISR'"),
        (json.dumps({**NETWORK, 'experts': [[4]] * 3}), 'the weights do not fit'),
    ):
        metadata = {'format': FORMAT, 'network_g': content}
        save_file(state, 'bad.safetensors', metadata=metadata)
        with pytest.raises(UserError, match=words) as caught:
            load_model('bad.safetensors')
        assert 'bad.safetensors' in str(caught.value)
    with pytest.raises(UserError, match='there is no model file'):
        load_model('nothing.safetensors')
    torch.save(net.state_dict(), 'net.pth')
    with pytest.raises(UserError, match='`basicsr convert net.pth -opt YAML -o OUT.safetensors`'):
        load_model('net.pth')


def test_saving_is_all_or_nothing(monkeypatch):
    save_model('m.safetensors', make_net(0), NETWORK)
    before = open('m.safetensors', 'rb').read()

    def full(handle):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(atomic_file.os, 'fsync', full)
    with pytest.raises(OSError, match='No space left'):
        save_model('m.safetensors', make_net(1), NETWORK)
    assert open('m.safetensors', 'rb').read() == before
    assert os.listdir() == ['m.safetensors']


def test_names_that_cannot_be_written():
    with pytest.raises(UserError, match="must end in '.safetensors'"):
        save_model('m.pth', make_net(), NETWORK)
    with pytest.raises(OSError, match='No such file or directory: cannot write gone'):
        save_model('gone/m.safetensors', make_net(), NETWORK)


@pytest.mark.parametrize('layout', ['params', 'params_ema', 'both', 'module', 'bare'])
def test_convert_basicsr(layout):
    first, second = make_net(0).state_dict(), make_net(1).state_dict()
    content = {
        'params': {'params': first},
        'params_ema': {'params_ema': first},
        'both': {'params': second, 'params_ema': first},
        'module': {'params': {f'module.{name}': value for name, value in first.items()}},
        'bare': first,
    }[layout]
    torch.save(content, 'net.pth')
    assert convert('net.pth', 'm.safetensors', NETWORK) == NETWORK
    assert torch.equal(predict(load_model('m.safetensors')), predict(make_net(0)))
    if layout == 'both':
        convert('net.pth', 'm.safetensors', NETWORK, param_key='params')
        assert torch.equal(predict(load_model('m.safetensors')), predict(make_net(1)))


def test_half_precision_files_and_metadata():
    net = make_net()
    torch.save({'params': make_net(1).state_dict(), 'params_ema': net.state_dict()}, 'net.pth')
    convert('net.pth', 'm.safetensors', NETWORK, notes={'license': 'mine', 'author': 'me'})
    convert('m.safetensors', 'half.safetensors', store='fp16', notes={'author': 'you'})  # what is known is kept
    metadata = read_model('half.safetensors').metadata
    assert {key: metadata[key] for key in ('source', 'param_key', 'license', 'author')} == {
        'source': 'net.pth',
        'param_key': 'params_ema',
        'license': 'mine',
        'author': 'you',
    }
    assert all(value.dtype == torch.float16 for value in read_model('half.safetensors').weights.values())
    loaded = load_model('half.safetensors')
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, net.state_dict()[name].half().float()), name
    with torch.no_grad():
        net.encoder.conv_first.bias[0] = 1e5
    save_model('large.safetensors', net, NETWORK)
    with pytest.raises(UserError, match='large.safetensors: encoder.conv_first.bias has a value of 1e.05; fp16 goes'):
        convert('large.safetensors', 'l.safetensors', store='fp16')
    assert not os.path.exists('l.safetensors')


def test_convert_finds_the_options_by_itself():
    torch.save({'params': make_net().state_dict()}, 'net_g_5.pth')
    for name, skip in (('a.yml', 'bicubic'), ('b.yml', 'none')):  # neither is read, though the weights fit both
        Path(name).write_text(json.dumps({'network_g': {**NETWORK, 'skip': skip}}))
    with pytest.raises(UserError, match='does not say which network it belongs to: name its options file with -opt'):
        convert('net_g_5.pth', 'm.safetensors')
    torch.save({'params': make_net().state_dict(), 'network_g': NETWORK}, 'embedded.pth')
    assert convert('embedded.pth', 'm2.safetensors') == NETWORK
    assert convert('m2.safetensors', 'm3.safetensors') == NETWORK
    assert torch.equal(predict(load_model('m3.safetensors')), predict(make_net()))
    other = {**NETWORK, 'experts': [[4]]}
    with pytest.raises(UserError, match=r'embedded.pth holds .* experts is \[\[4\]\], of the weights'):
        convert('embedded.pth', 'm.safetensors', other)
    assert sorted(os.listdir()) == ['a.yml', 'b.yml', 'embedded.pth', 'm2.safetensors', 'm3.safetensors', 'net_g_5.pth']


def test_options_that_change_no_shape_are_never_guessed():
    torch.save({'params': make_net().state_dict(), 'network_g': {**NETWORK, 'skip': 'bicubic'}}, 'net.pth')
    with pytest.raises(
        UserError, match="net.pth holds .* network_g: skip is 'none', of the weights 'bicubic'. Leave -opt"
    ):
        convert('net.pth', 'm.safetensors', NETWORK)
    mapper = {**NETWORK['mapper'], 'granularity': 'lr_pixel'}
    encoder = {**ENCODER, 'res_scale': 0.1}
    with pytest.raises(UserError, match='network_g: mapper: granularity .*') as caught:
        convert('net.pth', 'm.safetensors', {**NETWORK, 'mapper': mapper, 'encoder': encoder, 'skip': 'bicubic'})
    assert 'network_g: encoder: res_scale is 0.1, of the weights 1' in str(caught.value)
    spelled_out = {**NETWORK, 'skip': 'bicubic', 'experts': ((4,), (4, 4)), 'decoder': 'liif', 'scale': None}
    convert('net.pth', 'm.safetensors', spelled_out)  # the same with a default and tuples
    assert load_model('m.safetensors').skip == 'bicubic'
    options = convert('net.pth', 'm.safetensors', changes=['network_g:skip=bilinear', 'network_g:scale=3'])
    net = load_model('m.safetensors')
    assert (options['skip'], net.skip, net.scale) == ('bilinear', 'bilinear', 3)
    assert read_model('net.pth').network_opt['skip'] == 'bicubic'


@pytest.mark.parametrize('form', ['bare', 'safetensors', 'params'])
def test_prefixes_of_wrappers_are_left_out(form):
    state = make_net().state_dict()
    for before in ('module.', '_orig_mod.', 'module._orig_mod.', '_orig_mod.module.'):
        names = {f'{before}{name}': value for name, value in state.items()}
        save = {
            'bare': lambda: torch.save(names, 'net.pth'),
            'params': lambda: torch.save({'params': names}, 'net.pth'),
            'safetensors': lambda: save_file(names, 'net.safetensors'),
        }[form]
        save()
        convert('net.safetensors' if form == 'safetensors' else 'net.pth', 'm.safetensors', NETWORK)
        assert torch.equal(predict(load_model('m.safetensors')), predict(make_net()))
    parts = {name.replace('encoder.', 'encoder._orig_mod.'): value for name, value in state.items()}  # one was compiled
    torch.save(parts, 'net.pth')
    convert('net.pth', 'm.safetensors', NETWORK)
    torch.save({**state, 'module.encoder.conv_first.bias': torch.zeros(6)}, 'net.pth')
    with pytest.raises(UserError, match='net.pth has the weights encoder.conv_first.bias twice'):
        convert('net.pth', 'm.safetensors', NETWORK)


def test_a_checkpoint_that_holds_its_network_is_a_model():
    torch.save(
        {'params': make_net(1).state_dict(), 'params_ema': make_net().state_dict(), 'network_g': NETWORK}, 'n.pth'
    )
    assert torch.equal(predict(load_model('n.pth')), predict(make_net()))
    assert read_model('n.pth').metadata == {'source': 'n.pth', 'param_key': 'params_ema'}
    torch.save(OfficialNet('liif', 'edsr-baseline', {'n_resblocks': 1, 'n_feats': 6}, [8]).checkpoint(), 'liif.pth')
    assert load_model('liif.pth').num_experts == 1


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_weights_that_are_not_finite(value):
    net = make_net()
    net.decoder.pool.experts[1].layers[0].weight.data[2, 1] = value
    torch.save({'params': net.state_dict(), 'network_g': NETWORK}, 'net.pth')
    save_model('net.safetensors', net, NETWORK)
    words = 'decoder.pool.experts.1.layers.0.weight has values that are NaN or infinite'
    with pytest.raises(UserError, match=f'net.pth: {words}'):
        convert('net.pth', 'm.safetensors')
    with pytest.raises(UserError, match=f'net.safetensors: {words}'):
        load_model('net.safetensors')
    assert not os.path.exists('m.safetensors')


@pytest.mark.parametrize(
    'tensor',
    [
        torch.zeros(6, device='meta'),
        torch.zeros(6).to_sparse(),
        torch.zeros(6, dtype=torch.complex64),
        torch.full((6,), 1e300, dtype=torch.float64),  # infinite as fp32
    ],
    ids=['meta', 'sparse', 'complex', 'large'],
)
def test_tensors_that_are_no_weights(tensor):
    state = {**make_net().state_dict(), 'encoder.conv_first.bias': tensor}
    torch.save({'params': state, 'network_g': NETWORK}, 'net.pth')
    with pytest.raises(UserError, match='net.pth: encoder.conv_first.bias (is no tensor of real numbers|has values)'):
        convert('net.pth', 'm.safetensors')


def nested(depth):
    return {'a': nested(depth - 1)} if depth else 1


@pytest.mark.parametrize(
    'network',
    [nested(300), {**NETWORK, 'scale': 10**400}, [NETWORK], {**NETWORK, 'skip': torch.zeros(1)}, {1: {2, 3}}, 'EDSR'],
    ids=['deep', 'long', 'list', 'tensor', 'set', 'text'],
)
def test_options_in_a_checkpoint_that_are_none(network):
    torch.save({'params': make_net().state_dict(), 'network_g': network}, 'net.pth')
    for read in (load_model, lambda path: convert(path, 'm.safetensors')):
        with pytest.raises(UserError, match='net.pth: the options of its network cannot be read: .*') as caught:
            read('net.pth')
        assert '\n' not in str(caught.value) and len(str(caught.value)) < 200


def official_model(**args):
    """An official LIIF without weights."""
    small = {'name': 'edsr-baseline', 'args': {'n_resblocks': 1, 'n_feats': 4}}
    mlp = {'name': 'mlp', 'args': {'hidden_list': [4]}}
    return {'name': 'liif', 'args': {'encoder_spec': small, 'imnet_spec': mlp, **args}, 'sd': {}}


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        ({'optimizers': [], 'schedulers': [], 'iter': 3}, 'training state without weights'),
        ({'a': 1}, 'has no weights under params_ema or params; it has a.'),
        ({}, 'it has nothing'),
        ([1, 2], 'holds no weights but a list'),
        ({'params': {'x': torch.zeros(2)}}, 'weights do not fit the network MoEISR'),
        ({'model': {'name': 'metasr', 'args': {}, 'sd': {}}}, "model 'metasr' is not supported"),
        ({'model': {'name': 'lte-fast', 'args': {}, 'sd': {}}}, "Did you mean 'lte'"),
        ({'model': official_model(local_ensemble=False)}, 'local_ensemble is off'),
        ({'model': official_model(encoder_spec={'name': 'rcan'})}, "encoder 'rcan' is not supported"),
        ({'model': official_model(imnet_spec={'name': 'cnn', 'args': {}})}, "KeyError('hidden_list')"),
        ({'model': official_model(feat_unfold=False)}, 'weights do not fit the network LIIF: .* missing'),
        ({'model': {**official_model(), 'name': 'lmliif'}}, "KeyError('hypernet_spec')"),
        ({'model': {**official_model(), 'name': 'lmlte'}}, "model 'lmlte' is not supported; liif, lte, lmliif are"),
        ({'model': {'name': 'liif', 'args': None, 'sd': {}}}, 'no official LIIF, LTE or LMF checkpoint'),
        ({'model': {'name': ['liif'], 'args': {}, 'sd': {}}}, 'is not supported; liif, lte, lmliif are'),
        (
            {'model': official_model(encoder_spec={'name': 'rdn', 'args': [1]})},
            'no official LIIF, LTE or LMF checkpoint',
        ),
        (
            {'model': official_model(imnet_spec={'name': 'mlp', 'args': {'hidden_list': 7}})},
            'no official LIIF, LTE or LMF',
        ),
        ({'model': official_model(imnet_spec={'name': 'mlp', 'args': {'hidden_list': 'ab'}})}, 'hidden_list'),
        ({'model': official_model(imnet_spec={'name': 'mlp', 'args': {'hidden_list': [10**30]}})}, '64 bits'),
        ({'model': {**official_model(), 'sd': [1]}}, 'no official LIIF, LTE or LMF checkpoint'),
        ({'model': {**official_model(), 'sd': {1: torch.zeros(1)}}}, 'no official LIIF, LTE or LMF checkpoint'),
        ({'model': {**official_model(), 'sd': {'imnet.layers.0.weight': 3}}}, 'is no tensor of real numbers'),
        ({'model': {'conv.weight': torch.zeros(2)}}, "no official LIIF, LTE or LMF checkpoint: KeyError('name')"),
    ],
)
def test_convert_says_what_it_cannot_read(content, words):
    torch.save(content, 'net.pth')
    with pytest.raises(UserError) as caught:
        convert('net.pth', 'm.safetensors', None if 'model' in content else NETWORK)
    assert re.search(words, str(caught.value)) or words in str(caught.value)
    assert '\n' not in str(caught.value) and not os.path.exists('m.safetensors')


def test_hostile_and_damaged_checkpoints_run_nothing(folder):
    hostile = {'params': {'x': Touch(folder / 'ran')}}
    torch.save(hostile, 'zip.pth')
    with open('raw.pth', 'wb') as file:
        pickle.dump(hostile, file)
    torch.save(make_net().state_dict(), 'good.pth')
    content = open('good.pth', 'rb').read()
    open('cut.pth', 'wb').write(content[: len(content) // 2])
    open('empty.pth', 'wb').write(b'')
    open('text.pth', 'wb').write(b'import os; os.system("touch ran")')
    for name in ('zip.pth', 'raw.pth', 'cut.pth', 'empty.pth', 'text.pth'):
        with pytest.raises(UserError, match=f'{name} is no checkpoint .* Nothing in it was run') as caught:
            convert(name, 'm.safetensors', NETWORK)
        assert '\n' not in str(caught.value)
    assert not os.path.exists('ran') and not os.path.exists('m.safetensors')
    with pytest.raises(UserError, match='there is no model file or checkpoint'):
        convert('nothing.pth', 'm.safetensors')


OFFICIAL = [
    ('liif', 'edsr-baseline', {'n_resblocks': 2, 'n_feats': 6}, [8, 8]),
    ('liif', 'edsr', {'n_resblocks': 2, 'n_feats': 6, 'res_scale': 0.1}, [8]),
    ('liif', 'rdn', {'G0': 4, 'RDNconfig': 'A'}, [8]),
    ('lte', 'edsr-baseline', {'n_resblocks': 2, 'n_feats': 6}, [8, 8]),
    ('lte', 'rdn', {'G0': 4, 'RDNconfig': 'A'}, [8]),
    ('lmliif', 'edsr-baseline', {'n_resblocks': 2, 'n_feats': 6}, [12]),
    ('lmliif', 'rdn', {'G0': 4, 'RDNconfig': 'A'}, [8, 9]),
]


@pytest.mark.parametrize(('name', 'encoder', 'args', 'hidden'), OFFICIAL)
def test_convert_official(name, encoder, args, hidden):
    official = (
        OfficialLM(encoder, args, hidden) if name == 'lmliif' else OfficialNet(name, encoder, args, hidden)
    ).eval()
    torch.save(official.checkpoint(), 'official.pth')
    options = convert('official.pth', 'm.safetensors')
    assert options['type'] == name.upper() and options['latent' if name == 'lmliif' else 'hidden_list'] == hidden
    net = load_model('m.safetensors')
    assert not [key for key in net.state_dict() if 'mean' in key]
    for lq_size, size in (
        ((6, 4), (12, 8)),
        ((5, 7), (16, 9)),
        ((4, 4), (12, 17)),
        ((3, 5), (25, 26)),
        ((1, 1), (3, 2)),
        ((7, 3), (9, 29)),
    ):
        lq = torch.rand(1, 3, *lq_size)
        coord, cell = grid(size)
        with torch.no_grad():
            # LTE's and LMF's test code multiply the cell by max(s / 4, 1) before their network sees it; here it does.
            factors = [1 if name == 'liif' else max(out / low / 4, 1) for out, low in zip(size, lq_size)]
            expected = official(lq, coord, cell * torch.tensor(factors))
            assert expected.std() > 0.01 or lq_size == (1, 1)  # a flat picture could not tell anything
            torch.testing.assert_close(net(lq, coord, cell), expected, rtol=0, atol=1e-5)


def test_convert_official_swinir():
    """The names agree, and every parameter finds its place; the arithmetic is that of the encoder's own tests."""
    own = make_net(0, {'type': 'LTE', 'encoder': {'type': 'SwinIREncoder'}, 'hidden_list': [8], 'hidden_dim': 4})
    state = {}
    for key, value in own.state_dict().items():
        key = key.replace('decoder.pool.experts.0.', 'imnet.').replace('decoder.pool.', '')
        state[key] = value
    torch.save(
        {
            'model': {
                'name': 'lte',
                'sd': state,
                'args': {
                    'encoder_spec': {'name': 'swinir', 'args': {'no_upsampling': True}},
                    'hidden_dim': 4,
                    'imnet_spec': {'name': 'mlp', 'args': {'out_dim': 3, 'hidden_list': [8]}},
                },
            }
        },
        'official.pth',
    )
    assert convert('official.pth', 'm.safetensors')['encoder'] == {'type': 'SwinIREncoder'}
    converted = load_model('m.safetensors').state_dict()
    assert converted.keys() == own.state_dict().keys()
    assert all(torch.equal(converted[key], value) for key, value in own.state_dict().items())
