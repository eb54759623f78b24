"""The measurement of where samples lie: on axes where that is so, else row by row."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdRef, WeakTensorKeyDictionary

from layerwise.errors import AmbiguousSamples, BadInput, LayerwiseError, SamplesMixed
from layerwise.graph.coverage import Graph, prove
from layerwise.graph.samples import readings
from layerwise.graph.samples.rows import by_rows, check_losses, one_row_a_sample, one_sample_a_row, owners_of_rows
from layerwise.graph.samples.sample_axes import by_axes, structural
from layerwise.graph.samples.sample_layout import SampleLayout
from layerwise.graph.walk import Node, by_node, inputs, nodes
from layerwise.rows.base import RowNumbers
from layerwise.tape.origins import Source, settle
from layerwise.tape.tape import Tape

__all__ = ["count", "measure", "said_count"]

Refused = tuple[type[LayerwiseError], str]
Memo = dict[Any, SampleLayout | Refused]

# A cache of measurements, one entry per live model: nothing in it changes a result. The entry of a functional model
# lives as long as the model's first tensor; the other tensors are in the key.
_MEASURED: weakref.WeakKeyDictionary[nn.Module, Memo] = weakref.WeakKeyDictionary()
_FUNCTIONAL: MutableMapping[Tensor, Memo] = WeakTensorKeyDictionary()
_MEMO_LIMIT = 64
_REFUSALS = (SamplesMixed, AmbiguousSamples, BadInput)
_NO_BATCH = "asked for per-sample quantities, but no batch with a sample axis was seen; pass samples=N"


def measure(tape: Tape, graph: Graph, model: Any = None, samples: int | Tensor | None = None) -> SampleLayout:
    """Where the samples lie in every use and loss of the graph.

    samples: the number N, or a sample number from 0 to N - 1 for each loss term; by default N is what the batch, the
    targets and the losses say.
    Raises SamplesMixed, AmbiguousSamples, or BadInput (N fits no axis of the loss).
    """
    settle([*readings.origins(graph), *graph.entered])
    if isinstance(samples, Tensor):
        return next(by_rows(graph, int(samples.max()) + 1, samples))
    key, memo = _signature(tape, graph, model, samples), _memo(model)
    n = samples if samples is not None else readings.first_count(graph)
    if n is None or (samples is None and readings.contradictory(graph)):
        return _remembered(tape, graph, key, memo, None)
    refusal = memo.get((key, "axes"))
    if not isinstance(refusal, tuple):
        try:
            return _checked(graph, _on_axes(tape, graph, n, key, memo, samples is None))
        except _REFUSALS as error:
            if isinstance(error, AmbiguousSamples) and not graph.own:
                raise
            refusal = _parts(error)
    before = memo.get((key, "refused"))  # row by row, too: nothing in what the tensors were made from can change that
    if isinstance(before, tuple):
        raise before[0](before[1])
    try:
        # of a loss of the user's own the terms may say which rows are a sample
        alone = n if refusal[0] is AmbiguousSamples or samples is not None else None
        layout = _remembered(tape, graph, key, memo, alone)
        _remember(memo, (key, "axes"), refusal)
        return layout
    except _REFUSALS as error:
        kind, text = _parts(error)
    kind, text = (kind, text) if refusal[0] is BadInput and kind is not BadInput else refusal
    if all(isinstance(origin, Source) for origin in readings.origins(graph)):
        _remember(memo, (key, "refused"), (kind, text))
    raise kind(text)


def _remembered(tape: Tape, graph: Graph, key: Any, memo: Memo, n: int | None) -> SampleLayout:
    """The layout by what is said of the number of samples, or by rows of n samples; remembered where all have rows."""
    place = (key, readings.places(graph), n)
    found = memo.get(place)
    if isinstance(found, SampleLayout):
        return _checked(graph, found)
    if n is None:
        layout = _first_that_holds(tape, graph, readings.candidates(graph))
    else:
        layout = next(by_rows(graph, n))
    numbered = [where for where in layout.uses.values() if isinstance(where, RowNumbers)]
    every = all(bool((where.numbers >= 0).all()) for where in numbered)
    if every and not layout.shared and structural(graph, layout):
        _remember(memo, place, layout)
    return layout


def _parts(error: LayerwiseError) -> Refused:
    """An error's type and text, to keep without the frames that the error itself would keep."""
    return type(error), str(error)


