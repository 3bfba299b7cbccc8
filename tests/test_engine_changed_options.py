"""Options that differ on resume: each is applied, or refused in one line, and the log lists it."""

import shutil

import pytest
import torch
from tiny_runs import log_text, metrics_lines, run_options, saved

from moeisr_basicsr.engine.changed_options import changes_of, describe
from moeisr_basicsr.engine.train_loop import train
from moeisr_basicsr.errors import ExitCode, UserError

SHORT = {'train:total_iter': 10, 'val': None}


def rates(root):
    return {line['iter']: line['lr'] for line in metrics_lines(root) if line['kind'] == 'train'}


@pytest.fixture(scope='module')
def first(tmp_path_factory):
    root = tmp_path_factory.mktemp('first')
    assert train(run_options(root, **SHORT)) == ExitCode.OK
    return root


@pytest.fixture
def begun(tmp_path, first):
    """A run of 10 iterations: Adam, rate 1e-3, halved after 8 and 16; a copy, so its images are elsewhere."""
    return shutil.copytree(first, tmp_path, dirs_exist_ok=True)


def resume(root, **changes):
    return train(run_options(root, auto_resume=True, **{**SHORT, 'train:total_iter': 20, **changes}))


def test_what_is_unchanged_is_no_change(tmp_path):
    """Also where a default is written out: the network's, the optimizer's, a key of the loop."""
    changes = {'network_g:skip': 'none', 'train:optim_g:betas': [0.9, 0.999], 'logger:keep_checkpoints': 5}
    assert train(run_options(tmp_path, **SHORT)) == ExitCode.OK
    assert resume(tmp_path, **changes) == ExitCode.OK
    lines = log_text(tmp_path).splitlines()
    assert [line.partition('changed option, ')[2] for line in lines if 'changed option' in line] == [
        'train: total_iter: 10 -> 20.'
    ]
    assert rates(tmp_path)[17] == pytest.approx(2.5e-4)


def test_rates_and_schedule_are_those_of_the_options(begun):
    """The same rates as of a run that had them from the start."""
    changes = {'train:optim_g:lr': 1e-6, 'train:scheduler:milestones': [9, 13], 'train:optim_g:weight_decay': 0.01}
    assert resume(begun, **changes) == ExitCode.OK
    found = rates(begun)
    assert found[10] == pytest.approx(5e-4)  # before
    assert [found[at] for at in (11, 13, 14, 20)] == pytest.approx([5e-7, 5e-7, 2.5e-7, 2.5e-7])
    group = saved(begun, 20)[1]['optimizers'][0]['param_groups'][0]
    assert group['weight_decay'] == 0.01 and saved(begun, 20)[1]['optimizers'][0]['state'][0]['step'] == 20
    for line in (
        'train: optim_g: lr: 0.001 -> 1e-06',
        'train: scheduler: milestones: [8, 16] -> [9, 13]',
        'train: optim_g: weight_decay: 0 -> 0.01',
    ):
        assert f'Resume: changed option, {line}.' in log_text(begun)
    assert saved(begun, 20)[1]['options']['train']['optim_g']['lr'] == 1e-6


def test_another_kind_of_schedule(begun):
    scheduler = {'type': 'CosineAnnealingLR', 'T_max': 20}
    assert resume(begun, **{'train:scheduler': scheduler}) == ExitCode.OK
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    expected = {}
    for iteration in range(1, 21):
        expected[iteration] = optimizer.param_groups[0]['lr']
        optimizer.step()
        reference.step()
    found = rates(begun)
    assert [found[at] for at in range(11, 21)] == pytest.approx([expected[at] for at in range(11, 21)], rel=1e-9)


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'train:optim_g': {'type': 'SGD', 'lr': 1e-3}}, 'train: optim_g: type: .Adam. -> .SGD.'),
        ({'network_g:experts': [[8], [8]]}, r'network_g: experts: \[\[8\], \[8, 8\]\] -> \[\[8\], \[8\]\]'),
        ({'network_g:skip': 'bicubic'}, 'network_g: skip: .none. -> .bicubic.'),  # of the same shapes
        ({'model_type': 'ArbitraryScaleModel'}, 'model_type: '),
        ({'path:pretrain_network_g': 'other.pth'}, 'path: pretrain_network_g: '),
        ({'train:optim_g:amsgrad': True}, r'Adam with these options cannot go on from the saved state \(KeyError: '),
    ],
)
def test_what_cannot_change_is_refused_before_anything_is_moved(begun, monkeypatch, changes, words):
    monkeypatch.chdir(begun)
    torch.save({'params': {}}, 'other.pth')
    before = {path for path in (begun / 'experiments').rglob('*') if path.suffix in ('.pth', '.state', '.jsonl')}
    with pytest.raises(UserError, match=words) as error:
        resume(begun, **changes)
    assert '\n' not in str(error.value)
    assert before == {
        path for path in (begun / 'experiments').rglob('*') if path.suffix in ('.pth', '.state', '.jsonl')
    }


