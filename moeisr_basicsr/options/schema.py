"""Every key that an options file may have: its kind, what it means, its default. One row per key.

A row is `'key': Key(kind, 'meaning', ...)`. `basicsr train --keys` prints these tables. Keys of networks, losses,
metrics, optimizers and schedulers are not listed here: they are the arguments of the class that `type` names.
"""

from dataclasses import dataclass
from typing import Any

from .kinds import AnyOf, Block, Bool, Choice, Data, File, FolderName, Int, Kind, ListOf, Number, Text

UNSET = object()


@dataclass(frozen=True)
class Key:
    """One key of a section.

    Args:
        kind: What its value may be.
        about: What it means, for people.
        required: Whether it must be there.
        null: Whether `~` may stand for 'not given'.
        default: Filled in where the key is missing.
    """

    kind: Kind
    about: str
    required: bool = False
    null: bool = False
    default: Any = UNSET


Table = dict[str, Key]


@dataclass(frozen=True)
class Section(Kind):
    """A section with known keys; `open` sections also take unknown ones."""

    table: Table
    open: bool = False

    def words(self) -> str:
        return 'a section of keys'

    def accepts(self, value: Any) -> bool:
        return isinstance(value, dict)


@dataclass(frozen=True)
class Named(Kind):
    """A section whose keys are names that the user chooses, each with a value of the same kind."""

    item: Kind

    def words(self) -> str:
        return 'a section of names'

    def accepts(self, value: Any) -> bool:
        return isinstance(value, dict)


@dataclass(frozen=True)
class Typed(Kind):
    """A section whose `type` names a class; its other keys are that class's arguments. `what`: see `typed.TYPES`."""

    what: str

    def words(self) -> str:
        return 'a section with a `type`'

    def accepts(self, value: Any) -> bool:
        return isinstance(value, dict)


FACTOR = AnyOf((Number(least=1), ListOf(Number(least=1), length=2)))
POSITIVE = Int(least=1)
COUNT = Int(least=0)
WEIGHTS = 'weights (.pth or .safetensors) to start from'

TOP: Table = {
    'name': Key(FolderName(), 'name of the run; its folder is experiments/<name> or results/<name>', required=True),
    'model_type': Key(Text(), 'ArbitraryScaleModel, MoEISRModel, or a model of BasicSR', required=True),
    'scale': Key(FACTOR, 'factor given to every dataset; leave it out to train at many factors'),
    'num_gpu': Key(AnyOf((Choice(('auto',)), COUNT)), 'GPUs; auto takes all, 0 the CPU', default='auto'),
    'manual_seed': Key(COUNT, 'seed of all random draws; drawn where it is not given', null=True),
    'cudnn_benchmark': Key(Bool(), 'let cuDNN time its algorithms; faster, but not the same bits from run to run'),
    'find_unused_parameters': Key(Bool(), 'option of DistributedDataParallel'),
    'dist_params': Key(
        Section(
            {
                'backend': Key(Choice(('nccl', 'gloo')), 'communication library'),
                'port': Key(Int(1, 65535), 'port of the first process, under slurm'),
                'timeout': Key(Number(above=0), 'minutes that processes wait for each other'),
            }
        ),
        'distributed training',
        null=True,
    ),
    'network_g': Key(Typed('network'), 'the network', required=True),
    'datasets': Key(
        Named(Typed('dataset')), 'train, val, val_2, ... in training; test, test_2, ... in testing', required=True
    ),
}

PATH: Table = {
    'pretrain_network_g': Key(File(), WEIGHTS, null=True),
    'strict_load_g': Key(Bool(), 'whether every weight must fit', null=True),
    'param_key_g': Key(Text(), 'params or params_ema', null=True),
    'resume_state': Key(
        File(), 'training state to go on from; --auto_resume finds it by itself', null=True, default=None
    ),
}

