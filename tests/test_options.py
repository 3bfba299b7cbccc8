"""Options files: what they may say, what is said about mistakes, and that nothing in them runs."""
import copy
import sys

import cv2
import numpy as np
import pytest
from basicsr.utils import options as basicsr_options
from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY, MODEL_REGISTRY
from torch import nn

from moeisr_basicsr.errors import UserError
from moeisr_basicsr.options import OptionsError, check_network, check_options, load_options, parse_options, read_yaml

GOOD = """\
name: run
model_type: MoEISRModel
num_gpu: auto
manual_seed: 0
datasets:
  train:
    name: train
    type: ArbitraryScaleImageDataset
    dataroot_gt: images
    scale_range: [1, 4]
    lq_size: 8
    sample_q: 16
    batch_size_per_gpu: 2
    num_worker_per_gpu: 0
  val:
    name: val
    type: ArbitraryScaleImageDataset
    dataroot_gt: images
    scale: 2
network_g:
  type: MoEISR
  encoder:
    type: EDSREncoder
    num_feat: 8
  experts: [[8], [8, 8]]
  mapper:
    num_layers: 1
  skip: none
path:
  pretrain_network_g: ~
train:
  optim_g:
    type: Adam
    lr: 1e-4
    betas: [0.9, 0.99]
  scheduler:
    type: MultiStepLR
    milestones: [10]
    gamma: 0.5
  total_iter: 1e2
  pixel_opt:
    type: L1Loss
    loss_weight: !!float 1
  balance_opt:
    type: MoEBalanceLoss
val:
  val_freq: 10
  metrics:
    psnr:
      type: calculate_psnr_sr
      protocol: benchmark
logger:
  print_freq: 1
"""

