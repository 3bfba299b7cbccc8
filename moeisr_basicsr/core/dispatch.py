"""Dispatch: every query to its expert, and the training forms of the mixture sum_j g_j f_j.

`decode(j, queries)` stands for expert j's answers to N queries, (N, C).

Shapes: N queries of one image, J experts, C output channels.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .queries import Queries

Decode = Callable[[int, Queries], Tensor]


def group_by_expert(expert: Tensor, num_experts: int) -> tuple[Tensor, list[int]]:
    """A stable order that puts the queries of each expert side by side, and the size of each group.

    Args:
        expert: (N,) int64 or uint8.
    """
    order = torch.argsort(expert, stable=True)
    return order, torch.bincount(expert.long(), minlength=num_experts).tolist()


def dispatch(decode: Decode, queries: Queries, expert: Tensor, num_experts: int, skip_idle: bool = True) -> Tensor:
    """Each query answered by its own expert only: (N, C).

    Args:
        expert: (N,) chosen expert.
        skip_idle: Leave out experts without a query. Training calls them with no query, so that every parameter has
            a gradient (zero) on every rank.
    """
    order, counts = group_by_expert(expert, num_experts)
    blocks = [
        decode(j, queries.select(which))
        for j, which in enumerate(order.split(counts))
        if not skip_idle or which.numel() > 0
    ]
    answers = torch.cat(blocks)
    return torch.zeros_like(answers).index_copy(0, order, answers)


def mixture_naive(answers: Tensor, gates: Tensor) -> Tensor:
    """sum_j g_j f_j with every expert on every query under autograd: the definition.

    Args:
        answers: (N, J, C) of all experts.
        gates: (N, J).
    """
    return (gates.unsqueeze(-1) * answers).sum(dim=1)


def mixture_exact(decode: Decode, queries: Queries, gates: Tensor, expert: Tensor) -> Tensor:
    """The same output and gradients as `mixture_naive` at about a third of its cost.

    The gates are one-hot, so only the chosen expert's weights and features receive a gradient; the mapper's gradient
    needs the values of the others, which run without autograd.

    Args:
        gates: (N, J) from `route_gumbel`.
        expert: (N,) chosen expert.
    """
    num_experts = gates.shape[1]
    order, counts = group_by_expert(expert, num_experts)
    chosen, others = [], []
    for j, which in enumerate(order.split(counts)):
        chosen.append(decode(j, queries.select(which)))
        with torch.no_grad():
            unchosen = expert.ne(j).nonzero().squeeze(1)
            values = chosen[-1].new_empty(expert.shape[0], chosen[-1].shape[1])  # (N, C)
            values[which] = chosen[-1]
            values[unchosen] = decode(j, queries.select(unchosen))
        others.append(values)
    answers = torch.cat(chosen)
    output = torch.zeros_like(answers).index_copy(0, order, answers)
    soft = (gates - gates.detach()).to(answers.dtype)  # zero forward, the softmax's gradient backward
    return output + torch.einsum('nj,jnc->nc', soft, torch.stack(others))


def mixture_sampled(
    decode: Decode, queries: Queries, gates: Tensor, expert: Tensor, keep: Tensor, rate: float
) -> Tensor:
    """An unbiased estimate of `mixture_exact`'s gradients: unchosen experts see a random part of the queries only.

    s = f_k + (1 / rho) sum over sampled j != k of (p_j - sg p_j) sg(f_j - f_k). Since the p_j add up to one, f_k is a
    control variate: it changes no expectation and takes the common part of the values out of the noise.

    Args:
        gates: (N, J) from `route_gumbel`.
        expert: (N,) chosen expert k.
        keep: (N, J) bool, which pairs of query and unchosen expert to run; each True with probability `rate`.
        rate: rho.
    """
    output = dispatch(decode, queries, expert, gates.shape[1], skip_idle=False)
    soft = (gates - gates.detach()).to(output.dtype)
    extra = torch.zeros_like(output)
    for j in range(gates.shape[1]):
        which = (keep[:, j] & expert.ne(j)).nonzero().squeeze(1)
        with torch.no_grad():
            gain = (decode(j, queries.select(which)) - output[which]) / rate
        extra = extra.index_add(0, which, soft[which, j, None] * gain)
    return output + extra