# Keys of BasicSR that cannot be honoured here, and what is said about them.
REFUSED = {
    ('path', 'ignore_resume_networks'): 'a resumed run takes its networks from the checkpoint; leave this key out.'
}

LOGGER: Table = {
    'print_freq': Key(POSITIVE, 'iterations between two lines of the log', default=100),
    'save_checkpoint_freq': Key(POSITIVE, 'iterations between two checkpoints', default=5000),
    'keep_checkpoints': Key(COUNT, 'newest checkpoints to keep; 0 keeps all', default=5),
    'save_best': Key(Bool(), 'keep the weights that are the best of a metric', default=True),
    'use_tb_logger': Key(Bool(), 'write TensorBoard files', default=False),
    'wandb': Key(
        Section(
            {'project': Key(Text(), 'project', null=True), 'resume_id': Key(Text(), 'run to go on with', null=True)}
        ),
        'Weights & Biases',
        null=True,
    ),
}

TRAIN: Table = {
    'total_iter': Key(POSITIVE, 'iterations; one is one optimizer step', required=True),
    'warmup_iter': Key(Int(least=-1), 'iterations of linear warm-up; -1 for none', null=True),
    'optim_g': Key(Typed('optimizer'), 'optimizer', required=True),
    'scheduler': Key(Typed('scheduler'), 'learning rate over the iterations', required=True),
    'ema_decay': Key(Number(least=0, most=1), 'decay of the averaged weights; 0 for none'),
    'pixel_opt': Key(Typed('loss'), 'loss between output and truth', null=True),
    'perceptual_opt': Key(Typed('loss'), 'perceptual loss; for images, not for queries', null=True),
}

TRAIN_OURS: Table = {
    'trainable': Key(ListOf(Text()), 'parts of the network that train, such as decoder.mapper', null=True),
    'restart': Key(ListOf(Text()), 'parts of the network that do not start from path: pretrain_network_g', null=True),
    'amp': Key(Choice(('none', 'bf16', 'fp16')), 'number format of the network in training', null=True),
    'accumulate': Key(POSITIVE, 'parts that a batch is cut into, to save memory; the gradient stays the same'),
    'grad_clip': Key(Number(above=0), 'largest norm of the gradient', null=True),
    'compile': Key(AnyOf((Bool(), Block())), 'torch.compile of the encoder; or its arguments'),
    'channels_last': Key(Bool(), 'memory layout that suits convolutions'),
    'tf32': Key(Bool(), 'TF32 on NVIDIA GPUs'),
    'non_finite': Key(Choice(('stop', 'skip')), 'what to do when a loss is not finite'),
    'non_finite_limit': Key(COUNT, 'skipped steps that a run tolerates'),
}

TRAIN_MOEISR: Table = {
    'balance_opt': Key(Typed('loss'), 'loss that balances the experts', null=True),
    'experts_opt': Key(Typed('loss'), 'loss of every expert on every query', null=True),
    'temperature': Key(
        Section(
            {
                'type': Key(Choice(('constant', 'linear', 'exponential', 'cosine')), 'course over the iterations'),
                'start': Key(Number(above=0), 'temperature at the first iteration', required=True),
                'end': Key(Number(above=0), 'temperature from total_iter on'),
                'total_iter': Key(POSITIVE, 'iterations until `end`'),
            }
        ),
        'Gumbel temperature; the constant tau of network_g where it is not given',
        null=True,
    ),
    'mapper_spread': Key(Number(least=0), "deviation of the mapper's logits at the start (1); 0: as initialised"),
}

VAL: Table = {
    'val_freq': Key(POSITIVE, 'iterations between two validations'),
    'save_img': Key(Bool(), 'write the result images', default=False),
    'pbar': Key(Bool(), 'show a progress bar'),
    'suffix': Key(Text(), 'text at the end of the names of result images', null=True),
    'metrics': Key(Named(Typed('metric')), 'name: {type: calculate_psnr, ...}', null=True),
}

