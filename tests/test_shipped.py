"""Models that come with the package: how they are listed, chosen, packed and made. The models here are stand-ins."""

import importlib.util
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from basicsr.archs import build_network
from basicsr.models import build_model
from shipped_cases import NETWORK, RESULTS, problems, stand_in
from tiny_runs import parse, run_yaml

from moeisr_basicsr import shipped
from moeisr_basicsr.analysis import schema
from moeisr_basicsr.analysis.complexity import decoder_macs, parameters
from moeisr_basicsr.checkpoint import load_model, read_model
from moeisr_basicsr.cli import main
from moeisr_basicsr.errors import UserError
from moeisr_basicsr.models.weights import load_weights

ROOT = Path(__file__).resolve().parents[1]
DENSE = {'type': 'LIIF', 'encoder': NETWORK['encoder'], 'hidden_list': [4]}


@pytest.fixture(autouse=True)
def weights(tmp_path, monkeypatch):
    """The folder of shipped models, empty; the current folder is another one, with an image."""
    folder = tmp_path / 'package' / 'weights'
    folder.mkdir(parents=True)
    monkeypatch.setattr(shipped, 'FOLDER', folder)
    monkeypatch.setattr(shipped, 'DEFAULT', 'general')
    monkeypatch.setenv('MOEISR_KERNELS', 'off')
    monkeypatch.delenv('RANK', raising=False)
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    cv2.imwrite('a.png', np.random.default_rng(0).integers(0, 255, (6, 5, 3), np.uint8))
    return folder


@pytest.fixture
def models(weights):
    stand_in(weights, 'general')
    stand_in(weights, 'photos_dense', DENSE)
    return weights


def run(capsys, *argv):
    """Standard output of a command that works."""
    code = main([*map(str, argv)])
    output, error = capsys.readouterr()
    assert code == 0 and error == '', error
    return output


def fails(capsys, *argv):
    """The one line of a command that does not."""
    assert main([*map(str, argv)]) == 2
    output, error = capsys.readouterr()
    assert output == '' and len(error.splitlines()) == 1 and error.startswith('basicsr: error: ')
    return error


def test_list(models, capsys):
    output = run(capsys, 'models')
    net = load_model(models / 'general.safetensors')
    macs = decoder_macs(net.decoder, (180, 320), (720, 1280)).total([0.75, 0.25])
    assert 'general (default): MoEISR with EDSREncoder, decoder liif, 2 experts\n' in output
    assert 'photos_dense: LIIF with EDSREncoder, decoder liif, 1 expert\n' in output
    assert f'  {parameters(net)["total"]:,} parameters, 0.0 MiB, trained on x1 to x4\n' in output
    assert f'  decoder at x4: {macs / 1e3:.1f} (dense ' in output
    assert output.count('Set5_x4 30.50 (+2.25)') == 2 and output.count('(default)') == 1


def test_one_model(models, capsys):
    output = run(capsys, 'models', 'general')
    path = models / 'general.safetensors'
    assert output.startswith(path.with_suffix('.md').read_text()) and f'\nFile: {path}\n' in output
    assert yaml.safe_load(output[output.index('network_g:') :]) == {'network_g': NETWORK}
    assert run(capsys, 'models', 'general', '--path') == run(capsys, 'models', '--path') == f'{path}\n'
    shutil.copy(path, 'mine.safetensors')  # a file of one's own, without a card
    assert run(capsys, 'models', 'mine.safetensors').startswith('mine: MoEISR with')


def test_json(models, capsys):
    first, second = json.loads(run(capsys, 'models', '--json'))
    assert (first['name'], first['default'], second['name'], second['default']) == (
        'general',
        True,
        'photos_dense',
        False,
    )
    assert first['network_g'] == NETWORK and first['scale_range'] == [1, 4] and first['results'] == RESULTS
    assert first['metadata']['license'] == 'none' and first['bytes'] == (models / 'general.safetensors').stat().st_size
    assert json.loads(run(capsys, 'models', 'photos_dense', '--json')) == second


def test_no_model(capsys):
    assert 'No model comes with this installation' in run(capsys, 'models')
    assert run(capsys, 'models', '--json') == '[]\n'
    error = fails(capsys, 'upscale', 'a.png', '-o', 'o.png', '--scale', '2')
    assert 'no default model comes with this installation; name a model file by --model' in error
    assert 'there is no model file general.' in fails(capsys, 'models', 'general')


def test_upscale_takes_the_default_and_says_so(models, capsys):
    output = run(capsys, 'upscale', 'a.png', '-o', 'default.png', '--scale', '2.5')
    assert output.splitlines()[0] == 'Model: general, the default; `basicsr models` tells more.'
    for number, model in enumerate(('general', models / 'general.safetensors')):
        output = run(capsys, 'upscale', 'a.png', '-o', f'{number}.png', '--scale', '2.5', '--model', model)
        assert 'default;' not in output
        assert Path(f'{number}.png').read_bytes() == Path('default.png').read_bytes()


