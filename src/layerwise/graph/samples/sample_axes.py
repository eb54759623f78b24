"""The samples' axis in each use's output: measured by vector-Jacobian products, never guessed from sizes.

Cotangents are sent back from the loss rows of some of the samples, then of others, so that of any two samples each is
once sent without the other. The axis of a use's output that carries the samples is the one along which, in every
product, only indices of the chosen samples are nonzero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, count, islice
from math import comb
from typing import NamedTuple

import torch
from torch import Tensor

from layerwise.errors import AmbiguousSamples, BadInput, SamplesMixed
from layerwise.graph.coverage import Graph, hides
from layerwise.graph.samples.meeting import meeting
from layerwise.graph.samples.readings import tensor_asked
from layerwise.graph.samples.sample_layout import SampleLayout, Where, free_axes
from layerwise.rows.base import Samples
from layerwise.tape.pull import pull
from layerwise.tape.tape import Tape
from layerwise.tape.uses import LossUse, Use
from layerwise.tensors import is_out_of_memory

__all__ = [
    "advice_on_shared_rows", "by_axes", "free_axes", "hypotheses", "mixed_text", "on_axes", "on_axis", "structural",
    "structural_below",
]  # fmt: skip


class AxesFound(NamedTuple):
    """The layout on axes; proved: whether a cotangent reached every use. for_all: whether that was so of NaN, too."""

    layout: SampleLayout
    proved: bool
    for_all: bool = False


def by_axes(tape: Tape, graph: Graph, n: int) -> AxesFound:
    """The axis of n samples in every use and loss.

    Raises SamplesMixed, AmbiguousSamples, or BadInput (n fits no axis of a loss).
    """
    ways = [hypotheses(loss, n) for loss in graph.losses]
    if ways and all(len(each) == 1 for each in ways):  # then one product of all losses tells as much as one of each
        rows = [only for (only,) in ways]
        for_all = _for_all_values(graph, graph.losses, rows)
        if for_all is not None:
            return _merge(graph, [for_all], n)
        found, culprit = _test(graph, graph.losses, rows)
        if culprit is None:
            return _merge(graph, [found], n)
    pairs = zip(graph.losses, ways, strict=True)
    return _merge(graph, [_measure_loss(tape, graph, loss, each, n) for loss, each in pairs], n)


def _for_all_values(graph: Graph, losses: Sequence[LossUse], rows: Sequence[Samples]) -> _Candidates | None:
    """The axes from NaN cotangents alone, where every use has one for them; None where one has not.

    A derivative of torch's own is linear with zeros where values decide, so NaN arrives wherever any number would; a
    function of the user's own may replace it, and is asked with numbers as well.
    """
    if any(map(hides, graph.passed)):
        return None
    try:
        with torch.autograd.set_detect_anomaly(False):
            found, culprit = _test(graph, losses, rows, nan=True)
    except (RuntimeError, ArithmeticError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        return None  # a derivative that checks its input
    if culprit is not None or any(len(found.axes[i]) > 1 < rows[0].n for i in found.reached):
        return None
    return found._replace(for_all=True)


class _Candidates(NamedTuple):
    """Hypotheses on the samples' axes of losses, the axes left for each use, and the uses reached by a cotangent.

    for_all: whether the cotangents were NaN, which tell what holds for all values.
    """

    rows: Sequence[Samples]
    axes: dict[int, list[Samples]]
    reached: set[int]
    for_all: bool = False


# -- hypotheses ---------------------------------------------------------------------------------------


def hypotheses(loss: LossUse, n: int) -> list[Samples]:
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


def _measure_loss(tape: Tape, graph: Graph, loss: LossUse, ways: Sequence[Samples], n: int) -> _Candidates:
    """The samples' axis of one loss, out of several ways, and, for each use, the axes that carry its samples."""
    shape = tuple(loss.call.logits.shape)
    if not ways:
        raise BadInput(
            f"asked for per-sample quantities of {n} samples, but {loss} reads outputs of shape {shape}, of which no "
            f"axis holds {n} rows or a multiple of them. Where {n} (read off the batch, unless you passed it) is not "
            f"the number of samples, pass samples=N, or samples= {tensor_asked(graph)}; where the outputs were reduced "
            "over the batch before the loss, there is none for each sample"
        )
    passed: list[_Candidates] = []
    failed: Use | None = None
    for hypothesis in ways:
        # NaN for one way that holds; numbers for the others, which values may allow
        for_all = None if passed else _for_all_values(graph, [loss], [hypothesis])
        if for_all is not None:
            passed.append(for_all)
            continue
        found, culprit = _test(graph, [loss], [hypothesis])
        if culprit is None:
            passed.append(found)
        else:
            failed = failed or culprit
    if not passed:
        assert failed is not None
        raise SamplesMixed(mixed_text(tape, failed, n, meeting(loss, ways[0], failed), tensor_asked(graph)))
    if len(passed) > 1:
        passed = _by_first_batch(graph, passed)
    if len(passed) > 1 and n > 1:  # of one sample all axes say the same
        raise AmbiguousSamples(
            f"the {shape} outputs of {loss} can belong to {n} samples in {len(passed)} ways that this "
            "batch cannot tell apart (number of samples equal to number of positions?); pass samples= "
            f"{tensor_asked(graph)}, or use a batch of another size"
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


def _test(
    graph: Graph, losses: Sequence[LossUse], rows: Sequence[Samples], nan: bool = False
) -> tuple[_Candidates, Use | None]:
    """The axes of each use that carry the samples under a hypothesis for each loss, and the first use without one.

    nan: the cotangents of the chosen samples are NaN, else random numbers.
    """
    generator, n = torch.Generator().manual_seed(0), rows[0].n
    edges, logits = [use.edge for use in graph.uses], [loss.logits for loss in losses]
    candidates = {use.index: _axes(use, n) for use in graph.uses}
    reached: set[int] = set()
    for chosen in _choices(n):
        pairs = zip(losses, rows, strict=True)
        sent = [_nan(*pair, chosen) if nan else _masked_noise(*pair, chosen, generator) for pair in pairs]
        for use, g in zip(graph.uses, pull(logits, sent, edges), strict=True):
            support = None if g is None else g != 0
            if support is None or not bool(support.any()):
                continue
            reached.add(use.index)
            where = chosen.to(support.device)
            candidates[use.index] = [s for s in candidates[use.index] if _follows(support, s, where)]
            if not candidates[use.index]:
                return _Candidates(rows, candidates, reached), use
    return _Candidates(rows, candidates, reached), None


def structural(graph: Graph, layout: SampleLayout) -> bool:
    """Whether no values of weights and activations could mix samples: then the measurement may be cached.

    A path that mixes samples may be multiplied by zero now (a branch that starts at zero) and by another number later.
    Zero times NaN is NaN, so NaN cotangents reach everything that a sample can reach.
    """
    edges, logits = [use.edge for use in graph.uses], [loss.logits for loss in graph.losses]
    silent = {use.index for use in graph.uses}
    for chosen in _choices(layout.n):
        sent = [_nan(loss, rows, chosen) for loss, rows in zip(graph.losses, layout.losses, strict=True)]
        try:
            with torch.autograd.set_detect_anomaly(False):
                pulled = pull(logits, sent, edges)
        except (RuntimeError, ArithmeticError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            return False  # a derivative that checks its input
        for use, g in zip(graph.uses, pulled, strict=True):
            if g is None:
                continue
            if not _follows(g != 0, layout.uses[use.index], chosen.to(g.device)):
                return False
            if use.index in silent and bool(g.any()):
                silent.discard(use.index)
    return not silent  # a use that nothing reaches, behind units that are off, may be reached in another way later


def structural_below(front: Sequence[Use], uses: Sequence[Use], n: int, axes: Mapping[int, Samples]) -> bool:
    """The same of the part of the graph below some uses' outputs."""
    ends = [use.edge for use in front]
    for chosen in _choices(n):
        sent = []
        for use in front:
            data = use.edge.node._input_metadata[use.edge.output_nr]
            g = torch.zeros(use.call.out_shape, dtype=data.dtype, device=data.device)
            mine = chosen.to(g.device)[axes[use.index].owners(g.shape, g.device)]
            sent.append(g.masked_fill_(mine, torch.nan))
        try:
            pulled = pull(ends, sent, [use.edge for use in uses])
        except (RuntimeError, ArithmeticError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            return False
        for use, found in zip(uses, pulled, strict=True):
            if found is not None and not _follows(found != 0, axes[use.index], chosen.to(found.device)):
                return False
    return True


def on_axes(graph: Graph, layout: SampleLayout) -> SampleLayout:
    """The layout with an axis in every use whose numbered rows agree with one."""
    uses = {u.index: on_axis(u, layout.uses[u.index]) for u in graph.uses if u.index in layout.uses}
    return replace(layout, uses=layout.uses | uses)


def on_axis(use: Use, where: Where) -> Where:
    """Numbered rows as the only axis that they agree with, where there is one; rows of no sample agree with any."""
    if isinstance(where, Samples):
        return where
    numbers, shape = where.numbers, use.call.out_shape
    aligned = {axis for slot in use.slots for axis in slot.aligned}
    if bool((numbers < 0).all()):
        return where
    found = [s for s in _axes(use, where.n) if s.axis not in aligned]
    found = [s for s in found if bool(((numbers < 0) | (numbers == s.owners(shape, numbers.device))).all())]
    return found[0] if len(found) == 1 else where


def _choices(n: int) -> Iterator[Tensor]:
    """Masks of some of n samples, so that for any two there is one of the first alone, and one of the other alone.

    Each sample has a code of as many masks as any other, and no two the same: of no fewer masks is that so.
    Source: Sperner (1928), "Ein Satz über Untermengen einer endlichen Menge".
    """
    masks = next(t for t in count(1) if comb(t, (t + 1) // 2) >= n)
    codes = list(islice(combinations(range(masks), (masks + 1) // 2), n))
    for mask in range(masks):
        yield torch.tensor([mask in code for code in codes], dtype=torch.bool)


def _axes(use: Use, n: int) -> list[Samples]:
    """Every axis and order of n samples in a use's output that the operation allows."""
    shape = use.call.out_shape
    found = []
    for a in free_axes(use):
        if n and shape[a] % n == 0:
            found += [Samples(n, a)] if shape[a] == n else [Samples(n, a, True), Samples(n, a, False)]
    return sorted(found, key=lambda s: shape[s.axis] != n)


def _masked_noise(loss: LossUse, rows: Samples, chosen: Tensor, generator: torch.Generator) -> Tensor:
    logits = loss.call.logits
    noise = torch.randn(logits.shape, generator=generator, dtype=torch.float32).to(logits)
    return noise * _mask(loss, rows, chosen)


def _nan(loss: LossUse, rows: Where, chosen: Tensor) -> Tensor:
    """NaN at the chosen samples' logits, zero elsewhere."""
    return torch.zeros_like(loss.call.logits).masked_fill_(_mask(loss, rows, chosen), torch.nan)


def _mask(loss: LossUse, rows: Where, chosen: Tensor) -> Tensor:
    """True at the chosen samples' logits, broadcastable to the logits' shape."""
    logits = loss.call.logits
    return chosen.to(logits.device)[rows.owners(logits.shape, logits.device)]


def _follows(support: Tensor, s: Where, chosen: Tensor) -> bool:
    """Whether the support holds indices of the chosen samples only, with the samples at `s`."""
    if not isinstance(s, Samples):
        owners = s.owners(support.shape, support.device)
        return not bool((support & ~(chosen[owners] & (owners >= 0))).any())
    parts = s.split(support, s.axis)
    others = [a for a in range(parts.dim()) if a != s.axis]
    per_sample = parts.any(dim=others) if others else parts
    return not bool((per_sample & ~chosen).any())


def _merge(graph: Graph, found: Sequence[_Candidates], n: int) -> AxesFound:
    """The samples' axes common to all losses."""
    uses: dict[int, Where] = {}
    proved = True
    for use in graph.uses:
        common = [s for s in _axes(use, n) if all(s in f.axes[use.index] for f in found)]
        reached = any(use.index in f.reached for f in found)
        if not common:
            raise SamplesMixed(
                f"no axis of the output {tuple(use.call.out_shape)} of {use} carries the {n} samples for all losses: "
                "lay them along the same axis for each loss, or pass samples= a tensor with the sample number of each "
                "loss term"
            )
        if len(common) > 1 and n > 1 and reached:
            raise AmbiguousSamples(
                f"the output {tuple(use.call.out_shape)} of {use} can carry {n} samples on several axes that this "
                f"batch cannot tell apart; pass samples= {tensor_asked(graph)}, or use a batch of another size"
            )
        proved &= reached  # where no cotangent arrives the gradient is zero, wherever the samples lie
        uses[use.index] = common[0]
    layout = SampleLayout(n, uses, [rows for f in found for rows in f.rows])
    return AxesFound(layout, proved, proved and all(f.for_all for f in found))


def mixed_text(tape: Tape, use: Use, n: int, where: str, tensor: str) -> str:
    """The error text for a use at whose output several samples meet.

    where: the call at which they do; tensor: the one that `samples=` takes; both in words.
    """
    norms = any(getattr(c, "__name__", "") in ("batch_norm", "instance_norm") for c in tape.calls)
    hint = "; a batch norm in training mode mixes them: call model.eval()" if norms else ""
    return (
        f"asked for per-sample quantities of {n} samples, but each row of the output {tuple(use.call.out_shape)} of "
        f"{use} has a part in the loss of several samples{where}{hint}. Statistics of the batch, and losses that set "
        "samples against each other, have no per-sample gradients (quantities of the Hessian and products with it "
        f"need none); where a sample is several rows, pass samples= {tensor}; {advice_on_shared_rows(n)}"
    )


def advice_on_shared_rows(n: int) -> str:
    """What to do with rows that all samples share and whose number is a multiple of N."""
    return (
        f"rows that all samples share, {n} or a multiple of it, are told from samples only where the model keeps them "
        "(a buffer) in place of an argument"
    )