BASICSR = """\
name: sr
model_type: SRModel
scale: 2
num_gpu: 0
manual_seed: 10
datasets:
  train:
    name: train
    type: PairedImageDataset
    dataroot_gt: images
    dataroot_lq: images
    filename_tmpl: '{}'
    io_backend:
      type: disk
    gt_size: 16
    use_hflip: true
    use_rot: true
    use_shuffle: true
    num_worker_per_gpu: 0
    batch_size_per_gpu: 1
    dataset_enlarge_ratio: 1
    prefetch_mode: ~
  val:
    name: val
    type: SingleImageDataset
    dataroot_lq: images
    io_backend:
      type: disk
network_g:
  type: EDSR
  num_in_ch: 3
  num_out_ch: 3
  num_block: 1
path:
  pretrain_network_g: ~
  strict_load_g: true
  resume_state: ~
train:
  ema_decay: 0.999
  optim_g:
    type: Adam
    lr: !!float 1e-4
    weight_decay: 0
    betas: [0.9, 0.99]
  scheduler:
    type: CosineAnnealingRestartLR
    periods: [100]
    restart_weights: [1]
    eta_min: !!float 1e-7
  total_iter: 100
  warmup_iter: -1
  pixel_opt:
    type: CharbonnierLoss
    loss_weight: 1.0
    reduction: mean
val:
  val_freq: !!float 5e3
  save_img: false
  metrics:
    psnr:
      type: calculate_psnr
      crop_border: 2
      test_y_channel: true
      better: higher
logger:
  print_freq: 100
  save_checkpoint_freq: !!float 5e3
  use_tb_logger: true
  wandb:
    project: ~
    resume_id: ~
dist_params:
  backend: nccl
  port: 29500
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder with one image below `images`, as the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'images').mkdir()
    cv2.imwrite(str(tmp_path / 'images/a.png'), np.zeros((40, 40, 3), np.uint8))
    return tmp_path


def write(text, name='run.yml'):
    with open(name, 'w') as file:
        file.write(text)
    return name


def swap(old, new, text=GOOD):
    assert text.count(old) >= 1, old
    return text.replace(old, new, 1)


def line_of(text, part):
    return next(number for number, line in enumerate(text.splitlines(), 1) if part in line)


def problems(text, force_yml=None, is_train=True):
    with pytest.raises(OptionsError) as caught:
        load_options(write(text), force_yml, is_train)
    assert str(caught.value) == '\n'.join(caught.value.problems)
    return caught.value.problems


class Args:
    """Parsed arguments of `basicsr train`."""

    def __init__(self, opt, launcher='none', auto_resume=False, debug=False, force_yml=None):
        self.opt, self.launcher, self.auto_resume = opt, launcher, auto_resume
        self.debug, self.force_yml = debug, force_yml


def test_values():
    document = read_yaml(write('a: 1e-4\nb: !!float 1\nc: 1.5e+3\nd: [1, 2.0, x]\ne: ~\nf: none\ng: 2024-01-02\n'
                               'h: 0x10\ni: {k: yes}\nz: -3\n'))
    expected = {'a': 1e-4, 'b': 1.0, 'c': 1500.0, 'd': [1, 2.0, 'x'], 'e': None, 'f': 'none', 'g': '2024-01-02',
                'h': 16, 'i': {'k': True}, 'z': -3}
    assert document.data == expected
    assert list(document.data) == list(expected)
    assert all(type(document.data[key]) is type(value) for key, value in expected.items())
    assert document.where(('i', 'k')) == 'run.yml:9'
    assert document.where(('i', 'not there')) == 'run.yml:9'


def test_merge_keys_give_way_to_own_keys():
    data = read_yaml(write('base: &base {a: 1, b: 2}\nown:\n  b: 3\n  <<: *base\n')).data
    assert data['own'] == {'a': 1, 'b': 3}


@pytest.mark.parametrize(('text', 'line', 'words'), [
    ('a: 1\nb: [1,\n', 3, 'broken YAML'),
    ('a: 1\na: 2\n', 2, 'the key a stands twice; it is already in line 1'),
    ('s:\n  a: 1\n  a: 2\n', 3, 'the key s.a stands twice'),
    ('a:\n\t- b\n', 2, 'broken YAML'),
    ('a: b: c\n', 1, 'broken YAML'),
    ('a: *nothing\n', 1, 'undefined alias'),
    ('- 1\n', 1, 'must consist of `key: value` lines'),
    ('', 1, 'must consist of `key: value` lines'),
    ('a: !!float abc\n', 1, "'abc' is no float"),
    ('a: 1\n? [x, y]\n: 2\n', 2, 'a key must be plain text'),
    ('a: !!python/object/apply:os.system ["touch ran"]\n', 1, 'the tag !!python/object/apply:os.system is not allowed'),
    ('a: !!python/name:os.system\n', 1, 'not allowed'),
    ('x: 1\na: !!python/object/new:subprocess.Popen [["touch", "ran"]]\n', 2, 'not allowed'),
    ('!!python/object/apply:os.system ["touch ran"]: 1\n', 1, 'a key must be plain text'),
    ('a: !custom 1\n', 1, 'the tag !custom is not allowed'),
    ('a: !!binary aGk=\n', 1, 'not allowed'),
    ('a: &a [*a]\n', 1, 'too large or refers to itself'),
    ('a: 1\n---\nb: 2\n', 2, 'broken YAML'),
])
def test_broken_and_hostile_yaml(folder, text, line, words):
    with pytest.raises(UserError) as caught:
        read_yaml(write(text))
    message = str(caught.value)
    assert message.startswith(f'run.yml:{line}: ') and words in message and '\n' not in message
    assert not (folder / 'ran').exists()


def test_aliases_of_aliases_do_not_fill_the_memory():
    lines = ['a0: &a0 [x, x, x, x, x, x, x, x, x, x]']
    lines += [f'a{i}: &a{i} [{", ".join([f"*a{i - 1}"] * 10)}]' for i in range(1, 12)]
    with pytest.raises(UserError, match='too large'):
        read_yaml(write('\n'.join(lines)))
    with pytest.raises(UserError, match='nested too deeply|too large'):
        read_yaml(write('a: ' + '[' * 3000 + ']' * 3000))


def test_unreadable_files(folder):
    with pytest.raises(UserError, match='nothere.yml: cannot read this options file: No such file'):
        read_yaml('nothere.yml')
    with pytest.raises(UserError, match='cannot read'):
        read_yaml(str(folder))
    (folder / 'image.yml').write_bytes(b'\x89PNG\xff\xfe')
    with pytest.raises(UserError, match='not UTF-8'):
        read_yaml('image.yml')


def test_a_good_file_passes_and_gets_defaults():
    opt = load_options(write(GOOD))
    assert opt['train']['total_iter'] == 100 and isinstance(opt['train']['total_iter'], int)
    assert opt['train']['optim_g']['lr'] == 1e-4
    assert opt['train']['pixel_opt']['loss_weight'] == 1.0
    assert opt['logger'] == {'print_freq': 1, 'save_checkpoint_freq': 5000, 'keep_checkpoints': 5, 'save_best': True,
                             'use_tb_logger': False}
    assert opt['path'] == {'pretrain_network_g': None, 'resume_state': None}
    assert opt['val']['save_img'] is False


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
        f"run.yml:{line_of(text, 'dataroot_gt: image')}: datasets: train: dataroot_gt: there is no folder image; "
        f"{found[0].split('; ')[1].split(' has')[0]} has no 'image'. Did you mean 'images'?",
        f"run.yml:{line_of(text, 'lq_size')}: datasets: train: lq_size: must be a whole number of at least 1; got 0.",
        f"run.yml:{line_of(text, 'num_fet')}: network_g: encoder: num_fet: unknown key. Did you mean 'num_feat'?",
        found[3],
        f"run.yml:{line_of(text, 'val_freq')}: val: val_freq: must be a whole number of at least 1; got 'often'.",
        "--force_yml logger:print_freq=0: logger: print_freq: must be a whole number of at least 1; got 0."]
    assert found[3].startswith(f"run.yml:{line_of(text, 'Adan')}: train: optim_g: type: must be the name of an opti")
    assert found[3].endswith("got 'Adan'. Did you mean 'Adam'?")


@pytest.mark.parametrize(('old', 'new', 'part', 'words'), [
    ('num_gpu: auto', 'num_gpus: auto', 'num_gpus', "unknown key. Did you mean 'num_gpu'?"),
    ('num_gpu: auto', 'num_gpu: all', 'num_gpu', 'must be one of auto, or a whole number of at least 0'),
    ('name: run', 'name: 7', 'name: 7', "name: must be text; got 7. Put it in quotes"),
    ('name: run\n', '', 'model_type', "the key 'name' is missing"),
    ('MoEISRModel', 'MoEISRMode', 'MoEISRMode', "Did you mean 'MoEISRModel'?"),
    ('type: ArbitraryScaleImageDataset', 'type: ArbitraryScaleImagesDataset', 'ImagesDataset',
     "Did you mean 'ArbitraryScaleImageDataset'?"),
    ('scale_range: [1, 4]', 'scale_range: [4, 1]', 'scale_range', 'must rise'),
    ('scale_range: [1, 4]', 'scale_range: [0.5, 4]', 'scale_range', 'each a number of at least 1'),
    ('scale_range: [1, 4]', 'scale_range: [1, 4, 5]', 'scale_range', 'a list of 2 entries'),
    ('scale: 2', 'scale: 0.5', 'scale: 0.5', 'must be a number of at least 1'),
    ('    scale: 2\n', '', 'val:', "the key 'scale' is missing"),
    ('sample_q: 16', 'sample_q: 65', 'sample_q', 'must be at most lq_size squared, 64'),
    ('batch_size_per_gpu: 2', 'batch_size_per_gpu: 0', 'batch_size', 'at least 1; got 0'),
    ('batch_size_per_gpu: 2\n', '\n', '  train:', "the key 'batch_size_per_gpu' is missing"),
    ('lq_size: 8', 'use_hflip: true', 'use_hflip', "unknown key. Did you mean 'use_flip'?"),
    ('  val:\n    name', '  valid:\n    name', 'valid', "a dataset must be called train, val, val_2"),
    ('type: MoEISR\n', 'type: MoEIRS\n', 'MoEIRS', "Did you mean 'MoEISR'?"),
    ('type: EDSREncoder', 'type: EDSREncodr', 'EDSREncodr', "Did you mean 'EDSREncoder'?"),
    ('num_feat: 8', 'num_feat: eight', 'num_feat', "must be a whole number of at least 1; got 'eight'"),
    ('skip: none', 'skip: bicubc', 'skip', "Did you mean 'bicubic'?"),
    ('skip: none', 'skp: none', 'skp', "Did you mean 'skip'?"),
    ('experts: [[8], [8, 8]]', 'experts: [8, 8]', 'experts', 'must be a list of entries'),
    ('num_layers: 1', 'num_layers: 6', 'num_layers', 'at least 1 and at most 5'),
    ('num_layers: 1', 'layers: 1', '    layers', "Did you mean 'num_layers'?"),
    ('pretrain_network_g: ~', 'pretrain_network_g: gone.pth', 'pretrain', 'there is no file gone.pth'),
    ('pretrain_network_g: ~', 'pretrained_network_g: ~', 'pretrain', "Did you mean 'pretrain_network_g'?"),
    ('lr: 1e-4', 'lr: fast', 'lr: fast', "must be a number above 0; got 'fast'"),
    ('lr: 1e-4', 'lr: -1', 'lr: -1', 'must be a number above 0; got -1'),
    ('betas: [0.9, 0.99]', 'beta: [0.9, 0.99]', 'beta', "Did you mean 'betas'?"),
    ('type: MultiStepLR', 'type: MultistepLR', 'MultistepLR', "Did you mean 'MultiStepLR'?"),
    ('milestones: [10]', 'milestone: [10]', 'optim', "the key 'milestones' is missing"),
    ('total_iter: 1e2', 'total_iter: 1.5', 'total_iter', 'must be a whole number'),
    ('total_iter: 1e2', 'totaliter: 10', 'totaliter', "unknown key. Did you mean 'total_iter'?"),
    ('type: L1Loss', 'type: L2Loss', 'L2Loss', "Did you mean 'L1Loss'?"),
    ('type: MoEBalanceLoss', 'type: MoEBalanceLoss\n    wieght: 1', 'wieght', "Did you mean 'loss_weight'?"),
    ('total_iter: 1e2', 'total_iter: 1e2\n  amp: bf61', '  amp: ', "Did you mean 'bf16'?"),
    ('total_iter: 1e2', 'total_iter: 1e2\n  temperature: {type: linear, start: 5}', 'temperature', "'end' is missing"),
    ('type: calculate_psnr_sr', 'type: calculate_psnr_rs', 'psnr_rs', "Did you mean 'calculate_psnr_sr'?"),
    ('protocol: benchmark', 'protocol: bench', 'protocol', "Did you mean 'benchmark'?"),
    ('val_freq: 10', 'val_freq: 10\n  budget: 0.3\n  cost_weight: 1', 'cost_weight', 'not both'),
    ('print_freq: 1', 'print_freq: 1\n  use_tb: true', 'use_tb', "Did you mean 'use_tb_logger'?"),
    ('logger:', 'val_2: 3\nlogger:', 'val_2', 'unknown key'),
])
def test_each_mistake_is_named(old, new, part, words):
    text = swap(old, new)
    found = [problem for problem in problems(text) if words in problem]
    assert found and all('\n' not in problem for problem in found)
    assert any(problem.startswith('run.yml:') for problem in found)
    if 'missing' not in words:
        assert found[0].startswith(f'run.yml:{line_of(text, part)}: ')


def leaves(value, keys=()):
    """The paths of all keys of nested options."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield (*keys, key)
            yield from leaves(child, (*keys, key))


