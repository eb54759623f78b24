"""The measurement of where samples lie: on axes where that is so, else row by row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import AmbiguousSamples, BadInput, LayerwiseError, SamplesMixed
from layerwise.graph.coverage import Graph, known_losses, prove
from layerwise.graph.samples import readings
from layerwise.graph.samples.constants import KeptLayout
from layerwise.graph.samples.first_uses import FirstUses
from layerwise.graph.samples.loss_parts import groupings, terms_apart
from layerwise.graph.samples.loss_rows import numberings
from layerwise.graph.samples.memo import Memo, Refused, key_of, memo_of, recalled, remember
from layerwise.graph.samples.rows import (
    Owners,
    by_rows,
    check_losses,
    one_row_a_sample,
    one_sample_a_row,
    owners_of_rows,
    rivals,
)
from layerwise.graph.samples.sample_axes import by_axes, on_axes, structural
from layerwise.graph.samples.sample_layout import SampleLayout
from layerwise.graph.walk import by_node, edges, moves
from layerwise.rows.base import RowNumbers
from layerwise.tape.origins import Source, settle
from layerwise.tape.tape import Tape
from layerwise.tape.uses import LossUse

__all__ = ["count", "measure", "said_count"]

_REFUSALS = (SamplesMixed, AmbiguousSamples, BadInput)
_NO_BATCH = "asked for per-sample quantities, but no batch with a sample axis was seen; pass samples=N"


def measure(tape: Tape, graph: Graph, model: Any = None, samples: int | Tensor | None = None) -> SampleLayout:
    """Where the samples lie in every use and loss of the graph.

    samples: the number N, or a sample number from 0 to N - 1 for each loss term; by default N is what the batch, the
    targets and the losses say.
    Raises SamplesMixed, AmbiguousSamples, or BadInput (N fits no axis of the loss).
    """
    settle([*readings.origins(graph), *graph.entered])
    given = readings.hashed(samples)
    key, memo = key_of(tape, graph, model, given), memo_of(model)
    place = key, readings.places(graph.entered, readings.origins(graph), graph.uses)
    found = recalled(memo, place)
    if isinstance(found, KeptLayout):
        return _checked(graph, found.on(graph))
    first = None if isinstance(samples, Tensor) else FirstUses.of(tape, graph, model, given)
    layout = None if first is None else first.recall(memo)
    if layout is None:
        layout = on_axes(graph, _measured(tape, graph, samples, key, memo))
        if first is not None:
            first.remember(memo, layout)
    else:
        _checked(graph, layout)
    if place not in memo:
        remember(memo, place, None)  # a batch of other indices or masks is not worth a proof for all values
    elif _for_all_values(graph, layout, memo.get(key)):
        remember(memo, place, KeptLayout.of(graph, layout))
    return layout


def _for_all_values(graph: Graph, layout: SampleLayout, proved: Any) -> bool:
    """Whether a layout may be remembered: every row has a sample, and no values could give it another.

    proved: one of which this is known.
    """
    if isinstance(proved, KeptLayout) and (proved.layout.uses, proved.layout.losses) == (layout.uses, layout.losses):
        return True
    numbered = [where for where in layout.uses.values() if isinstance(where, RowNumbers)]
    return all(bool((where.numbers >= 0).all()) for where in numbered) and structural(layout.graph(graph), layout)


def _measured(tape: Tape, graph: Graph, samples: int | Tensor | None, key: Any, memo: Memo) -> SampleLayout:
    """The layout of a graph that was not measured before."""
    samples = readings.said_by_loss(graph) if samples is None else samples
    if isinstance(samples, Tensor):
        return next(by_rows(graph, int(samples.max()) + 1, samples))
    n = samples if samples is not None else readings.first_count(graph)
    if n is None or (samples is None and readings.contradictory(graph, len(graph.losses))):
        return _first_that_holds(tape, graph, _candidates(graph))
    refusal = recalled(memo, (key, "axes"))
    if not isinstance(refusal, tuple):
        try:
            return _checked(graph, _on_axes(tape, graph, n, key, memo, samples is None))
        except _REFUSALS as error:
            if isinstance(error, AmbiguousSamples) and not graph.own:
                raise
            refusal = _parts(error)
    before = recalled(memo, (key, "refused"))  # row by row, too: nothing that the tensors were made from can change it
    if isinstance(before, tuple):
        raise before[0](before[1])
    try:
        # of a loss of the user's own the terms may say which rows are a sample
        alone = refusal[0] is AmbiguousSamples or samples is not None
        if alone:
            layout = next(by_rows(graph, n))
        else:
            layout = _first_that_holds(tape, graph, _candidates(graph))
        remember(memo, (key, "axes"), refusal)
        return layout
    except _REFUSALS as error:
        kind, text = _parts(error)
    kind, text = (kind, text) if refusal[0] is BadInput and kind is not BadInput else refusal
    if all(isinstance(origin, Source) for origin in readings.origins(graph)):
        remember(memo, (key, "refused"), (kind, text))
    raise kind(text)


def _parts(error: LayerwiseError) -> Refused:
    """An error's type and text, to keep without the frames that the error itself would keep."""
    return type(error), str(error)


