"""Samples that are any set of rows: the rows of every use are numbered by the loss terms that they answer for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice, product

import torch
from torch import Tensor

from layerwise.errors import AmbiguousSamples, BadInput, SamplesMixed
from layerwise.graph.coverage import Graph
from layerwise.graph.own_loss import OwnLossGraph
from layerwise.graph.samples.constants import shared_uses
from layerwise.graph.samples.loss_parts import groupings, one_after_another, parts, terms_apart
from layerwise.graph.samples.loss_rows import axis_of, numberings, unheard
from layerwise.graph.samples.meeting import meeting
from layerwise.graph.samples.numbers import MIXED, Root, numbers_of_both, row_numbers
from layerwise.graph.samples.readings import (
    labelled,
    on_output,
    outside,
    row_counts,
    rows_by_source,
    tensor_asked,
    terms,
)
from layerwise.graph.samples.sample_axes import advice_on_shared_rows, hypotheses
from layerwise.graph.samples.sample_layout import SampleLayout, Where, free_axes
from layerwise.graph.separable import check_sum_over_samples
from layerwise.rows.base import RowNumbers, Samples
from layerwise.tape.origins import Origin, sources
from layerwise.tape.uses import LossUse, Use

__all__ = [
    "Owners", "by_rows", "check_losses", "layout_by", "one_row_a_sample", "one_sample_a_row", "owners_of_rows",
    "rivals", "root_of",
]  # fmt: skip

Owners = tuple[Origin, dict[int, int], bool]

_MOST_WAYS = 64  # in which the terms of several losses are tried to be laid out together


def by_rows(graph: Graph, n: int, given: Tensor | None = None) -> Iterator[SampleLayout]:
    """The layouts of n samples that the measurement confirms, the likeliest first.

    given: the sample number of each loss term, or of each row of the batch. Raises SamplesMixed, or BadInput where the
    loss terms cannot be numbered, if there is none.
    """
    refusal = ""  # its text: an error that is kept would keep the frames that it passed
    confirmed = 0
    for losses in numberings(graph, n, given):
        try:
            layout = layout_by(graph, n, losses)
            check_losses(graph, layout)
            if given is None:
                _check_rows_apart(graph, layout)
        except SamplesMixed as error:
            refusal = refusal or str(error)
            continue
        confirmed += 1
        yield layout
    flat = None if confirmed or given is not None else _flat(graph, n)
    if flat is not None:
        yield flat
    if confirmed or flat is not None:
        return
    if refusal:
        raise SamplesMixed(refusal)
    raise BadInput(
        f"asked for per-sample quantities of {n} samples, but {_unplaced(graph, n)}, which does not say which sample "
        f"each belongs to; pass samples= {tensor_asked(graph)}"
        + ("" if given is None else f" (and not {tuple(given.shape)})")
        + ", or take what was reduced over the batch out of the loss"
    )


def _unplaced(graph: Graph, n: int) -> str:
    """The losses whose outputs have no axis of n samples, or all of them, in words."""
    losses = [loss for loss in graph.losses if not hypotheses(loss, n)] or graph.losses
    read = [f"{loss} reads outputs of shape {tuple(loss.call.logits.shape)}" for loss in losses]
    return " and ".join(dict.fromkeys(read))


def _flat(graph: Graph, n: int) -> SampleLayout | None:
    """The layout where a loss's terms lie in n equal pieces of an axis, if the batch allows one order alone."""
    found: list[SampleLayout] = []
    for ways in _ways(graph, n):
        try:
            layout = layout_by(graph, n, ways)
            check_losses(graph, layout)
        except SamplesMixed:
            continue
        # a tensor that no one called the model with may be a constant, whose rows are those of all samples
        owners = owners_of_rows(graph, layout)
        shown = all(one or outside(graph, source) for source, _, one in owners)
        # where all that reads the batch would be shared by its samples, nothing tells which terms are one sample's
        heard = not layout.replaced or any(one and len(set(owner.values())) > 1 for _, owner, one in owners)
        found += [layout] if shown and heard else []
    if len(found) > 1:
        raise AmbiguousSamples(
            f"the terms of the loss can belong to {n} samples in {len(found)} ways that this batch cannot tell apart; "
            f"pass samples= {tensor_asked(graph)}"
        )
    if found and any(unheard(graph, loss, n) for loss in graph.losses):
        raise AmbiguousSamples(
            f"some terms of the loss answer for no row of the batch, and may belong to any of its {n} samples; "
            f"pass samples= {tensor_asked(graph)}"
        )
    return found[0] if found else None