ODD = [None, 3, -1, 0.5, float('nan'), float('inf'), 10**30, True, '', 'x', [], [1], ['a'], [[]], {}, {'type': 'x'},
       {'type': [1]}, {'a': {'b': 1}}]


@pytest.mark.parametrize('text', [GOOD, BASICSR], ids=['ours', 'basicsr'])
def test_no_value_in_any_place_ends_in_anything_but_a_message(text):
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


@pytest.mark.parametrize(('changes', 'words'), [
    ({'network_g:hidden_dim': 8}, "hidden_dim: belongs to the decoder 'lte'"),
    ({'network_g:decoder': 'lte', 'network_g:hidden_dim': 7}, 'must be even; got 7'),
    ({'network_g:in_channels': 1, 'network_g:skip': 'bicubic'}, "'bicubic' needs in_channels = out_channels; got 1"),
    ({'network_g:encoder': {'type': 'SwinIREncoder', 'depths': [2]}}, 'must have as many entries as depths, 1'),
    ({'network_g:encoder': {'type': 'SwinIREncoder', 'embed_dim': 20}}, 'embed_dim: must be even and divisible'),
    ({'train:balance_opt:target': [0.5, 0.2, 0.3]}, 'must have a share for each of the 2 experts; got 3'),
    ({'train:balance_opt:target': [0.5, 0.2]}, 'must be shares that add up to 1'),
    ({'train:pixel_opt': None}, "a loss is missing: the key 'pixel_opt'"),
    ({'datasets:val_2': {'name': 'val', 'type': 'ArbitraryScaleImageDataset', 'dataroot_gt': 'images', 'scale': 3}},
     "'val' is also the name of val"),
])
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


