"""Cotangents that quantities send back through the graph: the loss's own, or roots of the loss Hessian.

For a loss L = sum_r w_r l_r(f_r) over loss terms r with outputs f, a root is a set of columns s with
`sum_j s_rj s_rj^T = w_r H_r` for every term. Each column holds the terms of all samples at one position within the
sample: terms of the same sample must not add before they are squared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from layerwise.graph.loss_curvature import LossCurvature
from layerwise.losses import Likelihood
from layerwise.rows.base import RowNumbers, Samples
from layerwise.rows.numbered import ranks

__all__ = [
    "Columns",
    "Cotangent",
    "Exact",
    "Gradient",
    "InGraph",
    "Sampled",
    "Second",
    "position_count",
    "positions",
]


class Cotangent:
    """What is sent back for a quantity: the user's own backward pass, columns before it, or nothing.

    streamed: it is the cotangent of the user's backward pass. in_graph: nothing is sent; `Quantity.compute_graph` works
    on the graph by itself. twice: that graph must be differentiable twice.
    """

    streamed: ClassVar[bool] = False
    in_graph: ClassVar[bool] = False
    twice: ClassVar[bool] = False

    def needs_layout(self, own_losses: bool) -> bool:
        """Whether samples must be told apart to make the columns; own_losses: whether a loss is the user's own."""
        return False


@dataclass(frozen=True)
class Gradient(Cotangent):
    """The cotangent of the loss itself, streamed from the user's own backward pass."""

    streamed = True


class Columns(Cotangent):
    """Columns of a root of the loss Hessian, sent before the user's backward pass."""

    def count(self, loss: Likelihood, rows: Samples | RowNumbers) -> int:
        """The number of columns of one loss."""
        raise NotImplementedError

    def columns(self, loss: Likelihood, rows: Samples | RowNumbers, chunk: int) -> Iterator[Tensor]:
        """Stacks `[v, *logits.shape]` of at most `chunk` columns."""
        raise NotImplementedError

    def stacks(self, curvatures: Sequence[LossCurvature], chunk: int) -> Iterator[tuple[int, LossCurvature, Tensor]]:
        """All columns, one curvature after another: the number of the first, its curvature, and a stack of them."""
        column = 0
        for curvature in curvatures:
            for stack in self.columns(curvature.likelihood, curvature.rows, chunk):
                yield column, curvature, stack
                column += len(stack)


@dataclass(frozen=True)
class Exact(Columns):
    """All columns of the exact root: `(C-1)·P` for C classes and P loss terms a sample."""

    def needs_layout(self, own_losses: bool) -> bool:
        """Always: a column holds one position of each sample."""
        return True

    def count(self, loss: Likelihood, rows: Samples | RowNumbers) -> int:
        """The number of columns of one loss."""
        return max(1, loss.columns) * position_count(loss, rows)

    def columns(self, loss: Likelihood, rows: Samples | RowNumbers, chunk: int) -> Iterator[Tensor]:
        """Stacks `[v, *logits.shape]` of at most `chunk` columns."""
        root = loss.root()
        if not len(root):  # one class: the loss is constant, and so is zero curvature
            yield torch.zeros_like(loss.logits)[None]
            return
        count = position_count(loss, rows)
        position = positions(loss, rows) if count > 1 else None
        stack: list[Tensor] = []
        for p in range(count):
            columns = root if position is None else root * (position == p).to(root.dtype)
            for column in columns.split(1):
                stack.append(column)
                if len(stack) == chunk:
                    yield torch.cat(stack)
                    stack = []
        if stack:
            yield torch.cat(stack)


@dataclass(frozen=True)
class Sampled(Columns):
    """Monte-Carlo columns from labels drawn from the model: unbiased, `draws` of them.

    Terms are drawn independently, so one column holds all positions of a sample.
    """

    draws: int
    generator: torch.Generator | None = None

    def needs_layout(self, own_losses: bool) -> bool:
        """For losses of the user's own, whose Hessian has blocks by sample."""
        return own_losses

    def count(self, loss: Likelihood, rows: Samples | RowNumbers) -> int:
        """The number of columns of one loss."""
        return self.draws

    def columns(self, loss: Likelihood, rows: Samples | RowNumbers, chunk: int) -> Iterator[Tensor]:
        """Stacks `[v, *logits.shape]` of at most `chunk` columns."""
        yield from loss.sample(self.draws, self.generator).split(chunk)


@dataclass(frozen=True)
class InGraph(Cotangent):
    """No cotangent is sent; the quantity sends its own through the graph in `compute_graph`."""

    in_graph = True


@dataclass(frozen=True)
class Second(InGraph):
    """No cotangent is sent; the quantity works on the double-differentiable graph in `compute_graph`."""

    twice = True


def position_count(loss: Likelihood, rows: Samples | RowNumbers) -> int:
    """The most loss terms of a sample; without a wait for the device where samples lie on an axis."""
    sizes = {axis: size for axis, size in enumerate(loss.logits.shape) if axis != loss.class_axis}
    if not isinstance(rows, RowNumbers):
        if rows.axis in sizes:
            sizes[rows.axis] = sizes[rows.axis] // rows.n if rows.n else 1
        return math.prod(sizes.values())
    position = positions(loss, rows)
    return int(position.max()) + 1 if position.numel() else 0


def positions(loss: Likelihood, rows: Samples | RowNumbers) -> Tensor:
    """The number of each logit's loss term within the sample, broadcastable to the logits' shape."""
    shape = list(loss.logits.shape)
    if isinstance(rows, RowNumbers):
        terms = [1 if axis == loss.class_axis else size for axis, size in enumerate(shape)]
        return ranks(rows.numbers.expand(terms).flatten(), rows.n).reshape(terms).to(loss.logits.device)
    position = torch.zeros([1] * len(shape), dtype=torch.long)
    for axis, size in enumerate(shape):
        if axis == loss.class_axis:
            continue
        index = torch.arange(size)
        if axis == rows.axis:
            repeats = size // rows.n if rows.n else 1
            index = index % max(repeats, 1) if rows.n_major else index // max(rows.n, 1)
            size = repeats
        position = position * size + index.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return position.to(loss.logits.device)
