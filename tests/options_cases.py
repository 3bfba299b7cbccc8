"""Options files, and how the tests of the options write, change and check them in the current folder."""

import pytest

from moeisr_basicsr.options import OptionsError, load_options

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
    num_block: 1
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
