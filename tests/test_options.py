"""The check of an options file: what it may say, and what is said about mistakes."""

import copy

import pytest
import torch
from options_cases import BASICSR, GOOD, line_of, problems, swap, write

from moeisr_basicsr.options import OptionsError, check_options, load_options, read_yaml, registered

pytestmark = pytest.mark.usefixtures('images_here')


def test_a_good_file_passes_and_gets_defaults():
    opt = load_options(write(swap('experts: [[8], [8, 8]]', 'experts: [[8.0], [8, 1e1]]')))
    assert repr(opt['network_g']['experts']) == '[[8], [8, 10]]'
    assert opt['train']['total_iter'] == 100 and isinstance(opt['train']['total_iter'], int)
    assert opt['train']['optim_g']['lr'] == 1e-4
    assert opt['train']['pixel_opt']['loss_weight'] == 1.0
    assert (repr(opt['datasets']['val']['scale']), repr(opt['datasets']['train']['scale_range'])) == ('2', '[1, 4]')
    assert opt['logger'] == {
        'print_freq': 1,
        'save_checkpoint_freq': 5000,
        'keep_checkpoints': 5,
        'use_tb_logger': False,
    }
    assert opt['path'] == {'pretrain_network_g': None, 'strict_load_g': True}
    assert (opt['val']['save_img'], opt['val']['precision'], opt['train']['tau']) == (False, 'fp32', 1.0)
    assert opt['datasets']['train']['cache'] == 'none' and 'scale_range' not in opt['datasets']['val']
    assert opt['network_g']['encoder'] == {'type': 'EDSREncoder', 'num_feat': 8, 'num_block': 1}


def test_the_document_is_not_changed():
    document = read_yaml(write(GOOD))
    before = copy.deepcopy(document.data)
    opt = check_options(document, ['train:ema_decay=0.5', 'network_g:encoder:num_feat=16'])
    opt['train']['optim_g'].clear()
    assert document.data == before


def test_all_mistakes_at_once_with_their_lines():
    text = swap('num_feat: 8', 'num_fet: 8')
    text = swap('lq_size: 8', 'lq_size: 0', text)
    text = swap('type: Adam', 'type: Adan', text)
    text = swap('val_freq: 10', 'val_freq: often', text)
    text = swap('dataroot_gt: images', 'dataroot_gt: image', text)
    found = problems(text, ['logger:print_freq=0'])
    assert found == [
        f'run.yml:{line_of(text, "dataroot_gt: image")}: datasets: train: dataroot_gt: there is no folder image; '
        f"{found[0].split('; ')[1].split(' has')[0]} has no 'image'. Did you mean 'images'?",
        f'run.yml:{line_of(text, "lq_size")}: datasets: train: lq_size: must be a whole number of at least 1, or a '
        'list of 2 entries, each a whole number of at least 1; got 0.',
        f"run.yml:{line_of(text, 'num_fet')}: network_g: encoder: num_fet: unknown key. Did you mean 'num_feat'?",
        found[3],
        f"run.yml:{line_of(text, 'val_freq')}: val: val_freq: must be a whole number of at least 1; got 'often'.",
        '--force_yml logger:print_freq=0: logger: print_freq: must be a whole number of at least 1; got 0.',
    ]
    assert found[3].startswith(f'run.yml:{line_of(text, "Adan")}: train: optim_g: type: must be the name of an opti')
    assert found[3].endswith("got 'Adan'. Did you mean 'Adam'?")


