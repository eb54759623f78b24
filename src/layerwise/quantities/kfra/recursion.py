"""The recursion of KFRA: one Hessian block for each use of a chain, averaged over the batch on its way down.

    B_top = sum_n J_n^T H_n J_n                 at the output of the last use, H_n the loss Hessian of sample n
    B_below = (1/N) sum_n J_n^T B J_n           J_n from the output of one use to that of the use before

Where a use's own map is the same for all samples (`J_n = W D_n`), B is first multiplied to `W^T B W`, then passed
through the functions between the two uses. Probe vectors find the kind of each map, so no layer needs a rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerwise.errors import Undefined
from layerwise.gradient.parameter import ParameterGradient
from layerwise.gradient.parts import Part, RowsPart, for_sums, parts_of
from layerwise.graph.cotangents import Exact
from layerwise.graph.coverage import Graph
from layerwise.graph.decisions import decided
from layerwise.graph.loss_curvature import likelihoods, loss_curvatures
from layerwise.graph.probes import draws, join, matrix_among, near, sample_axes, split
from layerwise.graph.samples import SampleLayout
from layerwise.losses import Likelihood
from layerwise.ops.base import Slot
from layerwise.quantities.kfra.chain import Link, chain, same_edge
from layerwise.quantities.kfra.hessian_blocks import Send, congruence, probe, through, uniform
from layerwise.rows import contract
from layerwise.rows.base import Samples
from layerwise.tape.pull import pull, pull_stack
from layerwise.tape.tape import Tape
from layerwise.tape.uses import Use

__all__ = ["AveragedGradient", "averaged"]

_ELEMENTS = 2**22  # elements of columns of the loss Hessian that are backpropagated together
_SMALL = 2**14  # cotangents below this many elements are backpropagated as a batch


class _Place(NamedTuple):
    """A tensor of the graph: its edge, where its samples lie, its shape."""

    edge: Any
    samples: Samples
    shape: torch.Size

    @property
    def size(self) -> int:
        """D, the number of values of one sample."""
        return self.shape.numel() // self.samples.n


@dataclass(frozen=True, kw_only=True)
class AveragedGradient(ParameterGradient):
    """A gradient with zero cotangents, and the averaged Hessian in the output rows of one sample, `[T,K,O,T,K,O]`."""

    curvature: Tensor


def averaged(tape: Tape, graph: Graph, layout: SampleLayout, max_bytes: int) -> Iterator[ParameterGradient]:
    """Yield the parameters of a chain, from the loss down, as `AveragedGradient`.

    Parameters without row form get columns of a root of the Hessian instead, the same for all samples.
    max_bytes: the largest block allowed. Raises Undefined, before any work, where the graph is no chain or a block
    would be larger.
    """
    rows = next(iter(layout.losses))
    if not layout.regular or not isinstance(rows, Samples):
        raise Undefined(
            "asked for a recursion down a chain with samples that are no equal pieces of one axis (rows chosen by a "
            "mask, segments, routed tokens), so that there is no block of a sample to average; ask for KFLR"
        )
    (top, *_) = loss_curvatures(graph, likelihoods(graph), layout)
    links = chain(graph)
    places = [_Place(link.use.edge, layout.axes[link.use.index], link.use.call.out_shape) for link in links]
    if top.parts is not None:
        raise Undefined(
            f"asked for a recursion down a chain, but {top.likelihood.call} couples the positions of a sample, or "
            "several outputs; ask for KFLR"
        )
    likelihood = top.likelihood
    dtype = torch.promote_types(likelihood.logits.dtype, torch.float32)
    _check_size(links, places, dtype, max_bytes)
    for i, (link, place) in enumerate(zip(links, places, strict=True)):
        if i == 0:
            logits = _Place(graph.losses[0].logits, rows, likelihood.logits.shape)
            block = _at_top(likelihood, logits, place, dtype)
        else:
            block = _down(block, links[i - 1], places[i - 1], place)
        yield from _gradients(tape, link.use, place, block)


# -- refusals -----------------------------------------------------------------------------------------------


def _check_size(links: Sequence[Link], places: Sequence[_Place], dtype: torch.dtype, most: int) -> None:
    """Raise Undefined for too large blocks at a use's output, or at the input of a use that has others below it."""
    for i, (link, place) in enumerate(zip(links, places, strict=True)):
        inner = i + 1 < len(links)
        size = max(place.size, _input_size(link.use, place.samples.n) if inner else 0)
        needed = size * size * dtype.itemsize
        if needed > most:
            raise Undefined(
                f"asked for the recursion's block of {link.use}, whose output {tuple(place.shape)} and input take a "
                f"matrix of {size} x {size}, {needed} bytes, for each sample's values: more than max_bytes={most}. "
                "Raise max_bytes, freeze the layers down to this one, or ask for KFLR, which needs no such block"
            )


