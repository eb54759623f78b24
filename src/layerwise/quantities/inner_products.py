"""Linear functions of each sample's own gradient: inner products with directions, and projections from both sides."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from layerwise.errors import Undefined
from layerwise.gradient.parameter import ParameterGradient
from layerwise.quantities.base import ByParameter, Context, Quantity, Union

__all__ = ["Direction", "InnerProducts", "Projections", "SampleQuantity"]


Direction = tuple[Tensor, ...]


class SampleQuantity(Quantity):
    """Base: values `[N, ...]` of the gradients of the samples' own losses, without the 1/terms of a mean."""

    powers: tuple[float, ...] = (1,)
    concatenate = True

    def finish(self, values: Mapping[str, tuple[Tensor, ...]], union: Union, context: Context) -> ByParameter:
        """By parameter, each in the scale of the sum of the loss's terms."""
        factor = (union.terms if union.mean else 1.0) ** self.powers[0]
        return ByParameter({name: v[0] * factor if factor != 1 else v[0] for name, v in values.items()})


class InnerProducts(SampleQuantity):
    """<g_n, v_q> for given directions v_q by parameter, `[N, Q]`, without holding `[N, P]`.

    A direction is v_q alone, `[Q, *shape]`, or its factors L `[Q,r,R]` and R `[Q,r,C]`: L_q^T R_q is v_q as a matrix
    `[first axis, rest]`.
    by_position: what each position of the parameter's rows adds to it, `[N, T, Q]`. Raises Undefined where uses of the
    parameter have no rows, or unlike numbers of positions.
    """

    def __init__(self, directions: Mapping[str, Direction], by_position: bool = False) -> None:
        self.directions, self.by_position = directions, by_position

    def covers(self, gradient: ParameterGradient) -> bool:
        """Parameters with a direction."""
        return gradient.name in self.directions

    def compute(self, gradient: ParameterGradient) -> tuple[Tensor, ...]:
        """`[N, Q]`, or `[N, T, Q]`."""
        directions = self.directions[gradient.name]
        if len(directions) > 1:
            found = [gradient.two_sided(left, right)[0] for left, right in zip(*directions, strict=True)]
            return (torch.stack([products.diagonal(dim1=1, dim2=2).sum(1) for products in found], 1),)
        if not self.by_position:
            return (gradient.inner(*directions)[0],)
        value = gradient.inner_by_position(*directions)
        if value is None:
            lengths = gradient.positions
            seen = (
                f"its uses have {' and '.join(map(str, lengths))} positions"
                if lengths
                else "it is read once for all samples (a position table looked up by `arange(T)`: give the indices "
                "with the batch, or look up `arange(T) + 0 * tokens`), or the weight that is used is derived from it"
            )
            raise Undefined(
                f"asked for scores by token, but {gradient.name!r} has no rows by position: {seen}; leave it out by "
                "`parameters=`"
            )
        return (value[0],)


class Projections(SampleQuantity):
    """L D_n R^T of every sample's gradient D_n as a matrix, `[N, P·Q]`, for L `[P,R]` and R `[Q,C]` by parameter."""

    def __init__(self, sides: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self.sides = sides

    def numbers(self, gradient: ParameterGradient) -> int:
        """N·P·Q."""
        return gradient.size.numel() * len(self.sides[gradient.name][0]) * len(self.sides[gradient.name][1])

    def compute(self, gradient: ParameterGradient) -> tuple[Tensor, ...]:
        """`[N, P·Q]`."""
        left, right = self.sides[gradient.name]
        like = gradient.like
        return (gradient.two_sided(left.to(like), right.to(like))[0].flatten(1),)