@pytest.mark.parametrize(
    ('old', 'new', 'part', 'words'),
    [
        ('num_gpu: auto', 'num_gpus: auto', 'num_gpus', "unknown key. Did you mean 'num_gpu'?"),
        ('num_gpu: auto', 'num_gpu: all', 'num_gpu', 'must be auto, or a whole number of at least 0'),
        (
            'name: run',
            'name: 7',
            'name: 7',
            'name: must be text that names one folder, without / and \\; got 7. Put it in',
        ),
        ('name: run', 'name: ../photos', 'name: ../', "that names one folder, without / and \\; got '../photos'."),
        ('type: EDSREncoder', 'type: TinyEncoder', 'TinyEncoder', 'registered network: EDSREncoder, '),
        (
            'type: EDSREncoder',
            'type: TinyEncoder',
            'TinyEncoder',
            'A class of your own is known with --import FILE.py.',
        ),
        ('name: run\n', '', 'model_type', "the key 'name' is missing"),
        ('MoEISRModel', 'MoEISRMode', 'MoEISRMode', "Did you mean 'MoEISRModel'?"),
        (
            'type: ArbitraryScaleImageDataset',
            'type: ArbitraryScaleImagesDataset',
            'ImagesDataset',
            "Did you mean 'ArbitraryScaleImageDataset'?",
        ),
        ('scale_range: [1, 4]', 'scale_range: [4, 1]', 'scale_range', 'must rise'),
        ('scale_range: [1, 4]', 'scale_range: [0.5, 4]', 'scale_range', 'each a number of at least 1'),
        ('scale_range: [1, 4]', 'scale_range: [1, 4, 5]', 'scale_range', 'a list of 2 entries'),
        ('scale: 2', 'scale: 0.5', 'scale: 0.5', 'must be a number of at least 1'),
        ('    scale: 2\n', '', 'val:', "the key 'scale' is missing"),
        ('sample_q: 16', 'sample_q: 65', 'sample_q', 'must be at most the 64 pixels of the LR patch'),
        ('batch_size_per_gpu: 2', 'batch_size_per_gpu: 0', 'batch_size', 'at least 1; got 0'),
        ('batch_size_per_gpu: 2\n', '\n', '  train:', "the key 'batch_size_per_gpu' is missing"),
        ('lq_size: 8', 'use_hflip: true', 'use_hflip', "unknown key. Did you mean 'use_flip'?"),
        ('  val:\n    name', '  valid:\n    name', 'valid', 'a dataset must be called train, val, val_2'),
        ('type: MoEISR\n', 'type: MoEIRS\n', 'MoEIRS', "Did you mean 'MoEISR'?"),
        ('type: EDSREncoder', 'type: EDSREncodr', 'EDSREncodr', "Did you mean 'EDSREncoder'?"),
        ('type: EDSREncoder', 'type: RDNEncode', 'RDNEncode', "got 'RDNEncode'. Did you mean 'RDNEncoder'?"),
        ('type: MultiStepLR', 'type: Cosin', 'Cosin', "Did you mean 'CosineAnnealingLR'?"),
        (
            'dataroot_gt: images\n    scale_r',
            'dataroot_gt: images/a.png\n    scale_r',
            'a.png',
            'must be the path of a folder; images/a.png is none',
        ),
        (
            'pretrain_network_g: ~',
            'pretrain_network_g: images',
            'pretrain',
            'must be the path of a file; images is none',
        ),
        ('num_feat: 8', 'num_feat: eight', 'num_feat', "must be a whole number of at least 1; got 'eight'"),
        ('skip: none', 'skip: bicubc', 'skip', "got 'bicubc'. Did you mean 'bicubic'?"),
        ('skip: none', 'skp: none', 'skp', "Did you mean 'skip'?"),
        ('experts: [[8], [8, 8]]', 'experts: [8, 8]', 'experts', 'must be a list of entries'),
        ('num_layers: 1', 'num_layers: 6', 'num_layers', 'must be a whole number of at least 1 and at most 5; got 6'),
        ('num_layers: 1', 'layers: 1', 'layers', "Did you mean 'num_layers'?"),
        ('pretrain_network_g: ~', 'pretrain_network_g: gone.pth', 'pretrain', 'there is no file gone.pth'),
        ('pretrain_network_g: ~', 'pretrained_network_g: ~', 'pretrain', "Did you mean 'pretrain_network_g'?"),
        ('lr: 1e-4', 'lr: fast', 'lr: fast', "must be a number above 0; got 'fast'"),
        ('lr: 1e-4', 'lr: -1', 'lr: -1', 'must be a number above 0; got -1'),
        ('betas: [0.9, 0.99]', 'beta: [0.9, 0.99]', 'beta', "Did you mean 'betas'?"),
        ('type: MultiStepLR', 'type: MultistepLR', 'MultistepLR', "Did you mean 'MultiStepLR'?"),
        ('milestones: [10]', 'milestone: [10]', 'optim', "the key 'milestones' is missing"),
        (
            '    type: MultiStepLR\n',
            '',
            'optim',
            "the key 'type' is missing (class). It must be the name of a scheduler: ",
        ),
        (
            '  scheduler:\n    type: MultiStepLR\n    milestones: [10]\n    gamma: 0.5\n',
            '',
            'train',
            "key 'scheduler' is missing (learning rate over the iterations). It must be a section whose `type` is the "
            'name of a scheduler: ',
        ),
        (
            'type: ArbitraryScaleImageDataset',
            'type: ArbitraryScalePairedDataset',
            'scale_range',
            'scale_range: unknown key.',
        ),
        ('total_iter: 1e2', 'total_iter: 1.5', 'total_iter', 'must be a whole number'),
        ('total_iter: 1e2', 'totaliter: 10', 'totaliter', "unknown key. Did you mean 'total_iter'?"),
        ('type: L1Loss', 'type: L2Loss', 'L2Loss', "Did you mean 'L1Loss'?"),
        ('type: MoEBalanceLoss', 'type: MoEBalanceLoss\n    wieght: 1', 'wieght', "Did you mean 'loss_weight'?"),
        ('total_iter: 1e2', 'total_iter: 1e2\n  amp: bf61', '  amp: ', "Did you mean 'bf16'?"),
        (
            'total_iter: 1e2',
            'total_iter: 1e2\n  tau: 0',
            '  tau: ',
            'must be a number above 0, or a list of 2 entries, each',
        ),
        (
            'total_iter: 1e2',
            'total_iter: 1e2\n  tau: [1, 2, 3]',
            '  tau: ',
            'a list of 2 entries, each a number above 0',
        ),
        ('total_iter: 1e2', "total_iter: 1e2\n  tau: '1'", '  tau: ', "got '1'"),
        ('total_iter: 1e2', 'total_iter: yes', 'total_iter', 'must be a whole number of at least 1; got true'),
        ('print_freq: 1', 'use_tb_logger: 1', 'use_tb', 'must be true or false; got 1'),
        ('type: calculate_psnr_sr', 'type: calculate_psnr_rs', 'psnr_rs', "Did you mean 'calculate_psnr_sr'?"),
        ('protocol: benchmark', 'protocol: bench', 'protocol', "Did you mean 'benchmark'?"),
        ('val_freq: 10', 'val_freq: 10\n  budget: 0.3\n  cost_weight: 1', 'cost_weight', 'not both'),
        ('print_freq: 1', 'print_freq: 1\n  use_tb: true', 'use_tb', "Did you mean 'use_tb_logger'?"),
        ('logger:', 'val_2: 3\nlogger:', 'val_2', 'unknown key'),
    ],
)
def test_each_mistake_is_named(old, new, part, words):
    text = swap(old, new)
    found = [problem for problem in problems(text) if words in problem]
    assert found and all('\n' not in problem for problem in found)
    assert any(problem.startswith('run.yml:') for problem in found)
    if 'missing' not in words:
        assert found[0].startswith(f'run.yml:{line_of(text, part)}: ')


