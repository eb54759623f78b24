"""Values that add up over batches and ranks: tensors, and what is made of several and takes a tensor's place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from layerwise.ranks.group import Ranks

__all__ = ["Sum", "TensorSpec", "all_reduced", "describe", "summed", "tensors_of", "zeros_like"]

_MESSAGE = 2**26  # bytes sent at once, which are held twice meanwhile


class TensorSpec(NamedTuple):
    """A tensor's shape and type."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __repr__(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}"

    @classmethod
    def of(cls, t: Tensor) -> TensorSpec:
        """The shape and type of a tensor."""
        return cls(tuple(t.shape), t.dtype)


@runtime_checkable
class Sum(Protocol):
    """A value made of several tensors. Adding two values adds their tensors."""

    def tensors(self) -> list[Any]:
        """The tensors that add up over ranks, in a fixed order."""
        ...

    def replaced(self, tensors: Sequence[Any]) -> Any:
        """The same value with other tensors in their place."""
        ...

    def described(self) -> Any:
        """The value with a `TensorSpec` for each tensor: picklable, and its repr differs where two have no sum."""
        ...


def tensors_of(value: Any) -> list[Any]:
    """The tensors of a value, or the specs of a described one."""
    return [value] if isinstance(value, Tensor | TensorSpec) else value.tensors()


def describe(value: Any) -> Any:
    """A value without its numbers, to be sent to a rank that has no such value."""
    return TensorSpec.of(value) if isinstance(value, Tensor) else value.described()


def zeros_like(described: Any, device: torch.device) -> Any:
    """A value of zeros from its description."""
    zeros = [torch.zeros(spec.shape, dtype=spec.dtype, device=device) for spec in tensors_of(described)]
    return zeros[0] if isinstance(described, TensorSpec) else described.replaced(zeros)


def all_reduced(ranks: Ranks, values: Sequence[Any]) -> list[Any]:
    """Each value with its tensors summed over ranks, which hold the same kinds of values in the same order."""
    each = [tensors_of(value) for value in values]
    sums = iter(summed(ranks, [t for tensors in each for t in tensors]))
    totals = [[next(sums) for _ in tensors] for tensors in each]
    return [
        total[0] if isinstance(value, Tensor) else value.replaced(total)
        for value, total in zip(values, totals, strict=True)
    ]


def summed(ranks: Ranks, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sums over ranks in memory of their own, sent in messages of bounded size."""
    if ranks.size == 1:
        return list(tensors)
    out: list[Tensor] = []
    message: list[Tensor] = []
    for i, t in enumerate(tensors):
        message.append(t)
        if i + 1 == len(tensors) or sum(p.numel() * p.element_size() for p in message) >= _MESSAGE:
            # clones: parts of one message would keep all of it, and lie in memory otherwise than a loaded state
            out += [s.clone() for s in ranks.sum(message)]
            message = []
    return out
