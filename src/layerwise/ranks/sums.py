"""Values that add up over batches and ranks: tensors, and what is made of several and takes a tensor's place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = ["Described", "Kind", "Sum", "describe", "rebuild", "tensors_of"]

Described = Any  # picklable; its repr differs where two values have no sum


@runtime_checkable
class Sum(Protocol):
    """A value made of several tensors. Adding two adds theirs."""

    def tensors(self) -> list[Tensor]:
        """Those that add up over ranks, in a fixed order."""
        ...

    def replaced(self, tensors: Sequence[Tensor]) -> Any:
        """The same with other tensors in their place."""
        ...

    def described(self) -> Described:
        """Everything else, to be sent to a rank that has no such value; it has `rebuild(tensors)` and `kinds`."""
        ...


class Kind(NamedTuple):
    """A tensor's shape and type."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __repr__(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}"

    @classmethod
    def of(cls, t: Tensor) -> Kind:
        """That of a tensor."""
        return cls(tuple(t.shape), t.dtype)


class Plain(NamedTuple):
    """A tensor as a value."""

    kinds: tuple[Kind, ...]

    def rebuild(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensor itself."""
        return tensors[0]


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of a value."""
    return [value] if isinstance(value, Tensor) else value.tensors()


def describe(value: Any) -> Described:
    """A value without its numbers."""
    return Plain((Kind.of(value),)) if isinstance(value, Tensor) else value.described()


def rebuild(described: Described, tensors: Sequence[Tensor] | None = None, device: Any = None) -> Any:
    """A value from its description, and its tensors or zeros."""
    if tensors is None:
        tensors = [torch.zeros(kind.shape, dtype=kind.dtype, device=device) for kind in described.kinds]
    return described.rebuild(tensors)