VAL_OURS: Table = {
    'bicubic_baseline': Key(Bool(), 'measure bicubic interpolation beside the model'),
    'budget': Key(Number(above=0, most=1), 'decoder cost as a fraction of the heaviest expert everywhere', null=True),
    'cost_weight': Key(Number(), 'kappa: above 0 cheaper, below 0 dearer than the trained routing', null=True),
    'precision': Key(Choice(('fp32', 'bf16', 'fp16')), 'number format of encoder and experts (fp32)'),
    'shuffle_experts': Key(Bool(), 'control experiment: permute the chosen experts over the pixels of each image'),
    'save_expert_map': Key(Bool(), 'write the expert maps beside the images'),
    'save_references': Key(Bool(), 'in testing, write the truth and the bicubic image beside the images, for reports'),
    'tb_images': Key(COUNT, 'images per dataset that TensorBoard shows'),
    'measure': Key(Bool(), 'in testing, measure the memory of each image too'),
}

IO_BACKEND = Section(
    {
        'type': Key(Choice(('disk', 'lmdb', 'memcached')), 'where images lie', required=True),
        'db_paths': Key(Kind(), 'LMDB folders; set by the dataset'),
        'client_keys': Key(Kind(), 'their names; set by the dataset'),
        'server_list_cfg': Key(File(), 'memcached'),
        'client_cfg': Key(File(), 'memcached'),
        'sys_path': Key(Text(), 'memcached', null=True),
    }
)

DATASET: Table = {
    'name': Key(FolderName(), 'name in logs and folders', required=True),
    'io_backend': Key(IO_BACKEND, 'disk or lmdb'),
    'scale': Key(FACTOR, 'factor, or [rows, columns]'),
    'crop_border': Key(
        AnyOf((COUNT, ListOf(COUNT, length=2))),
        "shave of this dataset's metrics, or [rows, columns], in place of the metrics' own",
    ),
    'phase': Key(Text(), "set from the section's name"),
    'pin_memory': Key(Bool(), 'faster copies to a GPU'),
    'persistent_workers': Key(Bool(), 'keep loader processes between epochs'),
    'prefetch_mode': Key(Choice(('cpu', 'cuda')), 'load batches ahead', null=True),
    'num_prefetch_queue': Key(POSITIVE, 'batches that prefetch_mode cpu loads ahead'),
}

DATASET_TRAIN: Table = {
    'batch_size_per_gpu': Key(POSITIVE, 'images per batch and process', required=True),
    'num_worker_per_gpu': Key(COUNT, 'loader processes per process', required=True),
    'dataset_enlarge_ratio': Key(POSITIVE, 'how often one epoch shows each image'),
    'use_shuffle': Key(Bool(), 'ignored; BasicSR always shuffles'),
}

IMAGES: Table = {
    'dataroot_gt': Key(Data(), 'folder or LMDB of the HR images', null=True),
    'dataroot_lq': Key(Data(), 'folder or LMDB of the LR images', null=True),
    'meta_info_file': Key(File(), 'text file that lists the images', null=True),
    'filename_tmpl': Key(Text(), 'name of an LR image from that of its HR image'),
    'gt_size': Key(POSITIVE, 'side of the HR training patch', null=True),
    'use_hflip': Key(Bool(), 'random flips'),
    'use_rot': Key(Bool(), 'random turns'),
    'mean': Key(ListOf(Number()), 'subtracted from every channel', null=True),
    'std': Key(ListOf(Number(above=0)), 'divides every channel', null=True),
    'color': Key(Choice(('y',)), 'y for the luma channel only', null=True),
}

