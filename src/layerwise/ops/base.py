"""The one form every known operation takes, and how it is described.

A tensor `W` used by a call enters it as a grouped linear map with shared positions,

    Z[n,t,k,o] = sum_i W[k,o,i] A[n,t,k,i]

with `n` sample, `t` position, `k` group, `i` in, `o` out; `v` numbers cotangents. A `Slot` says how
to lay the call's input and its output's cotangent out as these rows, and how to carry `[k,o,i]` back
to the shape of the tensor. Every quantity is a contraction of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Call", "Rows", "Samples", "Slot", "Windows"]


class Call(NamedTuple):
    """A recorded torch call: data arguments detached, parameters and derived tensors as they are."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out_shape: torch.Size


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
        """Whether the input is in memory as rows; where it is not, reading `a` puts it there."""
        return True

    @property
    def kind(self) -> str:
        """What the input is: "constant", "float" or "index"."""
        return "constant" if self.a is None else "float" if self.a.is_floating_point() else "index"

    def sent(self, g: Tensor) -> Rows:
        """The same input with other cotangents of the same samples."""
        return Rows(self.a, g, self.size_in)


class Windows(Rows):
    """Rows whose float input is a larger copy of something small, laid out when and as far as it is read.

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
        """All input rows; kept from then on."""
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


class Slot:
    """How one tensor enters one call. Subclasses live in `ops/`, one file per family.

    used: the tensor that gradients are of, shape `used.shape`: a parameter or derived from
        parameters. Where the call received an `expand` of such a tensor, it is the tensor before.
    axes: the output axes that may carry samples (feature axes are excluded by the operation).
    aligned: those of `axes` along which the tensor itself varies, each with the tensor's own axis:
        place j of the tensor then belongs to one sample, and only `dense` is defined.
    bias: True where the input rows are the constant 1.
    elementwise: True where O = I = 1 (each element of `used` meets its own output elements).
    linear: True where the rows do not depend on `used`: Z = W A, plus terms without `used`.
        False where `input` is only the derivative of the call at the present value.
    factored: False where only `dense` is defined (the operation has no known row form).
    indexed: True where `input` gives int64 indices in place of rows.
    """

    used: Tensor
    axes: Sequence[int]
    aligned: Mapping[int, int] = MappingProxyType({})
    bias: bool = False
    elementwise: bool = False
    linear: bool = True
    factored: bool = True
    indexed: bool = False

    def input(self, samples: Samples | None) -> Tensor | None:
        """Input rows `[N,T,K,I]` (None for a bias; int64 `[N,T]` for an index).

        `samples=None` asks for no sample structure: all positions may lie in N, with T = 1, or
        N the batch axis and T the positions, whatever costs least.
        """
        raise NotImplementedError

    def output(self, g: Tensor, samples: Samples | None) -> Tensor:
        """Cotangent rows `[V,N,T,K,O]` of a cotangent `[V, *out_shape]`, positions ordered as in `input`."""
        raise NotImplementedError

    def fold(self, w: Tensor) -> Tensor:
        """Carry `[..., K,O,I]` to `[..., *used.shape]`; the inverse of `matrix`."""
        raise NotImplementedError

    def matrix(self, used: Tensor) -> Tensor:
        """The tensor as `[K,O,I]`; the inverse of `fold`."""
        raise NotImplementedError

    def dense(self, g: Tensor, samples: Samples) -> Tensor:
        """Per-sample gradients `[V,N,*used.shape]` of a cotangent `[V, *out_shape]`."""
        axis = self.aligned.get(samples.axis)
        if axis is None:
            return self.fold(gradients(self.rows(g, samples)))
        # the tensor's own places belong to samples: one gradient, each place shown to its owner only
        whole = self.fold(gradients(self.rows(g, None)).sum(1)).unsqueeze(1)
        owner = samples.owner(self.used.shape[axis], whole.device)
        mine = owner == torch.arange(samples.n, device=whole.device).unsqueeze(1)
        mine = mine.reshape(samples.n, *(-1 if d == axis else 1 for d in range(self.used.ndim)))
        return torch.where(mine, whole, whole.new_zeros(()))

    def rows(self, g: Tensor, samples: Samples | None) -> Rows:
        """The rows of a cotangent `[V, *out_shape]`."""
        a = self.input(samples)
        size_in = 1 if a is None else a.shape[-1] if a.is_floating_point() else self.used.shape[0]
        return Rows(a, self.output(g, samples), size_in)


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
