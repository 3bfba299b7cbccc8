"""Every key that an options file may have: what it may be, what it means, its default. One row per key.

`basicsr train --keys` prints these tables. Below a `type` stand the arguments of the class that it names; see
`registered`.
"""

import functools
import inspect
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BaseModel, Field, create_model

from moeisr_basicsr.errors import did_you_mean

from .registered import (
    Loss,
    Metric,
    Network,
    OptimizerSection,
    PerceptualLoss,
    SchedulerSection,
    Typed,
    registered,
    registry,
)
from .values import (
    Count,
    Factors,
    File,
    FolderName,
    Key,
    Positive,
    PositiveNumber,
    Section,
    Share,
    Text,
    Weights,
    described,
    opened,
)


class IOBackend(Section):
    type: Literal['disk', 'lmdb'] = Key('where images lie')


class Dataset(Section):
    """What the loaders read of every dataset."""

    type: str = Key('class')
    name: FolderName = Key('name in logs and folders')
    phase: Text = Key("set from the section's name", None)
    io_backend: IOBackend = Key('disk or lmdb', None)
    scale: Factors = Key('factor, or [rows, columns]', None)
    crop_border: Count | Annotated[list[Count], Field(min_length=2, max_length=2)] = Key(
        "shave of this dataset's metrics, or [rows, columns], in place of the metrics' own", None
    )
    batch_size_per_gpu: Positive = Key('in training: images per batch and process', None)
    num_worker_per_gpu: Count = Key('in training: loader processes per process', None)
    dataset_enlarge_ratio: Positive = Key('in training: how often one epoch shows each image', 1)
    on_damaged: Literal['stop', 'skip'] = Key(
        'in training: what to do when an image cannot be used; skip takes others for up to 1 % of them, at most 100',
        'stop',
    )
    use_shuffle: bool = Key('ignored; BasicSR always shuffles', None)
    pin_memory: bool = Key('faster copies to a GPU', False)
    persistent_workers: bool = Key('keep loader processes between epochs', True)
    prefetch_mode: Literal['cpu', 'cuda'] = Key('load batches ahead', None)
    num_prefetch_queue: Positive = Key('batches that a loader process loads ahead', 2)


@functools.lru_cache(maxsize=64)
def dataset_model(entry: Any) -> type[Section]:
    """The keys of a dataset: what the loaders read, and its own as its class attribute `Options` declares them."""
    own = getattr(entry, 'Options', None)
    if inspect.isclass(own) and issubclass(own, BaseModel):
        bases: Any = (own, Dataset)  # the user's model need not be a Section
        return create_model(entry.__name__, __base__=bases)
    return opened(Dataset)


class Path(Section):
    pretrain_network_g: Weights = Key('weights (.pth or .safetensors) to start from, or to test', None)
    strict_load_g: bool = Key('whether every weight must fit', True)
    param_key_g: Text = Key('params or params_ema', None)
    resume_state: File = Key('training state to go on from; --auto_resume finds it by itself', None)


class Train(Section):
    """What BasicSR's SRModel reads."""

    total_iter: Positive = Key('iterations; one is one optimizer step')
    warmup_iter: Annotated[int, Field(ge=-1)] = Key('iterations of linear warm-up; -1 for none', -1)
    optim_g: OptimizerSection = Key('optimizer')
    scheduler: SchedulerSection = Key('learning rate over the iterations')
    ema_decay: Share = Key('decay of the averaged weights; 0 for none', 0)
    pixel_opt: Loss = Key('loss between output and truth', None)
    perceptual_opt: PerceptualLoss = Key('perceptual loss; for images, not for queries', None)


class ArbitraryScaleTrain(Train):
    fix_encoder: Count = Key('first iterations in which the encoder stays as it is', 0)
    encoder_lr_mul: PositiveNumber = Key("factor on the encoder's learning rate", 1.0)
    amp: Literal['none', 'bf16', 'fp16'] = Key('number format of the network in training', 'none')
    accumulate: Positive = Key('parts that a batch is cut into, to save memory; the gradient stays the same', 1)
    grad_clip: PositiveNumber = Key('largest norm of the gradient', None)
    compile: bool | dict = Key('torch.compile of the encoder; or its arguments', False)
    channels_last: bool = Key('memory layout that suits convolutions', False)
    tf32: bool = Key('TF32 on NVIDIA GPUs', None)
    non_finite: Literal['stop', 'skip'] = Key('what to do when a loss is not finite', 'stop')


class MoEISRTrain(ArbitraryScaleTrain):
    balance_opt: Loss = Key('loss that balances the experts', None)
    experts_opt: Loss = Key('loss of every expert on every query (MoEISR-J)', None)
    tau: PositiveNumber | Annotated[list[PositiveNumber], Field(min_length=2, max_length=2)] = Key(
        'Gumbel temperature; [start, end] anneals it exponentially over total_iter', 1.0
    )