# What BasicSR's other datasets read beside DATASET and IMAGES. Their values are left to them.
FREE = Key(Kind(), 'read by BasicSR', null=True)
VIDEO = (
    'dataroot_flow',
    'val_partition',
    'num_frame',
    'interval_list',
    'random_reverse',
    'flip_sequence',
    'test_mode',
    'cache_data',
    'padding',
    'use_duf_downsampling',
)
DEGRADATION = tuple(
    f'{key}{stage}'
    for stage in ('', '2')
    for key in (
        'blur_kernel_size',
        'kernel_list',
        'kernel_prob',
        'sinc_prob',
        'blur_sigma',
        'betag_range',
        'betap_range',
    )
)
BASICSR_DATASET: Table = dict.fromkeys((*VIDEO, *DEGRADATION, 'meta_info', 'final_sinc_prob'), FREE)

# Read by models of BasicSR other than SRModel.
RESTORATION = tuple(
    f'{key}{stage}'
    for stage in ('', '2')
    for key in (
        'resize_prob',
        'resize_range',
        'gaussian_noise_prob',
        'noise_range',
        'poisson_scale_range',
        'gray_noise_prob',
        'jpeg_range',
    )
)
BASICSR_TOP: Table = {
    **dict.fromkeys(
        (
            *RESTORATION,
            'second_blur_prob',
            'gt_size',
            'queue_size',
            'gt_usm',
            'l1_gt_usm',
            'percep_gt_usm',
            'gan_gt_usm',
            'high_order_degradation',
        ),
        FREE,
    ),
    **{
        key: Key(Kind(), 'ignored; some files of BasicSR still have it here', null=True)
        for key in ('save_img', 'suffix', 'crop_border')
    },
}
BASICSR_TRAIN: Table = {
    **dict.fromkeys(
        (
            'net_d_iters',
            'net_d_init_iters',
            'tsa_iter',
            'dcn_lr_mul',
            'fix_flow',
            'flow_lr_mul',
            'lr_flow',
            'r1_reg_weight',
            'path_batch_shrink',
            'path_reg_weight',
            'net_g_reg_every',
            'net_d_reg_every',
            'mixing_prob',
        ),
        FREE,
    ),
    'optim_d': Key(Typed('optimizer'), 'optimizer of the discriminator', null=True),
    **{
        key: Key(Typed('loss'), 'loss of an adversarial model', null=True)
        for key in ('gan_opt', 'ldl_opt', 'feature_matching_opt')
    },
}
BASICSR_VAL: Table = dict.fromkeys(('flip_seq', 'center_frame_only'), FREE)

_OURS: Table = {
    'dataroot_gt': Key(Data(), 'folder or LMDB of the HR images', required=True),
    'meta_info_file': Key(File(), 'text file that lists the images', null=True),
    'seed': Key(COUNT, "seed of the draws; the run's manual_seed where it is not given", null=True),
    'repeat': Key(POSITIVE, 'how often the dataset holds each image'),
    'cache': Key(Choice(('none', 'memory')), 'memory keeps the decoded images, for all workers at once'),
    'lq_size': Key(POSITIVE, 'side of the LR training patch (default 48)'),
    'sample_q': Key(POSITIVE, 'query pixels per training item, at most lq_size squared (default 2304)'),
    'use_flip': Key(Bool(), 'random flips (default true)'),
    'use_rot': Key(Bool(), 'random transposition (default true)'),
}

# What our datasets read beside DATASET.
DATASET_OURS: dict[str, Table] = {
    'ArbitraryScaleImageDataset': {
        **_OURS,
        'downsample': Key(
            Choice(('matlab', 'pil')),
            'bicubic that makes the LR image (default: pil in training, matlab in validation)',
        ),
        'scale_range': Key(ListOf(Number(least=1), length=2), 'least and greatest factor in training (default [1, 4])'),
        'asymmetric': Key(Bool(), 'draw a factor for the rows and another for the columns'),
    },
    'ArbitraryScalePairedDataset': {
        **_OURS,
        'dataroot_lq': Key(Data(), 'folder or LMDB of the LR images', required=True),
        'filename_tmpl': Key(Text(), "name of the LR image, with {} for that of its HR image (default '{}')"),
    },
}
