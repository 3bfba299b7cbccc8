"""`basicsr adapt`: from a fixed-scale checkpoint to a model file of any factor."""

import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import yaml
from basicsr.archs import build_network
from basicsr.archs.edsr_arch import EDSR
from data_cases import make_lmdb
from test_engine_lock import holder
from tiny_runs import NETWORK

from moeisr_basicsr.analysis import schema
from moeisr_basicsr.checkpoint import load_model as load
from moeisr_basicsr.checkpoint import read_model, save_model
from moeisr_basicsr.cli import main
from moeisr_basicsr.engine import adapt as adaptation
from moeisr_basicsr.engine import adapt_result
from moeisr_basicsr.inference import upscale

ARCH = {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 1, 'upscale': 2}
GREY = {**ARCH, 'num_in_ch': 1, 'num_out_ch': 1}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A current folder with a checkpoint and six smooth images."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save({'params': EDSR(**{key: value for key, value in ARCH.items() if key != 'type'}).state_dict()}, 'net.pth')
    (tmp_path / 'data').mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        small = rng.integers(0, 255, (12, 13, 3), np.uint8)
        cv2.imwrite(f'data/{number}.png', cv2.resize(small, (104, 98), interpolation=cv2.INTER_CUBIC))
    return tmp_path


def run(*words):
    return main(['adapt', 'net.pth', '--arch', str(ARCH), '--data', 'data', '-o', 'out.safetensors', *words])


def write_options(job, started):
    return adaptation.write_options(job, *adaptation.plan(job), started)


def small_recipe(monkeypatch, path):
    """A recipe of 12 short steps in place of the real one; no minutes pass, however busy the machine is."""
    now = time.monotonic()
    monkeypatch.setattr(adaptation, 'time', SimpleNamespace(monotonic=lambda: now, perf_counter=time.perf_counter))
    recipe = yaml.safe_load(adaptation.RECIPE.read_text())
    recipe['train'] |= {'total_iter': 12, 'fix_encoder': 3}
    recipe['train']['scheduler']['periods'] = [12]
    recipe['datasets']['train'] |= {'batch_size_per_gpu': 2, 'lq_size': 24, 'sample_q': 100}
    path.write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(adaptation, 'RECIPE', path)


def test_the_recipe_that_is_printed_is_the_one_in_options(capsys):
    assert main(['adapt', '--print-options']) == 0
    assert capsys.readouterr().out == (Path(__file__).parents[1] / 'options' / 'adapt.yml').read_text(encoding='utf-8')


def test_a_fixed_scale_network_gets_every_factor(workplace, monkeypatch, capsys):
    small_recipe(monkeypatch, workplace / 'recipe.yml')
    assert run() == 0
    out = capsys.readouterr().out
    values = {}
    for name in ('bicubic', 'resampled', 'adapted 25%', 'adapted 50%', 'adapted 100%'):
        line = next(line for line in out.splitlines() if re.search(rf'{name} *│', line))
        values[name] = [float(value) for value in re.findall(r'(\d\d\.\d\d)(?= |$)', line)]
    assert [len(of) for of in values.values()] == [4] * 5  # x2, x3, x3.3, x4
    net = load('out.safetensors')
    assert type(net).__name__ in ('MoEISR', 'FixedScale')
    (workplace / 'net.pth').unlink()  # the file needs nothing else
    assert upscale(load('out.safetensors'), torch.rand(1, 3, 9, 11), 2.7).image.shape == (1, 3, 24, 30)
    options = yaml.safe_load(Path('experiments/adapt_out.yml').read_text())
    listed = [Path(options['datasets'][part]['meta_info_file']).read_text().split() for part in ('train', 'val')]
    assert sorted(listed[0] + listed[1]) == [f'{number}.png' for number in range(6)]
    assert listed[0] and listed[1]


def test_a_damaged_image_in_the_comparison_costs_no_model(workplace, monkeypatch):
    small_recipe(monkeypatch, workplace / 'recipe.yml')
    (workplace / 'val').mkdir()
    for number in (0, 1):
        (workplace / 'data' / f'{number}.png').rename(f'val/{number}.png')
    Path('val/0.png').write_bytes(Path('val/0.png').read_bytes()[:2000])
    assert run('--val', 'val') == 0
    assert Path('out.safetensors').is_file()
    assert 'val/0.png: the image is damaged' in Path('results/adapt_out_share_1/results.json').read_text()
    Path('val/1.png').write_bytes(b'')
    assert run('--val', 'val', '--overwrite') == 2