def _input_size(use: Use, n: int) -> int:
    """The number of values per sample in the largest input of a use."""
    used = {id(derived.tensor) for derived in use.used}
    arguments = [*use.call.args, *use.call.kwargs.values()]
    data = [x for x in arguments if isinstance(x, Tensor) and id(x) not in used]
    return max((x.numel() // n for x in data), default=0)


# -- the recursion ------------------------------------------------------------------------------------------


def _at_top(likelihood: Likelihood, logits: _Place, last: _Place, dtype: torch.dtype) -> Tensor:
    """sum_n J_n^T H_n J_n at the output of the last use, `[D,D]`."""
    likelihood.root(0, 1)  # raises for a loss without a root, as all Kronecker factors do
    send = _between(logits, last, dtype)
    like = likelihood.logits.new_empty(0, dtype=dtype)
    seen = probe(send, logits.samples.n, logits.size, like)
    if seen.kind == "gathered":
        index = torch.arange(logits.size, device=like.device) if seen.sources is None else seen.sources
        factor = like.new_ones(logits.samples.n, len(index)) if seen.factor is None else seen.factor
        return _hessian(likelihood, logits, factor, index)
    total = like.new_zeros(last.size, last.size)
    for stack in Exact().columns(likelihood, logits.samples, max(1, _ELEMENTS // logits.shape.numel())):
        back = send(split(stack.to(dtype), logits.samples))
        total += contract.output_gram(back[:, :, None, None])[0]
    return total


def _hessian(likelihood: Likelihood, logits: _Place, factor: Tensor, index: Tensor) -> Tensor:
    """sum_n d_n[i] H_n[index[i], index[j]] d_n[j], computed a few columns j at a time."""
    n, size = factor.shape

    def product(columns: Tensor) -> Tensor:
        found = split(likelihood.hessian_product(join(columns, logits.samples, logits.shape)), logits.samples)
        return (found[:, :, index] * factor).sum(1)

    if likelihood.elementwise and decided(index.sort().values.diff().all()):  # each value once: then H is diagonal
        column = factor.new_zeros(1, n, logits.size)
        column[0][:, index] = factor
        return product(column)[0].diag()
    result = factor.new_empty(size, size)
    for j in torch.arange(size, device=index.device).split(max(1, _ELEMENTS // max(1, n * logits.size))):
        columns = factor.new_zeros(len(j), n, logits.size)
        columns[torch.arange(len(j), device=j.device), :, index[j]] = factor[:, j].T
        result[j] = product(columns)
    return result


def _down(block: Tensor, link: Link, start: _Place, end: _Place) -> Tensor:
    """(1/N) sum_n J_n^T B J_n from the output of a use to the output of the use before it."""
    passed = _own_map(block, link, start)
    if passed is not None:
        block, start = passed
    return through(block, _between(start, end, block.dtype), start.samples.n, own=passed is not None)


def _own_map(block: Tensor, link: Link, start: _Place) -> tuple[Tensor, _Place] | None:
    """J^T B J at the input of a use whose Jacobian J is the same for all samples, and that input; None for another use.

    Proved by a cotangent u_n r with random u and r: its VJP must be u_n J^T r, for samples along some axis. A used
    matrix W with W^T r = J^T r is taken as J.
    """
    if link.below is None:
        return None
    n, epsilon = start.samples.n, torch.finfo(block.dtype).eps
    r, u = draws(1, start.size, block), draws(1, n, block).T.round().exp2()  # powers of two: products round alike
    (back,) = pull([start.edge], [join((u * r)[None], start.samples, start.shape)[0]], [link.below])
    if back is None:
        return None
    back = back.to(block.dtype)
    neighbour = [start.samples] if start.samples.axis < back.dim() and back.shape[start.samples.axis] % n == 0 else []
    for samples in (*neighbour, *sample_axes(back.shape, n)):
        rows = split(back[None], samples)[0] / u
        if not near(rows[:1], rows, epsilon):
            continue
        middle = _Place(link.below, samples, back.shape)
        matrix = matrix_among((derived.tensor for derived in link.use.used), r, rows[:1])
        if matrix is not None:
            return congruence(block, matrix), middle
        return uniform(block, _between(start, middle, block.dtype), n), middle
    return None


def _between(start: _Place, end: _Place, dtype: torch.dtype) -> Send:
    """The vector-Jacobian product from the tensor `start` to the tensor `end`."""

    def send(stack: Tensor) -> Tensor:
        sent = join(stack, start.samples, start.shape)
        if same_edge(start.edge, end.edge):
            return split(sent, end.samples)
        if len(sent) > 1 and sent[0].numel() < _SMALL:
            (back,) = pull_stack([start.edge], [sent], [end.edge], decided)
        else:
            rows = [pull([start.edge], [row], [end.edge])[0] for row in sent]
            found = [row[None] for row in rows if row is not None]
            back = found[0] if len(found) == 1 else torch.cat(found) if found else None
        if back is None:
            back = stack.new_zeros(len(stack), *end.shape)
        return split(back.to(dtype), end.samples)

    return send


# -- the parameters of a use --------------------------------------------------------------------------------


def _gradients(tape: Tape, use: Use, place: _Place, block: Tensor) -> Iterator[ParameterGradient]:
    """Yield a use's parameters, with the block in the order of their output rows, or with columns of its root."""
    zero = block.new_zeros(()).expand(1, *place.shape)
    parts: dict[str, list[Part]] = {}
    for name, found in parts_of(tape, use, zero, place.samples):
        part = for_sums(found, tape.parameters[name].dtype)
        parts.setdefault(name, []).append(part)
    without_rows: set[str] = set()
    for name, (part, *others) in parts.items():
        if others or not isinstance(part, RowsPart):
            without_rows.add(name)
            continue
        rows = part.rows.g.shape[2:]
        curvature = block
        if not _keeps_order(part.slot, place):
            curvature = through(block, _as_rows(part.slot, place, block.dtype), place.samples.n)
        curvature = curvature.view(*rows, *rows)
        yield AveragedGradient(name, tape.parameters[name].shape, [part], curvature=curvature)
    if without_rows:
        yield from _from_root(tape, use, place, block, without_rows)


def _from_root(tape: Tape, use: Use, place: _Place, block: Tensor, names: set[str]) -> Iterator[ParameterGradient]:
    """Yield parameters with cotangents `[V,N,D]`, equal for all samples, whose outer products sum to the block."""
    n = place.samples.n
    values, vectors = torch.linalg.eigh(block / n)
    root = (vectors * values.clamp(min=0).sqrt()).T
    column = 0
    for some in root.split(max(1, _ELEMENTS // max(1, n * place.size))):
        stack = join(some[:, None].expand(-1, n, -1), place.samples, place.shape)
        parts: dict[str, list[Part]] = {}
        for name, part in parts_of(tape, use, stack, place.samples):
            if name in names:
                parts.setdefault(name, []).append(for_sums(part, tape.parameters[name].dtype))
        for name, found in parts.items():
            yield ParameterGradient(name, tape.parameters[name].shape, found, column)
        column += len(some)


def _keeps_order(slot: Slot, place: _Place) -> bool:
    """Whether a slot's rows keep the order of each sample's values: the same view of the same memory."""
    memory = torch.empty(1, *place.shape, dtype=slot.used.dtype, device=slot.used.device)
    ours, its = split(memory, place.samples), slot.output(memory, place.samples).flatten(2)
    return ours.data_ptr() == its.data_ptr() and ours.shape == its.shape and ours.stride() == its.stride()


def _as_rows(slot: Slot, place: _Place, dtype: torch.dtype) -> Send:
    """The map from cotangents of a use's output to a slot's rows, mostly a rearrangement."""

    def send(stack: Tensor) -> Tensor:
        return slot.output(join(stack, place.samples, place.shape), place.samples).flatten(2).to(dtype)

    return send
