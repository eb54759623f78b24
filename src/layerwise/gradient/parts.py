"""The contribution of one use to a parameter's gradient: rows, per-sample gradients, or gradients on demand."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from layerwise.gradient.derived import leaf_gradients
from layerwise.gradient.row_views import PlannedRows, Remembered, layout_of_call, layout_of_rows
from layerwise.ops.base import Slot
from layerwise.rows import contract, gram
from layerwise.rows.base import RowNumbers, Rows, Samples
from layerwise.rows.layout import MatrixLayout
from layerwise.rows.numbered import Scattered
from layerwise.tape.tape import Tape
from layerwise.tape.uses import Use
from layerwise.tensors import HALF, wide_type

__all__ = [
    "DensePart", "LaterPart", "Part", "RowsPart", "bias_of", "for_sums", "joined_parts", "layouts_of", "parts_of",
    "planned_parts",
]  # fmt: skip


@dataclass(frozen=True)
class Part:
    """The contribution of one use to a parameter's gradient; an instance of this base class holds no numbers."""

    use: Use

    @property
    def size(self) -> torch.Size:
        """(V, N)."""
        raise NotImplementedError

    def per_sample(self, start: int, stop: int | None) -> Tensor:
        """`[V,n,*shape]`: the gradients of the samples from `start` to `stop`."""
        raise NotImplementedError

    is_slice = False  # whether `per_sample` is in new memory, zero outside a slice of the parameter

    def added(self, total: Tensor, start: int, stop: int | None, new: bool) -> Tensor:
        """`total` and `per_sample`. new: whether `total` may be written."""
        return total + self.per_sample(start, stop)

    def column(self, v: int) -> Part:
        """The contribution to the v-th cotangent alone."""
        raise NotImplementedError

    def zeros(self, shape: Sequence[int]) -> Tensor:
        """Zeros of the type and on the device of the gradient."""
        raise NotImplementedError

    def to(self, dtype: torch.dtype) -> Part:
        """The same contribution with its numbers in another type."""
        return self


@dataclass(frozen=True)
class _OfSlot(Part):
    """A contribution as the rows of one slot of a use; place: the slot's number."""

    place: int
    rows: Rows

    @property
    def slot(self) -> Slot:
        """How the tensor enters the call, which a plan of its rows need not ask."""
        return self.use.slots[self.place]

    @property
    def size(self) -> torch.Size:
        """(V, N)."""
        return self.rows.size

    def column(self, v: int) -> Self:
        """The contribution to the v-th cotangent alone."""
        return replace(self, rows=self.rows.sent(self.rows.g[v : v + 1]))


@dataclass(frozen=True)
class RowsPart(_OfSlot):
    """Rows of the parameter itself; view: the layout in the parameter of the tensor that the slot reads.

    laid: the layout of the rows' matrix in the parameter, where that is known. real: gives bool `[N,T]`, the rows that
    a loss term which counts can send a cotangent to, before rows of irregular samples are gathered; or None: all.
    """

    view: MatrixLayout
    laid: MatrixLayout | None = None
    real: Callable[[], Tensor | None] | None = None

    def mask(self, real: bool) -> Tensor | None:
        """Bool `[N,T]`: the rows that are no padding of shorter samples, or the real ones among them; None: all."""
        if self.slot.bias:
            return None
        return self.rows.mask(self.real() if real and self.real is not None else None)

    def fold(self, w: Tensor) -> Tensor:
        """Reshape `[..., K,O,I]` to the parameter, `[..., *shape]`."""
        return self.view.fold(self.slot.fold(w)) if self.laid is None else self.laid.fold(w)

    def layout(self) -> MatrixLayout:
        """The layout of the rows' matrix in the parameter."""
        return self.view.then(self.slot.matrix, self.slot.bias) if self.laid is None else self.laid

    def per_sample(self, start: int, stop: int | None) -> Tensor:
        """`[V,n,*shape]`: the gradients of the samples from `start` to `stop`."""
        return self.fold(self._matrices(start, stop))

    def _matrices(self, start: int, stop: int | None) -> Tensor:
        """`[V,n,K,O,I]`."""
        length = len(range(self.size[1])[start:stop])
        return contract.per_sample(contract.narrow(self.rows, start, length))

    @property
    def is_slice(self) -> bool:  # type: ignore[override]
        """Whether the rows are those of a slice of the parameter."""
        return self.laid is None and self.view.axes is None

    def added(self, total: Tensor, start: int, stop: int | None, new: bool) -> Tensor:
        """`total` and `per_sample`: a slice is added where it lies. new: whether `total` may be written."""
        if not (new and self.is_slice and total.dtype == self.rows.g.dtype):
            return super().added(total, start, stop, new)
        self.view.write(total, self.slot.fold(self._matrices(start, stop)), add=True)
        return total

    def zeros(self, shape: Sequence[int]) -> Tensor:
        """Zeros of the type and on the device of the gradient."""
        return self.rows.g.new_zeros(shape)

    def to(self, dtype: torch.dtype) -> RowsPart:
        """The same contribution with its numbers in another type."""
        return replace(self, rows=self.rows.mapped(partial(_in_dtype, dtype)))


