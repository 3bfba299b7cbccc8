"""Training of a network with experts: routing noise, temperature, the objective, statistics of the experts.

Shapes: B images, C channels, Q queries, J experts.
"""

from collections import OrderedDict
from typing import NamedTuple

import torch
from basicsr.losses import build_loss
from basicsr.utils.registry import MODEL_REGISTRY
from torch import Tensor

from moeisr_basicsr.core import Draw, Predictions, make_cell, make_coord, mix
from moeisr_basicsr.core.mapper import route_gumbel
from moeisr_basicsr.errors import UserError

from .arbitrary_scale_model import ArbitraryScaleModel, average_over_ranks
from .batch import Batch
from .training_draws import batch_noise, check_tau, tau_at


class PartDraw(NamedTuple):
    """What the routing of one part of a batch needs."""

    draw: Draw
    gate_sum: Tensor | None = None  # (J,) over the queries of all other parts, a constant; None where there are none
    queries: int = 0  # of the whole batch


@MODEL_REGISTRY.register()
class MoEISRModel(ArbitraryScaleModel):
    """ArbitraryScaleModel for `MoEISR`.

    Reads from `train` also: `tau` (Gumbel temperature, 1 by default; [first, last] anneals it), `balance_opt`
    (MoEBalanceLoss, of the experts' shares of the queries) and `experts_opt` (MoEExpertLoss, ours).
    """

    whole_batch_losses = ('l_balance',)

    def init_training_settings(self) -> None:
        """As the parent; then the losses of experts and routing."""
        super().init_training_settings()
        net, train_opt = self.get_bare_model(self.net_g), self.opt['train']
        if not hasattr(net, 'num_experts'):
            raise UserError(
                f'model_type MoEISRModel needs a network with experts (MoEISR); network_g is '
                f'{type(net).__name__}. Use ArbitraryScaleModel or SRModel for it.'
            )
        self.num_experts = net.num_experts
        self.expert_costs = net.expert_costs.to(self.device)
        self.tau = check_tau(train_opt.get('tau', 1.0))
        self.cri_balance, self.cri_experts = (
            build_loss(train_opt[key]).to(self.device) if train_opt.get(key) and self.num_experts > 1 else None
            for key in ('balance_opt', 'experts_opt')
        )
        # A pretrained mapper keeps its scale; a resumed run never sees the first iteration.
        mapper = {name for name, _ in net.named_parameters() if name.startswith('decoder.mapper.')}
        self.mapper_is_new = not mapper <= self.pretrained

    def part_losses(self, part: Batch, drawn: object) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The objective of one part, and statistics of its routing: which loss teaches whom is decided here."""
        assert isinstance(drawn, PartDraw)
        predictions = self.predict(part, drawn.draw)
        gate = predictions.routing.gate
        if self.cri_experts is None or gate is None:
            # The paper: the reconstruction loss teaches encoder, chosen experts and, through the gates, the mapper.
            output = predictions.mixture()
        else:
            # MoEISR-J (ours): every expert learns every query, and its own loss teaches the mapper.
            output = mix(predictions.experts, gate.detach())
        losses = self.reconstruction_losses(as_patches(output, part), part)
        if gate is None:
            return losses, {}
        if self.cri_experts is not None:
            losses['l_experts'] = self.cri_experts(predictions.experts, as_queries(part), gate, scale_of(part))
        if self.cri_balance is not None:
            losses['l_balance'] = self.cri_balance(average_over_ranks(self.shares(gate, drawn)))
        return losses, self.statistics(gate, drawn.draw.tau)

    def predict(self, part: Batch, draw: Draw) -> Predictions:
        """Every expert's predictions for one part, and the routing."""
        with self.precision.autocast():
            return self.net_g(self.precision.images(part.lq), *queries_of(part), draw)

    def prepare_parts(self, parts: list[Batch], current_iter: int) -> list[PartDraw]:
        """Draw what the routing of this iteration needs, for the whole batch at once."""
        if self.num_experts == 1:
            return [PartDraw(Draw())] * len(parts)
        if current_iter == 1 and self.mapper_is_new:
            self.standardise_mapper(parts)
        images, queries = [part.lq.shape[0] for part in parts], sum(part.queries for part in parts)
        shape = sum(images), queries // sum(images), self.num_experts
        keys = self.opt['manual_seed'], current_iter, self.opt['rank'], self.opt['world_size']
        noise = batch_noise(shape, *keys).to(self.device, non_blocking=True)
        tau = tau_at(self.tau, current_iter, int(self.opt['train']['total_iter']))
        drawn = [PartDraw(Draw(own, tau, self.cri_experts is not None)) for own in noise.split(images)]
        if self.cri_balance is None or len(parts) == 1:
            return drawn
        # The balance loss is not a mean over images: each part needs the gates of the others.
        sums = []
        for part, (draw, *_) in zip(parts, drawn):
            gate = route_gumbel(self.logits(part), draw).gate
            assert gate is not None
            sums.append(gate.sum(dim=(0, 1)))
        total = torch.stack(sums).sum(dim=0)  # (J,)
        return [of_part._replace(gate_sum=total - own, queries=queries) for of_part, own in zip(drawn, sums)]

    @torch.no_grad()
    def logits(self, part: Batch) -> Tensor:
        """The mapper's logits, (B, Q, J), past the distributed wrapper: no backward follows."""
        with self.precision.autocast():
            return self.get_bare_model(self.net_g).logits(self.precision.images(part.lq), *queries_of(part))

    @torch.no_grad()
    def standardise_mapper(self, parts: list[Batch]) -> None:
        """Give the mapper's logits mean 0 and deviation 1 on the first batch of all ranks; see `Mapper.standardise`."""
        logits = torch.cat([self.logits(part).flatten(0, 1).double() for part in parts])  # (B * Q, J)
        moments = average_over_ranks(torch.stack([logits.mean(dim=0), logits.square().mean(dim=0)]))
        mean, square = moments
        if not torch.isfinite(square).all():
            return  # a damaged batch; the step itself decides what becomes of it
        mapper = self.get_bare_model(self.net_g).decoder.mapper
        mapper.standardise(mean, (square - mean.square()).clamp_(min=0).sqrt())
        if self.ema_decay > 0:
            self.model_ema(0)

    def shares(self, gate: Tensor, drawn: PartDraw) -> Tensor:
        """(J,): each expert's share of this rank's whole batch, with the gradient of this part's gates."""
        if drawn.gate_sum is None:
            return gate.float().mean(dim=(0, 1))
        return (gate.float().sum(dim=(0, 1)) + drawn.gate_sum) / drawn.queries

    @torch.no_grad()
    def statistics(self, gate: Tensor, tau: float) -> dict[str, Tensor]:
        """Share of the queries of each expert, mean relative cost of a query, and the temperature if it changes."""
        shares = gate.double().mean(dim=(0, 1))  # (J,)
        values = OrderedDict((f'share/expert_{j}', share) for j, share in enumerate(shares.unbind(), 1))
        values['mean_cost'] = (shares * self.expert_costs).sum()
        if self.tau[0] != self.tau[1]:
            values['tau'] = torch.as_tensor(tau)
        return values


