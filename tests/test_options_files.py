"""Every file below `options` is built and stepped through the command, at small sizes."""

import glob
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from moeisr_basicsr.cli import main
from moeisr_basicsr.options import load_options, read_yaml

FOLDER = Path(__file__).resolve().parents[1] / 'options'
TRAINED = ('moeisr_edsr', 'moeisr_rdn', 'moeisr_swinir', 'moeisr_lte_edsr', 'liif_edsr', 'lte_edsr')
TRAINED += ('moeisr_lm_edsr', 'lmliif_edsr')
SMALL_ENCODER = {
    'EDSREncoder': ['num_block=1', 'num_feat=8'],
    'RDNEncoder': ['num_block=1', 'num_conv=2', 'num_feat=8'],
    'SwinIREncoder': ['embed_dim=8', 'depths=[1]', 'num_heads=[2]'],
}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A current folder with the data folders that the files name, one image each."""
    monkeypatch.chdir(tmp_path)
    image = cv2.resize(
        np.random.default_rng(0).integers(0, 255, (9, 9, 3), np.uint8), (132, 140), interpolation=cv2.INTER_CUBIC
    )
    for name in ('DIV2K/DIV2K_train_HR', 'DIV2K/DIV2K_valid_HR', 'Set5', 'Set14', 'B100', 'Urban100'):
        folder = tmp_path / 'datasets' / name
        folder.mkdir(parents=True)
        cv2.imwrite(str(folder / 'image.png'), image)
    return tmp_path


def small_network(data):
    """--force_yml entries that shrink `network_g`."""
    network = data['network_g']
    entries = [f'network_g:encoder:{entry}' for entry in SMALL_ENCODER[network['encoder']['type']]]
    if 'hidden_list' in network:
        entries += ['network_g:hidden_list=[8]']
    elif 'latent' in network:
        entries += ['network_g:latent=[8]']
    elif network['decoder'] == 'lm':
        small = [entry and {**entry, 'latent': [8]} for entry in network['experts']]
        entries += [f'network_g:experts={small}']
    else:
        entries += [f'network_g:experts={[[8] * len(hidden) for hidden in network["experts"]]}']
    return entries + (['network_g:hidden_dim=8'] if 'hidden_dim' in network else [])


def test_the_files_that_there_must_be():
    names = {Path(path).stem for path in glob.glob(str(FOLDER / '*.yml'))}
    assert names >= {*TRAINED, *(f'test_{name}' for name in TRAINED)}


@pytest.mark.parametrize('name', TRAINED)
def test_train_then_test(name, workplace, capsys):
    path = FOLDER / f'{name}.yml'
    data = read_yaml(path).data
    code = main(
        [
            'train',
            '-opt',
            str(path),
            '--force_yml',
            *small_network(data),
            'num_gpu=0',
            'train:total_iter=2',
            'val:val_freq=2',
            'datasets:train:lq_size=16',
            'datasets:train:sample_q=64',
            'datasets:train:batch_size_per_gpu=2',
            'datasets:train:num_worker_per_gpu=0',
            'logger:print_freq=1',
            'logger:use_tb_logger=false',
        ]
    )
    assert code == 0, capsys.readouterr().err[-2000:]
    assert (workplace / f'experiments/{name}/models/net_g_latest.pth').is_file()
    records = [json.loads(line) for line in (workplace / f'experiments/{name}/metrics.jsonl').read_text().splitlines()]
    assert len(records) > 2

    path = FOLDER / f'test_{name}.yml'
    sets = [phase for phase, dataset in read_yaml(path).data['datasets'].items() if dataset['scale'] <= 4]
    kept = write_with_datasets(path, sets[:2])  # the sets differ in their folder only: two of them are enough
    code = main(['test', '-opt', str(kept), '--force_yml', *small_network(data), 'num_gpu=0'])
    assert code == 0, capsys.readouterr().err[-2000:]
    (results,) = (workplace / f'results/test_{name}').rglob('*.json')
    row = json.loads(results.read_text())['rows'][0]
    assert ('lr_reads' in row.get('routing', {})) is (name == 'moeisr_lm_edsr') and row['macs']['total'] > 0


def write_with_datasets(path, phases):
    """A copy of an options file in the current folder with some of its datasets."""
    data = read_yaml(path).data
    data['datasets'] = {phase: data['datasets'][phase] for phase in phases}
    kept = Path(path.name)
    kept.write_text(yaml.safe_dump(data, sort_keys=False))
    return kept


@pytest.mark.parametrize('name', TRAINED)
def test_protocol(name, workplace):
    """What the files must say: LIIF's protocol, SwinIR's and LM's own schedules, a skip, one network in both files."""
    opt = load_options(str(FOLDER / f'{name}.yml'))
    train, network = opt['datasets']['train'], opt['network_g']
    swinir, lm = 'swinir' in name, 'lm' in name
    batch, epoch = (32, 500) if swinir else (16, 1000)
    assert (train['lq_size'], train['sample_q'], train['scale_range']) == (48, 2304, [1, 4])
    assert train['dataset_enlarge_ratio'] == 20
    assert train['batch_size_per_gpu'] == batch and 800 * 20 // batch == epoch and train['downsample'] == 'pil'
    assert opt['train']['total_iter'] == (1200 if lm else 1000) * epoch
    assert opt['train']['optim_g']['lr'] == (2e-4 if swinir else 1e-4)
    epochs = (500, 800, 900, 950) if swinir else (200, 400, 600, 800, 1000)[: 5 if lm else 4]
    assert opt['train']['scheduler']['milestones'] == [epoch * number for number in epochs]
    assert opt['train']['scheduler']['gamma'] == 0.5
    skips = {'lte': 'bilinear', 'moeisr_lm': 'bicubic'}
    assert network['skip'] == next((skip for part, skip in skips.items() if part in name), 'none')
    depths = [1, 1, 2, 3] if 'lte' in name else [1, 2, 3, 4]
    published = {'latent': [208], 'depth': 6}
    if name == 'lmliif_edsr':
        assert {**network, **published, 'render_width': 16} == network
    elif lm:
        assert [entry and entry['depth'] for entry in network['experts']] == [[], 2, 4, 6]
        assert network['experts'][-1] == published and network['mapper']['num_layers'] == 1
    elif name.startswith('moeisr'):
        assert [len(expert) for expert in network['experts']] == depths
    else:
        assert network['hidden_list'] == [256] * depths[-1]

    weights = workplace / f'experiments/{name}/models/net_g_latest.pth'
    weights.parent.mkdir(parents=True)
    weights.touch()
    test = load_options(str(FOLDER / f'test_{name}.yml'), is_train=False)
    assert test['network_g'] == network and test['model_type'] == opt['model_type']
    assert Path(test['path']['pretrain_network_g']) == weights.relative_to(workplace)
    scales = {}
    for dataset in test['datasets'].values():
        label = dataset['name'].rpartition('_x')
        assert label[2] == str(dataset['scale'])
        scales.setdefault(label[0], []).append(dataset['scale'])
        assert dataset.get('downsample', 'matlab') == ('matlab' if dataset['scale'] <= 4 else 'pil')
    assert scales == {
        **{key: [2, 3, 4, 6, 8] for key in ('Set5', 'Set14', 'B100', 'Urban100')},
        'DIV2K': [2, 3, 4, 6, 8, 12, 18, 24, 30],
    }
    assert len({dataset['name'] for dataset in test['datasets'].values()}) == len(test['datasets'])
