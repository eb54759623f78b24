"""The sample number of every loss term, in the ways that it may be had.

From an axis with one index for each sample, from the rows that the targets were taken from, from the rows that a use's
input was taken from, from the terms that a loss of the user's own adds up, or from the user.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from layerwise.errors import Undefined
from layerwise.graph.coverage import Graph
from layerwise.graph.own_loss import OwnLossGraph
from layerwise.graph.products import twice
from layerwise.graph.samples.loss_parts import one_after_another, orders
from layerwise.graph.samples.numbers import MIXED, NONE, Root, element_numbers, numbers_of_both, over, row_numbers
from layerwise.graph.samples.readings import (
    on_output,
    origin_rows,
    outside,
    telling_target,
    term_shape,
)
from layerwise.graph.samples.sample_axes import hypotheses
from layerwise.graph.samples.sample_layout import Where
from layerwise.graph.separable import loss_terms
from layerwise.graph.walk import Edge
from layerwise.rows.base import RowNumbers, Samples
from layerwise.tape.origins import Origin, sources
from layerwise.tape.pull import pull
from layerwise.tape.uses import LossUse, Use
from layerwise.tensors import is_out_of_memory

__all__ = ["axis_of", "by_known_rows", "by_target", "numberings", "unheard"]


def numberings(graph: Graph, n: int, given: Tensor | None) -> Iterator[list[Where]]:
    """The ways in which the terms of the losses may belong to n samples, the likeliest first."""
    if given is not None:
        yield from _given(graph, n, given)
        return
    known = list(graph.known)
    for way in (_exact_axis, by_target, _by_inputs, _by_derivatives):
        found = [way(graph, loss, n) for loss in known]
        own: list[Where | None] = []
        for boundary in (o.boundary for o in graph.own):
            own += [way(graph, part, n) for part in boundary]
        if all(where is not None for where in (*found, *own)):
            yield [where for where in (*found, *own) if where is not None]
    if graph.own:
        rest: list[Where | None] = [_exact_axis(graph, x, n) or by_target(graph, x, n) for x in known]
        for o in graph.own:
            rest += _by_terms(OwnLossGraph(graph, o), n, None)
        if all(where is not None for where in rest):
            yield [where for where in rest if where is not None]
    if not graph.own and len(graph.known) == n > 1:
        yield [RowNumbers(n, torch.full([1] * loss.call.logits.dim(), i)) for i, loss in enumerate(graph.known)]
    yield from orders(graph, n)


def _exact_axis(graph: Graph, loss: LossUse, n: int) -> Where | None:
    return axis_of(loss, n)


def axis_of(loss: LossUse, n: int) -> Where | None:
    """The axis of a loss's terms with one index for each sample."""
    return next((s for s in hypotheses(loss, n) if s.axis < 0 or loss.call.logits.shape[s.axis] == n), None) or (
        _all_of_one(loss) if n == 1 else None
    )


def _first_axis(graph: Graph, loss: LossUse, n: int) -> Where | None:
    return next((s for s in hypotheses(loss, n) if s.axis == 0 and loss.call.logits.shape[0] == n), None)


def _all_of_one(loss: LossUse) -> RowNumbers:
    return RowNumbers(1, torch.zeros([1] * loss.call.logits.dim(), dtype=torch.long))


def by_target(graph: Graph, loss: LossUse, n: int) -> Where | None:
    """The rows that the target of a loss was taken from."""
    target = telling_target(graph, loss)
    if target is None:
        return None
    rows = _sample_rows(*target, n)
    return None if rows is None else _of_terms(loss, rows, n)


def _of_terms(loss: LossUse, rows: Tensor, n: int) -> RowNumbers | None:
    """Numbers of a loss's terms as numbers of its logits."""
    logits, axis = loss.call.logits, loss.call.class_axis
    rows = rows.to(logits.device)
    if axis is not None and rows.dim() == logits.dim() - 1:
        rows = rows.unsqueeze(axis)
    fits = rows.dim() == logits.dim() and all(a in (1, b) for a, b in zip(rows.shape, logits.shape, strict=True))
    return RowNumbers(n, rows) if fits else None


def _by_inputs(graph: Graph, loss: LossUse, n: int) -> Where | None:
    return by_known_rows(loss, n, list(_known_rows(graph, n)))


def by_known_rows(loss: LossUse, n: int, known: Sequence[tuple[Use, Tensor]]) -> Where | None:
    """The known rows of uses' outputs, carried to the loss's terms by vector-Jacobian products.

    Where a row answers for several terms, as for a derivative by it, those of one index of the first axis are one.
    """
    shape = term_shape(loss)
    found = _carried(loss, n, known, shape)
    if found is None and loss.call.class_axis is None and len(shape) > 1:
        found = _carried(loss, n, known, torch.Size([shape[0], *[1] * (len(shape) - 1)]))
    return found