def test_training_that_does_not_help_is_thrown_away(workplace, monkeypatch, capsys):
    """100 dB more are asked for at every factor."""
    monkeypatch.setattr(adapt_result, 'TOLERATED', -100.0)
    small_recipe(monkeypatch, workplace / 'recipe.yml')
    assert run() == 0
    assert 'Training has not improved on the resampled image' in capsys.readouterr().out
    assert read_model('out.safetensors').network_opt['type'] == 'FixedScale'
    image = torch.rand(1, 3, 10, 8)
    net = EDSR(**{key: value for key, value in ARCH.items() if key != 'type'}).eval()
    net.load_state_dict(torch.load('net.pth')['params'])
    with torch.no_grad():
        torch.testing.assert_close(upscale(load('out.safetensors'), image, 2.0).image, net(image))


@torch.no_grad()
def test_a_part_of_the_way(workplace):
    """Between the weights of the checkpoint and the trained ones; at 0 it is the network's own image, resampled."""
    options = {'type': 'NetworkEncoder', 'arch': ARCH, 'weights': 'net.pth'}
    start = build_network({'type': 'FixedScale', 'encoder': options}).eval()
    torch.manual_seed(1)
    mapper = {'num_layers': 1, 'num_feat': 4, 'granularity': 'lr_pixel'}
    experts = [{'latent': [4], 'depth': depth} for depth in (1, 2)]
    opt = {'type': 'MoEISR', 'encoder': options, 'decoder': 'lm', 'experts': experts, 'skip': 'network'}
    nets = [build_network({**opt, 'mapper': mapper}).eval() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    for net in nets:
        for weight in net.parameters():
            weight.data.add_(0.05)
    adapt_result.go_back(nets[0], start, 0.25)
    trained, own = nets[1].encoder.state_dict(), start.encoder.state_dict()
    for name, weight in nets[0].encoder.state_dict().items():
        torch.testing.assert_close(weight, 0.75 * own[name] + 0.25 * trained[name])
    image, decoded = torch.rand(1, 3, 7, 9), []
    for net in nets:
        encoded = nets[1].encode(image)
        decoded.append(net.decode_image(encoded, (18, 17)).output - start.decode_image(encoded, (18, 17)).output)
    assert decoded[1].abs().max() > 1e-3
    torch.testing.assert_close(decoded[0], 0.25 * decoded[1], atol=1e-6, rtol=1e-4)
    adapt_result.go_back(nets[0], start, 0)
    torch.testing.assert_close(upscale(nets[0], image, 2.5).image, upscale(start, image, 2.5).image)


def test_the_same_command_goes_on(workplace, monkeypatch, capsys):
    small_recipe(monkeypatch, workplace / 'recipe.yml')
    assert run() == 0
    capsys.readouterr()
    assert run() == 2
    assert 'out.safetensors already exists: give --overwrite' in capsys.readouterr().err
    log = Path('experiments/adapt_out/metrics.jsonl').read_text()
    assert run('--overwrite') == 0
    assert Path('experiments/adapt_out/metrics.jsonl').read_text() == log  # nothing was trained again
    assert run('--overwrite', '--decoder', 'liif') == 0  # another run: the first one is put aside
    assert len(list(Path('experiments').glob('adapt_out_archived_*'))) == 1


def test_the_schedule_fits_the_minutes(workplace, monkeypatch):
    """With steps of 0.2 s at rest and 0.6 s in training, 0.9 minutes of 1 minute hold 96 iterations."""
    small_recipe(monkeypatch, workplace / 'recipe.yml')
    monkeypatch.setattr(adaptation, 'seconds_per_step', lambda opt: (0.2, 0.6))
    encoder = {'type': 'NetworkEncoder', 'arch': ARCH, 'weights': str(workplace / 'net.pth')}
    job = adaptation.Job(encoder, 'data', Path('out.safetensors'), minutes=1)
    path, resumes = write_options(job, adaptation.time.monotonic())
    train = yaml.safe_load(path.read_text())['train']
    assert not resumes and train['total_iter'] == pytest.approx(96, abs=2)
    assert train['fix_encoder'] == round(train['total_iter'] / 10) and train['scheduler']['periods'] == [
        train['total_iter']
    ]


def test_a_schedule_that_was_not_finished_is_fitted_again(workplace, monkeypatch):
    small_recipe(monkeypatch, workplace / 'recipe.yml')
    encoder = {'type': 'NetworkEncoder', 'arch': ARCH, 'weights': str(workplace / 'net.pth')}
    job = adaptation.Job(encoder, str(workplace / 'data'), Path('out.safetensors'), minutes=1)

    def interrupted(opt):
        raise KeyboardInterrupt

    monkeypatch.setattr(adaptation, 'seconds_per_step', interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_options(job, adaptation.time.monotonic())
    monkeypatch.setattr(adaptation, 'seconds_per_step', lambda opt: (0.2, 0.6))
    path, resumes = write_options(job, adaptation.time.monotonic())
    assert not resumes and yaml.safe_load(path.read_text())['train']['total_iter'] == pytest.approx(96, abs=2)


def test_a_run_that_goes_on_keeps_images_and_schedule(workplace, monkeypatch, caplog):
    """An image that was trained on would otherwise be held back, as the folder has grown."""
    small_recipe(monkeypatch, workplace / 'recipe.yml')
    encoder = {'type': 'NetworkEncoder', 'arch': ARCH, 'weights': str(workplace / 'net.pth')}
    job = adaptation.Job(encoder, str(workplace / 'data'), Path('out.safetensors'))
    write_options(job, 0)
    lists = [Path('experiments', f'adapt_out_{part}.txt') for part in ('train', 'val')]
    before = [file.read_text() for file in lists]
    states = Path('experiments', 'adapt_out', 'training_states')
    states.mkdir(parents=True)
    (states / '4.state').touch()
    assert write_options(job, 0)[1] and not caplog.text
    for number in range(6):
        Path('data', f'{number}.png').with_stem(f'a{number}').write_bytes(Path('data', f'{number}.png').read_bytes())
    assert write_options(job._replace(minutes=5), 0)[1]
    assert [file.read_text() for file in lists] == before
    assert 'its 12 iterations, whatever --minutes is now' in caplog.text and 'has others now' in caplog.text


def test_a_checkpoint_that_has_changed_begins_a_new_run(workplace, monkeypatch, caplog):
    small_recipe(monkeypatch, workplace / 'recipe.yml')
    encoder = {'type': 'NetworkEncoder', 'arch': ARCH, 'weights': str(workplace / 'net.pth')}
    job = adaptation.Job(encoder, str(workplace / 'data'), Path('out.safetensors'))
    write_options(job, 0)
    states = Path('experiments', 'adapt_out', 'training_states')
    states.mkdir(parents=True)
    (states / '4.state').touch()
    assert write_options(job, 0)[1] and not caplog.text
    content = torch.load('net.pth')
    content['params']['conv_first.bias'] += 0.01
    torch.save(content, 'net.pth')
    assert not write_options(job, 0)[1]
    assert 'net.pth has changed since adapt_out began: a new run begins' in caplog.text
    assert write_options(job, 0)[1]


def test_a_second_start_leaves_the_files_of_the_first(workplace, monkeypatch, capsys):
    small_recipe(monkeypatch, workplace / 'recipe.yml')
    with holder(Path('experiments', 'adapt_out.yml')):
        before = sorted(workplace.rglob('*'))
        assert run() == 2
        assert 'adapt_out.yml is in use by process' in capsys.readouterr().err
        assert sorted(workplace.rglob('*')) == before


def test_names_that_no_list_can_hold(workplace, capsys):
    for odd in (os.fsdecode(b'caf\xe9.png'), 'two\nlines.png', ' blank.png'):
        path = Path('data/0.png').rename(Path('data', odd))
        assert run() == 2
        error = capsys.readouterr().err
        assert 'a name that is no line of text cannot be listed; rename it' in error and error.count('\n') == 1
        path.rename('data/0.png')


def test_images_for_the_comparison_below_folders_and_in_an_lmdb(workplace, monkeypatch):
    small_recipe(monkeypatch, workplace / 'recipe.yml')
    (workplace / 'val' / 'deep').mkdir(parents=True)
    (workplace / 'val.lmdb').mkdir()
    make_lmdb(workplace / 'val.lmdb', workplace / 'data', '45')
    for number, name in ((4, 'val/4.png'), (5, 'val/deep/5.png')):
        (workplace / 'data' / f'{number}.png').rename(name)
    psnr = []
    for number, folder in enumerate(('val', 'val.lmdb')):
        encoder = {'type': 'NetworkEncoder', 'arch': ARCH, 'weights': str(workplace / 'net.pth')}
        job = adaptation.Job(encoder, 'data', Path(f'{number}.safetensors'), validation=folder)
        opt = yaml.safe_load(write_options(job, 0)[0].read_text())
        baseline = {'type': 'FixedScale', 'encoder': encoder}
        psnr.append([row.psnr for row in adapt_result.measure(opt, baseline, None, f'run{number}', 'resampled')])
        rows = schema.load(Path('results', f'run{number}', 'results.json'))['rows']
        assert [row['count'] for row in rows if row['case'] == 'mean'] == [2, 2, 2, 2]
    assert psnr[0] == psnr[1]


def test_validation_images_in_the_data_are_not_trained_on(workplace):
    (workplace / 'data' / 'val' / 'deep').mkdir(parents=True)
    (workplace / 'data' / '1.png').rename('data/val/deep/1.png')
    (workplace / 'linked').symlink_to(workplace / 'data' / 'val')
    job = adaptation.Job({}, str(workplace / 'data'), Path('out.safetensors'), validation=str(workplace / 'linked'))
    assert adaptation.split_images(job, 48) == (['0.png', '2.png', '3.png', '4.png', '5.png'], [])


@pytest.mark.parametrize(
    'words, message',
    [
        (['net.pth'], 'needs --data FOLDER and -o OUT.safetensors'),
        (['net.pth', '--data', 'data', '-o', 'out.pth'], "must end in '.safetensors'"),
        (['net.pth', '--data', 'none', '-o', 'out.safetensors'], '--data: none is not a folder'),
        (['no.pth', '--data', 'data', '-o', 'out.safetensors'], 'there is no checkpoint no.pth'),
        (['net.pth', '--data', 'data', '-o', 'none/out.safetensors'], 'the folder none does not exist'),
        (['net.pth', '--data', 'data', '-o', 'out.safetensors', '--minutes', '0'], '--minutes must be above 0; got 0'),
        (['net.pth', '--data', 'data', '-o', 'out.safetensors', '--arch', 'EDSR'], '--arch must be a section'),
        (['net.pth', '--data', 'data', '-o', 'out.safetensors', '--arch', '{type: EDSR'], '--arch:1: broken YAML'),
        (
            ['net.pth', '--data', 'data', '-o', 'out.safetensors', '--val', 'data'],
            '0 images of at least 48 x 48 pixels t',
        ),
        (['grey.pth', '--data', 'data', '-o', 'out.safetensors', '--arch', str(GREY)], 'EDSR does not run on an image'),
        (['net.pth', '--data', 'empty', '-o', 'out.safetensors', '--arch', str(ARCH)], 'has no image'),
        (['net.pth', '--data', 'data', '-o', 'out.safetensors'], 'Name a registered one by `arch`'),
        (
            ['any.safetensors', '--data', 'data', '-o', 'out.safetensors'],
            'takes any factor already: use it with `basic',
        ),
        (['any.pth', '--data', 'data', '-o', 'out.safetensors'], 'takes any factor already: use it with `basicsr ups'),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(workplace, capsys, words, message):
    (workplace / 'empty').mkdir()
    torch.save(EDSR(**{key: value for key, value in GREY.items() if key != 'type'}).state_dict(), 'grey.pth')
    torch.save({'params': build_network(NETWORK).state_dict()}, 'any.pth')
    save_model('any.safetensors', build_network(NETWORK), NETWORK)
    before = sorted(workplace.rglob('*'))
    assert main(['adapt', *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert sorted(workplace.rglob('*')) == before
