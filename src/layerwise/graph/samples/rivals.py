"""Other numbers of samples that a batch may have as well: of losses without rows in common, of rows compared."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple

import torch

from layerwise.errors import SamplesMixed
from layerwise.graph.coverage import Graph
from layerwise.graph.samples.loss_rows import axis_of, one_after_another
from layerwise.graph.samples.numbers import MIXED, NONE, row_numbers
from layerwise.graph.samples.readings import labelled, on_output, read_as_one, terms
from layerwise.graph.samples.rows import check_losses, layout_by, root_of, rows_by_source
from layerwise.graph.samples.sample_layout import SampleLayout, Where, free_axes
from layerwise.graph.walk import by_node, nodes
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
    differentiated = _differentiated(graph)
    read |= {source for made in differentiated.values() for source in made}
    if len(graph.losses) < 2 or len(read) < 2:
        return layout.n
    found = [
        _rows_of_loss(graph, loss, where, differentiated)
        for loss, where in zip(graph.losses, layout.losses, strict=True)
    ]
    if not all(group.rows for group in found):
        return layout.n  # a loss without known rows may have a part in any
    together = read_as_one(graph)
    found += [_Group(set().union(*(found[i].rows for i in joined)), set()) for joined in together if len(joined) > 1]
    groups: list[_Group] = []
    for group in found:
        for other in [g for g in groups if g.rows & group.rows or _called_together(graph, g, group)]:
            groups.remove(other)
            group = _Group(group.rows | other.rows, group.samples | other.samples)
        groups.append(group)
    if len(groups) < 2:
        return layout.n
    whole = sum(terms(graph)[joined[0]] for joined in together)
    apart = one_after_another(graph, whole, together)
    if apart is not None and all(len(group.samples) == 1 for group in groups):
        # each loss is one sample's, or its rows are samples
        with suppress(SamplesMixed):
            check_losses(graph, layout_by(graph, whole, apart))
            return whole
    return sum(len(group.samples) for group in groups)


class _Group(NamedTuple):
    """Losses that have rows of tensors in common: these rows, and the losses' samples."""

    rows: set[tuple[Origin, int]]
    samples: set[int]


def _differentiated(graph: Graph) -> dict[int, list[Origin]]:
    """What the batch of each use that reads one with a gradient of its own was made of, by use.

    Its rows are not followed: it may have any of those of the tensors that it was made of.
    """
    above = by_node(graph.uses)
    first = [u for u in graph.uses if u.origin is None and not any(node in above for node in nodes(u.inputs))]
    return {use.index: sources(use.made_from) for use in first if use.made_from is not None}


def _rows_of_loss(graph: Graph, loss: LossUse, where: Where, whole: Mapping[int, list[Origin]]) -> _Group:
    """The rows of the tensors that the layers and the target of one loss were made of, and its samples.

    whole: for some uses the tensors all of whose rows count, since it is not known which of them were read.
    """
    uses = [use for use in graph.uses if use.origin is not None or use.index in whole]
    numbers = row_numbers([root_of(loss, where)], where.n, uses)
    rows: set[tuple[Origin, int]] = set()
    for use, number in zip(uses, numbers, strict=True):
        if bool((number != NONE).any()):
            rows |= {(s, r) for s in whole.get(use.index, ()) for r in range(s.shape[0] if s.shape else 1)}
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