def test_a_mistake_is_told_once():
    text = swap('experts: [[8], [8, 8]]', 'experts: [8]')
    found = problems(swap('type: MoEBalanceLoss', 'type: MoEBalanceLoss\n    target: [.5, .5]', text))
    assert len(found) == 1 and 'experts: must be a list of entries' in found[0]


@pytest.mark.parametrize('tau', [0.5, [5.0, 0.5]])
def test_the_temperature_is_a_number_or_a_start_and_an_end(tau):
    assert load_options(write(swap('total_iter', f'tau: {tau}\n  total_iter')))['train']['tau'] == tau


def leaves(value, keys=()):
    """The paths of all keys of nested options."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield (*keys, key)
            yield from leaves(child, (*keys, key))


ODD = [None, -1, 0.5, float('nan'), 10**30, True, 'x', [], [1], [[]], {}, {'type': [1]}, {'a': {'b': 1}}]


@pytest.mark.parametrize('text', [GOOD, BASICSR], ids=['ours', 'basicsr'])
def test_no_value_in_any_place_ends_in_anything_but_a_message(text, monkeypatch):
    monkeypatch.setattr(registered, 'refusal', lambda *_: None)  # what classes say is tested below, and slow
    document = read_yaml(write(text))
    for keys in list(leaves(document.data)):
        for odd in [*ODD, 'missing']:
            data = copy.deepcopy(document.data)
            section = data
            for key in keys[:-1]:
                section = section[key]
            section[keys[-1]] = odd
            if odd == 'missing':
                del section[keys[-1]]
            try:
                check_options(document._replace(data=data))
            except OptionsError as error:
                assert all(problem.startswith('run.yml:') for problem in error.problems)


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        # what only the constructor knows
        ({'network_g:hidden_dim': 8}, "hidden_dim belongs to the decoder 'lte'"),
        ({'network_g:decoder': 'lte', 'network_g:hidden_dim': 7}, 'even number; got 7'),
        ({'network_g:out_channels': 1, 'network_g:skip': 'bicubic'}, "skip 'bicubic' needs in_channels = out_channels"),
        (
            {'network_g:encoder': {'type': 'SwinIREncoder', 'depths': [2]}},
            'SwinIREncoder depths and num_heads must be equally long; got [2] and [6, 6, 6, 6, 6, 6]',
        ),
        ({'network_g:encoder': {'type': 'SwinIREncoder', 'num_heads': [0]}}, 'num_heads: must be a list of entries'),
        (
            {'network_g:experts': [[8], [16, 8]], 'network_g:shared_layers': 1},
            '1 needs experts whose first widths agree',
        ),
        ({'train:balance_opt:target': [0.5, 0.2]}, 'balance_opt: MoEBalanceLoss cannot be built from these options'),
        ({'train:pixel_opt:reduction': 'median'}, 'pixel_opt: L1Loss cannot be built from these options: Unsupported'),
        ({'train:optim_g:betas': [0.9, 1.5]}, 'optim_g: Adam cannot be built from these options: Invalid beta'),
        (
            {'train:scheduler': {'type': 'CosineAnnealingRestartLR', 'periods': [5], 'restart_weights': [1, 1]}},
            'scheduler: CosineAnnealingRestartLR cannot be built from these options: periods and restart_weights',
        ),
        # what two sections must be together
        ({'train:balance_opt:target': [0.5, 0.2, 0.3]}, 'must have a share for each of the 2 experts; got 3'),
        ({'train:pixel_opt': None}, "a loss is missing: the key 'pixel_opt'"),
        (
            {
                'datasets:val_2': {
                    'name': 'val',
                    'type': 'ArbitraryScaleImageDataset',
                    'dataroot_gt': 'images',
                    'scale': 3,
                }
            },
            "'val' is also the name of val",
        ),
    ],
)
def test_keys_that_do_not_fit_together(changes, words):
    document = read_yaml(write(GOOD))
    data = copy.deepcopy(document.data)
    for path, value in changes.items():
        *parents, last = path.split(':')
        section = data
        for key in parents:
            section = section[key]
        section[last] = value
    with pytest.raises(OptionsError) as caught:
        check_options(document._replace(data=data))
    assert len(caught.value.problems) == 1 and words in str(caught.value)


def test_a_network_is_built_without_touching_the_random_draws_and_its_own_failures_are_left_alone(monkeypatch):
    before = torch.get_rng_state()
    text = swap('EDSREncoder\n    num_feat: 8\n    num_block: 1', 'SwinIREncoder\n    depths: [1]\n    num_heads: [6]')
    load_options(write(text))  # SwinIR reads values back while it is built, so it takes memory
    assert torch.equal(before, torch.get_rng_state())

    def fails(self, *_, **__):
        raise RuntimeError('out of order')

    monkeypatch.setattr(torch.nn.Conv2d, '__init__', fails)
    load_options(write(GOOD))


def test_a_section_that_is_a_value_and_a_value_that_is_a_section():
    assert any(
        'train: must be a section of keys; got 3.' in problem
        for problem in problems(GOOD.partition('train:\n  optim')[0] + 'train: 3\n')
    )
    assert any(
        'lr: must be a number above 0; got a section of keys.' in problem
        for problem in problems(swap('lr: 1e-4', 'lr: {a: 1}'))
    )


def test_one_missing_folder_is_one_line_however_many_datasets_name_it():
    text = GOOD.replace('dataroot_gt: images', 'dataroot_gt: gone')
    assert len(problems(text)) == 1


def test_testing_needs_no_train_section_and_takes_test_datasets():
    text = GOOD.partition('train:\n  optim')[0].replace('  train:\n    name', '  test:\n    scale: 3\n    name')
    found = problems(text, is_train=False)  # it would measure a network as it was drawn at random
    assert len(found) == 1 and "path: the key 'pretrain_network_g' is missing" in found[0]
    assert load_options(write(text), ['val:needs_weights=false'], is_train=False)['val']['needs_weights'] is False
    opt = load_options(write(text), ['path:pretrain_network_g=images/a.png'], is_train=False)
    assert opt['val']['save_img'] is False and opt['logger']['print_freq'] == 100
    assert any('must be called test, test_2' in problem for problem in problems(GOOD, is_train=False))