class Val(Section):
    """What BasicSR's SRModel reads."""

    val_freq: Positive = Key('in training: iterations between two validations', None)
    needs_weights: bool = Key('in testing: whether `path: pretrain_network_g` must name weights', True)
    save_img: bool = Key('write the result images', False)
    pbar: bool = Key('show a progress bar', None)
    suffix: Text = Key('text at the end of the names of result images', None)
    metrics: dict[str, Metric] = Key('name: {type: calculate_psnr, ...}', None)


class ArbitraryScaleVal(Val):
    bicubic_baseline: bool = Key('measure bicubic interpolation beside the model', False)
    budget: Annotated[float, Field(gt=0, le=1)] = Key(
        'decoder cost as a fraction of the most expensive expert everywhere', None
    )
    cost_weight: float = Key('kappa: above 0 cheaper, below 0 more expensive than the trained routing', None)
    precision: Literal['fp32', 'bf16', 'fp16'] = Key('number format of encoder and experts', 'fp32')
    shuffle_experts: bool = Key('control experiment: permute the chosen experts over the pixels of each image', False)
    save_expert_map: bool = Key('write the expert maps beside the images', False)
    save_references: bool = Key('in testing, write the truth and the bicubic image beside the images', False)
    measure: bool = Key('in testing, measure the memory of each image too', False)


class WandB(Section):
    project: Text = Key('project', None)
    resume_id: Text = Key('run to go on with', None)


class Logger(Section):
    print_freq: Positive = Key('iterations between two lines of the log', 100)
    save_checkpoint_freq: Positive = Key('iterations between two checkpoints', 5000)
    keep_checkpoints: Count = Key('newest checkpoints to keep; 0 keeps all', 5)
    use_tb_logger: bool = Key('write TensorBoard files', False)
    wandb: WandB = Key('Weights & Biases', None)


class DistParams(Section):
    backend: Literal['nccl', 'gloo'] = Key('communication library', None)
    port: Annotated[int, Field(ge=1, le=65535)] = Key('port of the first process, under slurm', None)
    timeout: PositiveNumber = Key('minutes that processes wait for each other', None)


def registered_model(name: str) -> str:
    known = list(registered('MODEL'))
    if name not in known:
        listed = ', '.join(known)
        raise ValueError(f'must be the name of a registered model: {listed}; got {name!r}.{did_you_mean(name, known)}')
    return name


ModelName = Annotated[Text, AfterValidator(registered_model), described('the name of a registered model')]
DatasetSection = Annotated[dict, Typed('a registered dataset', registry('DATASET'), dataset_model)]


class Options(Section):
    """The whole file, for BasicSR's SRModel."""

    name: FolderName = Key('name of the run; its folder is experiments/<name> or results/<name>')
    model_type: ModelName = Key('MoEISRModel, ArbitraryScaleModel, or a model of BasicSR')
    scale: Factors = Key('factor given to every dataset; leave it out to train at many factors', None)
    num_gpu: Literal['auto'] | Count = Key('GPUs; auto takes all, 0 the CPU', 'auto')
    manual_seed: Annotated[int, Field(ge=0, le=10**18)] = Key(
        'seed of all random draws; drawn where it is not given', None
    )
    cudnn_benchmark: bool = Key('let cuDNN time its algorithms; faster, but not the same bits from run to run', True)
    find_unused_parameters: bool = Key('option of DistributedDataParallel', False)
    dist_params: DistParams = Key('distributed training', None)
    network_g: Network = Key('the network')
    datasets: dict[str, DatasetSection] = Key('train, val, val_2, ... in training; test, test_2, ... in testing')
    path: Path = Field(default_factory=Path, description='files to start from')
    train: Train = Key('training', None)
    val: Val = Key('validation', None)
    logger: Logger = Field(default_factory=Logger, description='logging')


class OneNetwork(Section):
    """A network by itself, which is built at once after the check."""

    network_g: Annotated[dict, Typed('a registered network', registry('ARCH'))] = Key('the network')


class ArbitraryScaleOptions(Options):
    """For ArbitraryScaleModel."""

    train: ArbitraryScaleTrain = Key('training', None)
    val: ArbitraryScaleVal = Key('validation', None)


class MoEISROptions(ArbitraryScaleOptions):
    """For MoEISRModel."""

    train: MoEISRTrain = Key('training', None)


def options_model(model_type: Any) -> type[Options]:
    """The keys of a whole file. Models of others, and BasicSR's own but SRModel, read keys that are not known here."""
    entry = registered('MODEL').get(model_type) if isinstance(model_type, str) else None
    parents = [] if entry is None else [parent.__name__ for parent in inspect.getmro(entry)]
    if entry is None or 'MoEISRModel' in parents:
        model: type[Options] = MoEISROptions
    else:
        model = ArbitraryScaleOptions if 'ArbitraryScaleModel' in parents else Options
    if model_type in ('MoEISRModel', 'ArbitraryScaleModel', 'SRModel'):
        return model
    free: dict[str, Any] = {
        name: (opened(cast(Any, model.model_fields[name].annotation)), model.model_fields[name])
        for name in ('path', 'train', 'val')
    }
    base: Any = opened(model)
    return create_model(model.__name__, __base__=base, **free)
