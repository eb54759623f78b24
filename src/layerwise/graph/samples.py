"""The samples' axis in each use's output: measured by vector-Jacobian products, never guessed from sizes.

Random cotangents are sent back from half of the samples' loss rows, then from the other half, for each bit of the
samples' numbers, so that any two samples are separated at least once. The axis of a use's output that carries the
samples is the one along which, in every product, only indices of the chosen samples are nonzero. Where there is no
such axis, samples are mixed (batch norm in training, contrastive losses) and per-sample quantities do not exist. The
result is cached per model and sequence of calls.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdRef, WeakTensorKeyDictionary

from layerwise.errors import AmbiguousSamples, BadInput, SamplesMixed
from layerwise.graph.coverage import Graph
from layerwise.graph.own_loss import OwnLossGraph
from layerwise.graph.separable import check_sum_over_samples
from layerwise.graph.walk import Node, by_node, inputs, nodes
from layerwise.rows.base import Samples
from layerwise.tape.pull import pull
from layerwise.tape.tape import Tape
from layerwise.tape.uses import LossUse, Use

__all__ = ["SampleLayout", "measure"]


@dataclass(frozen=True)
class SampleLayout:
    """The number of samples N, and their axis in each use's output and each loss's logits."""

    n: int
    uses: dict[int, Samples]
    losses: list[Samples]


# A cache of measurements, one entry per live model: nothing in it changes a result. The entry of a functional model
# lives as long as the model's first tensor; the other tensors are in the key.
_MEASURED: weakref.WeakKeyDictionary[nn.Module, dict[Any, SampleLayout]] = weakref.WeakKeyDictionary()
_FUNCTIONAL: MutableMapping[Tensor, dict[Any, SampleLayout]] = WeakTensorKeyDictionary()
_MEMO_LIMIT = 64


def measure(tape: Tape, graph: Graph, model: Any = None, samples: int | None = None) -> SampleLayout:
    """The samples' axis in every use and loss of the graph.

    samples: the number N; by default dim 0 of the batch that the first use's input was made from.
    Raises SamplesMixed, AmbiguousSamples, or BadInput (N fits no axis of the loss).
    """
    layout = _measure(tape, graph, model, samples)
    at = len(graph.known)
    for own in graph.own:  # at every batch: what a loss does with its samples may depend on their values
        check_sum_over_samples(OwnLossGraph(graph, own), layout.losses[at : at + len(own.boundary)])
        at += len(own.boundary)
    return layout


def _measure(tape: Tape, graph: Graph, model: Any, samples: int | None) -> SampleLayout:
    key = _signature(tape, graph, model, samples)
    memo = _memo(model)
    if key in memo:
        return memo[key]
    n = samples if samples is not None else _count(graph)
    layouts = [_measure_loss(tape, graph, loss, n) for loss in graph.losses]
    layout, proved = _merge(graph, layouts, n)
    if proved and _structural(graph, layout):
        if len(memo) >= _MEMO_LIMIT:
            memo.clear()
        memo[key] = layout
    return layout


def _count(graph: Graph) -> int:
    if graph.batch is None or graph.batch.dim() == 0:
        raise BadInput("asked for per-sample quantities, but no batch with a sample axis was seen; pass samples=N")
    return graph.batch.shape[0]


def _memo(model: Any) -> dict[Any, SampleLayout]:
    """The cached measurements of a model."""
    if isinstance(model, nn.Module):
        return _MEASURED.setdefault(model, {})
    first = next(iter(model.values()), None) if isinstance(model, Mapping) else None
    return {} if first is None else _FUNCTIONAL.setdefault(first, {})


def _signature(tape: Tape, graph: Graph, model: Any, samples: int | None) -> Any:
    """The cache key: all that a measurement depends on, other than values, whose influence `_structural` rules out."""
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


class _Candidates(NamedTuple):
    """A hypothesis on the samples' axis of a loss, the axes left for each use, and the uses reached by a cotangent."""

    rows: Samples
    axes: dict[int, list[Samples]]
    reached: set[int]


# -- hypotheses ---------------------------------------------------------------------------------------