def count(tape: Tape, graph: Graph, total: Tensor, model: Any = None) -> int:
    """The number of samples, for those who need nothing else: measured only where the tensors seen disagree on it.

    graph: of `total`, with or without its losses. Where samples are mixed it is dim 0 of the batch, or of the losses'
    terms where these are fewer.
    """
    first = readings.first_count(graph) or 1
    shapes = [loss.call.logits.shape for loss in tape.losses]
    if not readings.contradictory(graph) and all(any(size % first == 0 for size in shape) for shape in shapes if shape):
        return first
    try:
        whole = graph if graph.losses else prove(tape, total, graph.weight)
        return measure(tape, whole, model).n
    except LayerwiseError:
        lead = {shape[0] for shape in shapes if shape}
        return min(first, *lead) if len(lead) == 1 else first


def said_count(samples: int | Tensor | None, what: str) -> int | None:
    """The number of samples that a user says, by itself or by a sample number for each loss term; None for None.

    what: the argument, for the error. Raises BadInput where it is neither.
    """
    if samples is None:
        return None
    if not isinstance(samples, Tensor):
        if not isinstance(samples, int) or samples < 1:
            raise BadInput(f"{what} must be None, a whole number of at least 1, or a tensor, got {samples!r}")
        return samples
    if samples.is_floating_point() or samples.is_complex() or samples.dtype == torch.bool or not samples.numel():
        raise BadInput(
            f"{what} as a tensor must hold a whole number for each loss term, 0 to N - 1, got "
            f"{samples.dtype} of shape {tuple(samples.shape)}"
        )
    if int(samples.min()) < 0:
        raise BadInput(f"{what} as a tensor must hold numbers from 0 on, got {int(samples.min())}")
    return int(samples.max()) + 1


def _first_that_holds(tape: Tape, graph: Graph, counts: tuple[Sequence[int], Sequence[int]]) -> SampleLayout:
    """The layout of the first number of samples that the measurement confirms.

    counts: numbers of which only one may be confirmed, then others in order. A layout by which each row of the batch
    belongs to one sample comes first, then one by which that is so of some tensor (others are constants), then one on
    axes that the losses speak for. Raises AmbiguousSamples where two of the first are confirmed.
    """
    second: dict[int, SampleLayout] = {}
    refusals: list[Refused] = []
    confirmed: list[SampleLayout] = []
    possible: set[int] = set()  # the first numbers that are confirmed, or would be in several ways
    for n in (*counts[0], *counts[1]):
        if confirmed and n not in counts[0]:
            break
        try:
            for layout in _layouts(tape, graph, n):
                owners = owners_of_rows(graph, layout)
                if one_sample_a_row(graph, layout, owners):
                    confirmed.append(layout)
                    possible |= {n} & set(counts[0])
                    if one_row_a_sample(layout, owners):  # then N may as well be the number of rows
                        possible |= set(counts[0])
                    break
                rank = 0 if one_sample_a_row(graph, layout, owners, constants=True) else 1
                if not rank or (layout.regular and _spoken_for(graph, n)):
                    second.setdefault(rank, layout)
        except _REFUSALS as error:
            refusals.append(_parts(error))
            possible |= {n} & set(counts[0]) if isinstance(error, AmbiguousSamples) else set()
        if confirmed and n in counts[1]:
            break
    if confirmed and len(possible) > 1:
        raise AmbiguousSamples(
            f"several numbers of samples may hold: {readings.named(graph, possible)}; this batch cannot tell which it "
            "is; pass samples=N, or a tensor with the sample number of each loss term"
        )
    if confirmed or second:
        return confirmed[0] if confirmed else second[min(second)]
    kind, text = next((r for r in refusals if r[0] is SamplesMixed), refusals[0] if refusals else (BadInput, _NO_BATCH))
    listed = ", ".join(map(str, (*counts[0], *counts[1]))) or "none"
    raise kind(f"{text} (numbers of samples that the batch, the targets and the losses allow: {listed})")