def _ways(graph: Graph, n: int) -> list[list[Samples]]:
    """The axes and orders of the losses' terms, together; outputs of one shape have them alike."""
    shapes = [(loss.call.logits.shape, loss.call.class_axis) for loss in graph.losses]
    each = {shape: hypotheses(loss, n) for shape, loss in zip(shapes, graph.losses, strict=True)}
    found = list(islice(product(*each.values()), _MOST_WAYS + 1))
    if len(found) > _MOST_WAYS:
        raise AmbiguousSamples(
            f"the terms of the {len(shapes)} losses can belong to {n} samples in more than {_MOST_WAYS} ways; pass "
            f"samples= {tensor_asked(graph)}"
        )
    by_shape = [dict(zip(each, ways, strict=True)) for ways in found]
    return [[axes[shape] for shape in shapes] for axes in by_shape]


def _check_rows_apart(graph: Graph, layout: SampleLayout) -> None:
    """Refuse numbers by which several rows of a batch of N are one sample, and other samples have no term at all.

    So it looks where rows meet before the loss, whose target is one row: `mse_loss(model(x).mean(0), y[0])`.
    Raises SamplesMixed.
    """
    heard: set[int] = set()
    for loss, where in zip(graph.losses, layout.losses, strict=True):
        shape = loss.call.logits.shape
        heard.update(where.owners(shape, loss.call.logits.device).unique().tolist())
    if heard >= set(range(layout.n)):
        return
    for source, owner, _ in owners_of_rows(graph, layout):
        if source.shape[:1] == (layout.n,) and len(set(owner.values())) < len(owner):
            raise SamplesMixed(
                f"asked for per-sample quantities, but several of the {layout.n} rows of the batch meet in the same "
                "terms of the loss, and others have none; sum over the samples last, or say with samples= which terms "
                "of the loss are one sample's"
            )


def check_losses(graph: Graph, layout: SampleLayout) -> None:
    """Prove that every loss of the user's own is a sum over the samples. Raises SamplesMixed."""
    at = len(graph.known)
    for own in graph.own:
        check_sum_over_samples(OwnLossGraph(graph, own), layout.losses[at : at + len(own.boundary)])
        at += len(own.boundary)


def layout_by(graph: Graph, n: int, losses: Sequence[Where]) -> SampleLayout:
    """The layout by which the losses' terms belong to n samples as given. Raises SamplesMixed."""
    roots = [root_of(loss, where) for loss, where in zip(graph.losses, losses, strict=True)]
    numbers: list[Tensor | None] = [None] * len(graph.uses)
    for root in roots:  # each by itself: terms of two losses may cancel
        numbers = [numbers_of_both(a, b) for a, b in zip(numbers, row_numbers([root], n, graph.uses), strict=True)]
    uses: dict[int, Where] = {}
    mixed: dict[int, Use] = {}
    partly: set[int] = set()
    for use, rows in zip(graph.uses, numbers, strict=True):
        assert rows is not None
        if bool((rows == MIXED).any()):
            mixed[use.index] = use
            partly |= {use.index} if bool((rows >= 0).any()) else set()
        else:
            uses[use.index] = RowNumbers(n, rows)
    if not mixed:
        return SampleLayout(n, uses, list(losses))
    shared = shared_uses(graph, roots, n, mixed, partly)
    if shared is None:
        use = next((mixed[i] for i in partly), next(iter(mixed.values())))
        raise SamplesMixed(
            f"asked for per-sample quantities of {n} samples, but rows of the output {tuple(use.call.out_shape)} of "
            f"{use} answer for the loss terms of several samples{_where(graph, losses, use)}. Samples that meet have "
            "no per-sample gradients (quantities of the Hessian and products with it need none); where N is another "
            f"number, or a sample is several rows, say so with samples=N, or samples= {tensor_asked(graph)}; "
            f"{advice_on_shared_rows(n)}"
        )
    return SampleLayout(n, {**uses, **shared[1]}, list(losses), shared[0], frozenset(mixed))