def test_a_state_without_options_goes_on_by_those_given(begun):
    """BasicSR's own states hold none."""
    path = begun / 'experiments' / 'run' / 'training_states' / '10.state'
    torch.save({key: value for key, value in torch.load(path).items() if key != 'options'}, path)
    assert resume(begun, **{'train:optim_g:lr': 1e-5, 'train:total_iter': 12}) == ExitCode.OK
    assert rates(begun)[11] == pytest.approx(5e-6)
    assert 'the checkpoint does not hold its options; those given now count' in log_text(begun)


def test_other_data_loss_and_log_are_applied(begun):
    changes = {
        'datasets:train:batch_size_per_gpu': 2,
        'datasets:train:num_worker_per_gpu': 1,
        'train:balance_opt:loss_weight': 0.0,
        'train:ema_decay': 0.5,
        'logger:print_freq': 2,
        'train:total_iter': 12,
    }
    assert resume(begun, **changes) == ExitCode.OK
    state = saved(begun, 12)[1]
    assert state['place'] == {'epoch': 1, 'samples': 20, 'world_size': 1}
    assert [line['iter'] for line in metrics_lines(begun)][-2:] == [10, 12] and metrics_lines(begun)[-1][
        'l_balance'
    ] == 0
    for key in (
        'datasets: train: batch_size_per_gpu: 4 -> 2',
        'train: ema_decay: 0.9 -> 0.5',
        'logger: print_freq: 1 -> 2',
    ):
        assert f'Resume: changed option, {key}.' in log_text(begun)


def test_sections_that_come_and_go():
    saved = {'model_type': 'MoEISRModel', 'val': {'val_freq': 3}, 'train': {'grad_clip': 1.0, 'non_finite': 'stop'}}
    given = {'model_type': 'MoEISRModel', 'val': None, 'train': {'ema_decay': 0}}
    assert [describe(change) for change in changes_of(saved, given)] == [
        'val: a section of keys -> ~ (nothing)',
        'train: grad_clip: 1.0 -> ~ (nothing)',
    ]


@pytest.mark.parametrize(
    ('changes', 'factor'), [({'train:encoder_lr_mul': 0.25}, 0.25), ({'train:fix_encoder': 11}, 0)], ids=str
)
def test_an_encoder_that_slows_down_or_rests(tmp_path, first, changes, factor):
    """The rest of the network takes the step that it would have taken; the encoder a part of its own."""
    assert_encoder_steps(tmp_path, first, changes, factor)


def test_an_encoder_that_wakes_early(tmp_path):
    """Its optimizer has no state of it yet: its first step is that of a new one, of size `lr`."""
    root = tmp_path / 'rested'
    root.mkdir()
    assert train(run_options(root, **SHORT, **{'train:fix_encoder': 20})) == ExitCode.OK
    assert_encoder_steps(tmp_path, root, {'train:fix_encoder': 0}, None, {'train:fix_encoder': 20})


def assert_encoder_steps(tmp_path, first, changes, factor, before=None):
    start, ends = saved(first, 10)[0]['params'], []
    for name, changed in (('same', before or {}), ('changed', changes)):
        root = shutil.copytree(first, tmp_path / name)
        assert resume(root, **{**changed, 'train:total_iter': 11}) == ExitCode.OK
        ends.append(saved(root, 11)[0]['params'])
    for name, value in ends[1].items():
        step = value - start[name]
        if not name.startswith('encoder.'):
            assert torch.equal(value, ends[0][name]), name
        elif factor is None:
            assert step.abs().max() == pytest.approx(5e-4, rel=1e-3), name
        else:
            torch.testing.assert_close(step, factor * (ends[0][name] - start[name]), rtol=1e-3, atol=1e-7)


def test_metrics_that_are_added_or_defined_anew(tmp_path):
    """The best of another definition is no best; that of the other metrics stays."""
    both = {name: {'type': 'calculate_psnr', 'crop_border': 2} for name in ('kept', 'changed')}
    others = {**both, 'changed': {'type': 'calculate_psnr', 'crop_border': 4}, 'added': {'type': 'calculate_ssim'}}
    short = {'train:total_iter': 2, 'val:val_freq': 2, 'datasets:val_2': None}
    others['added']['crop_border'] = 2
    assert train(run_options(tmp_path, **short, **{'val:metrics': both})) == ExitCode.OK
    state = tmp_path / 'experiments' / 'run' / 'training_states' / '2.state'
    content = torch.load(state)
    for record in content['best_metric_results']['tiny_x2'].values():
        record['val'] = 99.0  # never reached again
    torch.save(content, state)
    later = {**short, 'train:total_iter': 4, 'val:metrics': others}
    assert train(run_options(tmp_path, auto_resume=True, **later)) == ExitCode.OK
    best = metrics_lines(tmp_path)[-1]['best']
    assert best['kept'] == {'better': 'higher', 'val': 99.0, 'iter': 2}
    assert best['changed']['iter'] == best['added']['iter'] == 4 and best['changed']['val'] < 99
