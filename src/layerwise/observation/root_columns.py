"""Roots of the loss Hessian, sent before the user's backward pass, and quantities that work on the graph itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from layerwise.gradient.parameter import ParameterGradient
from layerwise.gradient.parts import Part
from layerwise.graph.coverage import Graph
from layerwise.graph.loss_curvature import LossCurvature
from layerwise.observation.backward_pass import BackwardPass
from layerwise.quantities.base import Quantity
from layerwise.tape.pull import pull
from layerwise.tape.uses import Use

__all__ = ["send_roots"]

_COTANGENT_ELEMENTS = 2**22  # of a stack of columns sent back together; convolutions go one by one

Stacks = dict[tuple[int, str], list[tuple[Any, ...]]]  # by quantity and parameter


def send_roots(observed: BackwardPass) -> None:
    """Send the columns that the quantities ask for, shared between those that ask for the same."""
    for i in observed.in_graph:
        observed.values[i] = _on_graph(observed, observed.quantities[i])
    wanted: dict[Any, list[int]] = {}
    for i in observed.columns:
        wanted.setdefault(observed.quantities[i].cotangent, []).append(i)
    for cotangent, indices in wanted.items():
        _check_size(observed, cotangent, indices)
        chunk = _chunk_size(observed.graph)
        stacks: Stacks = {}
        for column, curvature, stack in cotangent.stacks(observed.curvatures, chunk):
            _contract(observed, indices, _pulled(curvature, stack, observed.graph.asked_uses), column, stacks)
        for i, name in list(stacks):
            found = stacks.pop((i, name))
            observed.values[i][name] = tuple(torch.cat(t, 1) for t in zip(*found, strict=True))


def _on_graph(observed: BackwardPass, quantity: Quantity) -> dict[str, tuple[Any, ...]]:
    """A quantity's values on the graph."""
    graph, layout = observed.graph, observed.known_layout()
    before = len(graph.unread or ())

    def run() -> dict[str, tuple[Any, ...]]:
        del (graph.unread or [])[before:]
        found = quantity.compute_graph(observed.tape, graph, layout)
        return {name: tuple(_typed(t, observed.dtype_of(name)) for t in value) for name, value in found.items()}

    return observed.decided(quantity, repr(quantity), run)


def _typed(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) else value


def _chunk_size(graph: Graph) -> int:
    """Columns sent back at once: as many as the uses' cotangents fit in the cache's neighbourhood."""
    elements = sum(use.call.out_shape.numel() for use in graph.asked_uses)
    return max(1, _COTANGENT_ELEMENTS // max(1, elements))


def _check_size(observed: BackwardPass, cotangent: Any, indices: Sequence[int]) -> None:
    """Let the quantities refuse a number of columns before any is sent."""
    quantities = [observed.quantities[i] for i in indices]
    asked = [q for q in quantities if type(q).check_size is not Quantity.check_size]
    if asked:
        count = sum(cotangent.count(curvature.likelihood, curvature.rows) for curvature in observed.curvatures)
        sizes = {name: observed.tape.parameters[name].numel() for name in observed.graph.parameters()}
        for quantity in asked:
            quantity.check_size(count, observed.batch.samples, sizes)


def _pulled(curvature: LossCurvature, stack: Tensor, uses: Sequence[Use]) -> list[Tensor]:
    """Vector-Jacobian products `[V, *out_shape]` of a stack of columns at each use."""
    edges = [use.edge for use in uses]
    pulled: list[Tensor | None]
    if len(stack) == 1:
        sent = [x[0] for x in curvature.cotangents(stack)]
        pulled = [None if g is None else g[None] for g in pull(curvature.edges, sent, edges)]
    else:
        pulled = pull(curvature.edges, curvature.cotangents(stack), edges, batched=True)
    return [
        stack.new_zeros(len(stack), *use.call.out_shape) if g is None else g
        for use, g in zip(uses, pulled, strict=True)
    ]


def _contract(
    observed: BackwardPass, indices: Sequence[int], pulled: Sequence[Tensor], column: int, stacks: Stacks
) -> None:
    """Give one stack of cotangents to the quantities; `stacks` takes the values of those that keep columns apart."""
    asked = [(i, observed.quantities[i]) for i in indices]
    flags = {q.needs_samples for _, q in asked}
    rows_only = {flag: all(q.rows_only for _, q in asked if q.needs_samples == flag) for flag in flags}
    parts: dict[tuple[str, bool], list[Part]] = {}
    for use, g in zip(observed.graph.asked_uses, pulled, strict=True):
        for flag in flags:
            for name, part in observed.parts(use, g, flag, rows_only[flag]):
                parts.setdefault((name, flag), []).append(part)
    shared: dict[Any, Any] = {}
    for (name, flag), found in parts.items():
        gradient = ParameterGradient(name, observed.tape.parameters[name].shape, found, column, shared)
        covering = [i for i, quantity in asked if quantity.needs_samples == flag and quantity.covers(gradient)]
        for i, values in zip(covering, observed.compute(covering, gradient), strict=True):
            if observed.quantities[i].stacks:
                stacks.setdefault((i, name), []).append(values)
            else:
                observed.add(i, gradient, values)
