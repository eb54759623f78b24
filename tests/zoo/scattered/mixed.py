"""Kind 0: samples are mixed in truth, so that no quantity of one sample exists."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..parts import Apply
from .program import Batch, Refusal, Scattered, draw, labels, register

__all__ = ["MIXED"]

MIXED: list[Scattered] = []
program = register(MIXED, 0)


def _rows(gen: Generator) -> Batch:
    return Batch(x=draw(gen, 4, 4), y=labels(gen, 4), number=torch.arange(4), n=4)


def _segments(gen: Generator) -> Batch:
    """Nine rows of which the fourth belongs to two samples."""
    segment = torch.arange(3).repeat_interleave(torch.tensor([2, 4, 3]))
    return Batch(x=draw(gen, 9, 4), segment=segment, y=labels(gen, 3), number=torch.arange(3), n=3)


def _refused(why: str) -> Refusal:
    return Refusal("SamplesMixed", "sample", why)


def _mixing(mix: Callable[[Tensor], Tensor]) -> nn.Module:
    return Apply(lambda m, x: m.head(mix(m.inner(x)).tanh()), inner=nn.Linear(4, 4), head=nn.Linear(4, 3))


@program(_rows, train=True, refused=_refused("samples meet in the batch's statistics"))
def batch_norm_in_training():
    """Batch norm with the batch's statistics."""
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


@program(
    _rows, lambda m, b: (z := F.normalize(m(b.x), dim=1)) @ z.T / 0.5,
    call=lambda z, b: F.cross_entropy(z, torch.arange(4).roll(1)),
    elements=lambda z, b: (z.exp().sum(1).log() - z[torch.arange(4), torch.arange(4).roll(1)]) / 4,
    refused=_refused("every sample is compared with all"),
)  # fmt: skip
def in_batch_negatives():
    """A contrastive loss with the other samples as negatives."""
    return _mixing(lambda h: h)


@program(_rows, refused=_refused("the batch's mean is added"))
def plus_the_mean():
    """`x + lin(x).mean(0, keepdim=True)`."""
    return Apply(
        lambda m, x: m.head((x + m.inner(x).mean(0, keepdim=True)).tanh()), inner=nn.Linear(4, 4),
        head=nn.Linear(4, 3),
    )  # fmt: skip


@program(_rows, refused=_refused("the context is the batch's mean"))
def mean_context():
    """A context that is the mean over the batch, in front of every row."""
    return Apply(
        lambda m, x: m.head(torch.cat([m.inner(x), m.context(x.mean(0)).expand(len(x), -1)], 1).tanh()),
        inner=nn.Linear(4, 4), context=nn.Linear(4, 2), head=nn.Linear(6, 3),
    )  # fmt: skip


@program(_segments, lambda m, b: m(b.x, b.segment), refused=_refused("a row belongs to two samples"))
def shared_row():
    """Uneven segments, and a row that is added to two of them."""

    def forward(m, x, s):
        h = m.inner(x).tanh()
        return m.head(x.new_zeros(3, 5).index_add(0, s, h) + F.one_hot(torch.tensor([0, 0, 1]), 2)[:, 1:] * h[0])

    return Apply(forward, inner=nn.Linear(4, 5), head=nn.Linear(5, 3))


@program(
    _rows, lambda m, b: m(b.x)[:, 0], samples=lambda b: 4, own=True,
    call=lambda z, b: F.softplus(z - z.roll(1)).mean(), elements=lambda z, b: (1 + (z - z.roll(1)).exp()).log() / 4,
    refused=_refused("every sample is compared with the next"),
)  # fmt: skip
def chain_of_pairs():
    """Each term of the loss compares a row with the one before it."""
    return _mixing(lambda h: h)


@program(_rows, refused=_refused("all rows compete for the slots"))
def soft_slots():
    """Slots that are weighted sums over the rows of all samples."""

    def forward(m, x):
        weight = m.gate(x).softmax(0)
        return m.head((x + weight @ m.inner(weight.T @ x)).tanh())

    return Apply(forward, gate=nn.Linear(4, 2), inner=nn.Linear(4, 4), head=nn.Linear(4, 3))
