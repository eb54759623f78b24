"""Views of a parameter: the same elements in another arrangement, with maps between the two."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

from torch import Tensor

__all__ = ["Map", "view_maps"]

Map = Callable[[Tensor], Tensor]


def view_maps(used: Tensor, parameter: Tensor) -> tuple[Map, Map] | None:
    """Maps `[..., *used.shape] -> [..., *parameter.shape]` and back where one is a full view of the other.

    None where `used` is no rearrangement of the parameter's elements.
    """
    if used is parameter:
        return _identity, _identity
    if used._base is not parameter or used.numel() != parameter.numel() or used.dtype != parameter.dtype:
        return None
    if used.is_contiguous() and parameter.is_contiguous():
        ours, theirs = parameter.shape, used.shape  # the maps outlive the batch: no tensor in them
        return lambda w: w.reshape(*w.shape[: w.dim() - len(theirs)], *ours), lambda p: p.reshape(theirs)
    if used.dim() == parameter.dim() <= 5:
        for order in permutations(range(used.dim())):
            permuted = parameter.permute(order)
            if permuted.shape == used.shape and permuted.stride() == used.stride():
                inverse = [order.index(i) for i in range(len(order))]

                def to_parameter(w: Tensor, inverse: list[int] = inverse) -> Tensor:
                    lead = w.dim() - len(inverse)
                    return w.permute(*range(lead), *(lead + i for i in inverse))

                return to_parameter, lambda p, order=order: p.permute(order)
    return None


def _identity(x: Tensor) -> Tensor:
    return x