def _carried(loss: LossUse, n: int, known: Sequence[tuple[Use, Tensor]], terms: torch.Size) -> Where | None:
    logits = loss.call.logits
    count = terms.numel()
    owners = torch.arange(count, device=logits.device).reshape(terms)
    owners = owners if loss.call.class_axis is None else owners.unsqueeze(loss.call.class_axis)
    if not known or not count:
        return None
    found = torch.full((count,), NONE, device=logits.device)
    reached = row_numbers([Root(loss.logits, logits, owners)], count, [use for use, _ in known])
    for (_, rows), term in zip(known, reached, strict=True):
        if bool((term == MIXED).any()):
            continue
        term, sample = torch.broadcast_tensors(term, rows.to(term.device))
        held = term >= 0
        before = found[term[held]]
        if bool(((before != NONE) & (before != sample[held])).any()):
            return None
        found[term[held]] = sample[held]
        if bool((found[term[held]] != sample[held]).any()):
            return None  # a term that depends on rows of several samples
    if bool((found == NONE).any()):
        return None
    numbers, axis = found[owners], axis_of(loss, n)
    agrees = axis is not None and bool((numbers == axis.owners(logits.shape, logits.device)).all())
    return axis if agrees else RowNumbers(n, numbers)


def _by_derivatives(graph: Graph, loss: LossUse, n: int) -> Where | None:
    """The same where a row reaches several terms: by products with the Jacobian."""
    found = _terms_of_rows(graph, loss, n)
    return None if found is None or bool((found < 0).any()) else RowNumbers(n, found)


def unheard(graph: Graph, loss: LossUse, n: int) -> bool:
    """Whether some term of a loss answers for no row with a known sample, and so may be of any sample."""
    found = _terms_of_rows(graph, loss, n)
    return found is not None and bool((found == NONE).any())


def _terms_of_rows(graph: Graph, loss: LossUse, n: int) -> Tensor | None:
    """For each term of a loss the sample whose rows it answers for, NONE or MIXED; None where that cannot be measured.

    J v is the derivative by r of v · (J^T r); where the part of v in each sample is multiplied by a power of two, a
    term that depends on one sample is multiplied by the same.
    """
    known = [(use, rows) for use, rows in _known_rows(graph, n) if use.origin is not None]
    if not known:
        return None
    r = torch.ones_like(loss.call.logits).requires_grad_()
    try:
        with twice():
            back = pull([loss.logits], [r], [use.edge for use, _ in known], create_graph=True)
    except (RuntimeError, Undefined) as error:
        if is_out_of_memory(error):
            raise
        return None
    roots = [
        Root(g, g, rows.expand([1] * g.dim() if rows.dim() != g.dim() else rows.shape))
        for g, (_, rows) in zip(back, known, strict=True)
        if g is not None and g.requires_grad
    ]
    try:
        with twice():
            (found,) = element_numbers(roots, n, [r]) if roots else (None,)
    except (RuntimeError, Undefined) as error:
        if is_out_of_memory(error):
            raise
        return None
    if found is None:
        return None
    axis = loss.call.class_axis
    return over([] if axis is None else [axis], found)


def _known_rows(graph: Graph, n: int) -> Iterator[tuple[Use, Tensor]]:
    """Uses whose rows have known samples, those next to the losses first: from the origin, or n rows on dim 0.

    Where the model was called with tensors, a use that read none of them says nothing: it may have read a constant.
    """
    for use in reversed(graph.uses):
        if use.origin is None:
            if use.call.out_shape and use.call.out_shape[0] == n:
                yield use, torch.arange(n).reshape(-1, *[1] * (len(use.call.out_shape) - 1))
            continue
        rows = None if outside(graph, use.origin[0]) else _input_rows(use, n)
        if rows is not None:
            yield use, rows


def _input_rows(use: Use, n: int) -> Tensor | None:
    """The sample of each leading index of a use's output, where its input's origin says it."""
    assert use.origin is not None
    rows = _sample_rows(*use.origin, n)
    return None if rows is None else on_output(rows, use)


def _sample_rows(origin: Origin, shape: torch.Size, n: int) -> Tensor | None:
    """The sample of each element of some data, where its sources have n rows, each or together, or n of them are used.

    None where neither is so.
    """
    found = sources(origin)
    sizes = [s.shape[0] if s.shape else 1 for s in found]
    offsets = dict.fromkeys(found, 0)
    if len(found) > 1 and sum(sizes) == n:
        offsets = {s: sum(sizes[:i]) for i, s in enumerate(found)}
    rows = origin_rows(origin, shape, offsets)
    if rows is None or sum(sizes) == n or all(size == n for size in sizes):
        return rows
    different, place = rows.unique(return_inverse=True)
    return place if len(different) == n and len(found) == 1 else None


