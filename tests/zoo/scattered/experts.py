"""Kind 5: rows are routed to experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..parts import Apply, leaf
from .program import Batch, Scattered, draw, labels, register

__all__ = ["EXPERTS"]

EXPERTS: list[Scattered] = []
program = register(EXPERTS, 5)


def _rows(gen: Generator) -> Batch:
    """Eight rows with a label each; the first feature of 5 of them is positive."""
    x = draw(gen, 8, 4)
    x[:, 0] = x[:, 0].abs() * torch.tensor([1, -1, 1, 1, -1, 1, -1, 1])
    return Batch(x=x, y=labels(gen, 8), number=torch.arange(8), n=8)


def _tokens(gen: Generator) -> Batch:
    """Four sequences of six tokens, a label for each token."""
    x, y = draw(gen, 4, 6, 4), labels(gen, 24)
    return Batch(x=x, y=y, number=torch.arange(4).repeat_interleave(6), n=4)


def _two() -> dict[str, nn.Module]:
    return {"one": nn.Linear(4, 5), "two": nn.Linear(4, 5), "head": nn.Linear(5, 3)}


def _by_masks(m: nn.Module, x: Tensor) -> Tensor:
    top = x[..., 0] > 0
    out = x.new_zeros(*x.shape[:-1], 5)
    out[top] = m.one(x[top])
    out[~top] = m.two(x[~top])
    return m.head(out.tanh()).flatten(0, -2)


def _everywhere(m: nn.Module, b: Batch) -> Tensor:
    """The regular form: both experts on all rows, of which one is taken."""
    return F.cross_entropy(m.head(torch.where(b.x[..., :1] > 0, m.one(b.x), m.two(b.x)).tanh()).flatten(0, -2), b.y)


@program(_rows, regular=_everywhere)
def masked_experts():
    """`out[top] = one(x[top])` for each of two experts, a row a sample."""
    return Apply(_by_masks, **_two())


@program(_tokens, regular=_everywhere)
def masked_experts_of_tokens():
    """The same with tokens routed, six a sample."""
    return Apply(_by_masks, **_two())


@program(_tokens)
def experts_behind_a_layer():
    """Tokens are routed between two layers, by what the first one gives."""
    return Apply(
        lambda m, x: _by_masks(m, m.inner(x).tanh()), inner=nn.Linear(4, 4), **_two()
    )  # fmt: skip


def _gated(m: nn.Module, x: Tensor, k: int) -> Tensor:
    """Sums of the k best of three experts, weighted by the gate."""
    rows = x.flatten(0, -2)
    weight, best = m.gate(rows).softmax(-1).topk(k, -1)
    out = rows.new_zeros(len(rows), 5)
    for e, expert in enumerate(m.experts):
        row, place = (best == e).nonzero(as_tuple=True)
        if len(row):
            out.index_add_(0, row, weight[row, place, None] * expert(rows[row]))
    return m.head(out.tanh())


def _three() -> dict[str, nn.Module]:
    experts = nn.ModuleList(nn.Linear(4, 5) for _ in range(3))
    return {"gate": nn.Linear(4, 3), "experts": experts, "head": nn.Linear(5, 3)}


@program(_tokens)
def index_added_experts():
    """The best of three experts for each token, by `index_add_`, times the gate's weight."""
    return Apply(lambda m, x: _gated(m, x, 1), **_three())


@program(_tokens)
def two_of_three_experts():
    """The same with the two best."""
    return Apply(lambda m, x: _gated(m, x, 2), **_three())


def _sorted(m: nn.Module, x: Tensor, product) -> Tensor:
    """Tokens sorted by expert, one product for the rows of each, and sorted back; a token has the best expert."""
    rows = x.flatten(0, -2)
    weight, best = m.gate(rows).softmax(-1).max(-1)
    order = best.argsort(stable=True)
    ends = best.bincount(minlength=3).cumsum(0)
    out = product(rows[order], m.w, ends)[order.argsort()]
    return m.head((weight[:, None] * out).tanh())


def _sliced(rows: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    starts = [0, *ends.tolist()[:-1]]
    return torch.cat([rows[a:b] @ w[e] for e, (a, b) in enumerate(zip(starts, ends.tolist(), strict=True))])


@program(_tokens)
def experts_on_sorted_tokens():
    """Tokens sorted by expert, whose weights are slices `w[e]` of one parameter."""
    return Apply(lambda m, x: _sorted(m, x, _sliced), gate=nn.Linear(4, 3), w=leaf(3, 4, 5), head=nn.Linear(5, 3))


def _grouped(rows: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(rows, w, offs=ends.to(torch.int32))


def _single(gen: Generator) -> Batch:
    b = _tokens(gen)
    b.x = b.x.float()
    return b


@program(_single, dtype=torch.float32, rel=2e-4)
def grouped_experts():
    """The same by `F.grouped_mm`, in float32, which is what it knows."""
    return Apply(lambda m, x: _sorted(m, x, _grouped), gate=nn.Linear(4, 3), w=leaf(3, 4, 8), head=nn.Linear(8, 3))