def test_lmdb_folders_of_basicsr_need_their_suffix():
    text = BASICSR.replace("filename_tmpl: '{}'\n    io_backend:\n      type: disk", 'io_backend: {type: lmdb}')
    found = problems(text)
    assert len(found) == 2 and all("must end in '.lmdb'; got 'images'" in problem for problem in found)


def test_a_section_that_is_a_value_and_a_value_that_is_a_section():
    assert any('train: must be a section of keys; got 3.' in problem
               for problem in problems(GOOD.partition('train:\n  optim')[0] + 'train: 3\n'))
    assert any('lr: must be a number above 0; got a section of keys.' in problem
               for problem in problems(swap('lr: 1e-4', 'lr: {a: 1}')))


def test_one_missing_folder_is_one_line_however_many_datasets_name_it():
    text = GOOD.replace('dataroot_gt: images', 'dataroot_gt: gone')
    assert len(problems(text)) == 1


def test_testing_needs_no_train_section_and_takes_test_datasets():
    text = GOOD.partition('train:\n  optim')[0].replace('  train:\n    name', '  test:\n    scale: 3\n    name')
    opt = load_options(write(text), is_train=False)
    assert opt['val'] == {'save_img': False}
    assert any('must be called test, test_2' in problem for problem in problems(GOOD, is_train=False))


