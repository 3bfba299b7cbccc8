"""BasicSR's own datasets, models and pipelines with our networks, and our models in BasicSR's pipeline."""

import sys

import cv2
import pytest
import torch
import yaml
from basicsr.models import build_model
from basicsr.test import test_pipeline as basicsr_test
from basicsr.train import train_pipeline as basicsr_train
from basicsr.utils.logger import initialized_logger
from safetensors.torch import save_file
from tiny_runs import DENSE, NETWORK, assert_same, change, model_options, parse, run_yaml, weights_of, write_images

from moeisr_basicsr.checkpoint import convert, load_model
from moeisr_basicsr.engine.test_loop import test as run_test
from moeisr_basicsr.engine.train_loop import train
from moeisr_basicsr.errors import ExitCode, UserError


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder with HR images and their halves, as the current folder."""
    for name, seed in (('train', 0), ('val', 1)):
        write_images(tmp_path / 'pairs' / name / 'gt', 3, (32, 40), seed)
        for path in (tmp_path / 'pairs' / name / 'gt').iterdir():
            (tmp_path / 'pairs' / name / 'lq').mkdir(exist_ok=True)
            small = cv2.resize(cv2.imread(str(path)), (20, 16), interpolation=cv2.INTER_AREA)
            cv2.imwrite(str(tmp_path / 'pairs' / name / 'lq' / path.name), small)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def paired_yaml(root, **changes):
    """A whole run on BasicSR's PairedImageDataset at x2."""

    def dataset(name):
        return {
            'name': name,
            'type': 'PairedImageDataset',
            'io_backend': {'type': 'disk'},
            'dataroot_gt': str(root / 'pairs' / name / 'gt'),
            'dataroot_lq': str(root / 'pairs' / name / 'lq'),
        }

    base = run_yaml(root, **{'network_g:scale': 2, **changes})
    base['datasets'] = {
        'train': {
            **dataset('train'),
            'gt_size': 24,
            'use_hflip': True,
            'use_rot': True,
            'batch_size_per_gpu': 2,
            'num_worker_per_gpu': 0,
            'dataset_enlarge_ratio': 6,
        },
        'val': dataset('val'),
    }
    base['scale'] = 2
    base['train']['total_iter'] = 6
    base['val']['val_freq'] = 3
    base['logger'] = {'print_freq': 2, 'save_checkpoint_freq': 3, 'use_tb_logger': False}
    return base


def run_basicsr(monkeypatch, root, pipeline, options, *arguments):
    """BasicSR's own command line."""
    initialized_logger.clear()  # as in a process of its own
    path = root / 'basicsr.yml'
    path.write_text(yaml.safe_dump(options, sort_keys=False))
    monkeypatch.setattr(sys, 'argv', ['train.py', '-opt', str(path), *arguments])
    pipeline(str(root))


def moved(root, iterations=(3, 6)):
    first, last = (
        torch.load(root / 'experiments' / 'run' / 'models' / f'net_g_{at}.pth')['params_ema'] for at in iterations
    )
    return any(not torch.equal(first[name], last[name]) for name in first)


@pytest.mark.parametrize('model_type', ['SRModel', 'ArbitraryScaleModel', 'MoEISRModel'])
def test_paired_image_dataset_trains_and_validates_in_our_loop(root, model_type):
    assert train(parse(root, paired_yaml(root, model_type=model_type))) == ExitCode.OK
    assert moved(root)
    log = next((root / 'experiments' / 'run').glob('*.log')).read_text()
    assert 'Validation val' in log and 'psnr' in log
    assert (root / 'experiments' / 'run' / 'models' / 'net_g_best_val_psnr.pth').is_file()
    assert ('l_balance' in log) == (model_type == 'MoEISRModel')


def test_sr_model_resumes_in_our_loop(root):
    """BasicSR's model and a dataset that draws from python's `random`: weights and EMA end the same."""
    options = paired_yaml(root, model_type='SRModel', network_g={**DENSE, 'scale': 2})
    train(parse(root, {**options, 'name': 'whole'}))
    short = change(options, {'train:total_iter': 3, 'train:scheduler:milestones': [8, 16]})
    train(parse(root, short))
    train(parse(root, options, auto_resume=True))
    whole, parts = (torch.load(root / 'experiments' / name / 'models' / 'net_g_6.pth') for name in ('whole', 'run'))
    for key in ('params', 'params_ema'):
        assert all(torch.equal(whole[key][name], parts[key][name]) for name in whole[key])