def _where(graph: Graph, losses: Sequence[Where], use: Use) -> str:
    found = (meeting(loss, where, use) for loss, where in zip(graph.losses, losses, strict=True))
    return next((text for text in found if text), "")


def root_of(loss: LossUse, where: Where) -> Root:
    """A loss's outputs with the numbers of their samples."""
    logits = loss.call.logits
    return Root(loss.logits, logits, where.owners(logits.shape, logits.device))


# -- proof ----------------------------------------------------------------------------------------------------------


def one_row_a_sample(layout: SampleLayout, owners: Sequence[Owners]) -> bool:
    """Whether samples are single rows of a tensor that has more of them, unheard by any loss term, or fewer."""
    for source, owner, _ in owners:
        rows = source.shape[0] if source.shape else 1
        if rows != layout.n and len(set(owner.values())) == len(owner) > 1:
            return True
    return False


def one_sample_a_row(graph: Graph, layout: SampleLayout, owners: Sequence[Owners], constants: bool = False) -> bool:
    """Whether each row of the tensors that the uses' inputs were made of belongs to at most one sample.

    Where the model was called with tensors, one of them must carry the samples, or have as many rows; where it is not
    known with what, some layer must have read rows of a single sample.
    owners: `owners_of_rows` of the layout.
    constants: whether that of one tensor is enough whose rows are those of all samples, if no other one has a single
    row: that may be a batch of one.
    """
    carrying = [source for source, owner, _ in owners if len(set(owner.values())) > 1]
    if all(outside(graph, source) for source in carrying):
        calls = row_counts([origin for origin in graph.entered if origin.shape])
        unseen = layout.n not in calls if calls else bool(layout.replaced)
        if carrying or (layout.n > 1 and unseen):
            return False
    if not owners and any(isinstance(where, Samples) and where.axis > 0 for where in layout.losses):
        return False  # nothing tells samples from the outputs of one
    if not constants:
        return all(one or outside(graph, source) for source, _, one in owners)
    if any(len(owner) == 1 and not one for _, owner, one in owners):
        return False
    return any(one and len(set(owner.values())) == layout.n for _, owner, one in owners)


def owners_of_rows(graph: Graph, layout: SampleLayout) -> list[Owners]:
    """For each tensor that inputs were made of, a sample of each of its rows, and whether it is the only one."""
    owners: dict[Origin, dict[int, int]] = {}
    single: dict[Origin, bool] = {}
    for use in graph.uses:
        where = layout.uses.get(use.index)
        if use.origin is None or where is None or use.index in layout.replaced:
            continue
        for source, of_source in rows_by_source(use.origin):
            rows = on_output(of_source, use)
            if rows is None:
                continue
            numbers = where.owners(use.call.out_shape).cpu()
            row, number = (x.flatten() for x in torch.broadcast_tensors(rows, numbers))
            held = (row >= 0) & (number >= 0)
            seen = owners.setdefault(source, {})
            single.setdefault(source, True)
            for pair in (row[held] * layout.n + number[held]).unique().tolist():
                r, sample = divmod(pair, layout.n)
                single[source] &= seen.setdefault(r, sample) == sample
    return [(source, owner, single[source]) for source, owner in owners.items()]


# -- other numbers ---------------------------------------------------------------------------------------------------


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
    """The number of samples if losses that have no row in common are of samples of their own; N where all have some."""
    groups = parts(graph)
    if len(groups) < 2:
        return layout.n
    shapes = [loss.call.logits.shape for loss in graph.losses]
    owners = [w.owners(shape).unique() for w, shape in zip(layout.losses, shapes, strict=True)]
    counts = [len(torch.cat([owners[i][owners[i] >= 0] for i in group]).unique()) for group in groups]
    if all(count == 1 for count in counts):  # each loss is one sample's, or its rows are samples
        for joined in groupings(graph):
            whole = terms_apart(terms(graph), joined)
            if (apart := one_after_another(graph, whole, joined)) is not None:
                with suppress(SamplesMixed):
                    check_losses(graph, layout_by(graph, whole, apart))
                    return whole
    return sum(counts)


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
