"""Training on queries and validation at several scales, as a BasicSR model.

BasicSR's own `train_pipeline` and the plugin's training loop both drive it. One iteration is one optimizer step.

Shapes: B images, C channels, (h, w) LR size, Q queries, (R, S) output size.
"""

from collections import OrderedDict
from collections.abc import Callable, Set
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger
from basicsr.utils.registry import MODEL_REGISTRY
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from moeisr_basicsr.atomic_file import save_atomic
from moeisr_basicsr.checkpoint import resolve_network
from moeisr_basicsr.errors import UserError

from .batch import Batch
from .evaluation import Evaluated, Journal
from .image_evaluation import ImageEvaluator, size_of
from .non_finite import NonFiniteGuard
from .optimizers import build_optimizer, build_scheduler, step_schedulers
from .precision import Precision, compile_network
from .validator import report, run_validation
from .weights import bare_weights, load_weights


@MODEL_REGISTRY.register()
class ArbitraryScaleModel(SRModel):
    """SRModel for networks that answer queries at any position.

    Training items with `coord` and `cell` go through `net(lq, coord, cell)`, items without through `net(lq)`.
    Beyond SRModel it reads from `train`: fix_encoder, encoder_lr_mul (as BasicSR's fix_flow and flow_lr_mul), amp,
    tf32, channels_last, compile, accumulate, grad_clip, non_finite, every torch.optim class and scheduler; from `val`:
    bicubic_baseline, protocols per metric.
    """

    net_g: nn.Module
    whole_batch_losses: tuple[str, ...] = ()  # losses of a part that already stand for the whole batch
    pretrained: Set[str] = frozenset()  # parameters that came from path: pretrain_network_g

    def __init__(self, opt: dict):
        if not torch.cuda.is_available():
            opt = {**opt, 'num_gpu': 0}
        super().__init__(opt)

    def model_to_device(self, net: nn.Module) -> nn.Module:
        """Move, lay out, compile and, in distributed training, wrap the network."""
        self.opt['network_g'] = resolve_network(self.opt['network_g'], net)  # as checkpoints keep it: without files
        train_opt = self.opt.get('train') or {}
        self.precision = Precision(train_opt, self.device)
        net = self.precision.network(net.to(self.device))
        if not self.is_train:
            return net
        self.fix_encoder(net)  # before DDP, which waits for every trainable gradient
        if train_opt.get('compile'):
            compile_network(net, train_opt['compile'])
        if not self.opt['dist'] and self.opt['num_gpu'] > 1:
            get_root_logger().warning(
                f'num_gpu is {self.opt["num_gpu"]}, but one process uses one GPU: launch with torchrun to use them all.'
            )
        return self.distributed(net)

    def distributed(self, net: nn.Module) -> nn.Module:
        """The network, wrapped if there are other processes."""
        if not self.opt['dist']:
            return net
        return DistributedDataParallel(
            net,
            device_ids=[torch.cuda.current_device()] if self.device.type == 'cuda' else None,
            gradient_as_bucket_view=True,
            find_unused_parameters=self.opt.get('find_unused_parameters', False),
        )

    def fix_encoder(self, net: nn.Module) -> None:
        """Keep the encoder as it is for `train: fix_encoder` iterations, and remember what will train then."""
        self.fixed: list[nn.Parameter] = []
        if not self.opt['train'].get('fix_encoder'):
            return
        encoder = self.encoder_of(net)
        self.fixed = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
        encoder.requires_grad_(False)

    def release_encoder(self) -> None:
        """Let the encoder train, from here on."""
        net: Any = self.get_bare_model(self.net_g)
        for parameter in self.fixed:
            parameter.requires_grad_(True)
        net.encoder.train()
        self.fixed = []
        self.net_g = self.distributed(net)  # a new one: DDP exchanges what was trainable when it was made
        get_root_logger().info('The encoder trains from this iteration on.')

    def encoder_of(self, net: nn.Module) -> nn.Module:
        """The part that `fix_encoder` and `encoder_lr_mul` are about."""
        if not hasattr(net, 'encoder'):
            raise UserError(f'train: fix_encoder and encoder_lr_mul: {type(net).__name__} has no encoder.')
        encoder: Any = net.encoder
        return encoder

    def load_network(self, net: nn.Module, load_path: str, strict: bool = True, param_key: str | None = 'params'):
        """Load weights (.pth, .safetensors, or a shipped model) without running code from the file."""
        network_opt = self.opt['network_g'] if net is self.net_g else None
        self.pretrained = load_weights(self.get_bare_model(net), load_path, strict, param_key, network_opt)

    def init_training_settings(self) -> None:
        """EMA, losses, optimizer and scheduler, as SRModel; then what is ours."""
        train_opt = self.opt['train']
        super().init_training_settings()
        if self.fixed:
            self.get_bare_model(self.net_g).encoder.eval()  # its running statistics stay as they are too
        if self.ema_decay > 0:
            self.net_g_ema.requires_grad_(False)  # fp32, like the trained weights: AMP only changes the forward
        self.accumulate = int(train_opt.get('accumulate', 1))
        if self.accumulate < 1:
            raise UserError(f'train: accumulate must be at least 1; got {self.accumulate}.')
        self.grad_clip = float(train_opt.get('grad_clip') or float('inf'))
        self.guard = NonFiniteGuard(train_opt)

    def setup_optimizers(self) -> None:
        """The optimizer of `train: optim_g`; the encoder's rate is `encoder_lr_mul` times that of the rest.

        The encoder comes last and is a group of its own whatever its rate, whether it rests or not: an optimizer's
        state knows parameters by their order, and a resumed run may change both.
        """
        train_opt, net = self.opt['train'], self.get_bare_model(self.net_g)
        parameters = [one for one in net.parameters() if one.requires_grad] + self.fixed
        groups: list = parameters
        factor = train_opt.get('encoder_lr_mul', 1)
        if factor != 1 or hasattr(net, 'encoder'):
            own = {id(one) for one in self.encoder_of(net).parameters()}
            groups = [
                {'params': [one for one in parameters if id(one) not in own]},
                {'params': [one for one in parameters if id(one) in own], 'lr': train_opt['optim_g']['lr'] * factor},
            ]
        self.optimizer_g = build_optimizer(train_opt['optim_g'], groups)
        self.optimizers.append(self.optimizer_g)

    def setup_schedulers(self) -> None:
        """The scheduler of `train: scheduler`, for every optimizer."""
        train_opt = self.opt['train']
        self.schedulers = [
            build_scheduler(train_opt['scheduler'], optimizer, int(train_opt['total_iter']))
            for optimizer in self.optimizers
        ]

    def update_learning_rate(self, current_iter: int, warmup_iter: int = -1) -> None:
        """Schedule times linear warm-up."""
        step_schedulers(self.schedulers, current_iter, warmup_iter)

    def feed_data(self, data: dict) -> None:
        """Take a collated batch."""
        self.batch = Batch.from_data(data, self.device)
        self.lq = self.batch.lq
        if self.batch.gt is not None:
            self.gt = self.batch.gt
        elif hasattr(self, 'gt'):
            del self.gt

    def optimize_parameters(self, current_iter: int) -> None:
        """One optimizer step on the batch, in `accumulate` parts: the gradient is the whole batch's.

        Raises:
            NonFiniteLossError: A loss or gradient is not finite, as `train: non_finite` decides.
        """
        if self.fixed and current_iter > self.opt['train']['fix_encoder']:
            self.release_encoder()
        self.optimizer_g.zero_grad(set_to_none=True)
        parts = self.batch.split(self.accumulate)
        losses, statistics = self.accumulate_gradients(parts, current_iter)
        scaler = self.precision.scaler
        scaler.unscale_(self.optimizer_g)
        parameters = [parameter for group in self.optimizer_g.param_groups for parameter in group['params']]
        norm = nn.utils.clip_grad_norm_(parameters, self.grad_clip)
        # The scaler finds infinite fp16 gradients by itself, lowers its factor and goes on.
        watched = losses if scaler.is_enabled() else {**losses, 'grad_norm': norm}
        self.log_dict = self.for_log(OrderedDict({**losses, **statistics, 'grad_norm': norm}))
        if self.guard.accept(watched, self.log_dict, self.batch, current_iter):
            scaler.step(self.optimizer_g)
            if self.ema_decay > 0:
                self.model_ema(decay=self.ema_decay)
        scaler.update()
        if self.guard.skipped:
            self.log_dict['skipped_steps'] = float(self.guard.skipped)

    def accumulate_gradients(self, parts: list[Batch], current_iter: int) -> tuple[dict, dict]:
        """Forward and backward of every part: the losses and the statistics of the whole batch on this rank."""
        losses: dict[str, Tensor] = {}
        statistics: dict[str, Tensor] = {}
        images = sum(part.lq.shape[0] for part in parts)
        for part, draws in zip(parts, self.prepare_parts(parts, current_iter)):
            weight = part.lq.shape[0] / images
            with self.gradient_exchange(last=part is parts[-1]):
                part_losses, part_statistics = self.part_losses(part, draws)
                total = sum(
                    loss * (1.0 if name in self.whole_batch_losses else weight) for name, loss in part_losses.items()
                )
                assert isinstance(total, Tensor)  # there is a loss: BasicSR sees to it
                self.precision.scaler.scale(total).backward()
            for sums, values in ((losses, part_losses), (statistics, part_statistics)):
                for name, value in values.items():
                    sums[name] = sums.get(name, 0) + value.detach() * weight
        return losses, statistics

    def prepare_parts(self, parts: list[Batch], current_iter: int) -> list:
        """What `part_losses` needs beside each part; nothing here, random draws where there are experts."""
        return [None] * len(parts)

    def part_losses(self, part: Batch, draws: object) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weighted losses, and statistics without gradient, of one part of the batch."""
        with self.precision.autocast():
            lq = self.precision.images(part.lq)
            output = self.net_g(lq) if part.coord is None else self.net_g(lq, part.coord, part.cell)
        return self.reconstruction_losses(output, part), {}

    def reconstruction_losses(self, output: Tensor, part: Batch) -> dict[str, Tensor]:
        """BasicSR's pixel and perceptual losses, in fp32 or better.

        Raises:
            UserError: The output has another shape than the truth.
        """
        if part.gt is not None and output.shape != part.gt.shape:
            shapes = f'the output is {tuple(output.shape)}, the truth {tuple(part.gt.shape)}'
            advice = "Check scale, in_channels and out_channels of network_g and the dataset's gt_size, scale and grey"
            raise UserError(f'{part.paths[0] if part.paths else "a batch"}: {shapes}. {advice}.')
        output = output if output.dtype == torch.float64 else output.float()
        losses = OrderedDict()
        if self.cri_pix:
            losses['l_pix'] = self.cri_pix(output, part.gt)
        if self.cri_perceptual:
            if output.dim() != 4:
                raise UserError(
                    'train: perceptual_opt compares images; this dataset gives queries. Remove it, or '
                    'train with PairedImageDataset.'
                )
            for name, loss in zip(('l_percep', 'l_style'), self.cri_perceptual(output, part.gt)):
                if loss is not None:
                    losses[name] = loss
        return losses

    def gradient_exchange(self, last: bool) -> AbstractContextManager:
        """DDP sends gradients with the last part of a batch only."""
        return nullcontext() if last or not isinstance(self.net_g, DistributedDataParallel) else self.net_g.no_sync()

    def for_log(self, values: 'OrderedDict[str, Tensor]') -> 'OrderedDict[str, float]':
        """The mean of every value over all ranks, on every rank, with one transfer from the device."""
        packed = [torch.as_tensor(value, device=self.device).detach().double() for value in values.values()]
        return OrderedDict(zip(values, average_over_ranks(torch.stack(packed)).tolist()))

    @torch.no_grad()
    def model_ema(self, decay: float = 0.999) -> None:
        """Move the averaged weights (fp32) towards the current ones; buffers are copied."""
        net = self.get_bare_model(self.net_g)
        for average, current in zip(self.net_g_ema.parameters(), net.parameters()):
            average.lerp_(current.to(average.dtype), 1 - decay)
        for copied, current in zip(self.net_g_ema.buffers(), net.buffers()):
            copied.copy_(current)

    @property
    def evaluated_net(self) -> nn.Module:
        """The bare network that validation and inference use: the averaged one where there is one."""
        return self.net_g_ema if hasattr(self, 'net_g_ema') else self.get_bare_model(self.net_g)

    def test(self) -> None:
        """Upscale `self.lq` to the size of `self.gt`, or by the network's own scale: `self.output`."""
        size = size_of(self.gt) if hasattr(self, 'gt') and self.gt.dim() == 4 else None
        self.output = ImageEvaluator(self.opt).upscale(self.evaluated_net, self.lq, size, None).image

    def validation(
        self, dataloader: DataLoader, current_iter: int | str, tb_logger: object, save_img: bool = False
    ) -> None:
        """BasicSR's entry point: one dataset, its images shared among the ranks."""
        self.validate([dataloader], current_iter, tb_logger, save_img)

    def validate(
        self,
        dataloaders: list[DataLoader],
        current_iter: int | str,
        tb_logger: object,
        save_img: bool = False,
        should_stop: Callable[[], bool] | None = None,
        journal: Journal | None = None,
    ) -> list[Evaluated] | None:
        """Evaluate every dataset, images x scales shared among the ranks; the same results on every rank.

        Args:
            dataloaders: One per dataset; each dataset has one scale.
            current_iter: Iteration, or the run's name in testing; part of the file names.
            tb_logger: TensorBoard writer, or None.
            save_img: Whether to write result images.
            should_stop: Asked before every image; once True, validation is given up on all ranks.
            journal: Knows and gets rows, and the results of every dataset.

        Returns:
            The results in the order of `dataloaders`; None where validation was given up.
        """
        results = []
        for result in run_validation(
            self.opt, self.evaluated_net, dataloaders, current_iter, tb_logger, save_img, should_stop, journal
        ):
            if result is None:
                return None
            self.record_best(result, current_iter)
            report(result, getattr(self, 'best_metric_results', {}), current_iter, tb_logger)
            results.append(result)
            if journal:
                journal.done(result)
        return results

    def record_best(self, result: Evaluated, current_iter: int | str) -> None:
        """Update `best_metric_results`, BasicSR's record of the best value and its iteration."""
        if not self.is_train or not result.metrics or result.failed:  # means over other images compare with nothing
            return
        known = getattr(self, 'best_metric_results', {}).pop(result.dataset, {})
        self._initialize_best_metric_results(result.dataset)  # of these metrics: a resumed run may have others
        best = self.best_metric_results[result.dataset]
        best.update({metric: record for metric, record in known.items() if metric in best})
        for metric in self.opt['val']['metrics']:
            if metric in result.metrics:
                self._update_best_metric_result(result.dataset, metric, result.metrics[metric], current_iter)

    def save_network(
        self, net: nn.Module | list[nn.Module], net_label: str, current_iter: int, param_key: str | list[str] = 'params'
    ) -> None:
        """BasicSR's weights file with the network's options, written so that it is complete or absent."""
        if self.opt['rank'] != 0:
            return
        nets, keys = ([entry] if not isinstance(entry, list) else entry for entry in (net, param_key))
        label = 'latest' if current_iter == -1 else current_iter
        weights: dict = {key: bare_weights(self.get_bare_model(one)) for one, key in zip(nets, keys)}
        options = f'network_{net_label.removeprefix("net_")}'
        save_atomic(
            {**weights, options: self.opt.get(options)}, f'{self.opt["path"]["models"]}/{net_label}_{label}.pth'
        )

    def save_training_state(self, epoch: int, current_iter: int) -> None:
        """BasicSR's state file, for BasicSR's own loop; the plugin's loop keeps more."""
        if current_iter != -1 and self.opt['rank'] == 0:
            state = {
                'epoch': epoch,
                'iter': current_iter,
                'optimizers': [optimizer.state_dict() for optimizer in self.optimizers],
                'schedulers': [scheduler.state_dict() for scheduler in self.schedulers],
            }
            save_atomic(state, f'{self.opt["path"]["training_states"]}/{current_iter}.state')


def average_over_ranks(values: Tensor) -> Tensor:
    """The mean over all ranks, differentiable.

    Forward the global mean, backward the identity: DDP averages the ranks' parameter gradients afterwards, which
    supplies the 1 / world_size that the mean's own derivative has.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return values
    mean = values.detach().clone()
    dist.all_reduce(mean)
    return (values - values.detach()) + mean / dist.get_world_size()  # in this order: the same bits on every rank
