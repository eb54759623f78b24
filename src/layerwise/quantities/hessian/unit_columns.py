"""Hessian diagonals of parameters that are used once, from second derivatives in the outputs of that use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.graph.coverage import Graph
from layerwise.graph.decisions import decided
from layerwise.graph.products import check_second, gradient_of, twice
from layerwise.graph.samples import SampleLayout
from layerwise.graph.second.custom_functions import check_functions, check_sparse
from layerwise.ops.base import Slot
from layerwise.rows.base import Rows, Samples
from layerwise.rows.layout import MatrixLayout
from layerwise.tape.pull import pull_stack
from layerwise.tape.tape import Tape
from layerwise.tape.uses import Use

__all__ = ["Unit", "plan"]

_STACK_ELEMENTS = 2**22  # elements of columns that are backpropagated together


@dataclass(frozen=True)
class Unit:
    """Parameters of one use whose diagonals come from the same Hessian-vector products.

    by_output: one direction per output (t, k, o), for all samples at once; otherwise one per element (k, o, i) of the
    only parameter, whose direction in the output space is its input.
    """

    use: Use
    samples: Samples
    slots: Sequence[tuple[str, Slot, Tensor]]
    by_output: bool

    @property
    def names(self) -> list[str]:
        """The names of the parameters."""
        return [name for name, _, _ in self.slots]

    @property
    def count(self) -> int:
        """The number of directions, each one Hessian-vector product."""
        rows = _rows(self.slots[0][1], self.use, self.samples)
        _, _, t, k, o = rows.g.shape
        return k * o * (t if self.by_output else rows.size_in)

    def diagonals(self, graph: Graph, per_sample: bool) -> dict[str, tuple[Tensor, ...]]:
        """The diagonals by parameter name, `[*shape]`, or per sample `[N, *shape]`."""
        slot = self.slots[0][1]
        rows = _rows(slot, self.use, self.samples)
        _, n, t, k, o = rows.g.shape
        inputs = [_rows(s, self.use, self.samples).a for _, s, _ in self.slots]
        sizes = [_rows(s, self.use, self.samples).size_in for _, s, _ in self.slots]
        lead = n if per_sample else 1
        found = [rows.g.new_zeros(lead, k * o, size) for size in sizes]
        check_functions([(graph.total.grad_fn, 0)], [self.use.edge.node])
        check_sparse([(graph.total.grad_fn, 0)])
        gradient = gradient_of(graph, self.use.edge)
        check_second([gradient], [self.use.edge], graph.unread)
        if gradient is not None and gradient.requires_grad:
            each = max(1, _STACK_ELEMENTS // max(1, n * t * max(k * o, *sizes)))
            for start in range(0, self.count, each):
                columns = torch.arange(start, min(start + each, self.count), device=rows.g.device)
                self._add(found, gradient, columns, inputs, rows, per_sample)
        return {
            name: (self._finish(s, p, total.view(lead, k, o, total.shape[-1]), per_sample),)
            for (name, s, p), total in zip(self.slots, found, strict=True)
        }

    def _add(
        self,
        found: Sequence[Tensor],
        gradient: Tensor,
        columns: Tensor,
        inputs: Sequence[Tensor | None],
        rows: Rows,
        per_sample: bool,
    ) -> None:
        """Add the contribution of some columns to the diagonals `[1 or N, k·o, I]`."""
        _, n, t, k, o = rows.g.shape
        each = t if self.by_output else rows.size_in
        unit, place = columns // each, columns % each
        at = torch.arange(len(columns), device=columns.device)
        sent = rows.g.new_zeros(len(columns), n, t, k * o)
        first = inputs[0]
        if self.by_output:
            sent[at, :, place, unit] = 1
        elif first is None:
            sent[at, :, :, unit] = 1
        else:
            sent[at, :, :, unit] = first[:, :, unit // o, place].permute(2, 0, 1).to(sent.dtype)
        with twice():
            stack = _adjoint(self.slots[0][1], self.use, self.samples, sent, k, o)
            (back,) = pull_stack([gradient], [stack], [self.use.edge], decided)
        if back is None:
            return
        m = self.slots[0][1].output(back.detach(), self.samples).reshape(len(columns), n, t, k * o)[at, :, :, unit]
        for total, a in zip(found, inputs, strict=True):
            if not self.by_output:
                values = m.sum(2) if a is None else (m * sent[at, :, :, unit]).sum(2)  # [v,n]
                values = values.T if per_sample else values.sum(1)[None]
                total[:, unit, place] = values
                continue
            values = _between(m, a, unit // o, place, total.shape[2])  # [v,n,i]
            total.index_add_(1, unit, values.transpose(0, 1) if per_sample else values.sum(1)[None])

    def _finish(self, slot: Slot, p: Tensor, diagonal: Tensor, per_sample: bool) -> Tensor:
        view = MatrixLayout.of_view(slot.used, p)
        assert view is not None
        result = view.fold(slot.fold(diagonal)).to(p.dtype)
        return result if per_sample else result[0]


def plan(tape: Tape, graph: Graph, layout: SampleLayout | None, names: Sequence[str]) -> tuple[list[Unit], list[str]]:
    """The units for parameters that have output directions, and the names of the other parameters."""
    if layout is None or not layout.regular:
        return [], list(names)
    places: dict[str, list[tuple[Use, Slot | None]]] = {}
    for use in graph.uses:
        for derived, each in zip(use.used, use.slots, strict=True):
            for name in derived.names:
                places.setdefault(name, []).append((use, each if len(derived.names) == 1 else None))
    by_use: dict[int, list[tuple[str, Slot, Tensor]]] = {}
    rest = []
    for name in names:
        use, slot = places[name][0]
        p, samples = tape.parameters[name], layout.axes[use.index]
        if (
            slot is None
            or len(places[name]) > 1
            or not (slot.factored and slot.linear)
            or samples.axis in slot.aligned
            or MatrixLayout.of_view(slot.used, p) is None
        ):
            rest.append(name)
        else:
            by_use.setdefault(use.index, []).append((name, slot, p))
    uses = {use.index: use for use in graph.uses}
    units = []
    for index, slots in by_use.items():
        found, left = _units(uses[index], layout.axes[index], slots)
        units += found
        rest += left
    return units, rest


def _units(use: Use, samples: Samples, slots: list[tuple[str, Slot, Tensor]]) -> tuple[list[Unit], list[str]]:
    """The units of one use: slots with the same output rows share one unit; also the names that fit none."""
    units, left = [], []
    waiting = sorted(slots, key=lambda s: -s[2].numel())
    while waiting:
        name, slot, p = waiting.pop(0)
        rows = _rows(slot, use, samples)
        index = rows.a is not None and not rows.a.is_floating_point()
        by_output = rows.g.shape[2] <= rows.size_in
        if index and not by_output:
            left.append(name)
            continue
        mine = [(name, slot, p)]
        if by_output:
            like = [s for s in waiting if _same_rows(slot, s[1], use, samples)]
            mine += like
            waiting = [s for s in waiting if s not in like]
        units.append(Unit(use, samples, mine, by_output))
    return units, left


def _rows(slot: Slot, use: Use, samples: Samples) -> Rows:
    """The rows of a use for a zero cotangent: its input, and the shape of its output rows."""
    like = next(d.tensor for d in use.used)
    return slot.rows(like.new_zeros(1).expand(1, *use.call.out_shape), samples)


def _same_rows(one: Slot, other: Slot, use: Use, samples: Samples) -> bool:
    """Whether two slots of one use rearrange its output into the same rows."""
    numbers = torch.arange(use.call.out_shape.numel(), dtype=torch.float64).reshape(1, *use.call.out_shape)
    first, second = (s.output(numbers, samples) for s in (one, other))
    return torch.equal(first, second)


def _adjoint(slot: Slot, use: Use, samples: Samples, sent: Tensor, k: int, o: int) -> Tensor:
    """A direction `[V,N,T,k·o]` in the rows as a direction `[V, *out_shape]` in the output."""
    with torch.enable_grad():
        probe = sent.new_zeros(len(sent), *use.call.out_shape).requires_grad_()
        laid = slot.output(probe, samples)
        (direction,) = torch.autograd.grad(laid, probe, sent.reshape(*sent.shape[:3], k, o))
    return direction


def _between(m: Tensor, a: Tensor | None, group: Tensor, place: Tensor, size: int) -> Tensor:
    """`a[n,t,i] sum_u m[v,n,u] a[n,u,i]` at t = place, the position of column v, `[v,n,i]`."""
    if a is None:
        return m.sum(2, keepdim=True)
    if not a.is_floating_point():  # embedding: only positions with the same index count
        same = a[:, place].T.unsqueeze(2) == a.unsqueeze(0)  # [v,n,u]
        values = (m * same).sum(2)
        return m.new_zeros(*values.shape, size).scatter_(2, a[:, place].T.unsqueeze(2), values.unsqueeze(2))
    if a.shape[2] == 1:
        return torch.einsum("vnu,nui->vni", m, a[:, :, 0].to(m.dtype)) * a[:, place, 0].transpose(0, 1)
    return torch.einsum("vnu,nuvi->vni", m, a[:, :, group].to(m.dtype)) * a[:, place, group].transpose(0, 1)
