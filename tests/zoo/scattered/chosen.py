"""Kind 3: rows are chosen before the loss or before the head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..parts import Apply
from .program import Batch, Scattered, cross_entropy, draw, labels, per_label, register

__all__ = ["CHOSEN"]

CHOSEN: list[Scattered] = []
program = register(CHOSEN, 3)


def _tagged(gen: Generator) -> Batch:
    """Four sequences of six rows, of which a mask keeps 5, 1, 3 and 4; `y` and `number` are of those."""
    keep = torch.zeros(4, 6, dtype=torch.bool)
    for n, count in enumerate((5, 1, 3, 4)):
        keep[n, torch.randperm(6, generator=gen)[:count]] = True
    every = labels(gen, 4, 6)
    return Batch(x=draw(gen, 4, 6, 4), keep=keep, every=every, y=every[keep], number=keep.nonzero()[:, 0], n=4)


def _lengths(gen: Generator) -> Batch:
    """Five padded sequences with their lengths, a label each."""
    lengths = torch.tensor([2, 5, 3, 1, 4])
    return Batch(x=draw(gen, 5, 5, 4), lengths=lengths, y=labels(gen, 5), number=torch.arange(5), n=5)


def _layers() -> dict[str, nn.Module]:
    return {"inner": nn.Linear(4, 5), "head": nn.Linear(5, 3)}


def _every_row() -> nn.Module:
    return Apply(lambda m, x: m.head(m.inner(x).tanh()), **_layers())


def _ignoring(m: nn.Module, b: Batch) -> Tensor:
    """The regular form: labels that do not count."""
    z = m.head(m.inner(b.x).tanh())
    return F.cross_entropy(z.flatten(0, 1), b.every.masked_fill(~b.keep, -100).flatten())


@program(_tagged, lambda m, b: m(b.x)[b.keep], regular=_ignoring)
def masked_logits():
    """`logits[keep]` meets `labels[keep]`."""
    return _every_row()


@program(_tagged, lambda m, b: m(b.x).masked_select(b.keep[..., None]).view(-1, 3), regular=_ignoring)
def masked_select():
    """`logits.masked_select(keep[..., None]).view(-1, C)`."""
    return _every_row()


@program(_tagged, lambda m, b: m(b.x)[b.keep.nonzero(as_tuple=True)], regular=_ignoring)
def nonzero():
    """`logits[keep.nonzero(as_tuple=True)]`."""
    return _every_row()


@program(_tagged, lambda m, b: m(b.x).view(-1, 3)[b.keep.view(-1)], regular=_ignoring)
def active_rows():
    """`logits.view(-1, C)[active]`."""
    return _every_row()


@program(
    _tagged, lambda m, b: m(b.x).flatten(0, 1).index_select(0, b.keep.flatten().nonzero()[:, 0]), regular=_ignoring
)
def index_select():
    """`index_select` of the rows of all samples."""
    return _every_row()


@program(_tagged, lambda m, b: m(b.x, b.keep))
def head_of_masked_rows():
    """The head reads `hidden[mask]`."""
    return Apply(lambda m, x, keep: m.head(m.inner(x).tanh()[keep]), **_layers())


@program(
    _tagged, lambda m, b: m(b.x)[b.keep], reduction="sum",
    call=lambda z, b: F.mse_loss(z[:, 0], b.y.to(z), reduction="sum"),
    elements=lambda z, b: (z[:, 0] - b.y) ** 2,
)  # fmt: skip
def masked_regression():
    """A summed squared error of the rows that a mask keeps."""
    return _every_row()


@program(_lengths, lambda m, b: m(b.x, b.lengths))
def gathered_last_token():
    """`gather` of each sequence's last token in front of the head."""

    def forward(m, x, lengths):
        last = (lengths - 1)[:, None, None].expand(-1, 1, 5)
        return m.head(m.inner(x).tanh().gather(1, last)[:, 0])

    return Apply(forward, **_layers())


@program(_lengths, lambda m, b: m(b.x, b.lengths))
def indexed_last_token():
    """`hidden[arange, lengths - 1]` in front of the head."""
    return Apply(lambda m, x, lengths: m.head(m.inner(x).tanh()[torch.arange(len(x)), lengths - 1]), **_layers())


@program(
    _lengths, lambda m, b: m(b.x, b.lengths),
    regular=lambda m, b: F.cross_entropy(m.head(m.inner(b.x).tanh().mean(1)), b.y),
)  # fmt: skip
def sorted_by_length():
    """Sequences sorted by length in front of a layer, and back behind it."""

    def forward(m, x, lengths):
        order = lengths.argsort(descending=True)
        return m.head(m.inner(x[order]).tanh()[order.argsort()].mean(1))

    return Apply(forward, **_layers())


@program(
    lambda gen: (b := _lengths(gen), setattr(b, "order", b.lengths.argsort()), setattr(b, "number", b.order))[0],
    lambda m, b: m(b.x, b.order),
    call=lambda z, b: cross_entropy(z, Batch(y=b.y[b.order])),
    elements=lambda z, b: per_label(z, Batch(y=b.y[b.order])),
    samples=lambda b: b.order,
)
def sorted_for_the_head():
    """Rows sorted between two layers, labels in that order too; the user numbers the loss's terms."""
    return Apply(lambda m, x, order: m.head(m.inner(x).tanh().mean(1)[order]), **_layers())
