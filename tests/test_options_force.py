"""--force_yml: one key for one run; nothing in an entry is evaluated."""

import pytest
from options_cases import GOOD, swap, write

from moeisr_basicsr.errors import UserError
from moeisr_basicsr.options import OptionsError, load_options

pytestmark = pytest.mark.usefixtures('images_here')


@pytest.mark.parametrize(
    ('entry', 'keys', 'value'),
    [
        ('train:ema_decay=0.999', ('train', 'ema_decay'), 0.999),  # not in the file, but known
        ('train:optim_g:lr=2e-4', ('train', 'optim_g', 'lr'), 2e-4),
        ('train:optim_g:betas=[0.5, 0.6]', ('train', 'optim_g', 'betas'), [0.5, 0.6]),
        ('manual_seed=none', ('manual_seed',), None),
        ('network_g:skip=none', ('network_g', 'skip'), 'none'),  # a choice of that name, not null
        ('train:amp=none', ('train', 'amp'), 'none'),
        ('network_g:experts=[[8],[8,8],[8,8,8]]', ('network_g', 'experts'), [[8], [8, 8], [8, 8, 8]]),
        ('network_g:encoder:num_block=2', ('network_g', 'encoder', 'num_block'), 2),
        ('val:save_img=True', ('val', 'save_img'), True),
        ('name=a=b', ('name',), 'a=b'),
        ('name={}x4', ('name',), '{}x4'),
        ('name="{}"', ('name',), '{}'),
        ("name='{1}'", ('name',), '{1}'),
        ('datasets:val:scale=[2, 3.5]', ('datasets', 'val', 'scale'), [2, 3.5]),
        ('val:metrics:psnr:crop_border=3', ('val', 'metrics', 'psnr', 'crop_border'), 3),
    ],
)
def test_force_yml(entry, keys, value):
    found = load_options(write(GOOD), [entry])
    for key in keys:
        found = found[key]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ('entry', 'words'),
    [
        ('train:ema_deca=0.9', "'train' has no key 'ema_deca'. Did you mean 'ema_decay'?"),
        ('trian:ema_decay=0.9', "there is no key 'trian'. Did you mean 'train'?"),
        ('train:ema_decay', 'write it as key:key=value'),
        ('=3', 'write it as key:key=value'),
        ('name:x=3', "'name' has no key 'x'|'name' is a value"),
        ('train:optim_g:lr=__import__("os").system("touch ran")', 'must be a number'),
        ('train:optim_g:lr=[__import__("os").system("touch ran")]', ''),
        ('train:optim_g:lr=!!python/object/apply:os.system ["touch ran"]', ''),
        ('train"]; __import__("os").system("touch ran"); opt["train:ema_decay=1', 'there is no key'),
    ],
)
def test_force_yml_refuses_and_runs_nothing(images_here, entry, words):
    with pytest.raises(UserError) as caught:
        load_options(write(GOOD), [entry])
    assert '\n' not in str(caught.value) and str(caught.value).startswith('--force_yml ')
    assert any(word in str(caught.value) for word in words.split('|'))
    assert not (images_here / 'ran').exists()


def test_a_named_entry_is_added_or_left_out():
    """Users choose the names of datasets and metrics."""
    opt = load_options(
        write(GOOD),
        [
            'datasets:val_2:name=second',
            'datasets:val_2:type=ArbitraryScaleImageDataset',
            'datasets:val_2:dataroot_gt=images',
            'datasets:val_2:scale=3.5',
            'val:metrics:ssim:type=calculate_ssim_sr',
            'val:metrics:psnr=none',
        ],
    )
    assert list(opt['datasets']) == ['train', 'val', 'val_2'] and opt['datasets']['val_2']['scale'] == 3.5
    assert list(opt['val']['metrics']) == ['ssim']
    assert list(load_options(write(GOOD), ['datasets:val=none'])['datasets']) == ['train']
    with pytest.raises(OptionsError) as caught:
        load_options(write(GOOD), ['datasets:vall:scale=2'])
    assert all(
        problem.startswith('--force_yml datasets:vall:scale=2: datasets: vall: ') for problem in caught.value.problems
    )
    assert "must be called train, val, val_2, ... in training. Did you mean 'val'?" in str(caught.value)


def test_a_run_without_validation_needs_none_of_its_datasets(images_here):
    text = swap('dataroot_gt: images\n    scale: 2', 'dataroot_gt: nowhere\n    scale: 2')
    with pytest.raises(OptionsError, match='no folder nowhere'):
        load_options(write(text))
    assert list(load_options(write(text), ['val=none'])['datasets']) == ['train']


def test_an_entry_removes_a_key(images_here):
    """None would be an argument of the network, a section of its own, or a key of BasicSR's with a meaning."""
    text = swap('    num_block: 1\n', '    num_block: 1\n    res_scale: 0.5\n')
    opt = load_options(write(text), ['network_g:encoder:res_scale=~', 'manual_seed=~', 'val:metrics:psnr=~'])
    assert opt['network_g']['encoder'] == {'type': 'EDSREncoder', 'num_feat': 8, 'num_block': 1}
    assert 'manual_seed' not in opt and opt['val']['metrics'] == {}
    assert 'val' not in load_options(write(GOOD), ['val=~', 'val:metrics=~'])  # nothing is made to be removed
    with pytest.raises(OptionsError) as caught:
        load_options(write(GOOD), ['train:optim_g:lr=~'])
    assert "train: optim_g: the key 'lr' is missing" in str(caught.value)
    with pytest.raises(UserError, match="there is no key 'vla'. Did you mean 'val'?"):
        load_options(write(GOOD), ['vla=~'])


def test_a_network_of_another_model_is_added(images_here):
    """Whatever the order: model_type decides which networks there are."""
    entries = ['network_d={type: UNetDiscriminatorSN, num_in_ch: 3}', 'model_type=SRGANModel']
    for ordered in (entries, entries[::-1]):
        opt = load_options(write(GOOD), ordered)
        assert opt['network_d'] == {'type': 'UNetDiscriminatorSN', 'num_in_ch': 3}
        assert opt['model_type'] == 'SRGANModel'


def test_a_template_of_file_names(images_here):
    entries = ['datasets:train:type=PairedImageDataset', 'datasets:train:filename_tmpl={}x4']
    assert load_options(write(GOOD), entries)['datasets']['train']['filename_tmpl'] == '{}x4'


@pytest.mark.parametrize('seed', [2**62, -1])
def test_a_seed_beyond_what_generators_take(images_here, seed):
    with pytest.raises(OptionsError) as caught:
        load_options(write(GOOD), [f'manual_seed={seed}'])
    assert caught.value.problems == [
        f'--force_yml manual_seed={seed}: manual_seed: must be a whole number of at least 0 and at most 1e+18; '
        f'got {seed}.'
    ]
    assert load_options(write(GOOD), [f'manual_seed={10**18}'])['manual_seed'] == 10**18
