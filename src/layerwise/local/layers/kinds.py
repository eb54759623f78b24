"""What a call is to local learning, decided once for all calls that are alike: its weight, and where its rows lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from layerwise.ops.base import Call
from layerwise.tape.uses import Use

__all__ = ["Kind", "Kinds", "tensors_of"]

_MOST = 256  # what one memo remembers, before it starts anew
_UNSEEN: Any = object()
T = TypeVar("T")


class Kind:
    """A weight on rows of data, and perhaps a bias: their places among the tensors that a use uses, and their names.

    elementwise, indexed: as of the weight's slot. whole: whether the parameter itself is used, not a view of it.
    shifted: whether the output has further terms.
    """

    def __init__(self, use: Use, weight: int, bias: int | None, whole: bool) -> None:
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
        """What `make` gives, for something that is the same at all calls of this kind."""
        found = self._known.get(key, _UNSEEN)
        return _put(self._known, key, make()) if found is _UNSEEN else found

    def view(self, what: str, x: Tensor, make: Callable[[], Tensor], others: Sequence[Tensor] = ()) -> Tensor:
        """What `make` makes of `x`; where that was a view of a tensor laid out as x is, the same view of x.

        others: further tensors that `make` reads; where one shares memory with x, nothing is remembered.
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


class Kinds:
    """The kinds of calls that were seen, by all that the decision reads.

    That is the function, its options, and of each tensor the layout, the type and, of a parameter, the name. Calls with
    tensors of other than real floating-point numbers (indices, masks), whose values may count, or with views of
    parameters, are decided at every batch.
    """

    def __init__(self) -> None:
        self._known: dict[Any, Kind | None] = {}

    def of(self, use: Use, ours: Callable[[Tensor], bool], decide: Callable[[], Kind | None]) -> Kind | None:
        """The kind of a use; None where it has no weight on rows. ours: whether a parameter is to be moved."""
        key = _signature(use, ours)
        if key is None:
            return decide()
        found = self._known.get(key, _UNSEEN)
        return _put(self._known, key, decide()) if found is _UNSEEN else found


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


def _put(memo: dict[Any, Any], key: Any, value: Any) -> Any:
    if len(memo) >= _MOST:
        memo.clear()
    memo[key] = value
    return value


def _signature(use: Use, ours: Callable[[Tensor], bool]) -> Any:
    """All that a kind is decided by; None where values may count."""
    used: dict[int, Any] = {}
    for tensor, names in use.used:
        if len(names) != 1 or not tensor.is_leaf:
            return None
        used[id(tensor)] = (*names, ours(tensor))
    try:
        call = use.call
        named = [(key, _described(value, used)) for key, value in call.kwargs.items()]
        return call.func, call.out_shape, *(_described(value, used) for value in call.args), *named
    except _Undescribed:
        return None


class _Undescribed(Exception):
    """An argument whose values may count."""


def _described(value: Any, used: dict[int, Any]) -> Any:
    """An argument, for a signature: layout and type of a tensor, other values as they are, with their type."""
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or not value.dtype.is_floating_point:
            raise _Undescribed
        return value.shape, value.stride(), value.dtype, value.device, used.get(id(value))
    if isinstance(value, (list, tuple)):
        return type(value), *(_described(v, used) for v in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return type(value), value
    raise _Undescribed
