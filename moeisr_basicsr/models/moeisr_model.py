"""Training of a network with experts: routing noise, temperature, balance loss, statistics of the experts.

Shapes: B images, C channels, Q queries, J experts.
"""

from collections import OrderedDict
from typing import NamedTuple

import torch
from basicsr.losses import build_loss
from basicsr.utils.registry import MODEL_REGISTRY
from torch import Tensor

from moeisr_basicsr.core import Decoded, make_cell, make_coord
from moeisr_basicsr.errors import UserError

from .arbitrary_scale_model import ArbitraryScaleModel
from .batch import Batch
from .parts import is_in
from .temperature import check_temperature, temperature_at
from .training_draws import DrawAhead, DrawKey, batch_draws


class PartDraws(NamedTuple):
    """What the routing of one part of a batch needs."""

    noise: Tensor | None = None  # (B, Q, J) Gumbel noise; None with one expert
    keep: Tensor | None = None  # (B, Q, J) bool, for expert_grad 'sampled' only
    tau: float | None = None  # None for the network's own
    before: tuple[Tensor, ...] = ()  # gates of the parts before this one, as constants
    after: tuple[Tensor, ...] = ()
    scale: Tensor | None = None  # (B, Q) of the whole batch


@MODEL_REGISTRY.register()
class MoEISRModel(ArbitraryScaleModel):
    """ArbitraryScaleModel for `MoEISR`.

    Reads from `train` also: `balance_opt` (a loss of the gates, MoEBalanceLoss), `experts_opt` (a loss of every expert
    on every query, MoEExpertLoss), `temperature`, and `mapper_spread` (the deviation of the mapper's logits at the
    start, 1 by default; 0 leaves them as initialised).
    """

    whole_batch_losses = ('l_balance',)

    def init_training_settings(self) -> None:
        """As the parent; then the balance loss and the temperature."""
        super().init_training_settings()
        net = self.get_bare_model(self.net_g)
        if not hasattr(net, 'num_experts'):
            raise UserError(
                f'model_type MoEISRModel needs a network with experts (MoEISR); network_g is '
                f'{type(net).__name__}. Use ArbitraryScaleModel or SRModel for it.'
            )
        self.num_experts = net.num_experts
        self.expert_costs = net.expert_costs.to(self.device)
        self.sample_rate = net.decoder.sample_rate if net.decoder.expert_grad == 'sampled' else None
        self.draw = DrawAhead() if self.device.type == 'cuda' else batch_draws
        train_opt = self.opt['train']
        self.cri_balance = None
        if train_opt.get('balance_opt') and self.num_experts > 1:
            self.cri_balance = build_loss(train_opt['balance_opt']).to(self.device)
        self.cri_experts = None
        if train_opt.get('experts_opt') and self.num_experts > 1:
            if not net.decoder.runs_all_experts:
                raise UserError(
                    'train: experts_opt needs training that runs every expert on every query: expert_grad '
                    'naive, or exact with shared_layers as many as the deepest expert has.'
                )
            self.cri_experts = build_loss(train_opt['experts_opt']).to(self.device)
            net.decoder.scores_are_fitted = getattr(self.cri_experts, 'fit_temperature', None) is not None
        # A pretrained mapper keeps its scale, a fitted one has its own; a resumed run never sees the first iteration.
        mapper = {name for name, _ in net.named_parameters() if is_in(name, ['decoder.mapper'])}
        fresh = not mapper <= self.pretrained and not net.decoder.scores_are_fitted
        self.mapper_spread = float(train_opt.get('mapper_spread', 1.0)) if fresh else 0.0
        self.temperature = train_opt.get('temperature')
        if self.temperature is not None:
            check_temperature(self.temperature)

    def prepare_parts(self, parts: list[Batch], current_iter: int) -> list[PartDraws]:
        """Draw what the routing of this iteration needs, for the whole batch at once."""
        tau = None if self.temperature is None else temperature_at(self.temperature, current_iter)
        if self.num_experts == 1:
            return [PartDraws()] * len(parts)
        if current_iter == 1 and self.mapper_spread > 0:
            self.standardise_mapper(parts)
        key = DrawKey(self.opt['manual_seed'], current_iter, self.opt['rank'], self.opt['world_size'])
        sizes = [part.lq.shape[0] for part in parts]
        shape = (sum(sizes), parts[0].queries // sizes[0], self.num_experts)
        whole = self.draw(key, shape, self.sample_rate)
        noise, keep = (
            [None] * len(parts) if entry is None else entry.to(self.device, non_blocking=True).split(sizes)
            for entry in whole
        )
        scale = torch.cat([scale_of(part) for part in parts])
        draws = [PartDraws(*of_part, tau, scale=scale) for of_part in zip(noise, keep)]
        if self.cri_balance is None or len(parts) == 1:
            return draws
        # The balance loss is not a mean over images: each part needs the gates of the others.
        with torch.no_grad():
            gates = tuple(self.decode(part, of_part, bare=True).routing.gates for part, of_part in zip(parts, draws))
        return [of_part._replace(before=gates[:place], after=gates[place + 1 :]) for place, of_part in enumerate(draws)]

    @torch.no_grad()
    def standardise_mapper(self, parts: list[Batch]) -> None:
        """Give the mapper's logits mean 0 and deviation `mapper_spread` on the first batch of all ranks."""
        net = self.get_bare_model(self.net_g)
        logits = torch.cat(
            [net.decoder.logits(net.encode(part.lq), *queries_of(part)).flatten(0, 1).double() for part in parts]
        )  # (B * Q, J)
        local = {'mean': logits.mean(dim=0), 'square': logits.square().mean(dim=0)}
        moments = self.average_over_ranks(
            OrderedDict((f'{name}{j}', value) for name, values in local.items() for j, value in enumerate(values))
        )
        mean, square = torch.tensor(list(moments.values()), device=self.device, dtype=torch.float64).chunk(2)
        if not torch.isfinite(square).all():
            return  # a damaged batch; the step itself decides what becomes of it
        net.decoder.mapper.standardise(mean, (square - mean.square()).clamp_(min=0).sqrt(), self.mapper_spread)
        if self.ema_decay > 0:
            self.model_ema(0)

    def decode(self, part: Batch, draws: PartDraws, bare: bool = False) -> Decoded:
        """Answers and routing of one part.

        Args:
            part: The part.
            draws: Its noise and temperature.
            bare: Past the distributed wrapper, for a forward that no backward follows.
        """
        net = self.get_bare_model(self.net_g) if bare else self.net_g
        with self.precision.autocast():
            return net(
                self.precision.images(part.lq),
                *queries_of(part),
                noise=draws.noise,
                tau=draws.tau,
                keep=draws.keep,
                with_routing=True,
            )

    def part_losses(self, part: Batch, draws: PartDraws) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Reconstruction and balance losses; load of each expert, mean cost and temperature."""
        output, routing, answers = self.decode(part, draws)
        if self.cri_experts is not None:
            output = self.cri_experts.routed(answers, routing.gates)
        if part.coord is None:
            output = output.transpose(1, 2).reshape(part.gt.shape)  # (B, C, R, S)
        losses = self.reconstruction_losses(output, part)
        if routing.gates is None:
            return losses, {}
        if self.cri_experts is not None:
            gt = part.gt if part.coord is not None else part.gt.flatten(2).transpose(1, 2)  # (B, Q, C)
            decoder = self.get_bare_model(self.net_g).decoder
            fit = {'scores': routing.logits - decoder.mapper.offset} if decoder.scores_are_fitted else {}
            losses['l_experts'] = self.cri_experts(answers, gt, routing.gates, self.expert_costs, scale_of(part), **fit)
        if self.cri_balance is not None:
            gates = torch.cat([*draws.before, routing.gates, *draws.after])
            losses['l_balance'] = self.cri_balance(gates, self.expert_costs, draws.scale)
        return losses, self.statistics(routing.gates, draws.tau)

    @torch.no_grad()
    def statistics(self, gates: Tensor, tau: float | None) -> dict[str, Tensor]:
        """Share of the queries of each expert, mean relative cost of a query, temperature."""
        load = gates.double().mean(dim=(0, 1))  # (J,)
        values = OrderedDict((f'load/expert_{j}', share) for j, share in enumerate(load.unbind(), 1))
        values['mean_cost'] = (load * self.expert_costs).sum()
        if tau is not None:
            values['tau'] = torch.as_tensor(tau)
        return values


def queries_of(part: Batch) -> tuple[Tensor, Tensor]:
    """Coordinates and cells (B, Q, 2) of a part; whole patches become queries of all their pixels."""
    if part.coord is not None:
        return part.coord, part.cell
    size = tuple(part.gt.shape[-2:])
    coord = make_coord(size, part.lq.device).expand(part.lq.shape[0], -1, -1)
    return coord, make_cell(size, part.lq.device).expand_as(coord)


def scale_of(part: Batch) -> Tensor:
    """The scale factor of each query, (B, Q): the geometric mean of both axes."""
    cell = queries_of(part)[1]  # 2 / output size
    return (2 / (cell * cell.new_tensor(part.lq.shape[-2:]))).prod(dim=-1).sqrt()