def _in_dtype(dtype: torch.dtype, rows: Rows) -> Rows:
    a = rows.a
    a = a.to(dtype) if a is not None and a.is_floating_point() else a
    return Rows(a, rows.g.to(dtype), rows.size_in)


@dataclass(frozen=True)
class DensePart(Part):
    """Per-sample gradients `[V,N,*shape]`; by_autograd: whether they came through a derived tensor by autograd."""

    values: Tensor
    by_autograd: bool

    @property
    def size(self) -> torch.Size:
        """(V, N)."""
        return self.values.shape[:2]

    def per_sample(self, start: int, stop: int | None) -> Tensor:
        """`[V,n,*shape]`: the gradients of the samples from `start` to `stop`."""
        return self.values[:, start:stop]

    def column(self, v: int) -> DensePart:
        """The contribution to the v-th cotangent alone."""
        return replace(self, values=self.values[v : v + 1])

    def zeros(self, shape: Sequence[int]) -> Tensor:
        """Zeros of the type and on the device of the gradient."""
        return self.values.new_zeros(shape)

    def to(self, dtype: torch.dtype) -> DensePart:
        """The same contribution with its numbers in another type."""
        return replace(self, values=self.values.to(dtype.to_complex() if self.values.is_complex() else dtype))


@dataclass(frozen=True)
class LaterPart(_OfSlot):
    """Rows of a derived tensor, backpropagated to a leaf on demand, a few samples at a time, while the graph is alive.

    dtype: of the gradients read.
    """

    leaf: Tensor
    dtype: torch.dtype

    def per_sample(self, start: int, stop: int | None) -> Tensor:
        """`[V,n,*shape]`: the gradients of the samples from `start` to `stop`."""
        length = len(range(self.size[1])[start:stop])
        dense = self.slot.fold(contract.per_sample(contract.narrow(self.rows, start, length)))
        return leaf_gradients(self.slot.used, dense, [self.leaf])[0].to(self.dtype)

    def zeros(self, shape: Sequence[int]) -> Tensor:
        """Zeros of the type and on the device of the gradient."""
        return self.leaf.new_zeros(shape, dtype=self.dtype)

    def to(self, dtype: torch.dtype) -> LaterPart:
        """The same contribution with its numbers in another type."""
        return replace(self, dtype=dtype.to_complex() if self.leaf.is_complex() else dtype)


