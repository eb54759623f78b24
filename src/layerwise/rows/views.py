"""Views of a parameter: the same elements in another arrangement, with maps between the two."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import torch
from torch import Tensor

__all__ = ["Map", "view_maps"]

Map = Callable[[Tensor], Tensor]


def view_maps(used: Tensor, parameter: Tensor) -> tuple[Map, Map] | None:
    """Maps `[..., *used.shape] -> [..., *parameter.shape]` and back where `used` is a strided view of the parameter.

    Of a view of some elements the first is zero at the others. None where `used` is no view, or shows an element twice.
    """
    if used is parameter:
        return _identity, _identity
    if used._base is not parameter or used.dtype != parameter.dtype:
        return None
    if used.numel() == parameter.numel():
        if used.is_contiguous() and parameter.is_contiguous():
            ours, theirs = parameter.shape, used.shape  # the maps outlive the batch: no tensor in them
            return lambda w: w.reshape((*w.shape[: w.dim() - len(theirs)], *ours)), lambda p: p.reshape(theirs)
        if (found := _permuted(used, parameter)) is not None:
            return found
    return _strided(used, parameter)


def _permuted(used: Tensor, parameter: Tensor) -> tuple[Map, Map] | None:
    """The maps of a view with the parameter's axes in another order."""
    if not used.dim() == parameter.dim() <= 5:
        return None
    for order in permutations(range(used.dim())):
        permuted = parameter.permute(order)
        if permuted.shape == used.shape and permuted.stride() == used.stride():
            inverse = [order.index(i) for i in range(len(order))]

            def to_parameter(w: Tensor, inverse: list[int] = inverse) -> Tensor:
                lead = w.dim() - len(inverse)
                return w.permute(*range(lead), *(lead + i for i in inverse))

            return to_parameter, lambda p, order=order: p.permute(order)
    return None


def _strided(used: Tensor, parameter: Tensor) -> tuple[Map, Map] | None:
    """The maps of any view that shows each element once: a chunk, a slice, a diagonal."""
    if not (_injective(used) and _injective(parameter)) or used.layout is not torch.strided:
        return None
    ours, theirs = (tuple(parameter.shape), parameter.stride()), (tuple(used.shape), used.stride())
    start = int(used.storage_offset()) - int(parameter.storage_offset())
    span = 1 + sum((size - 1) * stride for size, stride in zip(*ours, strict=True)) if parameter.numel() else 0

    def shown(memory: Tensor, view: tuple[tuple[int, ...], tuple[int, ...]], offset: int) -> Tensor:
        lead = memory.shape[:-1]
        size, stride = (*lead, *view[0]), (*memory.stride()[:-1], *view[1])
        return memory.as_strided(size, stride, int(memory.storage_offset()) + offset)

    def to_parameter(w: Tensor) -> Tensor:
        memory = w.new_zeros(*w.shape[: w.dim() - len(theirs[0])], span)
        shown(memory, theirs, start).copy_(w)
        return shown(memory, ours, 0)

    def from_parameter(p: Tensor) -> Tensor:
        memory = p.new_zeros(span)
        shown(memory, ours, 0).copy_(p)
        return shown(memory, theirs, start)

    return to_parameter, from_parameter


def _injective(x: Tensor) -> bool:
    """Whether no two elements of a strided tensor share memory (each axis steps over all smaller ones)."""
    reach = 0
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if stride <= reach:
            return False
        reach += stride * (size - 1)
    return True


def _identity(x: Tensor) -> Tensor:
    return x
