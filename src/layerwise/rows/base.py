"""The rows of a parameter's uses: inputs `[N,T,K,I]` and cotangents `[V,N,T,K,O]` of the linear map Z = W A."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

__all__ = ["RowNumbers", "Rows", "Samples", "Windows", "gradients"]


@dataclass(frozen=True)
class Samples:
    """Where the samples lie in a call's output: `axis` has size n·r, ordered (n, r) or (r, n).

    `n_major` is True for the order (n, r), which includes the plain case r = 1.
    """

    n: int
    axis: int
    n_major: bool = True

    def split(self, x: Tensor, axis: int) -> Tensor:
        """Replace `axis` (size n·r) of `x` by the two axes (n, r), in this order."""
        r = x.shape[axis] // self.n
        if self.n_major:
            return x.unflatten(axis, (self.n, r))
        return x.unflatten(axis, (r, self.n)).transpose(axis, axis + 1)

    def owner(self, size: int, device: torch.device | None = None) -> Tensor:
        """The sample that owns each of the `size` = n·r places of the axis, int64 `[n·r]`."""
        ids = torch.arange(self.n, device=device)
        return ids.repeat_interleave(size // self.n) if self.n_major else ids.repeat(size // self.n)

    def owners(self, shape: Sequence[int], device: torch.device | None = None) -> Tensor:
        """The sample that owns each element of a tensor of a shape, int64, broadcastable to it."""
        if self.axis < 0:
            return torch.zeros([1] * len(shape), dtype=torch.long, device=device)
        return self.owner(shape[self.axis], device).reshape([-1 if a == self.axis else 1 for a in range(len(shape))])


@dataclass(frozen=True, eq=False)
class RowNumbers:
    """The sample of every row of a call's output, wherever the rows lie.

    numbers: int64 from 0 to n - 1, or -1 for a row of no sample; broadcastable to the output's shape, with size 1 along
    the axes of features. orders: the order of the rows of each slot that was asked for one, by what arranges them.
    """

    n: int
    numbers: Tensor
    orders: dict[Any, Any] = field(default_factory=dict, repr=False)

    def owners(self, shape: Sequence[int], device: torch.device | None = None) -> Tensor:
        """The sample that owns each element of a tensor of a shape, int64, broadcastable to it; -1: no sample."""
        return self.numbers.to(device)


@dataclass(frozen=True)
class Rows:
    """One slot of one use as rows of the grouped linear map.

    a: `[N,T,K,I]` input rows; or None for the constant 1 with I = 1 (a bias);
       or int64 `[N,T]`, the index of the only input that is 1 (embedding; K = 1, I = `size_in`).
    g: `[V,N,T,K,O]` cotangents of the output rows.
    """

    a: Tensor | None
    g: Tensor
    size_in: int

    @property
    def laid_out(self) -> bool:
        """Whether the input is in memory as rows; where it is not, the first read of `a` copies it."""
        return True

    @property
    def kind(self) -> str:
        """What the input is: "constant", "float" or "index"."""
        return "constant" if self.a is None else "float" if self.a.is_floating_point() else "index"

    @property
    def size(self) -> torch.Size:
        """(V, N)."""
        return self.g.shape[:2]

    @property
    def cotangents(self) -> Sequence[Tensor]:
        """The cotangents as they arrived, whose memory may be that of the user's gradients."""
        return (self.g,)

    def sent(self, g: Tensor) -> Rows:
        """The same input with other cotangents of the same samples."""
        return Rows(self.a, g, self.size_in)

    def mapped(self, function: Callable[[Rows], Rows]) -> Rows:
        """The rows changed by a function that keeps their places."""
        return function(self)

    def mask(self, own: Tensor | None) -> Tensor | None:
        """Bool `[N,T]`: the rows that count, from those that `own` chooses before rows are gathered; None: all."""
        return own


class Windows(Rows):
    """Rows whose float input is a larger copy of a smaller tensor (windows), made when and as far as it is read.

    make: the input rows `[n,T,K,I]` of the samples from one number to another.
    product: `D[n,K,O,I]` of one cotangent `[n,T,K,O]` of these samples, without their rows; None where there is no
        such way, or the rows are faster.
    """

    make: Callable[[int, int], Tensor]
    product: Callable[[Tensor, int, int], Tensor] | None

    def __init__(
        self,
        make: Callable[[int, int], Tensor],
        g: Tensor,
        size_in: int,
        product: Callable[[Tensor, int, int], Tensor] | None = None,
    ) -> None:
        object.__setattr__(self, "make", make)
        object.__setattr__(self, "g", g)
        object.__setattr__(self, "size_in", size_in)
        object.__setattr__(self, "product", product)

    @cached_property
    def a(self) -> Tensor:
        """All input rows; cached from the first read on."""
        return self.make(0, self.g.shape[1])

    @property
    def laid_out(self) -> bool:
        """Whether `a` was read."""
        return "a" in self.__dict__

    @property
    def kind(self) -> str:
        """Always float."""
        return "float"

    def sent(self, g: Tensor) -> Rows:
        """The same input with other cotangents of the same samples."""
        return Rows(self.a, g, self.size_in) if self.laid_out else Windows(self.make, g, self.size_in, self.product)

    def narrow(self, start: int, length: int) -> Windows:
        """Some samples, whose input is laid out without the others'."""
        g = self.g[:, start : start + length]
        make, product = self.make, self.product

        def moved(cotangent: Tensor, low: int, high: int) -> Tensor:
            assert product is not None
            return product(cotangent, start + low, start + high)

        return Windows(
            lambda low, high: make(start + low, start + high), g, self.size_in, None if product is None else moved
        )


def gradients(rows: Rows) -> Tensor:
    """Per-sample gradients `[V,N,K,O,I]` = sum_t g[v,n,t,k,o] a[n,t,k,i] of any rows."""
    a, g = rows.a, rows.g
    if a is None:
        return g.sum(2).unsqueeze(-1)
    if a.is_floating_point():
        return torch.einsum("vntko,ntki->vnkoi", g, a)
    v, n, t, _, o = g.shape
    out = g.new_zeros(v, n, rows.size_in, o)
    out.scatter_add_(2, a[None, :, :, None].expand(v, n, t, o), g.squeeze(3))
    return out.transpose(2, 3).unsqueeze(2)
