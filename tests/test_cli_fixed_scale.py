"""`FixedScale` through every command: a network without a decoder is tested, profiled and upscales like any other."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from basicsr.archs import build_network
from helpers import pretrained, shared_data

from moeisr_basicsr.analysis import schema
from moeisr_basicsr.analysis.complexity import encoder_macs
from moeisr_basicsr.checkpoint import load_model, save_model
from moeisr_basicsr.cli import main
from moeisr_basicsr.data.resize import imresize

OPTIONS = Path(__file__).resolve().parents[1] / 'options' / 'test_fixed_scale.yml'
ENCODER = {'type': 'SMFANetEncoder', 'num_feat': 8, 'num_block': 1, 'scale': 3}
FIXED = {'type': 'FixedScale', 'encoder': ENCODER}


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model('fixed.safetensors', build_network(FIXED), FIXED)
    return 'fixed.safetensors'


def test_upscale(model):
    """The network's image of the photograph, resized: to the nearest of 256 levels."""
    pixels = cv2.resize(np.random.default_rng(0).integers(0, 255, (5, 4, 3), np.uint8), (17, 20))
    cv2.imwrite('photo.png', pixels)
    assert main(['upscale', 'photo.png', '--model', model, '--scale', '2.5', '-o', 'large.png', '--device', 'cpu']) == 0
    lq = torch.from_numpy(pixels[..., ::-1].copy()).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        image = load_model(model).encoder.with_image(lq * 2 - 1)[1][0].permute(1, 2, 0)
    expected = imresize(image.numpy(), (50, 43)).clip(0, 1) * 255
    assert np.abs(cv2.imread('large.png')[..., ::-1] - expected).max() < 0.501


