"""The decoder of MoEISR: mapper, routing, experts. It knows nothing of images: feed it any feature map.

Reads like the paper's table: map, route, decode. `reference.py` has the same without folding and dispatch.

Shapes: B images, C feature channels, (H, W) LR size, Q queries (N of one image), J experts, C_out output channels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .coords import Queries, make_corners, make_near, make_queries
from .liif import ExpertPool, LIIFExperts
from .lm import LMExperts
from .lte import LTEExperts
from .mapper import Draw, Mapper, Routing, route_gumbel

FAMILIES: dict[str, type[ExpertPool]] = {'liif': LIIFExperts, 'lte': LTEExperts, 'lm': LMExperts}
Predict = Callable[[int, Queries], Tensor]  # expert j's predictions for N queries, (N, C_out)


class Predictions(NamedTuple):
    """What a training objective needs: every expert's predictions, and which one was chosen."""

    experts: Tensor  # (B, Q, J, C_out); where every_expert was not drawn, only the chosen one's have a gradient
    routing: Routing

    def mixture(self) -> Tensor:
        """s = sum_j g_j f_j, (B, Q, C_out): the chosen prediction forward, the straight-through gradient backward."""
        if self.routing.gate is None:
            return self.experts.squeeze(2)
        return mix(self.experts, self.routing.gate)


class Decoded(NamedTuple):
    """Predictions of the chosen experts and the routing behind them."""

    prediction: Tensor  # (B, Q, C_out)
    routing: Routing


def mix(predictions: Tensor, gate: Tensor) -> Tensor:
    """sum_j g_j f_j: predictions (B, Q, J, C_out) and gates (B, Q, J) -> (B, Q, C_out)."""
    return (gate.unsqueeze(-1) * predictions).sum(dim=2)


class MoEDecoder(nn.Module):
    """A pool of experts behind a mapper; with one expert it is the dense decoder of its family.

    Args:
        in_channels: C.
        out_channels: C_out.
        family: 'liif', 'lte' or 'lm'.
        experts: Hidden widths of each expert, for example [[256], [256, 256]]; of lm, latent and depth, for example
            [{'latent': [208], 'depth': 6}]. An entry [] is the expert without layers: it predicts 0 and costs nothing.
        mapper: Options of `Mapper` (num_layers, num_feat, granularity); ignored with one expert.
        **family_options: Options of the family (all: shared_layers; lte: hidden_dim; lm: render_width).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 3,
        family: str = 'liif',
        experts: Sequence = ((256,), (256,) * 2, (256,) * 3, (256,) * 4),
        mapper: dict | None = None,
        **family_options,
    ):
        super().__init__()
        if family not in FAMILIES:
            raise ValueError(f'decoder must be one of {list(FAMILIES)}; got {family!r}.')
        experts = check_experts(experts, FAMILIES[family])
        self.family = family
        self.out_channels = out_channels
        self.pool = FAMILIES[family](in_channels, out_channels, experts, **family_options)
        self.mapper = Mapper(in_channels, len(experts), **(mapper or {})) if len(experts) > 1 else None

    @property
    def num_experts(self) -> int:
        """J."""
        return len(self.pool.experts)

    @property
    def depths(self) -> list[int]:
        """Number of hidden layers of each expert that run per query."""
        return [max(len(self.pool.linears(j)) - 1, 0) for j in range(self.num_experts)]

    @property
    def expert_macs(self) -> list[int]:
        """Multiply-adds of each expert for one query, LR tables and mapper not counted."""
        return [self.pool.macs(j) for j in range(self.num_experts)]

    @property
    def expert_costs(self) -> Tensor:
        """(J,) fp32: each expert's cost over that of the most expensive one; see `ExpertPool.cost`."""
        costs = torch.tensor([self.pool.cost(j) for j in range(self.num_experts)], dtype=torch.float32)
        return costs / costs.max().clamp(min=1)  # experts without layers only cost nothing

    def forward(self, feat: Tensor, coord: Tensor, cell: Tensor) -> Decoded:
        """Answer queries at any positions; in training with gradients, the noise from torch's generator.

        Args:
            feat: The implicit representation z, (B, C, H, W).
            coord: (B, Q, 2) in [-1, 1], rows first.
            cell: (B, Q, 2), 2 / output size.
        """
        if self.training:
            predictions = self.predict(feat, coord, cell)
            return Decoded(predictions.mixture(), predictions.routing)
        routing = self.route(feat, coord, cell)  # map, route
        decoded = [
            dispatch(partial(self.pool.predict, tables=tables), queries, expert, self.num_experts)
            for (queries, tables), expert in zip(self.images(feat, coord, cell, routing.expert), routing.expert)
        ]
        return Decoded(torch.stack(decoded), routing)

    def predict(self, feat: Tensor, coord: Tensor, cell: Tensor, draw: Draw | None = None) -> Predictions:
        """Every expert's predictions, in training; arguments as for `forward`.

        The gates are one-hot, so only the chosen expert's weights and features receive a gradient from the mixture; the
        mapper's gradient needs the values of the others, which run without autograd. That is exact, at about a third
        of the cost of all under autograd. Experts that share all hidden layers are one pass anyway.

        Args:
            draw: Noise, temperature and which experts learn; made with torch's generator where it is not given.
        """
        routing = self.route(feat, coord, cell, draw or Draw())
        every_expert = self.num_experts == 1 or self.pool.is_nested or (draw is not None and draw.every_expert)
        predictions = [
            self.pool.predict_all(queries, tables)
            if every_expert
            else predict_chosen(partial(self.pool.predict, tables=tables), queries, expert, self.num_experts)
            for (queries, tables), expert in zip(self.images(feat, coord, cell), routing.expert)
        ]
        return Predictions(torch.stack(predictions), routing)

    def logits(self, feat: Tensor, coord: Tensor, cell: Tensor) -> Tensor:
        """The mapper's logits, (B, Q, J); arguments as for `forward`."""
        assert self.mapper is not None  # one expert has no logits
        lr_size = feat.shape[-2], feat.shape[-1]
        return self.mapper(self.mapper.table(feat), make_near(coord, lr_size), cell * cell.new_tensor(lr_size))

    def route(self, feat: Tensor, coord: Tensor, cell: Tensor, draw: Draw | None = None) -> Routing:
        """Gumbel routing with a draw, argmax without; arguments as for `forward`."""
        if self.mapper is None:
            return Routing(torch.zeros(coord.shape[:2], dtype=torch.long, device=coord.device), None)
        logits = self.logits(feat, coord, cell)
        return Routing(logits.argmax(dim=-1), None) if draw is None else route_gumbel(logits, draw)

    def images(
        self, feat: Tensor, coord: Tensor, cell: Tensor, expert: Tensor | None = None
    ) -> Iterator[tuple[Queries, list[Tensor]]]:
        """Queries and LR tables of each image; of the tables only what `expert` (B, Q) reads, where it is given.

        Image by image: a batch's activations would fall out of the cache, and above 32 MiB each temporary is mapped
        anew by the C library.
        """
        lr_size = feat.shape[-2], feat.shape[-1]
        corners, cell_lr = make_corners(coord, lr_size), cell * cell.new_tensor(lr_size)
        reads = None
        if expert is not None and self.pool.skips_unread:
            reads = reads_of(corners.index, expert, self.num_experts, lr_size[0] * lr_size[1])
        tables = self.pool.tables(feat, cell_lr=cell_lr, reads=reads)
        for image, own in enumerate(zip(*(table.unbind() for table in tables))):
            yield make_queries(corners, cell_lr[image], image), list(own)