def count(tape: Tape, graph: Graph, total: Tensor, model: Any = None) -> int | str:
    """The number of samples, for those who need nothing else: measured where the loss is the user's own, or disagrees.

    graph: of `total`, with or without its losses. Where samples are mixed below a loss that adds up so many terms it is
    the number of the losses' terms if the model was called with as many rows, else dim 0 of the batch, or of the terms
    where these are fewer. Where several numbers hold, or a loss of the user's own is no sum over so many samples, the
    words of AmbiguousSamples, to be raised by whoever needs the number.
    """
    first = readings.first_count(graph) or 1
    sizes = [_term_sizes(loss) for loss in tape.losses]
    divides = bool(sizes) and all(any(size % first == 0 for size in axes) for axes in sizes)
    agree = divides and not readings.contradictory(graph, len(tape.losses))
    if not graph.uses or (agree and not _has_own_part(tape, total)):  # without uses nothing is moved
        return first
    whole = graph
    try:
        whole = graph if graph.losses else prove(tape, total, graph.weight)
        return measure(tape, whole, model).n
    except AmbiguousSamples as error:
        return str(error)
    except LayerwiseError:
        n = _of_terms_or_batch(graph, sizes, first)
        with suppress(LayerwiseError):  # what is made of the model's output is part of the loss
            whole = whole if whole.own else prove(tape, total, graph.weight, without=tape.losses)
        if whole.own and not _adds_up(whole, n):
            return (
                f"the batch seems to have {n} samples, but {whole.own[0]} is not seen to be a sum over so "
                "many; where a sample is several rows (a pair, a group) or the whole batch, pass samples=N, the number "
                "of samples that the loss adds up"
            )
        return n


def _has_own_part(tape: Tape, total: Tensor) -> bool:
    """Whether something else than the value of a known loss call, times a number or added up, is in the total.

    So is what is made of the model's output before such a call, but for moves of elements.
    """
    if _past_output(tape):
        return True
    if any(total.grad_fn is loss.value.node for loss in tape.losses):
        return False
    try:
        return bool(known_losses(tape, total).own)
    except LayerwiseError:
        return False  # the known losses' terms are all that is known


def _past_output(tape: Tape) -> bool:
    """Whether a loss reads anything but elements of the model's output, where that is recorded."""
    if tape.returned is None:
        return False
    ends = {part.logits[:2] for part in tape.returned}
    past = [loss.logits for loss in tape.losses if loss.logits[:2] not in ends]
    if not past:
        return False
    found = edges(past, dict.fromkeys(by_node(tape.uses), ()), ends)
    return any(edge not in ends and not moves(edge[0]) for edge in found)


def _of_terms_or_batch(graph: Graph, sizes: Sequence[Sequence[int]], first: int) -> int:
    """The losses' terms if the model was called with as many rows, else dim 0 of the batch, or of fewer terms."""
    lead = {axes[0] if axes else 1 for axes in sizes}
    if len(lead) != 1:
        return first
    called = readings.row_counts([origin for origin in graph.entered if origin.shape])
    return next(iter(lead)) if lead <= set(called) else min(first, *lead)


def _adds_up(graph: Graph, n: int) -> bool:
    """Whether every loss of the user's own is a sum over n samples of what it reads, wherever samples meet below it."""
    with suppress(LayerwiseError):
        for losses in numberings(graph, n, None):
            with suppress(SamplesMixed):
                check_losses(graph, SampleLayout(n, {}, losses))
                return True
    return False


def _term_sizes(loss: LossUse) -> list[int]:
    """The sizes of the axes of a loss's terms."""
    return [size for a, size in enumerate(loss.call.logits.shape) if a != loss.call.class_axis]


def said_count(samples: int | Tensor | None, what: str) -> int | None:
    """The number of samples that a user says, by itself or by a sample number for each loss term; None for None.

    what: the argument, for the error. Raises BadInput where it is neither.
    """
    if samples is None:
        return None
    if not isinstance(samples, Tensor):
        if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
            raise BadInput(f"{what} must be None, a whole number of at least 1, or a tensor, got {samples!r}")
        return samples
    whole = not (samples.is_floating_point() or samples.is_complex() or samples.dtype == torch.bool)
    if not whole or not samples.dim() or not samples.numel():
        raise BadInput(
            f"{what} as a tensor must hold a whole number for each loss term, 0 to N - 1, got "
            f"{samples.dtype} of shape {tuple(samples.shape)}"
        )
    if int(samples.min()) < 0:
        raise BadInput(f"{what} as a tensor must hold numbers from 0 on, got {int(samples.min())}")
    return int(samples.max()) + 1


def _candidates(graph: Graph) -> tuple[list[int], list[int]]:
    """The numbers of samples to try, those among them that losses of samples of their own have together."""
    sizes = readings.terms(graph)
    return readings.candidates(graph, [terms_apart(sizes, groups) for groups in groupings(graph)])