def _hypotheses(loss: LossUse, n: int) -> list[Samples]:
    """Every axis and order in which the rows of a loss may belong to n samples, the most usual first."""
    shape = loss.call.logits.shape
    axes = [a for a in range(len(shape)) if a != loss.call.class_axis]
    if not axes:
        return [Samples(1, -1)] if n == 1 else []
    exact = [Samples(n, a) for a in axes if shape[a] == n]
    if exact and exact[0].axis == axes[0]:
        # Rows on the leading axis; another axis of the same size is a rival only among positions.
        positions = axes if loss.call.class_axis is not None else axes[:-1]
        return [exact[0], *[s for s in exact[1:] if s.axis in positions]]
    majors = (True, False) if n > 1 else (True,)  # of one sample there is one order
    flat = [Samples(n, a, major) for a in axes if n and shape[a] % n == 0 and shape[a] > n for major in majors]
    return exact + flat


def _measure_loss(tape: Tape, graph: Graph, loss: LossUse, n: int) -> _Candidates:
    """The samples' axis of one loss and, for each use, the axes that carry its samples."""
    hypotheses = _hypotheses(loss, n)
    shape = tuple(loss.call.logits.shape)
    if not hypotheses:
        raise BadInput(
            f"asked for per-sample quantities of {n} samples, but {loss.call.name} has outputs of shape {shape}, "
            f"and no axis holds a multiple of {n} rows; pass samples=N where N is not the batch's dim 0"
        )
    passed: list[_Candidates] = []
    failed: Use | None = None
    for hypothesis in hypotheses:
        found, culprit = _test(graph, loss, hypothesis)
        if culprit is None:
            passed.append(found)
        else:
            failed = failed or culprit
    if not passed:
        assert failed is not None
        raise SamplesMixed(_mixed_text(tape, failed, n))
    if len(passed) > 1:
        passed = _by_first_batch(graph, passed)
    if len(passed) > 1:
        raise AmbiguousSamples(
            f"the {shape} outputs of {loss.call.name} can belong to {n} samples in {len(passed)} ways that this "
            "batch cannot tell apart (number of samples equal to number of positions?); use a batch of another "
            "size, or one whose first layer reads the batch as it is"
        )
    return passed[0]


def _by_first_batch(graph: Graph, passed: list[_Candidates]) -> list[_Candidates]:
    """Keep the hypotheses under which the first use carries samples where the batch does."""
    first = graph.batch
    if first is None:
        return passed
    for use in graph.uses:
        for arg in use.call.args[:2]:
            if not isinstance(arg, Tensor) or arg.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
                continue
            axes = [a for a in range(arg.dim()) if arg.stride(a) == first.stride(0) and arg.shape[a] == first.shape[0]]
            if len(axes) == 1:
                return [f for f in passed if any(s.axis == axes[0] for s in f.axes[use.index])] or passed
    return passed


def _test(graph: Graph, loss: LossUse, rows: Samples) -> tuple[_Candidates, Use | None]:
    """The axes of each use that carry the samples under a hypothesis, and the first use without such an axis."""
    generator = torch.Generator().manual_seed(0)
    edges = [use.edge for use in graph.uses]
    candidates = {use.index: _axes(use, rows.n) for use in graph.uses}
    reached: set[int] = set()
    for chosen in _halves(rows.n):
        cotangent = _masked_noise(loss, rows, chosen, generator)
        for use, g in zip(graph.uses, pull([loss.logits], [cotangent], edges), strict=True):
            support = None if g is None else g != 0
            if support is None or not bool(support.any()):
                continue
            reached.add(use.index)
            where = chosen.to(support.device)
            candidates[use.index] = [s for s in candidates[use.index] if _follows(support, s, where)]
            if not candidates[use.index]:
                return _Candidates(rows, candidates, reached), use
    return _Candidates(rows, candidates, reached), None