def test_only_the_first_process_speaks_of_the_default(models, capsys, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert 'Model:' not in run(capsys, 'upscale', 'a.png', '-o', 'o.png', '--scale', '2')


def test_a_word_with_two_meanings_is_an_error(models, capsys):
    shutil.copy(models / 'photos_dense.safetensors', 'general')
    error = fails(capsys, 'upscale', 'a.png', '-o', 'o.png', '--scale', '2', '--model', 'general')
    assert "'general' is a model that comes with the package and a file in the current folder. Write ./general" in error
    assert shipped.find_model('./general') == Path('general')
    assert shipped.find_model(None) == models / 'general.safetensors'  # nothing was named, so nothing is unclear
    Path('general').unlink()
    Path('general').mkdir()  # a folder is no model file
    assert shipped.find_model('general') == models / 'general.safetensors'


@pytest.mark.parametrize(
    ('model', 'words'),
    [
        (
            'genral',
            "there is no model file genral. The package comes with general, photos_dense. Did you mean 'general'?",
        ),
        ('general.safetensors', "Did you mean 'general'?"),
        ('folder/x.safetensors', 'there is no model file folder/x.safetensors'),
    ],
)
@pytest.mark.parametrize(
    'command', [('upscale', 'a.png', '-o', 'o.png', '--scale', '2', '--model'), ('profile', '--model'), ('models',)]
)
def test_unknown_names(models, capsys, command, model, words):
    assert words in fails(capsys, *command, model)


def test_damaged_files(models, capsys):
    path = models / 'general.safetensors'
    path.write_bytes(path.read_bytes()[:-5])
    upscale = ('upscale', 'a.png', '-o', 'o.png', '--scale', '2', '--model', 'general')
    for argv in (upscale, ('models',), ('profile', '--model', 'general')):
        error = fails(capsys, *argv)
        assert f'{path} is no whole safetensors file' in error
    for notes, words in (
        ({'results': '['}, "its metadata 'results' is not JSON"),
        ({'results': '[{}]'}, "its metadata is wrong: results[0]: 'dataset' is a required property"),
        ({'scale_range': '4'}, "its metadata is wrong: scale_range: 4 is not of type 'array'"),
    ):
        stand_in(models, 'general', **notes)
        assert words in fails(capsys, 'models')


def test_profile_takes_a_name(models, capsys):
    run(
        capsys,
        'profile',
        '--model',
        'general',
        '--lq-size',
        '6x6',
        '--scale',
        '2',
        '--repeats',
        '1',
        '--no-plain',
        '--device',
        'cpu',
        '--json',
        'p.json',
    )
    assert schema.load('p.json')['model']['file'] == str(models / 'general.safetensors')


@pytest.fixture(scope='module')
def script():
    spec = importlib.util.spec_from_file_location('ship_model', ROOT / 'scripts' / 'ship_model.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def checkpoint_and_results(network=NETWORK, results_of=NETWORK):
    """What training and testing leave behind."""
    net = build_network(network)
    torch.save(
        {'params': build_network(network).state_dict(), 'params_ema': net.state_dict(), 'network_g': network},
        'net_g_7.pth',
    )
    total = parameters(build_network(results_of))['total']
    rows = [{'case': 'test', 'scale': [4.0, 4.0]}, {'case': 'mean', **RESULTS[0]}]
    environment = {'torch': '2', 'threads': 1, 'cpu': 'x', 'device': 'cpu', 'kernel': 'torch'}
    schema.save(
        'results.json', schema.document('test', environment, rows, {'name': 'tiny', 'parameters': {'total': total}})
    )
    Path('tiny.yml').write_text('datasets: {train: {scale_range: [1, 3]}}\ntrain: {total_iter: 900}\n')
    return net


SHIP = ('net_g_7.pth', '--name', 'general', '--recipe', 'tiny.yml', '--results', 'results.json')


def test_a_checkpoint_becomes_a_shipped_model(script, weights, capsys):
    net = checkpoint_and_results()
    assert script.main([*SHIP, '--force_yml', 'train:total_iter=1234']) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert problems(weights, 'general') == []
    path = weights / 'general.safetensors'
    text, metadata = path.with_suffix('.md').read_text(), read_model(path).metadata
    assert '1,234 iterations' in text and 'x1 to x3' in text and '| Set5_x4 | 5 | 30.50 | +2.25 | 75% 25% |' in text
    assert metadata['recipe'] == 'tiny.yml with train:total_iter=1234' and metadata['param_key'] == 'params_ema'
    loaded = load_model(path)
    for name, value in net.state_dict().items():  # stored as fp16, used as fp32, and the averaged weights
        assert read_model(path).weights[name].dtype == torch.float16 and loaded.state_dict()[name].dtype == value.dtype
        torch.testing.assert_close(loaded.state_dict()[name], value.half().float(), rtol=0, atol=0)
    assert run(capsys, 'models', 'general').startswith('# general\n')
    tuned = build_network(NETWORK)
    load_weights(tuned, 'general')  # as `path: pretrain_network_g` does
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in tuned.state_dict().items())


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (lambda: checkpoint_and_results(results_of={**NETWORK, 'experts': [[4]]}), 'the results of another network'),
        (lambda: Path('tiny.yml').write_text('train: {total_iter: 5}'), 'tiny.yml needs datasets: train: scale_range'),
        (lambda: torch.save(build_network(NETWORK).state_dict(), 'net_g_7.pth'), 'which network it belongs to'),
        (lambda: torch.save({'params': {}}, 'results.json'), 'results.json'),
    ],
)
def test_what_cannot_be_shipped_leaves_nothing(script, weights, capsys, change, words):
    checkpoint_and_results()
    change()
    assert script.main(list(SHIP)) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1
    assert list(weights.iterdir()) == []


def test_training_starts_from_a_model_by_its_name(models, tmp_path):
    named = {'path:pretrain_network_g': 'general', 'network_g': NETWORK}
    model = build_model(parse(tmp_path, run_yaml(tmp_path, **named)))
    expected = load_model(models / 'general.safetensors').state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.net_g.state_dict().items())
    with pytest.raises(UserError, match='there is no file genral'):
        parse(tmp_path, run_yaml(tmp_path, **{**named, 'path:pretrain_network_g': 'genral'}))
    shutil.copy(models / 'general.safetensors', 'general')
    with pytest.raises(UserError, match="'general' is a model that comes with the package and a file in the current"):
        parse(tmp_path, run_yaml(tmp_path, **named))
