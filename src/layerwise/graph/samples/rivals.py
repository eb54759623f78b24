"""Other numbers of samples that a batch may have as well: of losses without rows in common, of rows compared."""

from __future__ import annotations

from contextlib import suppress
from typing import NamedTuple

import torch

from layerwise.errors import SamplesMixed
from layerwise.graph.coverage import Graph
from layerwise.graph.own_loss import OwnLossGraph
from layerwise.graph.samples.loss_rows import axis_of, one_after_another
from layerwise.graph.samples.numbers import MIXED, NONE, row_numbers
from layerwise.graph.samples.readings import labelled, on_output, terms
from layerwise.graph.samples.rows import check_losses, layout_by, root_of, rows_by_source
from layerwise.graph.samples.sample_layout import SampleLayout, Where, free_axes
from layerwise.graph.separable import read_together
from layerwise.tape.origins import Origin, sources
from layerwise.tape.uses import LossUse

__all__ = ["rivals"]


def rivals(graph: Graph, layout: SampleLayout, said_twice: bool) -> set[int]:
    """The other numbers of samples that may be meant where one is confirmed.

    said_twice: whether two kinds of tensors say the number that is confirmed; where one is the targets, none that are
    compared with it are meant.
    """
    found = {_in_parts(graph, layout)}
    other = _exchanged(graph, layout)
    if other is not None and not (said_twice and layout.n in labelled(graph)):
        found.add(other)
    return found - {layout.n}


def _in_parts(graph: Graph, layout: SampleLayout) -> int:
    """The number of samples if losses that have no row in common are of samples of their own; N where all have some.

    A row of a target counts, and rows that one call of the model was given beside each other.
    """
    read = {source for use in graph.uses if use.origin is not None for source in sources(use.origin[0])}
    if len(graph.losses) < 2 or len(read) < 2:
        return layout.n
    found = [_rows_of_loss(graph, loss, where) for loss, where in zip(graph.losses, layout.losses, strict=True)]
    if not all(group.rows for group in found):
        return layout.n  # a loss without known rows may have a part in any
    for own in graph.own:
        for joined in read_together(OwnLossGraph(graph, own)):
            first = len(graph.known) + sum(len(o.boundary) for o in graph.own[: graph.own.index(own)])
            found.append(_Group(set().union(*(found[first + i].rows for i in joined)), set()))
    groups: list[_Group] = []
    for group in found:
        for other in [g for g in groups if g.rows & group.rows or _called_together(graph, g, group)]:
            groups.remove(other)
            group = _Group(group.rows | other.rows, group.samples | other.samples)
        groups.append(group)
    whole = sum(terms(graph))
    apart = one_after_another(graph, whole)
    if len(groups) < 2 or apart is None:
        return layout.n
    if all(len(group.samples) == 1 for group in groups):  # each loss is one sample's, or its rows are samples
        with suppress(SamplesMixed):
            check_losses(graph, layout_by(graph, whole, apart))
            return whole
    return sum(len(group.samples) for group in groups)


class _Group(NamedTuple):
    """Losses that have rows of tensors in common: these rows, and the losses' samples."""

    rows: set[tuple[Origin, int]]
    samples: set[int]


def _rows_of_loss(graph: Graph, loss: LossUse, where: Where) -> _Group:
    """The rows of the tensors that the layers and the target of one loss were made of, and its samples."""
    uses = [use for use in graph.uses if use.origin is not None]
    numbers = row_numbers([root_of(loss, where)], where.n, uses)
    rows: set[tuple[Origin, int]] = set()
    for use, number in zip(uses, numbers, strict=True):
        for source, of_source in rows_by_source(use.origin):
            held = on_output(of_source, use)
            if held is not None:
                held, answers = torch.broadcast_tensors(held, number.cpu() != NONE)
                rows |= {(source, r) for r in held[answers & (held >= 0)].unique().tolist()}
    for source, of_source in rows_by_source(loss.target):
        rows |= {(source, r) for r in of_source[of_source >= 0].unique().tolist()}
    samples = where.owners(loss.call.logits.shape).unique().tolist()
    return _Group(rows, {sample for sample in samples if sample >= 0})


def _called_together(graph: Graph, one: _Group, other: _Group) -> bool:
    """Whether one call of the model was given rows of both, in two tensors, or any call took them together."""
    a, b = ({source for source, _ in group.rows} for group in (one, other))
    for call in (*graph.calls, *graph.met):
        made = [set(sources(origin)) for origin in call]
        if any(x & a and y & b for i, x in enumerate(made) for k, y in enumerate(made) if i != k):
            return True
    return False


def _exchanged(graph: Graph, layout: SampleLayout) -> int | None:
    """The rows that all samples share, where these may as well be the samples, compared with all rows of the batch.

    So it is where each of these rows, which the model was called with, has loss terms of its own, by an axis of the
    losses that no layer on the batch has. None where it is not so.
    """
    called = {source for origin in graph.entered for source in sources(origin)}
    shared = [use for use in graph.uses if use.index in layout.replaced and use.origin is not None]
    others = [use for use in graph.uses if use.index not in layout.replaced]
    counts = [s.shape[0] for use in shared if use.origin for s in sources(use.origin[0]) if s in called and s.shape]
    for m in dict.fromkeys(counts):
        ways = [axis_of(loss, m) for loss in graph.losses]
        if m in (1, layout.n) or any(use.call.out_shape[a] == m for use in others for a in free_axes(use)):
            continue
        roots = [root_of(loss, way) for loss, way in zip(graph.losses, ways, strict=True) if way is not None]
        if len(roots) == len(ways) and all(bool((r != MIXED).all()) for r in row_numbers(roots, m, shared)):
            return m
    return None
