"""Cost control at test time: a weight on cost, or a budget that is met (design after PCSR's test-time control).

Scores are l_j - kappa c_j; softmax only adds a constant per query, so the logits serve as log-probabilities. As kappa
grows from minus to plus infinity a query moves along the upper envelope of these lines from the most expensive to the
cheapest expert and never back.

A budget is a fraction of the cost of sending every query to the most expensive expert. Queries are seen twice in the
same order: once to collect the kappas at which they change their expert, in a histogram of fixed size; once to route.

Shapes: N queries in pixel order, J experts.
"""

import math
from functools import cached_property

import torch
from torch import Tensor

BINS = 1 << 14  # of arctan(kappa / KAPPA_SCALE); what falls into one bin is split in pixel order
CHUNK = 1 << 16  # queries at a time: the float64 copies of a wide strip would take more memory than its pixels
KAPPA_SCALE = 4.0  # logits differ by a few units, relative costs by less than one


def route_by_cost(logits: Tensor, costs: Tensor, cost_weight: float) -> Tensor:
    """argmax_j (l_j - kappa c_j): (..., J) -> (...) int64; ties go to the first expert.

    kappa = 0 is the trained routing. In float64, so that rounding cannot make a query more expensive as kappa grows.
    """
    if cost_weight == 0:
        return logits.argmax(dim=-1)
    if math.isinf(cost_weight):
        extreme = costs == (costs.min() if cost_weight > 0 else costs.max())
        return logits.masked_fill(~extreme, -math.inf).argmax(dim=-1)
    return (logits.double() - cost_weight * costs.double()).argmax(dim=-1)


def route_below(logits: Tensor, costs: Tensor, cost_weight: float) -> Tensor:
    """`route_by_cost` just below a kappa: ties go to the most expensive expert, which a query has not left yet."""
    expensive_first = costs.argsort(descending=True)
    return expensive_first[route_by_cost(logits[..., expensive_first], costs[expensive_first], cost_weight)]


class CostWeight:
    """Routing with a fixed kappa."""

    def __init__(self, cost_weight: float = 0.0):
        if not math.isfinite(cost_weight):
            raise ValueError(f'cost_weight must be a finite number; got {cost_weight}.')
        self.cost_weight = float(cost_weight)

    def route(self, logits: Tensor, costs: Tensor) -> Tensor:
        """(..., J) -> (...) int64."""
        costs = where_float64_is(costs)
        routed = [
            route_by_cost(chunk, costs, self.cost_weight)
            for chunk in where_float64_is(logits).flatten(0, -2).split(CHUNK)
        ]
        return torch.cat(routed).view(logits.shape[:-1]).to(logits.device)