@pytest.mark.parametrize('model_type', ['SRModel', 'ArbitraryScaleModel', 'MoEISRModel'])
def test_basicsrs_pipeline_runs_our_networks_and_models(root, monkeypatch, model_type):
    """train_pipeline, its --auto_resume, then test_pipeline with the weights that it wrote."""
    options = paired_yaml(root, model_type=model_type)
    options['train']['optim_g'].pop('weight_decay', None)
    options['path']['resume_state'] = None
    options['val']['save_img'] = False
    run_basicsr(monkeypatch, root, basicsr_train, change(options, {'train:total_iter': 3}))
    run_basicsr(monkeypatch, root, basicsr_train, options, '--auto_resume')
    assert moved(root)
    test_options = {key: options[key] for key in ('name', 'model_type', 'num_gpu', 'network_g', 'manual_seed', 'scale')}
    test_options['datasets'] = {'test_1': options['datasets']['val']}
    test_options['path'] = {
        'pretrain_network_g': str(root / 'experiments' / 'run' / 'models' / 'net_g_latest.pth'),
        'param_key_g': 'params_ema',
        'strict_load_g': True,
    }
    test_options['val'] = {'save_img': True, 'suffix': None, 'metrics': options['val']['metrics']}
    run_basicsr(monkeypatch, root, basicsr_test, test_options)
    pictures = sorted(path.name for path in (root / 'results' / 'run' / 'visualization' / 'val').iterdir())
    assert pictures == [f'{image}_{"run" if model_type == "SRModel" else "x2"}.png' for image in range(3)]
    log = next((root / 'results' / 'run').glob('*.log')).read_text()
    assert 'psnr' in log


def test_basicsrs_pipeline_runs_our_yaml_with_queries(root, monkeypatch):
    """ArbitraryScaleImageDataset, several scales, experts, all driven by BasicSR's train_pipeline."""
    options = run_yaml(
        root,
        **{'train:total_iter': 9, 'path:resume_state': None, 'logger:use_tb_logger': False, 'val:save_img': True},
        **{'network_g:skip': 'bilinear'},
    )
    run_basicsr(monkeypatch, root, basicsr_train, options)
    log = next((root / 'experiments' / 'run').glob('*.log')).read_text()
    assert 'Validation tiny_x2 x2' in log and 'Validation tiny_x3.3 x3.3' in log and 'l_balance' in log
    assert (root / 'experiments/run/visualization/tiny_x3.3/2_x3.3_9.png').is_file()
    path = root / 'experiments/run/models/net_g_latest.pth'
    weights = torch.load(path, weights_only=True)
    assert set(weights) == {'params', 'params_ema', 'network_g'}
    convert(path, root / 'm.safetensors')  # the file says what no shape tells
    assert load_model(root / 'm.safetensors').skip == load_model(path).skip == 'bilinear'


@pytest.mark.parametrize('dataset', ['PairedImageDataset', 'SingleImageDataset'])
def test_sr_model_is_tested_in_our_loop(root, dataset):
    options = paired_yaml(root, model_type='SRModel')
    section = options['datasets']['val']
    if dataset == 'SingleImageDataset':
        section = {key: section[key] for key in ('name', 'dataroot_lq', 'io_backend')}
    torch.save({'params': weights_of(build_model(model_options(**{'network_g:scale': 2})))}, root / 'weights.pth')
    val = {'save_img': True, **({'metrics': options['val']['metrics']} if dataset == 'PairedImageDataset' else {})}
    assert (
        run_test(
            parse(
                root,
                {
                    **{key: options[key] for key in ('name', 'model_type', 'num_gpu', 'network_g', 'scale')},
                    'val': val,
                    'datasets': {'test': {**section, 'type': dataset}},
                    'path': {'pretrain_network_g': str(root / 'weights.pth')},
                },
                is_train=False,
            )
        )
        == ExitCode.OK
    )
    picture = cv2.imread(str(root / 'results' / 'run' / 'visualization' / 'val' / '2_run.png'))
    assert picture.shape == (32, 40, 3)
    log = next((root / 'results' / 'run').glob('*.log')).read_text()
    assert ('psnr' in log.split('Model [SRModel] is created')[1]) == (dataset == 'PairedImageDataset')


