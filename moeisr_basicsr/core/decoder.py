"""The decoder of MoEISR: mapper, routing, experts. It knows nothing of images: feed it any feature map.

forward() reads like the paper's table: map, route, decode.

Shapes: B images, C feature channels, (H, W) LR size, Q queries, J experts, C_out output channels.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import dispatch
from .coords import make_corners
from .experts import check_experts
from .liif import LIIFExperts
from .lte import LTEExperts
from .mapper import Mapper
from .queries import Queries, make_queries
from .routing import SMALLEST, Routing, route_fitted, route_gumbel

FAMILIES = {'liif': LIIFExperts, 'lte': LTEExperts}
EXPERT_GRADS = ('exact', 'naive', 'sampled')


class Decoded(NamedTuple):
    """Answers and the routing that produced them."""

    output: Tensor  # (B, Q, C_out)
    routing: Routing
    answers: Tensor | None = None  # (B, Q, J, C_out) of every expert, where training ran them all under autograd


class MoEDecoder(nn.Module):
    """A pool of experts behind a mapper; with one expert it is the dense decoder of its family.

    Args:
        in_channels: C.
        out_channels: C_out.
        family: 'liif' or 'lte'.
        experts: Hidden widths of each expert, for example [[256], [256, 256]].
        mapper: Options of `Mapper` (num_layers, num_feat, hidden, granularity); ignored with one expert.
        tau: Gumbel temperature where `forward` is given none.
        expert_grad: 'exact' runs unchosen experts without autograd, 'naive' is the plain sum, 'sampled' the unbiased
            estimate at `sample_rate`. Where the experts share all hidden layers the plain sum costs one pass through
            the deepest, and 'exact' is the same as 'naive'.
        sample_rate: rho of 'sampled'.
        zero_init_last: See `Expert`.
        **family_options: Options of the family (both: shared_layers; lte: hidden_dim).

    Attributes:
        scores_are_fitted: Whether a loss fits the mapper's scores to the experts' losses. Training then routes as the
            test does, and the gates' gradient ends at the mapper's offsets.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 3,
        family: str = 'liif',
        experts: Sequence[Sequence[int]] = ((256,), (256,) * 2, (256,) * 3, (256,) * 4),
        mapper: dict | None = None,
        tau: float = 1.0,
        expert_grad: str = 'exact',
        sample_rate: float = 0.125,
        zero_init_last: bool = False,
        **family_options,
    ):
        super().__init__()
        if family not in FAMILIES:
            raise ValueError(f'decoder must be one of {sorted(FAMILIES)}; got {family!r}.')
        if expert_grad not in EXPERT_GRADS:
            raise ValueError(f'expert_grad must be one of {EXPERT_GRADS}; got {expert_grad!r}.')
        if tau <= 0:
            raise ValueError(f'tau must be above 0; got {tau}.')
        if not 0 < sample_rate <= 1:
            raise ValueError(f'sample_rate must be above 0 and at most 1; got {sample_rate}.')
        experts = check_experts(experts)
        self.family = family
        self.out_channels = out_channels
        self.tau = tau
        self.expert_grad = expert_grad
        self.sample_rate = sample_rate
        self.scores_are_fitted = False
        self.pool = FAMILIES[family](
            in_channels, out_channels, experts, zero_init_last=zero_init_last, **family_options
        )
        self.mapper = Mapper(in_channels, len(experts), **(mapper or {})) if len(experts) > 1 else None

    @property
    def num_experts(self) -> int:
        """J."""
        return len(self.pool.experts)

    @property
    def depths(self) -> list[int]:
        """Number of hidden layers of each expert."""
        return [len(self.pool.linears(j)) - 1 for j in range(self.num_experts)]

    @property
    def expert_macs(self) -> list[int]:
        """Multiply-adds of each expert for one query, LR tables and mapper not counted."""
        return [self.pool.macs(j) for j in range(self.num_experts)]

    @property
    def expert_costs(self) -> Tensor:
        """(J,) fp32: each expert's multiply-adds over the heaviest's."""
        macs = torch.tensor(self.expert_macs, dtype=torch.float32)
        return macs / macs.max()

    def forward(
        self,
        feat: Tensor,
        coord: Tensor,
        cell: Tensor,
        noise: Tensor | None = None,
        tau: float | None = None,
        keep: Tensor | None = None,
    ) -> Decoded:
        """Answer queries at any positions.

        Args:
            feat: The implicit representation z, (B, C, H, W).
            coord: (B, Q, 2) in [-1, 1], rows first.
            cell: (B, Q, 2), 2 / output size.
            noise: Gumbel noise (B, Q, J); in training drawn from torch's generator where it is not given.
            tau: Gumbel temperature; the constructor's where it is not given.
            keep: (B, Q, J) bool, the unchosen experts that 'sampled' runs; drawn where it is not given.
        """
        lr_size = feat.shape[-2:]
        logits = self.logits(feat, coord, cell)  # map
        routing = self.route(logits, coord.shape[:2], coord.device, noise, tau)  # route
        corners = make_corners(coord, lr_size)
        cell = cell * cell.new_tensor(lr_size)  # in units of LR cells
        tables = zip(*(table.unbind() for table in self.pool.tables(feat)))
        # Image by image: a batch's activations would fall out of the cache, and above 32 MiB each temporary is mapped
        # anew by the C library.
        outputs, answers = zip(
            *(
                self.decode(make_queries(corners, cell[image], image), list(of_image), routing, image, keep)
                for image, of_image in enumerate(tables)
            )
        )
        return Decoded(torch.stack(outputs), routing, None if answers[0] is None else torch.stack(answers))

    def logits(self, feat: Tensor, coord: Tensor, cell: Tensor) -> Tensor | None:
        """The mapper's logits (B, Q, J), arguments as for `forward`; None where there is one expert."""
        if self.mapper is None:
            return None
        lr_size = feat.shape[-2:]
        return self.mapper(self.mapper.table(feat), coord, cell * cell.new_tensor(lr_size), lr_size)

    def route(
        self,
        logits: Tensor | None,
        shape: tuple[int, int],
        device: torch.device,
        noise: Tensor | None = None,
        tau: float | None = None,
    ) -> Routing:
        """Gumbel routing in training, argmax in test, the only expert where there is one; `shape` is (B, Q)."""
        if logits is None:
            return Routing(torch.zeros(tuple(shape), dtype=torch.long, device=device), None, None)
        if not self.training:
            return Routing(logits.argmax(dim=-1), None, logits)
        if self.scores_are_fitted:
            return route_fitted(logits, self.mapper.offset)
        if noise is None:
            noise = -torch.empty_like(logits).exponential_().clamp_(min=SMALLEST).log()
        return route_gumbel(logits, noise.to(logits), self.tau if tau is None else tau)

    def decode(
        self, queries: Queries, tables: list[Tensor], routing: Routing, image: int, keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The queries of one image of the batch: (Q, C_out); and every expert's answers (Q, J, C_out) if all ran."""
        evaluate = partial(self._evaluate, tables)
        if self.num_experts == 1:
            return evaluate(0, queries), None
        expert = routing.expert[image]
        if routing.gates is None:
            return dispatch.dispatch(evaluate, queries, expert, self.num_experts), None
        gates = routing.gates[image]
        if self.runs_all_experts:
            answers = self.pool.evaluate_all(tables, queries)
            return dispatch.mixture_naive(answers, gates), answers
        if self.expert_grad == 'exact':
            return dispatch.mixture_exact(evaluate, queries, gates, expert), None
        keep = torch.rand_like(gates) < self.sample_rate if keep is None else keep[image]
        return dispatch.mixture_sampled(evaluate, queries, gates, expert, keep, self.sample_rate), None

    @property
    def runs_all_experts(self) -> bool:
        """Whether training runs every expert on every query under autograd, and `forward` gives their answers."""
        return self.num_experts > 1 and (
            self.expert_grad == 'naive' or (self.expert_grad == 'exact' and self.pool.is_nested)
        )

    def _evaluate(self, tables: list[Tensor], j: int, queries: Queries) -> Tensor:
        return self.pool.evaluate(j, tables, queries)