def _spoken_for(graph: Graph, n: int) -> bool:
    """Whether every loss has n terms, and no tensor that the model was called with has another number of rows."""
    calls = [origin for origin in graph.entered if isinstance(origin, Source)]
    return set(readings.terms(graph)) == {n} and all(origin.shape[:1] == (n,) for origin in calls)


def _layouts(tape: Tape, graph: Graph, n: int) -> Iterator[SampleLayout]:
    """The layouts of n samples: on axes, then row by row. Raises the refusal of the last."""
    with suppress(*_REFUSALS):
        yield _checked(graph, by_axes(tape, graph, n)[0])
    yield from by_rows(graph, n)


def _checked(graph: Graph, layout: SampleLayout) -> SampleLayout:
    """The layout, after proof that every loss of the user's own is a sum over its samples.

    At every batch: what a loss does with its samples may depend on their values.
    """
    check_losses(graph, layout)
    return layout


def _on_axes(tape: Tape, graph: Graph, n: int, key: Any, memo: Memo, by_rows: bool) -> SampleLayout:
    """The samples' axes. by_rows: whether each row of what the first layers read must belong to one sample."""
    found = memo.get(key)
    if isinstance(found, SampleLayout):
        return found
    layout, proved = by_axes(tape, graph, n)
    if by_rows and not one_sample_a_row(graph, layout, owners_of_rows(graph, layout)):
        raise SamplesMixed(f"rows of the tensors that the first layers read belong to several of {n} samples")
    if proved and structural(graph, layout):
        _remember(memo, key, layout)
    return layout


def _remember(memo: Memo, key: Any, found: SampleLayout | Refused) -> None:
    if len(memo) >= _MEMO_LIMIT:
        memo.clear()
    memo[key] = found


def _memo(model: Any) -> Memo:
    """The cached measurements of a model."""
    if isinstance(model, nn.Module):
        return _MEASURED.setdefault(model, {})
    first = next(iter(model.values()), None) if isinstance(model, Mapping) else None
    return {} if first is None else _FUNCTIONAL.setdefault(first, {})


def _signature(tape: Tape, graph: Graph, model: Any, samples: int | None) -> Any:
    """The cache key: all that a measurement depends on, other than values, whose influence `structural` rules out."""
    state: tuple[Any, ...] = ()
    if isinstance(model, nn.Module):
        state = tuple(m.training for m in model.modules())
    elif isinstance(model, Mapping):
        state = tuple((name, WeakIdRef(p), p.shape, p.requires_grad) for name, p in model.items())
    first = None if graph.batch is None else graph.batch.shape
    logits = tuple((loss.call.name, loss.call.logits.shape) for loss in graph.losses)
    return samples, first, state, logits, tuple(u.index for u in graph.uses), tuple(tape.calls), _wiring(graph)


def _wiring(graph: Graph) -> tuple[Any, ...]:
    """Which autograd node feeds which, from the losses down through the uses; the sequence of calls leaves it open."""
    roots = [loss.logits for loss in graph.losses]
    below: dict[Node, Sequence[Any]] = {**inputs(by_node(graph.uses))}
    number: dict[Node, int] = {}
    found: list[Any] = [edge[1] for edge in roots]
    for node in nodes(roots, below):
        followed = below.get(node)
        if followed is None:
            below[node] = followed = node.next_functions  # the walk then need not ask for them again
        found.append(node.name())
        for edge in followed:
            child = edge[0]
            found.append(None if child is None else number.setdefault(child, len(number)))
            if edge[1]:
                found.append((edge[1],))
    return tuple(found)