class Budget:
    """Routing at a given fraction of the cost of the most expensive expert everywhere: `observe` all, then `route` all.

    The mean cost misses the budget by at most one query's cost.

    Args:
        budget: Fraction, from the cheapest expert's relative cost to 1.
        costs: (J,) relative costs, the most expensive 1.

    Raises:
        ValueError: The budget is out of this range.
    """

    def __init__(self, budget: float, costs: Tensor):
        least = float(costs.min())
        if not least - 1e-6 <= budget <= 1:  # costs are fp32
            allowed = math.ceil((least - 1e-6) * 1e4) / 1e4
            raise ValueError(
                f'budget must lie between {allowed:.4f} (all pixels to the cheapest expert) and 1 (all to '
                f'the most expensive); got {budget}.'
            )
        self.budget = float(budget)
        self.costs = where_float64_is(costs).double()
        self.count = 0
        # saved[b]: relative cost saved by the queries that change their expert at a kappa in bin b
        self.saved = torch.zeros(BINS, dtype=torch.float64)
        self.bounds: tuple[float, float] | None = None
        self.spare = 0.0

    def observe(self, logits: Tensor) -> None:
        """Add queries, (..., J), to the histogram."""
        for chunk in where_float64_is(logits).flatten(0, -2).split(CHUNK):
            self._observe(chunk.double())
        self.bounds = None

    def _observe(self, logits: Tensor) -> None:
        costs = self.costs.to(logits.device)
        # walk each query's envelope from the most expensive expert down
        current = route_by_cost(logits, costs, -math.inf)
        saved = torch.zeros(BINS, dtype=torch.float64, device=logits.device)
        for _ in range(len(costs) - 1):
            here = logits.gather(1, current[:, None])
            gap = costs[current][:, None] - costs  # (N, J) cost saved by a change
            kappa = torch.where(gap > 0, (here - logits) / gap, math.inf)
            first, target = kappa.min(dim=1)
            moving = torch.isfinite(first)
            saved.index_add_(0, bin_of(first[moving]), gap.gather(1, target[:, None])[moving, 0])
            current = torch.where(moving, target, current)
        self.saved += saved.cpu()
        self.count += logits.shape[0]

    def solve(self) -> tuple[float, float]:
        """The edges (lower, upper) of the bin of kappa in which the budget is crossed."""
        if self.bounds is None:
            to_save = (1 - self.budget) * self.count
            cumulative = self.saved.cumsum(0)
            at = int(torch.searchsorted(cumulative, to_save))
            if at >= BINS:
                self.bounds = (math.inf, math.inf)
            elif to_save <= 0:
                self.bounds = (-math.inf, -math.inf)
            else:
                self.bounds = (edge_of(at), edge_of(at + 1))
            # what the queries of this bin may spend above the cheaper routing of its upper edge
            spent = self.count - (float(cumulative[at]) if at < BINS else float(cumulative[-1]))
            self.spare = max(self.budget * self.count - spent, 0.0)
        return self.bounds

    def route(self, logits: Tensor, costs: Tensor) -> Tensor:
        """(..., J) -> (...) int64. Stateful: the queries of a bin are split in the order in which they come."""
        costs = where_float64_is(costs)
        routed = [self._route(chunk, costs) for chunk in where_float64_is(logits).flatten(0, -2).split(CHUNK)]
        return torch.cat(routed).view(logits.shape[:-1]).to(logits.device)

    def _route(self, logits: Tensor, costs: Tensor) -> Tensor:
        lower, upper = self.solve()
        below = route_below(logits, costs, upper)  # a kappa at an edge counts for the bin above it
        if lower == upper:
            return below
        above = route_below(logits, costs, lower)
        extra = self.costs.to(logits.device)[above] - self.costs.to(logits.device)[below]
        spent = extra.cumsum(0)
        granted = spent <= self.spare * (1 + 1e-12)
        self.spare -= float(torch.where(granted, extra, 0).sum())
        return torch.where(granted, above, below)


class Shuffle:
    """A control experiment: as many pixels for each expert as the routing gave it, but drawn at random.

    A routing that has learned nothing about the image loses nothing by it. `count` the map of every region of one
    image, in any order, then read `expert_map`; that depends on the counts and the seed only.

    Args:
        size: (R, S) of the whole output.
        num_experts: J.
        seed: Of the draw.
        device: Where the map is read.
    """

    def __init__(self, size: tuple[int, int], num_experts: int, seed: int, device: torch.device | str = 'cpu'):
        self.size, self.seed, self.device = size, seed, device
        self.counts = torch.zeros(num_experts, dtype=torch.long)

    def count(self, expert_map: Tensor) -> None:
        """Add a region's map, (r, s) uint8."""
        self.counts += torch.bincount(expert_map.flatten(), minlength=len(self.counts)).cpu()

    @cached_property
    def expert_map(self) -> Tensor:
        """(R, S) uint8; drawn on the CPU, so that every device has the same."""
        experts = torch.arange(len(self.counts), dtype=torch.uint8).repeat_interleave(self.counts)
        order = torch.randperm(len(experts), generator=torch.Generator().manual_seed(self.seed))
        return experts[order].view(self.size).to(self.device)


def where_float64_is(values: Tensor) -> Tensor:
    """`values` on their device, or on the CPU where it (Apple's MPS) knows no float64."""
    return values.cpu() if values.device.type == 'mps' else values


def bin_of(kappa: Tensor) -> Tensor:
    """Histogram bin of each kappa; the last bins hold what lies far out."""
    unit = torch.atan(kappa / KAPPA_SCALE) / math.pi + 0.5  # (0, 1)
    return (unit * BINS).long().clamp_(0, BINS - 1)


def edge_of(position: int) -> float:
    """Lower edge of bin `position`; minus and plus infinity at both ends."""
    if position <= 0:
        return -math.inf
    if position >= BINS:
        return math.inf
    return KAPPA_SCALE * math.tan(math.pi * (position / BINS - 0.5))