def _first_that_holds(tape: Tape, graph: Graph, counts: tuple[Sequence[int], Sequence[int]]) -> SampleLayout:
    """The layout of the first number of samples that the measurement confirms.

    counts: numbers of which only one may be confirmed, then others in order. A layout by which each row of the batch
    belongs to one sample comes first, then one by which that is so of some tensor (others are constants), then one on
    axes that the losses speak for. Raises AmbiguousSamples where two of the first are confirmed.
    """
    second: dict[int, SampleLayout] = {}
    refusals: list[Refused] = []
    unshown: list[Refused] = []
    confirmed: list[SampleLayout] = []
    possible: set[int] = set()  # the first numbers that are confirmed, or would be in several ways
    for n in (*counts[0], *counts[1]):
        if confirmed and n not in counts[0]:
            break
        try:
            for layout in _layouts(tape, graph, n):
                owners = owners_of_rows(graph, layout)
                if not owners and graph.own and n not in {readings.first_count(graph), *readings.terms(graph)}:
                    continue  # no row of the batch shows that the terms of several losses are of other samples each
                if one_sample_a_row(graph, layout, owners):
                    confirmed.append(layout)
                    possible |= {n} & set(counts[0])
                    if one_row_a_sample(layout, owners):  # then N may as well be the number of rows
                        possible |= set(counts[0])
                    break
                rank = 0 if one_sample_a_row(graph, layout, owners, constants=True) else 1
                if not rank or (layout.regular and _spoken_for(graph, n)):
                    second.setdefault(rank, layout)
                elif not unshown:
                    unshown.append((SamplesMixed, _why_not(graph, n, owners)))
        except _REFUSALS as error:
            refusals.append(_parts(error))
            possible |= {n} & set(counts[0]) if isinstance(error, AmbiguousSamples) else set()
        if confirmed and n in counts[1]:
            possible |= {n}
            break
    if confirmed:
        others = rivals(graph, confirmed[0], confirmed[0].n in counts[0])
        possible |= {confirmed[0].n, *others} if others else set()
    if confirmed and len(possible) > 1:
        raise AmbiguousSamples(
            f"several numbers of samples may hold: {readings.named(graph, possible)}; this batch cannot tell which it "
            f"is; pass samples=N, or {readings.tensor_asked(graph)}"
        )
    if confirmed or second:
        return confirmed[0] if confirmed else second[min(second)]
    first = [refused for kind in (SamplesMixed, AmbiguousSamples) for refused in refusals if refused[0] is kind]
    kind, text = next(iter((*first, *unshown, *refusals)), (BadInput, _NO_BATCH))
    listed = ", ".join(map(str, (*counts[0], *counts[1]))) or "none"
    raise kind(f"{text} (numbers of samples that the batch, the targets and the losses allow: {listed})")


def _spoken_for(graph: Graph, n: int) -> bool:
    """Whether every loss has n terms, and no tensor that the model was called with has another number of rows."""
    calls = [origin for origin in graph.entered if isinstance(origin, Source)]
    return set(readings.terms(graph)) == {n} and all(origin.shape[:1] == (n,) for origin in calls)


def _layouts(tape: Tape, graph: Graph, n: int) -> Iterator[SampleLayout]:
    """The layouts of n samples: on axes, then row by row. Raises the refusal of the last."""
    with suppress(*_REFUSALS):
        yield _checked(graph, by_axes(tape, graph, n).layout)
    yield from by_rows(graph, n)


def _checked(graph: Graph, layout: SampleLayout) -> SampleLayout:
    """The layout, after proof that every loss of the user's own is a sum over its samples.

    At every batch: what a loss does with its samples may depend on their values.
    """
    check_losses(graph, layout)
    return layout


def _why_not(graph: Graph, n: int, owners: Sequence[Owners]) -> str:
    """Why n samples are not taken, where some row is of several or nothing shows which rows are a sample."""
    if any(not one for _, _, one in owners):
        return (
            "in the likeliest order of the loss terms, rows of the tensors that the first layers read belong to "
            f"several of {n} samples; where {n} is right, pass samples={n}, or {readings.tensor_asked(graph)}"
        )
    return (
        f"the number of samples may be {readings.named(graph, {n})}, but the calls between what the model was called "
        f"with and the first trained layer do not show which rows are a sample; pass samples={n} if that is the "
        f"number, or {readings.tensor_asked(graph)}"
    )


def _on_axes(tape: Tape, graph: Graph, n: int, key: Any, memo: Memo, by_rows: bool) -> SampleLayout:
    """The samples' axes. by_rows: whether each row of what the first layers read must belong to one sample."""
    kept = recalled(memo, key)
    if isinstance(kept, KeptLayout):
        return kept.layout
    found = by_axes(tape, graph, n)
    layout = found.layout
    owners = owners_of_rows(graph, layout) if by_rows else []
    if by_rows and not one_sample_a_row(graph, layout, owners):
        raise SamplesMixed(_why_not(graph, n, owners))
    if found.for_all or (found.proved and structural(graph, layout)):
        remember(memo, key, KeptLayout(layout))
    return layout
