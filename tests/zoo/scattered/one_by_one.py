"""Kind 7: programs that run sample by sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..parts import Apply
from .program import Batch, Scattered, cross_entropy, draw, labels, register

__all__ = ["ONE_BY_ONE"]

ONE_BY_ONE: list[Scattered] = []
program = register(ONE_BY_ONE, 7)


def _one(gen: Generator) -> Batch:
    """A batch of three, of which the program takes the first."""
    return Batch(x=draw(gen, 3, 4), y=labels(gen, 3), number=torch.zeros(1, dtype=torch.long), n=1)


def _sequence(gen: Generator) -> Batch:
    """One sequence of six rows without an axis for samples, a label for each row."""
    return Batch(x=draw(gen, 6, 4), y=labels(gen, 6), number=torch.zeros(6, dtype=torch.long), n=1)


def _rows(gen: Generator) -> Batch:
    """Six rows with a label each."""
    return Batch(x=draw(gen, 6, 4), y=labels(gen, 6), number=torch.arange(6), n=6)


def _list(gen: Generator) -> Batch:
    """Four sequences of uneven length, a list, with a label each."""
    return Batch(x=[draw(gen, t, 4) for t in (2, 4, 1, 3)], y=labels(gen, 4), number=torch.arange(4), n=4)


def _apart(gen: Generator) -> Batch:
    """Six rows that are tensors of their own, with labels that are so too."""
    b = _rows(gen)
    b.x, b.each = [x.clone() for x in b.x], [y.clone() for y in b.y]
    return b


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def _whole(m: nn.Module, b: Batch) -> Tensor:
    return F.cross_entropy(m(torch.stack(list(b.x))), b.y)


def _sum_of_whole(m: nn.Module, b: Batch) -> Tensor:
    return F.cross_entropy(m(torch.stack(list(b.x))), b.y, reduction="sum")


def _row(z: Tensor, y: Tensor) -> Tensor:
    return z.exp().sum().log() - z[y]


def _summed(z: tuple[Tensor, ...], b: Batch) -> Tensor:
    return sum(F.cross_entropy(row, y) for row, y in zip(z, b.y, strict=True))


def _rows_of(z: tuple[Tensor, ...], b: Batch) -> Tensor:
    return torch.stack([_row(row, y) for row, y in zip(z, b.y, strict=True)])


@program(
    _one, lambda m, b: m(b.x[0]), samples=lambda b: 1,
    call=lambda z, b: F.cross_entropy(z, b.y[0]), elements=lambda z, b: _row(z, b.y[0])[None],
    regular=lambda m, b: F.cross_entropy(m(b.x[:1]), b.y[:1]),
)  # fmt: skip
def unbatched():
    """`m(x[0])` of one row; the user says that it is one sample."""
    return _mlp()


@program(_sequence, samples=lambda b: 1)
def unbatched_sequence():
    """One sequence without an axis for samples."""
    return Apply(lambda m, x: m.head(m.inner(x).tanh().cumsum(0)), inner=nn.Linear(4, 5), head=nn.Linear(5, 3))


@program(
    _apart, lambda m, b: tuple(m(x) for x in b.x), samples=lambda b: 6, call=_summed, elements=_rows_of,
    regular=_sum_of_whole, reduction=None,
)  # fmt: skip
def sum_of_losses():
    """Six losses of one sample each, added; the user says that they are six samples."""
    return _mlp()


@program(
    _apart, lambda m, b: tuple(m(x) for x in b.x), samples=lambda b: torch.arange(6),
    call=lambda z, b: torch.stack([F.cross_entropy(row, y) for row, y in zip(z, b.each, strict=True)]).mean(),
    elements=lambda z, b: _rows_of(z, b) / 6, regular=_whole, reduction=None,
)  # fmt: skip
def mean_of_a_list_of_losses():
    """The mean of a list of losses, which the user numbers."""
    return _mlp()


@program(
    _rows, lambda m, b: tuple(m(b.x[i]) for i in range(6)), call=_summed, elements=_rows_of, regular=_sum_of_whole,
    reduction=None,
)  # fmt: skip
def losses_of_rows():
    """The same where each sample is a row of one batch; the user says nothing."""
    return _mlp()


@program(_rows, lambda m, b: torch.stack([m(x) for x in b.x]), regular=_whole)
def stacked():
    """`stack` of a loop over the rows of a batch."""
    return _mlp()


@program(_rows, lambda m, b: torch.cat([m(b.x[i : i + 1]) for i in range(6)]), regular=_whole)
def comprehension():
    """`cat` of a list of batches of one."""
    return _mlp()


@program(_rows, regular=lambda m, b: F.cross_entropy(m.head(m.inner(b.x).tanh()), b.y))
def loop_inside():
    """The loop is in the model: layers row by row, the head on all."""
    return Apply(
        lambda m, x: m.head(torch.stack([m.inner(row) for row in x.unbind()]).tanh()),
        inner=nn.Linear(4, 5),
        head=nn.Linear(5, 3),
    )


@program(_list, lambda m, b: torch.stack([m(x) for x in b.x]), call=cross_entropy)
def list_of_sequences():
    """A list of sequences of uneven length, each summed, and a stack of these."""
    return Apply(lambda m, x: m.head(m.inner(x).tanh().sum(0)), inner=nn.Linear(4, 5), head=nn.Linear(5, 3))