def parts_of(
    tape: Tape,
    use: Use,
    g: Tensor,
    samples: Samples | RowNumbers | None,
    later: bool = False,
    unstructured: Collection[str] = (),
    rows_only: bool = False,
    asked: Collection[str] | None = None,
) -> list[tuple[str, Part]]:
    """The parts of each parameter's gradient from a stack of cotangents `[V, *out_shape]` of one use.

    samples: where the samples lie in the output; None where no parameter needs per-sample structure.
    later: return a `LaterPart` for derived tensors, to backpropagate on demand.
    unstructured: names of parameters with rows that need no per-sample structure (Kronecker factors).
    rows_only: return a `Part` without numbers where a parameter has no rows.
    asked: the names of the parameters whose parts are wanted; None: all.
    """
    key = layout_of_rows(layout_of_call(use, samples, tape.parameters, unstructured), g)
    plan = None if key is None else _PLANS.get(key)
    if plan is not None:
        return [*_planned(plan, use, g, asked)]
    parts = _parts_by_slots(tape, use, g, samples, later, unstructured, rows_only, asked)
    whole = asked is None or set(use.names) <= set(asked)
    if key is not None and whole and key not in _PLANS:
        _PLANS.enter(key, _plan(use, g, [part for _, part in parts]))
    return parts


def planned_parts(
    tape: Tape, use: Use, g: Tensor, samples: Samples | RowNumbers | None, asked: Collection[str] | None = None
) -> tuple[Hashable, list[tuple[str, RowsPart]]] | None:
    """What `parts_of` returns where a plan has it, and the layout as a key; None where there is no plan."""
    key = layout_of_rows(layout_of_call(use, samples, tape.parameters), g)
    plan = None if key is None else _PLANS.get(key)
    if plan is None:
        return None
    parts = _planned(plan, use, g, asked)
    return (key, g.device, *(part.place for _, part in parts)), parts


def _planned(
    plan: Sequence[PlannedRows], use: Use, g: Tensor, asked: Collection[str] | None
) -> list[tuple[str, RowsPart]]:
    found = []
    for place, (derived, planned) in enumerate(zip(use.used, plan, strict=True)):
        (name,) = derived.names
        if asked is None or name in asked:
            found.append((name, RowsPart(use, place, planned.rows(use, g), planned.view, planned.laid)))
    return found


# By layout, of all models; None for a layout whose rows are no views.
_PLANS: Remembered[Sequence[PlannedRows] | None] = Remembered()


def _plan(use: Use, g: Tensor, parts: Sequence[Part]) -> list[PlannedRows] | None:
    """What makes the same parts again; None where the slots do more than view the call's tensors."""
    found = []
    for part in parts:
        views = isinstance(part, RowsPart) and part.slot.by_view
        plan = PlannedRows.of(use, part.slot, g, part.rows, part.layout()) if views else None  # type: ignore[attr-defined]
        if plan is None:
            return None
        found.append(plan)
    return found


def _parts_by_slots(
    tape: Tape,
    use: Use,
    g: Tensor,
    samples: Samples | RowNumbers | None,
    later: bool,
    unstructured: Collection[str],
    rows_only: bool,
    asked: Collection[str] | None,
) -> list[tuple[str, Part]]:
    parts: list[tuple[str, Part]] = []
    for derived, slot in zip(use.used, use.slots, strict=True):
        names = sorted(derived.names if asked is None else derived.names.intersection(asked))
        if not names:
            continue
        if len(derived.names) == 1:
            (name,) = derived.names
            where = None if name in unstructured else samples
            view = MatrixLayout.of_view(slot.used, tape.parameters[name])
            found = None if view is None else slot.structured(g, where)
            if view is not None and found is not None:
                parts.append((name, RowsPart(use, slot.place, found, view)))
                continue
        if rows_only:
            parts += [(name, Part(use)) for name in names]
            continue
        assert samples is not None
        leaves = {name: tape.parameters[name] for name in names}
        rows = slot.structured(g, samples) if later and not slot.used.is_leaf else None
        if rows is not None:
            parts += [(name, LaterPart(use, slot.place, rows, leaf, leaf.dtype)) for name, leaf in leaves.items()]
            continue
        dense = slot.dense(g, samples)
        derived_tensor = not slot.used.is_leaf
        values = leaf_gradients(slot.used, dense, list(leaves.values())) if derived_tensor else [dense]
        by_autograd = derived_tensor or slot.through_graph
        parts += [(name, DensePart(use, v, by_autograd)) for name, v in zip(leaves, values, strict=True)]
    return parts