@pytest.mark.parametrize('kind', ['spandrel', 'basicsr', 'smfanet', 'own'])
def test_a_checkpoint_upscales_by_any_factor(kind, tmp_path, monkeypatch, capsys):
    """As it comes, without a model file: the picture is its network's own output, resized."""
    monkeypatch.chdir(tmp_path)
    rrdb = {'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 1, 'scale': 4}
    edsr = {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 1, 'upscale': 4}
    name, network = 'x4.pth', build_network({**edsr} if kind == 'basicsr' else {'type': 'RRDBNet', **rrdb}).eval()
    if kind == 'basicsr':  # a model file that `basicsr convert` made
        name = 'x4.safetensors'
        save_model(name, network, edsr)
    elif kind == 'spandrel':
        torch.save({'params_ema': network.state_dict()}, name)
    elif kind == 'smfanet':
        encoder = build_network({'type': 'SMFANetEncoder', 'num_feat': 8, 'num_block': 1, 'tail': True}).eval()
        torch.save({'params': encoder.state_dict()}, name)
        network = lambda lq: encoder.with_image(lq * 2 - 1)[1]  # noqa: E731
    else:
        network = build_network(FIXED).eval()
        torch.save({'params': network.state_dict(), 'network_g': FIXED}, name)
        network = lambda lq, net=network: net.encode(lq).image  # noqa: E731
    pixels = cv2.resize(np.random.default_rng(0).integers(0, 255, (5, 4, 3), np.uint8), (34, 40))
    cv2.imwrite('photo.png', pixels)
    assert main(['upscale', 'photo.png', '--model', name, '--scale', '2.5', '-o', 'large.png', '--device', 'cpu']) == 0
    with torch.no_grad():
        image = network(torch.from_numpy(pixels[..., ::-1].copy()).permute(2, 0, 1)[None].float() / 255)
    expected = imresize(image[0].permute(1, 2, 0).numpy(), (100, 85)).clip(0, 1) * 255
    assert np.abs(cv2.imread('large.png')[..., ::-1] - expected).max() < 0.51
    assert f'{name}, made for x{3 if kind == "own" else 4}: its image is resampled' in capsys.readouterr().out


def test_a_checkpoint_without_options_of_our_own_network(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    liif = {'type': 'LIIF', 'encoder': {'type': 'EDSREncoder', 'num_feat': 8, 'num_block': 1}, 'hidden_list': [8]}
    torch.save({'params': build_network(liif).state_dict()}, 'liif.pth')
    cv2.imwrite('photo.png', np.zeros((9, 9, 3), np.uint8))
    assert main(['upscale', 'photo.png', '--model', 'liif.pth', '--scale', '2', '-o', 'x.png']) == 2
    assert 'liif.pth does not say its options: `basicsr convert liif.pth -opt' in capsys.readouterr().err


def test_upscale_has_no_map_and_no_budget(model, capsys):
    cv2.imwrite('photo.png', np.zeros((9, 9, 3), np.uint8))
    for option, words in ((['--expert-map'], 'has one expert'), (['--budget', '0.5'], 'one expert: there is no')):
        assert main(['upscale', 'photo.png', '--model', model, '--scale', '2', '-o', 'x.png', *option]) == 2
        assert words in capsys.readouterr().err
    assert not Path('x.png').exists()


def test_profile(model, capsys):
    words = '--scale', '2', '--lq-size', '16x9', '--repeats', '1', '--device', 'cpu', '--json', 'p.json'
    assert main(['profile', '--model', model, *words]) == 0
    (row,) = schema.load('p.json')['rows']
    assert row['macs']['total'] == row['macs']['encoder'] > 0 and row['macs']['skip'] == 3 * (6 * 1.5 + 6)
    assert row['time_ms']['encode'] > 0 and row['time_ms']['other'] > 0 and 'map' not in row['time_ms']
    assert main(['profile', '--model', model, '--train', '--repeats', '1', '--device', 'cpu', '--patch', '16']) == 0
    assert main(['models', model]) == 0
    assert 'FixedScale with SMFANetEncoder' in capsys.readouterr().out


def measure(folder, network, model=None, least=1):
    """`basicsr test` with the options file on one folder as Set5: the mean row of each factor from `least` on."""
    opt = yaml.safe_load(OPTIONS.read_text())
    sets = {
        phase: dataset
        for phase, dataset in opt['datasets'].items()
        if dataset['name'].startswith('Set5') and dataset['scale'] >= least
    }
    opt['datasets'] = {phase: {**dataset, 'dataroot_gt': str(folder)} for phase, dataset in sets.items()}
    opt |= {'num_gpu': 0, 'network_g': network, 'path': {'pretrain_network_g': model}}
    Path('test.yml').write_text(yaml.safe_dump(opt))
    assert main(['test', '-opt', 'test.yml']) == 0
    rows = json.loads(Path('results/test_fixed_scale/results.json').read_text())['rows']
    return {row['scale'][0]: row for row in rows if row['case'] == 'mean'}


def test_the_options_file(tmp_path, monkeypatch):
    """With a checkpoint, as the file names one; its multiply-adds are those of encoder and tail."""
    monkeypatch.chdir(tmp_path)
    network = yaml.safe_load(OPTIONS.read_text())['network_g']
    Path('set').mkdir()
    cv2.imwrite('set/a.png', cv2.resize(np.random.default_rng(0).integers(0, 255, (9, 9, 3), np.uint8), (72, 60)))
    encoder = build_network({**ENCODER, 'tail': True})
    torch.save({'params': encoder.state_dict()}, 'x3.pth')
    network['encoder']['checkpoint'] = 'x3.pth'
    rows = measure('set', network)
    assert sorted(rows) == [2, 2.5, 3, 3.3, 4, 6]
    for row in rows.values():
        assert row['macs']['experts'] == row['macs']['tables'] == row['macs']['mapper'] == 0
    macs = encoder_macs(encoder.eval(), (30, 36), tail=True)
    assert rows[2]['macs']['total'] == pytest.approx(macs / (60 * 72))


def test_the_published_weights_at_other_factors(tmp_path, monkeypatch):
    """SMFANet made for x4, as published, untrained on other factors: what every arbitrary-scale network has to beat."""
    weights = torch.load(pretrained('SMFANet_DIV2K_100w_x4SR.pth'), weights_only=True)['params']
    monkeypatch.chdir(tmp_path)
    network = {'type': 'FixedScale', 'encoder': {'type': 'SMFANetEncoder', 'local': False}}
    save_model('x4.safetensors', {f'encoder.{name}': value for name, value in weights.items()}, network)
    rows = measure(shared_data('Set5'), network, 'x4.safetensors', least=3.3)  # the others take minutes
    psnr = {scale: row['metrics']['psnr_y'] for scale, row in rows.items()}
    expected = {3.3: 33.74, 4: 32.25, 6: 28.84}
    assert psnr == {scale: pytest.approx(value, abs=0.02) for scale, value in expected.items()}