def test_keys_of_another_model_are_unknown():
    text = swap('MoEISRModel', 'ArbitraryScaleModel')
    assert [problem for problem in problems(text) if 'train: balance_opt: unknown key' in problem]


def test_basicsr_files_pass_and_their_mistakes_do_not():
    load_options(write(BASICSR))
    found = problems(swap('gt_size: 16', 'gt_siz: 16', BASICSR), ['train:optim_g:type=AdamW'])
    assert "gt_siz: unknown key. Did you mean 'gt_size'?" in found[0]
    assert 'must be the name of an optimizer: Adam; got' in found[1]  # SRModel builds no other
    assert "num_blok: unknown key. Did you mean 'num_block'?" in problems(swap('num_block', 'num_blok', BASICSR))[0]
    assert 'num_block: must be a number' in problems(swap('num_block: 1', 'num_block: one', BASICSR))[0]
    assert "the key 'num_in_ch' is missing" in problems(swap('  num_in_ch: 3\n', '', BASICSR))[0]
    assert 'test_y_chanel' in problems(swap('test_y_channel', 'test_y_chanel', BASICSR))[0]


def test_the_dictionary_is_that_of_basicsr(folder, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['train.py', '-opt', write(BASICSR), '--force_yml', 'train:ema_decay=0.5',
                                      'val:metrics:psnr:crop_border=4'])
    theirs, args = basicsr_options.parse_options(str(folder), is_train=True)
    ours = parse_options(args, str(folder), is_train=True)
    extra = {key: ours.pop(key) for key in ('root_path', 'opt_file', 'launcher', 'debug')}
    assert extra == {'root_path': str(folder), 'opt_file': 'run.yml', 'launcher': 'none', 'debug': False}
    assert {key: ours['logger'].pop(key) for key in ('keep_checkpoints', 'save_best')}
    assert ours == theirs

    theirs, args = basicsr_options.parse_options(str(folder), is_train=False)
    text = BASICSR.replace('  train:\n    name', '  test:\n    name')
    write(text)
    theirs, args = basicsr_options.parse_options(str(folder), is_train=False)
    ours = parse_options(args, str(folder), is_train=False)
    assert all(ours['path'][key] == theirs['path'][key] for key in ('results_root', 'log', 'visualization'))
    assert ours['datasets'] == theirs['datasets']


