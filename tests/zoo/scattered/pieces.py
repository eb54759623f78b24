"""Kind 2: the batch is taken apart before the first layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..parts import Apply
from .program import Batch, Scattered, draw, labels, register

__all__ = ["PIECES"]

PIECES: list[Scattered] = []
program = register(PIECES, 2)


def _rows(gen: Generator) -> Batch:
    """Eight rows with a label each."""
    return Batch(x=draw(gen, 8, 4), y=labels(gen, 8), number=torch.arange(8), n=8)


def _sequences(gen: Generator) -> Batch:
    """Six sequences of three rows, a label for each row."""
    y = labels(gen, 18)
    return Batch(x=draw(gen, 6, 3, 4), y=y, number=torch.arange(6).repeat_interleave(3), n=6)


def _layers() -> dict[str, nn.Module]:
    return {"inner": nn.Linear(4, 5), "head": nn.Linear(5, 3)}


def _whole(m: nn.Module, b: Batch) -> Tensor:
    return F.cross_entropy(m.head(m.inner(b.x).tanh()).flatten(0, -2), b.y)


@program(_rows, regular=_whole)
def chunks():
    """`cat` of the inner layer on two chunks."""
    return Apply(lambda m, x: m.head(torch.cat([m.inner(c) for c in x.chunk(2)]).tanh()), **_layers())


@program(_rows, regular=_whole)
def uneven_split():
    """Pieces of 3, 1 and 4 rows."""
    return Apply(lambda m, x: m.head(torch.cat([m.inner(c) for c in x.split([3, 1, 4])]).tanh()), **_layers())


@program(_rows, regular=_whole)
def slices():
    """`x[:4]` and `x[4:]`, all layers on each."""
    return Apply(lambda m, x: torch.cat([m.head(m.inner(c).tanh()) for c in (x[:4], x[4:])]), **_layers())


@program(_rows, regular=_whole)
def loop_over_groups():
    """A loop over the batch as four groups of two rows."""
    return Apply(
        lambda m, x: m.head(torch.stack([m.inner(group) for group in x.view(4, 2, 4)]).flatten(0, 1).tanh()),
        **_layers(),
    )


@program(_rows, regular=_whole)
def unbound():
    """`unbind` of the batch as two groups."""
    return Apply(
        lambda m, x: m.head(torch.cat([m.inner(group) for group in x.view(2, 4, 4).unbind()]).tanh()), **_layers()
    )


@program(_rows, regular=_whole)
def every_other_row():
    """Even rows and odd rows, put together again in their order."""
    return Apply(
        lambda m, x: m.head(torch.stack([m.inner(x[::2]), m.inner(x[1::2])], 1).flatten(0, 1).tanh()), **_layers()
    )


@program(_rows)
def halves_of_two_layers():
    """A layer for the first half of the batch, another for the second."""
    return Apply(
        lambda m, x: m.head(torch.cat([m.first(x[:4]), m.second(x[4:])]).tanh()),
        first=nn.Linear(4, 5), second=nn.Linear(4, 5), head=nn.Linear(5, 3),
    )  # fmt: skip


def _of_pieces(z: tuple[Tensor, ...], b: Batch) -> Tensor:
    sizes = [len(part) for part in z]
    return sum(F.cross_entropy(p, y, reduction="sum") for p, y in zip(z, b.y.split(sizes), strict=True)) / len(b.y)


def _terms_of_pieces(z: tuple[Tensor, ...], b: Batch) -> Tensor:
    z = torch.cat(z)
    return (z.exp().sum(1).log() - z[torch.arange(len(z)), b.y]) / len(z)


@program(
    _rows, lambda m, b: tuple(m(c) for c in b.x.chunk(2)), call=_of_pieces, elements=_terms_of_pieces, regular=_whole,
    reduction=None,
)  # fmt: skip
def a_loss_for_each_chunk():
    """A summed loss for each of two chunks, added."""
    return Apply(lambda m, x: m.head(m.inner(x).tanh()), **_layers())


@program(
    _rows, lambda m, b: tuple(m(c) for c in b.x.chunk(2)),
    call=lambda z, b: (F.cross_entropy(z[0], b.y[:4]) + F.cross_entropy(z[1], b.y[4:])) / 2,
    elements=_terms_of_pieces, regular=_whole, reduction=None,
)  # fmt: skip
def a_mean_for_each_chunk():
    """A mean loss for each of two chunks, and the mean of these."""
    return Apply(lambda m, x: m.head(m.inner(x).tanh()), **_layers())


@program(_sequences, regular=_whole)
def chunks_of_sequences():
    """Three chunks of two sequences, a label for each row."""
    return Apply(lambda m, x: m.head(torch.cat([m.inner(c) for c in x.chunk(3)]).tanh()).flatten(0, 1), **_layers())
