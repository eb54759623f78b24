"""Reading and rewriting the arguments of a recorded call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from layerwise.ops.base import Call

__all__ = ["any_complex", "bind", "count", "expanded", "plain", "replace", "writes_first"]

_INPLACE_DUNDERS = frozenset(
    f"__{name}__" for name in ("iadd", "isub", "imul", "itruediv", "idiv", "ipow", "imod", "setitem")
)


def bind(call: Call, names: tuple[str, ...], defaults: tuple[Any, ...]) -> list[Any] | None:
    """The call's arguments in the order of `names`; None where it has one that is not named.

    `defaults` has an entry for every name (None for those without a default).
    """
    given = len(call.args)
    if given > len(names):
        return None
    values = [*call.args, *defaults[given:]]
    for key, value in call.kwargs.items():
        if key in names:
            values[names.index(key)] = value
        elif key != "out" or value is not None:
            return None
    return values


def count(value: Any, tensor: Tensor) -> int:
    """How often `tensor` itself occurs in nested arguments."""
    found, left = 0, [value]
    while left:
        value = left.pop()
        if value is tensor:
            found += 1
        elif isinstance(value, (tuple, list)):
            left += value
        elif isinstance(value, dict):
            left += value.values()
    return found


def replace(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Nested arguments with `change` applied to every tensor."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        items = [replace(v, change) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {k: replace(v, change) for k, v in value.items()}
    return value


@lru_cache(maxsize=2**12)
def writes_first(func: Callable[..., Any]) -> bool:
    """Whether a torch call overwrites its first argument (`add_`, `+=`), by torch's naming rule."""
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name in _INPLACE_DUNDERS


def expanded(used: Tensor) -> tuple[Tensor, tuple[int, ...]] | None:
    """The tensor that `used` is an `expand` of, with `used`'s shape less the repeats; else None.

    All repeats of an element share its memory, so a gradient may be summed over them.
    """
    base = used._base
    if base is None or used.is_leaf or 0 not in used.stride():
        return None
    shape = tuple(1 if step == 0 else size for size, step in zip(used.shape, used.stride(), strict=True))
    once = used.detach().as_strided(shape, used.stride(), used.storage_offset())
    same = once.numel() == base.numel() and once.storage_offset() == base.storage_offset()
    if same and once.is_contiguous() and base.is_contiguous() and once.dtype == base.dtype:
        return base, shape
    return None


def any_complex(values: Iterable[Any]) -> bool:
    """Whether complex tensors are among arguments; the row forms are written for real ones."""
    for value in values:
        if isinstance(value, Tensor):
            if value.is_complex():
                return True
        elif isinstance(value, (tuple, list)) and any_complex(value):
            return True
    return False


def plain(tensor: Tensor) -> bool:
    """Whether a tensor is dense, strided and real, as the row forms need it."""
    return tensor.layout is torch.strided and tensor.is_floating_point()