def _by_terms(own_loss: OwnLossGraph, n: int, given: Tensor | None, apart: bool = False) -> list[Where | None]:
    """The samples of a boundary's elements, from the terms that a loss of the user's own adds up."""
    found: list[Tensor | None] = [None] * len(own_loss.edges)
    terms = _own_terms(own_loss, given, apart)
    for (node, output), its in terms:
        data = node._input_metadata[output]
        like = torch.zeros((), dtype=data.dtype, device=data.device).expand(torch.Size(data.shape))
        owners = _term_owners(like.shape, n, its)
        if owners is None:
            return [None] * len(found)
        with own_loss.alone():
            numbers = element_numbers([Root(GradientEdge(node, output), like, owners)], n, own_loss.edges)
        found = [numbers_of_both(a, b) for a, b in zip(found, numbers, strict=True)]
    if any(x is None or bool((x == MIXED).any()) for x in found):
        return [None] * len(found)
    return [RowNumbers(n, x) for x in found if x is not None]


def _own_terms(own_loss: OwnLossGraph, given: Tensor | None, apart: bool) -> list[tuple[Edge, Tensor | None]]:
    """The terms of a loss of the user's own in the order of their calls, each with its part of the user's numbers.

    apart: as many numbers as terms, or as calls (a list of losses that is summed), are taken one after another; else,
    and where they are not as many, all calls have the same.
    """
    terms = [(edge, probe.rows) for probe in loss_terms(own_loss) for edge in probe.edges]
    if given is None or not apart:
        return [(edge, given) for edge, _ in terms]
    terms.sort(key=lambda term: term[0][0]._sequence_nr())
    shapes = [torch.Size(node._input_metadata[output].shape) for (node, output), _ in terms]
    units = [shape[:-1] if rows else shape for shape, (_, rows) in zip(shapes, terms, strict=True)]
    for each in ([torch.Size()] * len(terms), units):
        sizes = [unit.numel() for unit in each]
        if sum(sizes) == given.numel():
            parts = given.flatten().split(sizes)
            return [(e, part.reshape(unit)) for (e, _), part, unit in zip(terms, parts, each, strict=True)]
    return [(edge, given) for edge, _ in terms]


def _term_owners(shape: torch.Size, n: int, given: Tensor | None) -> Tensor | None:
    if given is not None:
        fits = given.shape == shape[: given.dim()]
        return given.reshape(*given.shape, *[1] * (len(shape) - given.dim())) if fits else None
    axis = next((a for a, size in enumerate(shape) if size == n), None)
    return None if axis is None else Samples(n, axis).owners(shape)


def _given(graph: Graph, n: int, given: Tensor) -> Iterator[list[Where]]:
    """The user's numbers: of every loss's terms, of those that a loss of their own adds up, or of the batch's rows."""
    given = given.detach().long()
    known = [_fitted(loss, given, n) for loss in graph.known]
    sizes = [term_shape(loss).numel() for loss in graph.known]
    if len(sizes) > 1 and sum(sizes) == given.numel():  # the terms of all losses, one loss after another
        parts = given.flatten().split(sizes)
        known = [_fitted(loss, part, n) for loss, part in zip(graph.known, parts, strict=True)]
    for apart in (False, True) if graph.own else (False,):
        own: list[Where | None] = []
        for o in graph.own:
            own += _by_terms(OwnLossGraph(graph, o), n, given, apart)
        if all(where is not None for where in (*known, *own)):
            yield [where for where in (*known, *own) if where is not None]
    rows = len(given)
    if given.dim() == 1 and rows > 1:
        found = [
            by_target(graph, x, rows) or _first_axis(graph, x, rows) or _by_inputs(graph, x, rows) for x in graph.losses
        ]
        alone = one_after_another(graph, rows, [[i] for i in range(len(graph.losses))])
        for ways in (found, alone, *orders(graph, rows)):
            if ways is not None and all(where is not None for where in ways):
                shapes = [loss.call.logits.shape for loss in graph.losses]
                yield [
                    RowNumbers(n, given.to(where.owners(shape).device)[where.owners(shape)])
                    for where, shape in zip((w for w in ways if w is not None), shapes, strict=True)
                ]


def _fitted(loss: LossUse, given: Tensor, n: int) -> RowNumbers | None:
    """The user's numbers for the terms of one loss: in the shape of its terms, or of their leading axes, or flat."""
    shape = term_shape(loss)
    if given.numel() == shape.numel():
        return _of_terms(loss, given.reshape(shape), n)
    if given.shape == shape[: given.dim()]:
        return _of_terms(loss, given.reshape(*given.shape, *[1] * (len(shape) - given.dim())), n)
    return None
