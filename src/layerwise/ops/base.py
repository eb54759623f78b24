"""The one form every known operation takes, and how it is described.

A tensor `W` used by a call enters it as a grouped linear map with shared positions,

    Z[n,t,k,o] = sum_i W[k,o,i] A[n,t,k,i]

with `n` sample, `t` position, `k` group, `i` in, `o` out; `v` numbers cotangents. A `Slot` says how
to lay the call's input and its output's cotangent out as these rows, and how to carry `[k,o,i]` back
to the shape of the tensor. Every quantity is a contraction of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerwise.errors import Undefined
from layerwise.rows.base import RowNumbers, Rows, Samples, gradients
from layerwise.rows.numbered import Order, Scattered, digits, from_digits

__all__ = ["Call", "DenseSlot", "RowNumbers", "Rows", "Samples", "Slot"]


class Call(NamedTuple):
    """A recorded torch call: data arguments detached, parameters and derived tensors as they are."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out_shape: torch.Size


class Slot:
    """How one tensor enters one call. Subclasses live in `ops/`, one file per family.

    used: the tensor that gradients are of, shape `used.shape`: a parameter or derived from
        parameters. Where the call received an `expand` of such a tensor, `used` is the tensor that was expanded.
    axes: the output axes that may carry samples (feature axes are excluded by the operation).
    aligned: those of `axes` along which the tensor itself varies, each with the tensor's own axis:
        each index j of it then belongs to one sample, and only `dense` is defined.
    bias: True where the input rows are the constant 1.
    elementwise: True where O = I = 1 (each element of `used` meets its own output elements).
    linear: True where the rows do not depend on `used`: Z = W A, plus terms without `used`.
        False where `input` is only the derivative of the call at the present value.
    factored: False where only `dense` is defined (the operation has no known row form).
    indexed: True where `input` gives int64 indices in place of rows.
    by_view: True where `rows` are views of the call's arguments and of the cotangent wherever strides allow, and depend
        on the layouts of these and on the call's other arguments alone, not on the values of any tensor.
    computed: gives, of any call of the same layout, the tensor of which the input rows are a view; None where they are
        a view of an argument, or no view that is known to be the same in all such calls.
    through_graph: True where `dense` sends cotangents through the recorded graph, which a backward pass frees.
    place: the number of the tensor among those that the call uses.
    """

    used: Tensor
    axes: Sequence[int]
    aligned: Mapping[int, int] = MappingProxyType({})
    bias: bool = False
    elementwise: bool = False
    linear: bool = True
    factored: bool = True
    indexed: bool = False
    by_view: bool = False
    computed: Callable[[Call], Tensor] | None = None
    through_graph: bool = False
    place: int = 0

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

    @property
    def arrangement(self) -> Hashable:
        """What `matrix` depends on, beside the slot's type and the tensor's shape; None where that is not known."""
        return None

    def dense(self, g: Tensor, samples: Samples | RowNumbers) -> Tensor:
        """Per-sample gradients `[V,N,*used.shape]` of a cotangent `[V, *out_shape]`."""
        if isinstance(samples, RowNumbers):
            rows = self.structured(g, samples)
            return self._one_by_one(g, samples) if rows is None else self.fold(gradients(rows))
        axis = self.aligned.get(samples.axis)
        if axis is None:
            return self.fold(gradients(self.rows(g, samples)))
        # each index of the tensor's own axis belongs to one sample, which alone has a gradient there
        whole = self.fold(gradients(self.rows(g, None)).sum(1)).unsqueeze(1)
        owner = samples.owner(self.used.shape[axis], whole.device)
        mine = owner == torch.arange(samples.n, device=whole.device).unsqueeze(1)
        mine = mine.reshape(samples.n, *(-1 if d == axis else 1 for d in range(self.used.ndim)))
        return torch.where(mine, whole, whole.new_zeros(()))

    def _one_by_one(self, g: Tensor, samples: RowNumbers) -> Tensor:
        """`dense` where one row holds elements of several samples: a cotangent for each sample."""
        owner = samples.owners(g.shape[1:], g.device)
        parts = []
        for n in range(samples.n):
            mine = torch.where(owner == n, g, g.new_zeros(()))
            parts.append(self.fold(gradients(self.rows(mine, None)).sum(1)))
        return torch.stack(parts, 1) if parts else g.new_zeros(len(g), 0, *self.used.shape)

    def structured(self, g: Tensor, samples: Samples | RowNumbers | None) -> Rows | None:
        """The rows of a cotangent with the samples in N; None where only `dense` is defined for such samples."""
        if not self.factored:
            return None
        if isinstance(samples, RowNumbers):
            order = self.order(samples, g.shape[1:], g.device)
            return None if order is None else Scattered([self.rows(g, None)], order)
        return None if samples is not None and samples.axis in self.aligned else self.rows(g, samples)

    def order(self, samples: RowNumbers, shape: torch.Size, device: torch.device) -> Order | None:
        """The order of the rows of `rows(g, None)` by samples; None where a row holds elements of several samples.

        Found once for the numbers of one use, whose call arranges the rows of its slots in the same way at every run.
        """
        key = self.place, type(self), self.used.shape, shape, device
        if key not in samples.orders:
            samples.orders[key] = self._order(samples, shape, device)
        return samples.orders[key]

    def _order(self, samples: RowNumbers, shape: torch.Size, device: torch.device) -> Order | None:
        stack = digits(samples.owners(shape, device), samples.n, self.used.dtype)
        found = self.output(stack.expand(len(stack), *shape), None)
        one = found[..., :1, :1]
        return Order(samples.n, from_digits(one[..., 0, 0]).flatten()) if bool((found == one).all()) else None

    def rows(self, g: Tensor, samples: Samples | None) -> Rows:
        """The rows of a cotangent `[V, *out_shape]`."""
        a = self.input(samples)
        size_in = 1 if a is None else a.shape[-1] if a.is_floating_point() else self.used.shape[0]
        return Rows(a, self.output(g, samples), size_in)


class DenseSlot(Slot):
    """A slot of a use without input and output rows: only `dense` is defined.

    factored: False. linear: False. use: the use that it belongs to, in words, where a tape has recorded it.
    """

    factored = False
    linear = False
    use: str | None = None

    def no_rows(self) -> Undefined:
        """The refusal of rows, with its reason."""
        raise NotImplementedError

    def input(self, samples: Samples | None) -> Tensor | None:
        """Raises `Undefined`."""
        raise self.no_rows()

    def output(self, g: Tensor, samples: Samples | None) -> Tensor:
        """Raises `Undefined`."""
        raise self.no_rows()

    def fold(self, w: Tensor) -> Tensor:
        """Raises `Undefined`."""
        raise self.no_rows()

    def matrix(self, used: Tensor) -> Tensor:
        """Raises `Undefined`."""
        raise self.no_rows()