@pytest.mark.parametrize('file', ['missing.pth', 'cut.pth', 'hostile.pth', 'other.pth'])
def test_bad_pretrained_weights_are_one_clear_line(root, file):
    class Hostile:
        def __reduce__(self):
            return (root / 'executed').mkdir, ()

    torch.save({'params': weights_of(build_model(model_options()))}, root / 'cut.pth')
    (root / 'cut.pth').write_bytes((root / 'cut.pth').read_bytes()[:5000])
    torch.save({'params': Hostile()}, root / 'hostile.pth')
    other = build_model(model_options(**{'network_g:experts': [[8], [9]]}))
    torch.save({'params': weights_of(other)}, root / 'other.pth')
    with pytest.raises(UserError) as error:
        build_model(model_options(**{'path:pretrain_network_g': str(root / file)}))
    assert file in str(error.value) and '\n' not in str(error.value)
    assert not (root / 'executed').exists()


def test_pretrained_weights_of_other_files(root):
    """params_ema, `module.` prefixes, safetensors, and strict_load_g: false."""
    source = weights_of(build_model(model_options(network_g=NETWORK)))
    torch.save({'params_ema': {f'module.{name}': value for name, value in source.items()}}, root / 'ema.pth')
    save_file(source, root / 'whole.safetensors')
    torch.save({'params': {name: value for name, value in source.items() if 'encoder' in name}}, root / 'part.pth')
    for file, extra in (
        ('ema.pth', {'path:param_key_g': 'params_ema'}),
        ('whole.safetensors', {}),
        ('part.pth', {'path:strict_load_g': False}),
    ):
        torch.manual_seed(1)
        model = build_model(model_options(**{'path:pretrain_network_g': str(root / file), 'is_train': False, **extra}))
        same = {name for name, value in weights_of(model).items() if torch.equal(value, source[name])}
        assert same >= {name for name in source if 'encoder' in name}
        assert file == 'part.pth' or same == set(source)


@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.'])
def test_a_bare_state_dict_is_loaded(root, prefix):
    source = weights_of(build_model(model_options()))
    torch.save({f'{prefix}{name}': value for name, value in source.items()}, root / 'bare.pth')
    torch.manual_seed(1)
    model = build_model(model_options(**{'path:pretrain_network_g': str(root / 'bare.pth')}))
    assert_same(weights_of(model), source)


@pytest.mark.parametrize('is_train', [False, True])
def test_weights_of_which_nothing_fits(root, is_train):
    torch.save(
        {'params': {'body.weight': torch.zeros(3), 'encoder.conv_first.weight': torch.zeros(1)}}, root / 'net.pth'
    )
    start = {'path:pretrain_network_g': str(root / 'net.pth'), 'path:strict_load_g': False, 'is_train': is_train}
    with pytest.raises(UserError, match='net.pth: nothing in it fits the network MoEISR: .* 1 unknown'):
        build_model(model_options(**start))


def test_weights_that_are_not_finite_are_not_loaded(root):
    source = weights_of(build_model(model_options()))
    source['encoder.conv_first.bias'][2] = float('nan')
    torch.save({'params': source}, root / 'net.pth')
    with pytest.raises(UserError, match='net.pth: encoder.conv_first.bias has values that are NaN'):
        build_model(model_options(**{'path:pretrain_network_g': str(root / 'net.pth')}))


def test_other_options_than_those_of_the_weights_are_named(root, caplog):
    trained = {**NETWORK, 'skip': 'bicubic', 'decoder': 'liif'}
    torch.save({'params': weights_of(build_model(model_options())), 'network_g': trained}, root / 'net.pth')
    start = {'path:pretrain_network_g': str(root / 'net.pth'), 'is_train': False}
    build_model(model_options(**start, **{'network_g:skip': 'bilinear'}))
    assert "network_g: skip is 'bilinear', of the weights 'bicubic'." in caplog.text and 'decoder' not in caplog.text
    caplog.clear()
    build_model(model_options(**start, **{'network_g:skip': 'bicubic'}))
    assert 'other options' not in caplog.text