def test_debug_is_a_flag_and_not_a_name(folder):
    path = write(swap('name: run', 'name: no_debugging'))
    opt = parse_options(Args(path), str(folder))
    assert (opt['name'], opt['val']['val_freq'], opt['debug']) == ('no_debugging', 10, False)
    opt = parse_options(Args(path, debug=True), str(folder))
    assert opt['name'] == 'debug_no_debugging' and opt['path']['log'].endswith('experiments/debug_no_debugging')
    assert (opt['val']['val_freq'], opt['logger']['print_freq'], opt['logger']['save_checkpoint_freq']) == (8, 1, 8)


@pytest.mark.parametrize(('entry', 'keys', 'value'), [
    ('train:ema_decay=0.999', ('train', 'ema_decay'), 0.999),  # not in the file, but known
    ('train:optim_g:lr=2e-4', ('train', 'optim_g', 'lr'), 2e-4),
    ('train:optim_g:betas=[0.5, 0.6]', ('train', 'optim_g', 'betas'), [0.5, 0.6]),
    ('manual_seed=~', ('manual_seed',), None),
    ('manual_seed=none', ('manual_seed',), None),
    ('network_g:skip=none', ('network_g', 'skip'), 'none'),  # a choice of that name, not null
    ('train:amp=none', ('train', 'amp'), 'none'),
    ('network_g:experts=[[8],[8,8],[8,8,8]]', ('network_g', 'experts'), [[8], [8, 8], [8, 8, 8]]),
    ('network_g:encoder:num_block=2', ('network_g', 'encoder', 'num_block'), 2),
    ('val:save_img=True', ('val', 'save_img'), True),
    ('name=a=b', ('name',), 'a=b'),
    ('datasets:val:scale=[2, 3.5]', ('datasets', 'val', 'scale'), [2, 3.5]),
    ('val:metrics:psnr:crop_border=3', ('val', 'metrics', 'psnr', 'crop_border'), 3),
])
def test_force_yml(entry, keys, value):
    found = load_options(write(GOOD), [entry])
    for key in keys:
        found = found[key]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(('entry', 'words'), [
    ('train:ema_deca=0.9', "'train' has no key 'ema_deca'. Did you mean 'ema_decay'?"),
    ('trian:ema_decay=0.9', "there is no key 'trian'. Did you mean 'train'?"),
    ('train:ema_decay', 'write it as key:key=value'),
    ('=3', 'write it as key:key=value'),
    ('name:x=3', "'name' has no key 'x'|'name' is a value"),
    ('datasets:val_7:scale=2', "'datasets' has no key 'val_7'"),
    ('train:optim_g:lr=__import__("os").system("touch ran")', 'must be a number'),
    ('train:optim_g:lr=[__import__("os").system("touch ran")]', ''),
    ('train:optim_g:lr=!!python/object/apply:os.system ["touch ran"]', ''),
    ('train"]; __import__("os").system("touch ran"); opt["train:ema_decay=1', 'there is no key'),
])
def test_force_yml_refuses_and_runs_nothing(folder, entry, words):
    with pytest.raises(UserError) as caught:
        load_options(write(GOOD), [entry])
    assert '\n' not in str(caught.value) and str(caught.value).startswith('--force_yml ')
    assert any(word in str(caught.value) for word in words.split('|'))
    assert not (folder / 'ran').exists()