def reads_of(index: Tensor, expert: Tensor, num_experts: int, num_codes: int) -> Tensor:
    """Which LR pixels the queries of each expert read: (J, B, T) bool.

    Args:
        index: (4, B, Q) int64, the LR pixels at the corners of the queries.
        expert: (B, Q), the chosen expert.
        num_experts: J.
        num_codes: T.
    """
    reads = torch.zeros(num_experts, expert.shape[0], num_codes, dtype=torch.bool, device=index.device)
    image = torch.arange(expert.shape[0], device=index.device)[:, None]
    reads[expert.long(), image, index] = True
    return reads


def group_by_expert(expert: Tensor, num_experts: int) -> tuple[Tensor, list[int]]:
    """A stable order that puts the queries of each expert side by side, and the size of each group.

    Args:
        expert: (N,) int64 or uint8.
    """
    order = torch.argsort(expert, stable=True)
    return order, torch.bincount(expert.long(), minlength=num_experts).tolist()


def dispatch(predict: Predict, queries: Queries, expert: Tensor, num_experts: int) -> Tensor:
    """Each query answered by its own expert only, (N, C_out); `expert` (N,) is the chosen one."""
    order, counts = group_by_expert(expert, num_experts)
    blocks = [predict(j, queries.select(which)) for j, which in enumerate(order.split(counts)) if which.numel() > 0]
    predictions = torch.cat(blocks)
    return torch.zeros_like(predictions).index_copy(0, order, predictions)


def predict_chosen(predict: Predict, queries: Queries, expert: Tensor, num_experts: int) -> Tensor:
    """Every expert's predictions (N, J, C_out), with autograd in the chosen expert `expert` (N,) only.

    An expert that nobody chose runs on no query, so that its parameters have a gradient (zero) on every rank.
    """
    order, counts = group_by_expert(expert, num_experts)
    predictions = []
    for j, mine in enumerate(order.split(counts)):
        chosen = predict(j, queries.select(mine))
        with torch.no_grad():
            others = expert.ne(j).nonzero().squeeze(1)
            values = chosen.new_zeros(expert.shape[0], chosen.shape[1])  # (N, C_out)
            values[others] = predict(j, queries.select(others)).to(values)
        predictions.append(values.index_copy(0, mine, chosen))
    return torch.stack(predictions, dim=1)


def check_experts(experts: Sequence, family: type[ExpertPool]) -> list:
    """The experts as the family takes them.

    Raises:
        ValueError: There is no expert or more than 256, or an entry describes none.
    """
    is_list = isinstance(experts, Sequence) and not isinstance(experts, str)
    if not (is_list and len(experts) > 0 and all(map(family.is_entry, experts))):
        raise ValueError(f'experts must list {family.entries}; got {experts!r}.')
    if len(experts) > 256:  # expert maps are bytes
        raise ValueError(f'there may be 256 experts at most; got {len(experts)}.')
    return [dict(entry) if isinstance(entry, Mapping) else list(entry) for entry in experts]