def queries_of(part: Batch) -> tuple[Tensor, Tensor]:
    """Coordinates and cells (B, Q, 2) of a part; whole patches become queries of all their pixels."""
    if part.coord is not None and part.cell is not None:
        return part.coord, part.cell
    assert part.gt is not None  # in training
    size = part.gt.shape[-2], part.gt.shape[-1]
    coord = make_coord(size, part.lq.device).expand(part.lq.shape[0], -1, -1)
    return coord, make_cell(size, part.lq.device).expand_as(coord)


def as_patches(output: Tensor, part: Batch) -> Tensor:
    """Predictions (B, Q, C) in the shape of the part's truth."""
    assert part.gt is not None
    return output if part.coord is not None else output.transpose(1, 2).reshape(part.gt.shape)


def as_queries(part: Batch) -> Tensor:
    """The part's truth as (B, Q, C)."""
    assert part.gt is not None
    return part.gt if part.coord is not None else part.gt.flatten(2).transpose(1, 2)


def scale_of(part: Batch) -> Tensor:
    """The scale factor of each query, (B, Q): the geometric mean of both axes."""
    cell = queries_of(part)[1]  # 2 / output size
    return (2 / (cell * cell.new_tensor(part.lq.shape[-2:]))).prod(dim=-1).sqrt()
