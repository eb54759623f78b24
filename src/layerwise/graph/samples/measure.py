"""The measurement of where samples lie: on axes where that is so, else row by row."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdRef, WeakTensorKeyDictionary

from layerwise.errors import AmbiguousSamples, BadInput, LayerwiseError, SamplesMixed
from layerwise.graph.coverage import Graph, prove
from layerwise.graph.samples import readings
from layerwise.graph.samples.rows import by_rows, check_losses, one_sample_a_row
from layerwise.graph.samples.sample_axes import by_axes, structural
from layerwise.graph.samples.sample_layout import SampleLayout
from layerwise.graph.walk import Node, by_node, inputs, nodes
from layerwise.tape.origins import settle
from layerwise.tape.tape import Tape

__all__ = ["count", "measure"]

# A cache of measurements, one entry per live model: nothing in it changes a result. The entry of a functional model
# lives as long as the model's first tensor; the other tensors are in the key.
_MEASURED: weakref.WeakKeyDictionary[nn.Module, dict[Any, SampleLayout]] = weakref.WeakKeyDictionary()
_FUNCTIONAL: MutableMapping[Tensor, dict[Any, SampleLayout]] = WeakTensorKeyDictionary()
_MEMO_LIMIT = 64
_REFUSALS = (SamplesMixed, AmbiguousSamples, BadInput)


def measure(tape: Tape, graph: Graph, model: Any = None, samples: int | Tensor | None = None) -> SampleLayout:
    """Where the samples lie in every use and loss of the graph.

    samples: the number N, or a sample number from 0 to N - 1 for each loss term; by default N is what the batch, the
    targets and the losses say.
    Raises SamplesMixed, AmbiguousSamples, or BadInput (N fits no axis of the loss).
    """
    settle([pair[0] for pair in (*(u.origin for u in graph.uses), *(loss.target for loss in graph.losses)) if pair])
    if isinstance(samples, Tensor):
        return _checked(graph, by_rows(graph, int(samples.max()) + 1 if samples.numel() else 0, samples))
    if samples is None and readings.contradictory(graph):
        return _first_that_holds(tape, graph, readings.candidates(graph), None)
    n = samples if samples is not None else readings.first_count(graph)
    if n is None:
        return _first_that_holds(tape, graph, readings.candidates(graph), None)
    try:
        return _checked(graph, _on_axes(tape, graph, model, n, samples))
    except AmbiguousSamples as error:
        if not graph.own:
            raise
        try:  # the terms of a loss of the user's own may say which rows are a sample
            return by_rows(graph, n)
        except _REFUSALS:
            raise error from None
    except (SamplesMixed, BadInput) as error:
        others = [n] if samples is not None else readings.candidates(graph)
        try:
            return _first_that_holds(tape, graph, others, error, n)
        except SamplesMixed as refusal:
            raise (refusal if isinstance(error, BadInput) else error) from None
        except BadInput:
            raise error from None


def count(tape: Tape, graph: Graph, total: Tensor, model: Any = None) -> int:
    """The number of samples, for those who need nothing else: measured only where the tensors seen disagree on it.

    graph: of `total`, with or without its losses. Where samples are mixed it is dim 0 of the batch.
    """
    first = readings.first_count(graph) or 1
    shapes = [loss.call.logits.shape for loss in tape.losses]
    if not readings.contradictory(graph) and all(any(size % first == 0 for size in shape) for shape in shapes if shape):
        return first
    try:
        return measure(tape, graph if graph.losses else prove(tape, total, graph.weight), model).n
    except LayerwiseError:
        return first


def _first_that_holds(
    tape: Tape, graph: Graph, counts: Sequence[int], error: Exception | None, tried: int | None = None
) -> SampleLayout:
    """The layout of the first number of samples that the measurement confirms; tried: on axes, without success.

    Among several, one by which each row of the batch belongs to one sample comes first.
    """
    on_axes: SampleLayout | None = None
    for n in counts:
        for attempt in ([] if n == tried else [lambda n=n: by_axes(tape, graph, n)[0]]) + [
            lambda n=n: by_rows(graph, n)
        ]:
            try:
                layout = _checked(graph, attempt())
            except _REFUSALS as refusal:
                worse = isinstance(error, BadInput) and isinstance(refusal, SamplesMixed)
                error = refusal if error is None or worse else error
                continue
            if one_sample_a_row(graph, layout):
                return layout
            if layout.regular:
                on_axes = on_axes or layout
    if on_axes is not None:
        return on_axes
    if error is None:
        raise BadInput("asked for per-sample quantities, but no batch with a sample axis was seen; pass samples=N")
    seen = ", ".join(map(str, counts))
    raise type(error)(f"{error} (numbers of samples that the batch, the targets and the losses allow: {seen})")


def _checked(graph: Graph, layout: SampleLayout) -> SampleLayout:
    """The layout, after proof that every loss of the user's own is a sum over its samples.

    At every batch: what a loss does with its samples may depend on their values.
    """
    check_losses(graph, layout)
    return layout


def _on_axes(tape: Tape, graph: Graph, model: Any, n: int, samples: int | None) -> SampleLayout:
    key = _signature(tape, graph, model, samples)
    memo = _memo(model)
    if key in memo:
        return memo[key]
    layout, proved = by_axes(tape, graph, n)
    if proved and structural(graph, layout):
        if len(memo) >= _MEMO_LIMIT:
            memo.clear()
        memo[key] = layout
    return layout


def _memo(model: Any) -> dict[Any, SampleLayout]:
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
