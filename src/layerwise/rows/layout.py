"""`MatrixLayout`: where the elements of a matrix `[K,O,I]` lie in a parameter, as numbers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["LONG_SIDE", "FactorForm", "MatrixLayout", "dense_layout", "dense_sides", "grouped", "rest_of"]

LONG_SIDE = 2**14  # of a matrix of per-sample gradients, beyond which its factor is a diagonal


@dataclass(frozen=True, eq=False)
class _Places:
    """A long index, equal by value; its repr is short and differs where two indices do."""

    values: Tensor
    copies: dict[torch.device, Tensor] = field(default_factory=dict)

    def on(self, device: torch.device) -> Tensor:
        """The index on a device, copied there once."""
        if device == self.values.device:
            return self.values
        if device not in self.copies:
            self.copies[device] = self.values.to(device)
        return self.copies[device]

    def __getstate__(self) -> dict[str, Any]:
        return {"values": self.values, "copies": {}}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Places) and torch.equal(self.values, other.values)

    def __hash__(self) -> int:
        return hash(self.values.shape)

    def __repr__(self) -> str:
        return hashlib.sha256(self.values.numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class MatrixLayout:
    """How a parameter, or a slice of it, is a matrix `[K,O,I]` (or a view of other axes): a value, which holds no data.

    shape: of the parameter; size: of the matrix. strides, offset: its steps through the parameter's elements in their
    own order, 0 along an axis of size 1; or index: the element at each place, int64 of that size, on the CPU.
    bias: the inputs are the constant 1. partner: the bias that all uses add to their rows, where known. Neither of the
    two counts in `==`.
    """

    shape: tuple[int, ...]
    size: tuple[int, ...]
    strides: tuple[int, ...] | None
    offset: int = 0
    index: _Places | None = None
    bias: bool = field(default=False, compare=False)
    partner: str | None = field(default=None, compare=False)

    @classmethod
    def strided(
        cls, shape: Sequence[int], size: Sequence[int], strides: Sequence[int], offset: int = 0, bias: bool = False
    ) -> MatrixLayout:
        """The layout of a view with strides and an offset, of a contiguous parameter."""
        steps = tuple(s if n > 1 else 0 for s, n in zip(strides, size, strict=True))
        return cls(tuple(shape), tuple(size), steps if 0 not in size else (0,) * len(steps), offset, None, bias)

    @classmethod
    def whole(
        cls, shape: Sequence[int], size: Sequence[int] | None = None, axes: Sequence[int] | None = None,
        bias: bool = False,
    ) -> MatrixLayout:  # fmt: skip
        """The layout of all elements in their own order; axes: the order that the axes of the matrix have there."""
        return _whole(tuple(shape), tuple(shape if size is None else size), axes and tuple(axes), bias)

    @classmethod
    def at(cls, shape: Sequence[int], places: Tensor, bias: bool = False) -> MatrixLayout:
        """The layout of the elements at given places (int64), as strides where it has such."""
        size, total = tuple(places.shape), math.prod(shape)
        if places.numel():
            first = int(places.flatten()[0])
            steps = [int(places.select(d, 1).flatten()[0]) - first if n > 1 else 0 for d, n in enumerate(size)]
            last = first + sum((n - 1) * step for n, step in zip(size, steps, strict=True))
            if min(steps, default=0) >= 0 and last < total and _stepped(total, size, steps, first).equal(places):
                return cls.strided(shape, size, steps, first, bias)
        return cls(tuple(shape), size, None, 0, _Places(places.contiguous().cpu()), bias)

    @classmethod
    def of_view(cls, used: Tensor, parameter: Tensor) -> MatrixLayout | None:
        """The layout of a strided view of a parameter; None where `used` is none, or shows an element twice."""
        if used is parameter:
            return cls.whole(parameter.shape)
        if used._base is not parameter or used.dtype != parameter.dtype or used.layout is not torch.strided:
            return None
        if not (_injective(used) and (parameter.is_contiguous() or _injective(parameter))):
            return None
        offset = int(used.storage_offset()) - int(parameter.storage_offset())
        if parameter.is_contiguous():
            return cls.strided(parameter.shape, used.shape, used.stride(), offset)
        memory = torch.zeros(1 + sum((n - 1) * s for n, s in zip(parameter.shape, parameter.stride(), strict=True)),
                             dtype=torch.int64)  # fmt: skip
        elements = torch.arange(parameter.numel()).reshape(parameter.shape)
        memory.as_strided(parameter.shape, parameter.stride()).copy_(elements)
        return cls.at(parameter.shape, memory.as_strided(used.shape, used.stride(), offset))

    def then(self, matrix: Callable[[Tensor], Tensor], bias: bool = False) -> MatrixLayout:
        """The layout of what a function of this view gives: elements of it in another arrangement."""
        if self.strides is not None:
            memory = torch.empty(self.size if self._in_order else math.prod(self.shape), device="meta")
            found = matrix(memory if self._in_order else memory.as_strided(self.size, self.strides, self.offset))
            if found is memory or found._base is memory:
                return self.strided(self.shape, found.shape, found.stride(), int(found.storage_offset()), bias)
        return self.at(self.shape, matrix(self.places()), bias)

    def places(self) -> Tensor:
        """The element at each place of the matrix, int64, on the CPU."""
        if self.index is not None:
            return self.index.values
        assert self.strides is not None
        return _stepped(math.prod(self.shape), self.size, self.strides, self.offset)

    @cached_property
    def axes(self) -> tuple[int, ...] | None:
        """The order that the matrix's axes have in the parameter; None where it is no rearrangement of all elements."""
        if self.strides is None or math.prod(self.size) != math.prod(self.shape):
            return None
        steps = self.strides
        longest = iter(sorted((d for d, n in enumerate(self.size) if n > 1), key=lambda d: -steps[d]))
        axes = tuple(next(longest) if n > 1 else d for d, n in enumerate(self.size))
        return axes if MatrixLayout.whole(self.shape, self.size, axes).strides == steps else None

    @cached_property
    def _in_order(self) -> bool:
        """Whether the matrix holds all elements in the parameter's own order."""
        return self.axes == tuple(range(len(self.size)))

    def fold(self, w: Tensor) -> Tensor:
        """`[..., *size]` in the parameter's shape, `[..., *shape]`, zero outside the matrix; a view where it can be."""
        if self._in_order and self.size == self.shape:
            return w
        lead = w.shape[: w.dim() - len(self.size)]
        if self.axes is not None:
            if not self._in_order:
                w = w.permute(*range(len(lead)), *(len(lead) + a for a in self.axes))
            return w.reshape((*lead, *self.shape))
        memory = w.new_zeros((*lead, *self.shape))
        self.write(memory, w)
        return memory

    def write(self, p: Tensor, w: Tensor, add: bool = False) -> None:
        """Write `[..., *size]` to its places in a contiguous `[..., *shape]`, or add it to what is there."""
        if self.strides is None:
            assert self.index is not None
            flat = p.view((*p.shape[: p.dim() - len(self.shape)], -1))
            put = flat.index_add_ if add else flat.index_copy_
            put(-1, self.index.on(w.device).flatten(), w.flatten(flat.dim() - 1))
        else:
            there = self.matrix(p)
            (there.add_ if add else there.copy_)(w)

    def matrix(self, p: Tensor) -> Tensor:
        """Tensors `[..., *shape]` as matrices `[..., *size]`; the left inverse of `fold`, a view where it can be."""
        lead = p.shape[: p.dim() - len(self.shape)]
        if self.axes is not None:
            if self._in_order:
                return p.reshape((*lead, *self.size))
            back = [len(lead) + self.axes.index(i) for i in range(len(self.axes))]
            return p.reshape((*lead, *(self.size[a] for a in self.axes))).permute(*range(len(lead)), *back)
        flat = p.reshape((*lead, math.prod(self.shape)))
        if self.strides is None:
            assert self.index is not None
            return flat[..., self.index.on(p.device)]
        *outer, step = flat.stride()
        strides = (*outer, *(step * s for s in self.strides))
        return flat.as_strided((*lead, *self.size), strides, int(flat.storage_offset()) + step * self.offset)


