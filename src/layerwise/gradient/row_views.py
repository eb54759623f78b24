"""Rows that are views of a use's input and cotangent, found once for each layout of a call and made again from numbers.

What a call is, its slots, and how they lay out rows depend on the call's function, the layouts of its tensors and its
other arguments alone. A plan holds the resulting views as sizes, strides and offsets; it is looked up by all of these,
so a change of any of them makes another plan. An input that is computed first (normalised) is computed from the call,
by what its slot says; other calls whose rows are no views (windows) have no plan.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeGuard, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from layerwise.ops.base import Call, Slot
from layerwise.rows.base import RowNumbers, Rows, Samples
from layerwise.rows.layout import MatrixLayout
from layerwise.tape.uses import Use

__all__ = ["PlannedRows", "Remembered", "layout_of_call", "layout_of_rows"]

_TENSORS = {Tensor, Parameter}
_SIMPLE = (int, float, str, type(None))
_MOST = 4096  # entries of a memory
T = TypeVar("T")


class StridedView(NamedTuple):
    """A view of a tensor as numbers; offset: from the tensor's first element."""

    size: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, view: Tensor, base: Tensor) -> StridedView | None:
        """The view that shares memory with a tensor of the same type; None for any other."""
        same = view.dtype == base.dtype and view.untyped_storage()._cdata == base.untyped_storage()._cdata
        same = same and (view.is_conj(), view.is_neg()) == (base.is_conj(), base.is_neg())
        offset = view.storage_offset() - base.storage_offset()
        return cls(tuple(view.shape), view.stride(), int(offset)) if same and view.numel() else None

    def on(self, base: Tensor) -> Tensor:
        """The view of another tensor with the same layout."""
        return base.as_strided(self.size, self.strides, base.storage_offset() + self.offset)


class PlannedRows(NamedTuple):
    """The rows of one slot: its input as a view of an argument of the call, its cotangents as a view of the output's.

    source: the number of the argument, or what computes a contiguous tensor from the call in its place; None where the
    input is the constant 1. laid: the rows' matrix in the parameter. view: the layout of all of the parameter.
    """

    source: int | Callable[[Call], Tensor] | None
    input: StridedView | None
    output: StridedView
    size_in: int
    laid: MatrixLayout
    view: MatrixLayout

    @classmethod
    def of(cls, use: Use, slot: Slot, g: Tensor, rows: Rows, laid: MatrixLayout) -> PlannedRows | None:
        """The plan of rows that were made by the slot; None where they are no views."""
        output, whole = StridedView.of(rows.g, g), MatrixLayout.whole(laid.shape)
        if output is None or type(rows) is not Rows:
            return None
        if rows.a is None:
            return cls(None, None, output, rows.size_in, laid, whole)
        if slot.computed is not None:
            computed = rows.a if rows.a._base is None else rows.a._base
            view = StridedView.of(rows.a, computed)
            same = view is not None and computed.is_contiguous() and computed.numel() == use.call.out_shape.numel()
            return cls(slot.computed, view, output, rows.size_in, laid, whole) if same else None
        views = [
            (source, view) for source, arg in enumerate(_arguments(use))
            if isinstance(arg, Tensor) and (view := StridedView.of(rows.a, arg)) is not None
        ]  # fmt: skip
        if (
            len(views) != 1 or _arguments(use)[views[0][0]].requires_grad
        ):  # arguments that share memory here may not do so in another call of this layout
            return None
        source, found = views[0]
        return cls(source, found, output, rows.size_in, laid, whole)

    def rows(self, use: Use, g: Tensor) -> Rows:
        """The rows of a use of the same layout."""
        if self.source is None or self.input is None:
            a = None
        elif isinstance(self.source, int):
            a = self.input.on(_arguments(use)[self.source])
        else:
            a = self.input.on(self.source(use.call).contiguous())
        return Rows(a, self.output.on(g), self.size_in)


class Remembered(Generic[T]):
    """What follows from a layout, by all that it follows from: nothing in it changes a result."""

    def __init__(self) -> None:
        self._found: dict[Hashable, T] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._found

    def get(self, key: Hashable) -> T | None:
        """What was entered."""
        return self._found.get(key)

    def enter(self, key: Hashable, found: T) -> None:
        """Remember it; the oldest entry makes room."""
        if len(self._found) >= _MOST:
            del self._found[next(iter(self._found))]
        self._found[key] = found


def layout_of_call(
    use: Use, samples: Samples | RowNumbers | None, parameters: Mapping[str, Tensor], unstructured: Collection[str] = ()
) -> tuple[Any, ...] | None:
    """All that the slots of a use depend on, as a key; None where it reads more than whole parameters of its own.

    samples: where they lie in its output. unstructured: parameters whose rows need no sample structure.
    """
    if isinstance(samples, RowNumbers) or type(use) is not Use:  # others stand for more than their call
        return None
    places: dict[int, tuple[int, bool]] = {}
    for tensor, names in use.used:
        (name, *others) = names
        if others or parameters[name] is not tensor:
            return None
        places[id(tensor)] = len(places), name in unstructured
    found: list[Any] = [use.call.func, use.call.out_shape, samples, *use.call.kwargs]
    for arg in _arguments(use):
        if _plain(arg):
            place = places.get(id(arg))
            found.append((arg.shape, arg.stride(), arg.dtype, arg.requires_grad, place))
        elif isinstance(arg, _SIMPLE):
            found.append(arg)
        elif isinstance(arg, (tuple, list)) and all(isinstance(x, int) for x in arg):
            found.append(tuple(arg))
        else:
            return None
    return tuple(found) if len(places) == len(use.used) else None


def layout_of_rows(call: tuple[Any, ...] | None, g: Tensor) -> Hashable | None:
    """The key of a call together with the layout of its cotangents `[V, *out_shape]`."""
    return None if call is None or not _plain(g) else (call, g.shape, g.stride(), g.dtype)


def _plain(x: Any) -> TypeGuard[Tensor]:
    """Whether this is a strided tensor of torch's own types, whose views are numbers."""
    return type(x) in _TENSORS and x.layout is torch.strided and not (x.is_conj() or x.is_neg())


def _arguments(use: Use) -> Sequence[Any]:
    call = use.call
    return (*call.args, *call.kwargs.values()) if call.kwargs else call.args
