"""Losses that are of the same samples, and those that are of samples of their own: one part of the batch after another.

Losses belong together where a term reads both, where rows of one tensor have a part in both, and where one call took
rows of both together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from layerwise.graph.coverage import Graph
from layerwise.graph.samples.numbers import NONE, Root, row_numbers
from layerwise.graph.samples.readings import on_output, read_as_one, rows_by_source, telling_target, terms
from layerwise.graph.samples.sample_layout import Where
from layerwise.graph.walk import by_node, nodes
from layerwise.rows.base import RowNumbers
from layerwise.tape.origins import Origin, sources
from layerwise.tape.uses import LossUse

__all__ = ["groupings", "one_after_another", "orders", "parts", "terms_apart"]


def groupings(graph: Graph) -> list[list[list[int]]]:
    """The losses, by number, those together that a term reads; and, where it may differ, those of the same samples."""
    together = read_as_one(graph)
    return [together, parts(graph)] if len(together) > 2 else [together]


def orders(graph: Graph, n: int) -> Iterator[list[Where]]:
    """The samples of several losses that have n rows of terms together, part by part."""
    for groups in groupings(graph):
        found = one_after_another(graph, n, groups)
        if found is not None:
            yield found


def terms_apart(sizes: Sequence[int], groups: Sequence[Sequence[int]]) -> int:
    """The number of loss terms of all losses, those of a group counted once. sizes: `terms` of the graph."""
    return sum(sizes[group[0]] for group in groups)


def one_after_another(graph: Graph, n: int, groups: Sequence[Sequence[int]]) -> list[Where] | None:
    """The samples of several losses that have n rows of terms together: those of one loss after those of another.

    In the order of the loss calls; where some loss is the user's own, of the calls that made what the losses read.
    groups: the losses by number, those together that are of the same samples.
    """
    sizes = terms(graph)
    if len(groups) < 2 or any(sizes[i] != sizes[group[0]] for group in groups for i in group):
        return None
    if terms_apart(sizes, groups) != n:
        return None
    if graph.own:
        groups = sorted(groups, key=lambda group: min(graph.losses[i].logits.node._sequence_nr() for i in group))
    found: dict[int, Where] = {}
    start = 0
    for group in groups:
        for i in group:
            call, size = graph.losses[i].call, sizes[i]
            axis = next((a for a in range(call.logits.dim()) if a != call.class_axis), None)
            shape = [size if a == axis else 1 for a in range(call.logits.dim())]
            found[i] = RowNumbers(n, torch.arange(start, start + size).reshape(shape))
        start += sizes[group[0]]
    return [found[i] for i in range(len(sizes))]


def parts(graph: Graph) -> list[list[int]]:
    """The losses, by number, those together that are of the same samples.

    A row of a target counts, too. All are together where some loss has no known row, which may be any.
    """
    together = read_as_one(graph)
    if len(together) < 2:
        return together
    differentiated = _differentiated(graph)
    origins = [use.origin[0] for use in graph.uses if use.origin is not None]
    if len({*(s for x in origins for s in sources(x)), *(s for x in differentiated.values() for s in x)}) < 2:
        return [list(range(len(graph.losses)))]
    rows = [_rows_of_loss(graph, loss, differentiated) for loss in graph.losses]
    if not all(rows):
        return [list(range(len(rows)))]
    found: list[_Part] = []
    for group in together:
        part = _Part(list(group), set().union(*(rows[i] for i in group)))
        for other in [x for x in found if x.rows & part.rows or _called_together(graph, x, part)]:
            found.remove(other)
            part = _Part(sorted([*part.losses, *other.losses]), part.rows | other.rows)
        found.append(part)
    return [part.losses for part in found]


class _Part(NamedTuple):
    """Losses that have rows of tensors in common: these rows, by tensor and number."""

    losses: list[int]
    rows: set[tuple[Origin, int]]


def _differentiated(graph: Graph) -> dict[int, list[Origin]]:
    """What the batch of each use that reads one with a gradient of its own was made of, by use.

    Its rows are not followed: it may have any of those of the tensors that it was made of.
    """
    above = by_node(graph.uses)
    first = [u for u in graph.uses if u.origin is None and not any(node in above for node in nodes(u.inputs))]
    return {use.index: sources(use.made_from) for use in first if use.made_from is not None}


def _rows_of_loss(graph: Graph, loss: LossUse, whole: Mapping[int, list[Origin]]) -> set[tuple[Origin, int]]:
    """The rows of the tensors that the layers and the target of one loss were made of.

    whole: for uses whose rows are not followed the tensors that they may have any row of.
    """
    uses = [use for use in graph.uses if use.origin is not None or use.index in whole]
    logits = loss.call.logits
    root = Root(loss.logits, logits, torch.zeros([1] * logits.dim(), dtype=torch.long, device=logits.device))
    rows: set[tuple[Origin, int]] = set()
    for use, number in zip(uses, row_numbers([root], 1, uses), strict=True):
        if not bool((number != NONE).any()):
            continue
        known = {source: on_output(of_source, use) for source, of_source in rows_by_source(use.origin)}
        for source in whole[use.index] if use.origin is None else sources(use.origin[0]):
            held = known.get(source)
            if held is None:  # it may have any of them
                rows |= {(source, r) for r in range(source.shape[0] if source.shape else 1)}
            else:
                held, answers = torch.broadcast_tensors(held, number.cpu() != NONE)
                rows |= {(source, r) for r in held[answers & (held >= 0)].unique().tolist()}
    for source, of_source in rows_by_source(telling_target(graph, loss)):
        rows |= {(source, r) for r in of_source[of_source >= 0].unique().tolist()}
    return rows


def _called_together(graph: Graph, one: _Part, other: _Part) -> bool:
    """Whether one call of the model was given rows of both, in two tensors, or any call took them together."""
    a, b = ({source for source, _ in part.rows} for part in (one, other))
    for call in (*graph.calls, *graph.met):
        made = [set(sources(origin)) for origin in call]
        if any(x & a and y & b for i, x in enumerate(made) for k, y in enumerate(made) if i != k):
            return True
    return False