@pytest.fixture
def foreign():
    """Register classes as another package does, and take them out again."""
    added = []

    def register(registry, entry):
        entry.__module__ = 'somebody.else'
        registry.register(entry)
        added.append((registry, entry.__name__))
    yield register
    for registry, name in added:
        del registry._obj_map[name]


def test_types_of_other_packages(foreign):
    class TheirNet(nn.Module):
        def __init__(self, width, height=3, *, depth: int = 2):
            super().__init__()

    class TheirOpenNet(nn.Module):
        def __init__(self, width=1, **kwargs):
            super().__init__()

    class TheirDataset:
        pass

    class TheirModel:
        pass

    class TheirEncoder(nn.Module):
        def __init__(self, num_in_ch=3, channels=4):
            super().__init__()

    for registry, entry in ((ARCH_REGISTRY, TheirNet), (ARCH_REGISTRY, TheirOpenNet), (ARCH_REGISTRY, TheirEncoder),
                            (DATASET_REGISTRY, TheirDataset), (MODEL_REGISTRY, TheirModel)):
        foreign(registry, entry)

    def with_network(lines):
        head, _, rest = BASICSR.partition('network_g:\n')
        return head + 'network_g:\n' + lines + 'path:' + rest.partition('path:')[2]

    load_options(write(with_network('  type: TheirNet\n  width: 3\n')))
    assert "Did you mean 'height'?" in problems(with_network('  type: TheirNet\n  width: 3\n  heigth: 3\n'))[0]
    assert "the key 'width' is missing" in problems(with_network('  type: TheirNet\n'))[0]
    load_options(write(with_network('  type: TheirOpenNet\n  anything: 3\n')))

    text = swap('type: SingleImageDataset\n    dataroot_lq: images', 'type: TheirDataset\n    theirs: 1', BASICSR)
    load_options(write(text))
    text = swap('model_type: SRModel', 'model_type: TheirModel\ntheirs: {a: 1}', BASICSR)
    load_options(write(swap('total_iter', 'their_key: 1\n  total_iter', text)))

    text = swap('type: EDSREncoder\n    num_feat: 8', 'type: TheirEncoder\n    channels: 3')
    load_options(write(text))
    assert "Did you mean 'channels'?" in problems(swap('channels: 3', 'chanels: 3', text))[0]


def test_check_network():
    good = {'type': 'LIIF', 'encoder': {'type': 'RDNEncoder', 'config': 'A'}, 'hidden_list': [8]}
    before = copy.deepcopy(good)
    check_network(good, 'model.safetensors')
    assert good == before
    with pytest.raises(OptionsError) as caught:
        check_network({**good, 'encoder': {'type': 'RDNEncoder', 'config': 'C'}, 'x': 1}, 'model.safetensors')
    assert caught.value.problems == [
        "model.safetensors: network_g: encoder: config: must be one of A, B; got 'C'.",
        caught.value.problems[1]]
    assert caught.value.problems[1].startswith('model.safetensors: network_g: x: unknown key.')
    with pytest.raises(OptionsError, match='must be a section'):
        check_network([1], 'model.safetensors')
