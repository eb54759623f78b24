"""Writes in place onto tensors that the tape knows: weights assembled element by element, and batches made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerwise import ops
from layerwise.errors import UnsupportedCall
from layerwise.tape.recorded_call import Known, is_view
from layerwise.tape.uses import Derived, Use

__all__ = ["Write", "assembled", "forget_written", "preserve"]


class Write(NamedTuple):
    """A call of parameters with data that writes onto its first argument, as a call that writes onto a copy of it.

    The output then has an edge of its own, and a derived tensor stays what it was. target: what to copy it back to;
    None: the call is as it was. derived: whether that is a derived tensor.
    """

    func: Any
    args: Any
    used: list[Derived]
    data: list[Tensor]
    target: Tensor | None = None
    derived: bool = False

    @classmethod
    def of(cls, known: Known, func: Any, args: Any, used: list[Derived], data: list[Tensor]) -> Write:
        """The call as it is, unless it writes onto a view or a derived tensor."""
        if not (ops.writes_first(func) and args and isinstance(args[0], Tensor)):
            return cls(func, args, used, data)
        target = args[0]
        kind = known.get(id(target))
        if type(kind) is Derived:
            if target._base is not None:  # the rest of what it is a view of goes through the call too
                func, target = _onto(func, target), target._base
            copy = target.clone()
            known[id(copy)] = own = Derived(copy, kind.names | getattr(known.get(id(target)), "names", kind.names))
            return cls(func, (copy, *args[1:]), [own if d is kind else d for d in used], data, target, derived=True)
        if not is_view(target):
            return cls(func, args, used, data)
        copy = target.clone()
        return cls(func, (copy, *args[1:]), used, [copy if t is target else t for t in data], target)

    def back(self, result: Tensor) -> None:
        """Copy the result back to the target."""
        assert self.target is not None
        if self.derived:
            self.target.detach_()  # all of it is the result's: else torch keeps a path, of zeros, to its parameters
        self.target.copy_(result)


def _onto(func: Callable[..., Any], view: Tensor) -> Callable[..., Any]:
    """A call that writes onto a view, as one that writes onto the tensor that it is a view of."""
    whole = view._base
    assert whole is not None
    size, stride, offset = view.shape, view.stride(), view.storage_offset() - whole.storage_offset()
    laid = whole.stride()

    @wraps(func)
    def onto(base: Tensor, *args: Any, **kwargs: Any) -> None:
        if base.stride() != laid:
            raise UnsupportedCall(
                f"{func.__name__} writes onto a part of a tensor of strides {laid}, computed from parameters, whose "
                "copy is laid out in another way; make it contiguous first"
            )
        func(base.as_strided(size, stride, base.storage_offset() + offset), *args, **kwargs)

    return onto


def assembled(known: Known, target: Tensor, names: frozenset[str]) -> None:
    """Note that tensors derived from parameters were written onto a tensor, so that it and its views are derived too.

    names: of these parameters.
    """
    tensors = [target] if target._base is None else [target, target._base]
    tensors += [kind if isinstance(kind, Tensor) else kind.tensor for _, kind in _alike(known, target)]
    for tensor in tensors:
        if tensor.requires_grad and not tensor.is_leaf:
            kind = known.get(id(tensor))
            known[id(tensor)] = Derived(tensor, names | kind.names if type(kind) is Derived else names)


def forget_written(known: Known, target: Tensor) -> None:
    """Make a constant or derived tensor, onto which data was written, and all its views data."""
    if id(target) in known:
        for key, _ in list(_alike(known, target)):
            del known[key]


def preserve(uses: Iterable[Use], target: Tensor) -> None:
    """Before a write onto a derived tensor: give the uses of it, or of its views, copies of what they used."""
    storage = _storage(target)
    for use in uses:
        use.exchange(lambda t: not t.is_leaf and storage is not None and _storage(t) == storage)


def _alike(known: Known, target: Tensor) -> Iterator[tuple[int, Any]]:
    """The constants and derived tensors in the memory of a tensor."""
    storage = _storage(target)
    for key, kind in list(known.items()):
        tensor = kind if isinstance(kind, Tensor) else kind.tensor
        if storage is not None and _storage(tensor) == storage:
            yield key, kind


def _storage(tensor: Any) -> int | None:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else None