def for_sums(part: Part, own: torch.dtype, asked: torch.dtype | None = None) -> Part:
    """The part of a parameter of a type with numbers in the one asked for, or in one that sums can be held in."""
    dtype = wide_type(own) if asked is None and own in HALF else asked
    return part if dtype is None else part.to(dtype)


def bias_of(part: RowsPart) -> str | None:
    """The parameter that a use adds to each output row of a weight: `Z = W A + b`; None where there is none.

    Proved by numbering the output's elements: both slots must arrange them into the same rows.
    """
    if part.slot.bias or not part.slot.used.numel():
        return None
    places = torch.arange(part.use.call.out_shape.numel(), device=part.rows.g.device)
    places = places.to(part.rows.g.dtype).reshape(1, *part.use.call.out_shape)
    for derived, slot in zip(part.use.used, part.use.slots, strict=True):
        if not slot.bias or not slot.factored or not derived.tensor.is_leaf:
            continue
        elements = torch.arange(slot.used.numel()).reshape(slot.used.shape)
        if not torch.equal(slot.matrix(elements).flatten(), elements.flatten()):
            continue
        mine, its = (s.output(places, None)[0].flatten(0, 1).flatten(1) for s in (part.slot, slot))
        if mine.shape == its.shape and (_is_one_view(mine, its) or _has_same_rows(mine, its)):
            return next(iter(derived.names))
    return None


def _is_one_view(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors of one shape are the same view of the same memory, which is known without a wait."""
    return one.data_ptr() == two.data_ptr() and one.stride() == two.stride()


def _has_same_rows(one: Tensor, two: Tensor) -> bool:
    return torch.equal(one[one[:, 0].argsort()], two[two[:, 0].argsort()])


def layouts_of(parts: Sequence[RowsPart]) -> list[MatrixLayout]:
    """The layout of each part's matrix in the parameter, found once for those that are arranged in the same way."""
    known: dict[Any, MatrixLayout] = {}
    found = []
    for part in parts:
        if part.laid is not None:
            found.append(part.laid)
            continue
        slot, arranged = part.slot, part.slot.arrangement
        key = (part.view, type(slot), slot.used.shape, arranged) if arranged is not None else id(slot)
        if key not in known:
            known[key] = part.layout()
        found.append(known[key])
    return found


def joined_parts(parts: Sequence[RowsPart]) -> RowsPart:
    """Parts of one layout concatenated to one pair of rows; inputs of different kinds become dense."""
    if any(isinstance(part.rows, Scattered) for part in parts):  # pieces of a batch mostly come in its order
        parts = sorted(parts, key=lambda part: part.use.index)
    rows = [part.rows for part in parts]
    if len({r.size[1] for r in rows}) > 1:  # rows without sample structure: all are positions
        rows = [contract.flatten_samples(r) for r in rows]
    if len({r.kind for r in rows}) > 1:
        rows = [r.mapped(gram.written_out) for r in rows]
    if len(parts) == 1:
        return replace(parts[0], rows=rows[0])
    real, whole = [part.real for part in parts], contract.concat(rows)
    masks = None if all(mask is None for mask in real) else partial(_joined_masks, real, rows, whole)
    return replace(parts[0], rows=whole, real=masks)


def _joined_masks(
    each: Sequence[Callable[[], Tensor | None] | None], rows: Sequence[Rows], whole: Rows
) -> Tensor | None:
    """The mask of parts that were concatenated as a whole, before rows are gathered, from the mask of each."""
    masks = [None if mask is None else mask() for mask in each]
    if all(mask is None for mask in masks):
        return None
    found = []
    for mask, r in zip(masks, rows, strict=True):
        shape = r.order.numbers.shape if isinstance(r, Scattered) else r.g.shape[1:3]
        found.append(
            torch.ones(shape, dtype=torch.bool, device=r.cotangents[0].device) if mask is None else mask.reshape(shape)
        )
    return torch.cat([x.flatten() for x in found]) if isinstance(whole, Scattered) else torch.cat(found, 1)