@lru_cache(maxsize=2**12)
def _whole(
    shape: tuple[int, ...], size: tuple[int, ...], axes: tuple[int, ...] | None, bias: bool
) -> MatrixLayout:  # fmt: skip
    steps, step = [0] * len(size), 1
    for axis in reversed(range(len(size)) if axes is None else axes):
        steps[axis], step = step, step * size[axis]
    return MatrixLayout.strided(shape, size, steps, 0, bias)


class FactorForm(NamedTuple):
    """How a parameter's gradient gives Kronecker factors, one pair for each of its matrices.

    form: "rows", the inputs and cotangents of its uses as one matrix; "slices", those of uses that read disjoint
    slices of it; "gradients", the gradients of single samples.
    """

    form: str
    matrices: tuple[MatrixLayout, ...]


def grouped(layouts: Sequence[MatrixLayout]) -> list[list[int]] | None:
    """Which of several layouts of a parameter are the same; None where two that differ share an element."""
    groups: dict[MatrixLayout, list[int]] = {}
    for i, layout in enumerate(layouts):
        groups.setdefault(layout, []).append(i)
    if len(groups) > 1:
        shown = torch.cat([layout.places().flatten() for layout in groups])
        if len(shown.unique()) < len(shown):
            return None
    return list(groups.values())


def rest_of(layouts: Sequence[MatrixLayout]) -> MatrixLayout | None:
    """The elements of a parameter that stand in none of the layouts, as `[1,1,I]`; None where there are none."""
    shape = layouts[0].shape
    missing = torch.ones(math.prod(shape), dtype=torch.bool)
    for layout in layouts:
        missing[layout.places().flatten()] = False
    return MatrixLayout.at(shape, missing.nonzero()[:, 0].view(1, 1, -1)) if missing.any() else None


def dense_sides(shape: torch.Size) -> tuple[int, int, bool]:
    """(O, I, turned) of `dense_layout`: whether I runs over the first axis."""
    rows = shape[0] if shape else 1
    columns = shape[1:].numel() if shape else 1
    if rows > max(columns, LONG_SIDE):
        return columns, rows, True
    return rows, columns, False


def dense_layout(shape: torch.Size) -> MatrixLayout:
    """A parameter as one matrix `[1,O,I]`, the first axis by the rest; a vector is a column.

    A matrix with a side over `LONG_SIDE` has the longer one for I.
    """
    o, i, turned = dense_sides(shape)
    return MatrixLayout.whole(shape, (1, o, i), (0, 2, 1) if turned else None, i == 1)


def _stepped(total: int, size: Sequence[int], strides: Sequence[int], offset: int) -> Tensor:
    return torch.arange(total).as_strided(size, strides, offset)


def _injective(x: Tensor) -> bool:
    """Whether no two places of a strided tensor share memory (each axis steps over all that lies within it)."""
    reach = 0
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if stride <= reach:
            return False
        reach += stride * (size - 1)
    return True