def _structural(graph: Graph, layout: SampleLayout) -> bool:
    """Whether no values of weights and activations could mix samples: then the measurement may be cached.

    A path that mixes samples may be multiplied by zero now (a branch that starts at zero) and by another number later.
    Zero times NaN is NaN, so NaN cotangents reach everything that a sample can reach.
    """
    edges = [use.edge for use in graph.uses]
    for loss, rows in zip(graph.losses, layout.losses, strict=True):
        for chosen in _halves(layout.n):
            cotangent = torch.zeros_like(loss.call.logits).masked_fill_(_mask(loss, rows, chosen), torch.nan)
            try:
                with torch.autograd.set_detect_anomaly(False):
                    pulled = pull([loss.logits], [cotangent], edges)
            except (RuntimeError, ArithmeticError, ValueError):
                return False  # a derivative that checks its input
            for use, g in zip(graph.uses, pulled, strict=True):
                if g is not None and not _follows(g != 0, layout.uses[use.index], chosen.to(g.device)):
                    return False
    return True


def _halves(n: int) -> Iterator[Tensor]:
    """Masks of half of n samples and of the others, for each bit of their numbers: any two differ in some bit."""
    for bit in range(max(n - 1, 1).bit_length()):
        half = (torch.arange(n) >> bit & 1).bool()
        yield from (half, ~half)


def _axes(use: Use, n: int) -> list[Samples]:
    """Every axis and order of n samples in a use's output that the operation allows."""
    shape = use.call.out_shape
    allowed = [set(slot.axes) for slot in use.slots]
    axes = sorted(set.intersection(*allowed)) if allowed else []
    found = []
    for a in axes:
        if n and shape[a] % n == 0:
            found += [Samples(n, a)] if shape[a] == n else [Samples(n, a, True), Samples(n, a, False)]
    return sorted(found, key=lambda s: shape[s.axis] != n)


def _masked_noise(loss: LossUse, rows: Samples, chosen: Tensor, generator: torch.Generator) -> Tensor:
    logits = loss.call.logits
    noise = torch.randn(logits.shape, generator=generator, dtype=torch.float32).to(logits)
    return noise * _mask(loss, rows, chosen)


def _mask(loss: LossUse, rows: Samples, chosen: Tensor) -> Tensor:
    """True at the chosen samples' logits, broadcastable to the logits' shape."""
    logits = loss.call.logits
    if rows.axis < 0:
        return chosen.any().to(logits.device)
    repeats = logits.shape[rows.axis] // rows.n
    mask = chosen[:, None].expand(-1, repeats) if rows.n_major else chosen[None].expand(repeats, -1)
    shape = [1] * logits.dim()
    shape[rows.axis] = -1
    return mask.reshape(shape).to(logits.device)


def _follows(support: Tensor, s: Samples, chosen: Tensor) -> bool:
    """Whether the support holds indices of the chosen samples only, with the samples at `s`."""
    parts = s.split(support, s.axis)
    others = [a for a in range(parts.dim()) if a != s.axis]
    per_sample = parts.any(dim=others) if others else parts
    return not bool((per_sample & ~chosen).any())


def _merge(graph: Graph, found: Sequence[_Candidates], n: int) -> tuple[SampleLayout, bool]:
    """The samples' axes common to all losses, and whether a cotangent reached every use and so proved them."""
    uses: dict[int, Samples] = {}
    proved = True
    for use in graph.uses:
        common = [s for s in _axes(use, n) if all(s in f.axes[use.index] for f in found)]
        reached = any(use.index in f.reached for f in found)
        if not common:
            raise SamplesMixed(
                f"no axis of the output {tuple(use.call.out_shape)} of {use} carries the {n} samples for all losses"
            )
        if len(common) > 1 and n > 1 and reached:
            raise AmbiguousSamples(
                f"the output {tuple(use.call.out_shape)} of {use} can carry {n} samples on several axes that this "
                "batch cannot tell apart; use a batch of another size"
            )
        proved &= reached  # where no cotangent arrives the gradient is zero, wherever the samples lie
        uses[use.index] = common[0]
    return SampleLayout(n, uses, [f.rows for f in found]), proved


def _mixed_text(tape: Tape, use: Use, n: int) -> str:
    norms = any(getattr(c, "__name__", "") in ("batch_norm", "instance_norm") for c in tape.calls)
    hint = " (a batch norm runs in this model: in training mode it mixes samples; call model.eval())" if norms else ""
    return (
        f"asked for per-sample quantities of {n} samples, but no axis of the output {tuple(use.call.out_shape)} of "
        f"{use} depends on one sample alone{hint}; a loss that compares samples has no per-sample gradient"
    )
