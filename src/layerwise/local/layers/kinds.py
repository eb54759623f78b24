"""Kinds of calls: which tensor is a layer's weight and where its rows lie, decided once for all similar calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from layerwise.ops.base import Call
from layerwise.tape.uses import Use

__all__ = ["Kind", "Kinds", "data_places", "tensors_of"]

_MOST = 256  # entries of a cache before it is cleared
_UNSEEN: Any = object()
T = TypeVar("T")


class Kind:
    """A weight on rows of data, and perhaps a bias: their indices among the tensors of a use, and their names.

    elementwise, indexed: as of the weight's slot. whole: whether the parameter itself is used, not a view of it.
    shifted: whether the output has further terms. held: the last views of parameters, by name, of all kinds of a cache.
    """

    def __init__(self, use: Use, weight: int, bias: int | None, whole: bool) -> None:
        self.held: dict[str, _Held] = {}
        names = [next(iter(d.names)) for d in use.used]
        self.weight, self.bias, self.whole = weight, bias, whole
        self.names = (names[weight],) if bias is None else (names[weight], names[bias])
        slot = use.slots[weight]
        self.elementwise, self.indexed = slot.elementwise, slot.indexed
        # elementwise calls may add what no tensor shows: PReLU adds its input's positive part
        self.shifted = slot.elementwise or len(tensors_of(use.call)) > 1 + len(self.names)
        self._views: dict[Any, Any] = {}
        self._known: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """The value of `make()`, cached: it is the same at all calls of this kind."""
        found = self._known.get(key, _UNSEEN)
        return _put(self._known, key, make()) if found is _UNSEEN else found

    def view(self, what: str, x: Tensor, make: Callable[[], Tensor], others: Sequence[Tensor] = ()) -> Tensor:
        """`make(x)`; where an earlier result was a view of a tensor with x's layout, the same view of x.

        others: further tensors that `make` reads; where one shares memory with x, nothing is cached.
        """
        key = (what, x.shape, x.stride(), x.dtype)
        found = self._views.get(key, _UNSEEN)
        if found is None:
            return make()
        if found is not _UNSEEN:
            size, stride, ahead = found
            return x.as_strided(size, stride, x.storage_offset() + ahead)
        out = make()
        storage = x.untyped_storage().data_ptr()
        alone = all(t.untyped_storage().data_ptr() != storage for t in others)
        within = alone and x.numel() > 0 and out.dtype == x.dtype and out.untyped_storage().data_ptr() == storage
        _put(self._views, key, (out.shape, out.stride(), out.storage_offset() - x.storage_offset()) if within else None)
        return out

    def of_parameter(self, name: str, p: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """`make()`, a view of a parameter, or the same tensor as before where the parameter lies where it lay then."""
        found = self.held.get(name)
        if found is not None and found.kind is self and found.parameter is p and found.place == p.data_ptr():
            return found.view
        view = make()
        self.held[name] = _Held(self, p, p.data_ptr(), view)
        return view


class _Held(NamedTuple):
    kind: Kind
    parameter: Tensor
    place: int
    view: Tensor


class Kinds:
    """A cache of kinds, keyed by the function, its options, and each tensor's layout, type and parameter name.

    Not cached: calls with tensors whose values may matter (indices, masks), or which are computed from parameters. A
    view of a parameter is none of these: its layout says which elements it holds.
    """

    def __init__(self) -> None:
        self._known: dict[Any, Kind | None] = {}
        self._held: dict[str, _Held] = {}  # a view of each parameter: more would keep memory that it has left

    def of(
        self,
        use: Use,
        parameters: Mapping[str, Tensor],
        ours: Callable[[Tensor], bool],
        decide: Callable[[], Kind | None],
    ) -> Kind | None:
        """The kind of a use; None where it has no weight on rows. ours: whether the optimizer moves a parameter."""
        key = _signature(use, parameters, ours)
        if key is None:
            return decide()
        found = self._known.get(key, _UNSEEN)
        if found is not _UNSEEN:
            return found
        if (kind := decide()) is not None:
            kind.held = self._held
        _put(self._known, key, kind)
        return kind


def tensors_of(call: Call) -> list[Tensor]:
    """The tensors among a call's arguments."""
    found: list[Tensor] = []
    stack = [*call.args, *call.kwargs.values()]
    while stack:
        value = stack.pop()
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            stack += value
    return found


def data_places(call: Call, used: Sequence[Tensor]) -> list[int | str] | None:
    """Where the tensors of `tensors_of` that are not used ones are among the arguments; None where some are nested."""
    every: list[tuple[int | str, Any]] = [*enumerate(call.args), *call.kwargs.items()]
    if any(isinstance(value, (list, tuple)) for _, value in every):
        return None
    return [at for at, t in reversed(every) if isinstance(t, Tensor) and not any(t is u for u in used)]


def _put(memo: dict[Any, Any], key: Any, value: Any) -> Any:
    if len(memo) >= _MOST:
        memo.clear()
    memo[key] = value
    return value


def _signature(use: Use, parameters: Mapping[str, Tensor], ours: Callable[[Tensor], bool]) -> Any:
    """The cache key of a use; None where values may matter."""
    used: dict[int, Any] = {}
    for tensor, names in use.used:
        if len(names) != 1:
            return None
        if tensor.is_leaf:
            used[id(tensor)] = (*names, ours(tensor))
            continue
        (name,) = names
        p = parameters[name]
        if tensor._base is not p:
            return None
        used[id(tensor)] = (name, ours(p), p.shape, p.stride(), tensor.storage_offset() - p.storage_offset())
    try:
        call = use.call
        named = [(key, _described(value, used)) for key, value in call.kwargs.items()] if call.kwargs else ()
        return call.func, call.out_shape, *[_described(value, used) for value in call.args], *named
    except _Undescribed:
        return None


class _Undescribed(Exception):
    """Raised for an argument whose values may matter."""


def _described(value: Any, used: dict[int, Any]) -> Any:
    """An argument in a cache key: layout and type of a tensor; any other value with its type."""
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or not value.dtype.is_floating_point:
            raise _Undescribed
        return value.shape, value.stride(), value.dtype, value.device, used.get(id(value))
    if isinstance(value, (list, tuple)):
        return type(value), *(_described(v, used) for v in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return type(value), value
    raise _Undescribed
