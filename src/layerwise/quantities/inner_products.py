"""Linear functions of each sample's own gradient: inner products with directions, and projections from both sides."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from layerwise.errors import Undefined
from layerwise.gradient.parameter import ParameterGradient
from layerwise.quantities.base import ByParameter, Context, Quantity, Union

__all__ = ["InnerProducts", "OwnGradients", "Projections", "SampleQuantity"]


class SampleQuantity(Quantity):
    """Base: values `[N, ...]` of the gradients of the samples' own losses, without the 1/terms of a mean."""

    powers: tuple[float, ...] = (1,)
    concatenate = True

    def finish(self, values: Mapping[str, tuple[Tensor, ...]], union: Union, context: Context) -> ByParameter:
        """By parameter, each in the scale of the sum of the loss's terms."""
        factor = (union.terms if union.mean else 1.0) ** self.powers[0]
        return ByParameter({name: v[0] * factor if factor != 1 else v[0] for name, v in values.items()})


class OwnGradients(SampleQuantity):
    """The gradient of every sample's own loss, the sum of its terms, `[N, *shape]`."""

    forms_rows = True

    def compute(self, gradient: ParameterGradient) -> tuple[Tensor, ...]:
        """`[N, *shape]`."""
        return (gradient.rows()[0],)


class InnerProducts(SampleQuantity):
    """<g_n, v_q> for given directions v_q `[Q, *shape]` by parameter, `[N, Q]`, without holding `[N, P]`.

    by_position: what each position of the parameter's rows adds to it, `[N, T, Q]`. Raises Undefined where uses of the
    parameter have no rows, or unlike numbers of positions.
    """

    def __init__(self, directions: Mapping[str, Tensor], by_position: bool = False) -> None:
        self.directions, self.by_position = directions, by_position

    def covers(self, gradient: ParameterGradient) -> bool:
        """Parameters with a direction."""
        return gradient.name in self.directions

    def compute(self, gradient: ParameterGradient) -> tuple[Tensor, ...]:
        """`[N, Q]`, or `[N, T, Q]`."""
        directions = self.directions[gradient.name]
        if not self.by_position:
            return (gradient.inner(directions)[0],)
        value = gradient.inner_by_position(directions)
        if value is None:
            raise Undefined(
                f"asked for scores by token, but the uses of {gradient.name!r} have no rows in common (a derived "
                "weight, or uses with other numbers of positions); leave it out by `parameters=`"
            )
        return (value[0],)


class Projections(SampleQuantity):
    """L D_n R^T of every sample's gradient D_n as a matrix, `[N, P·Q]`, for L `[P,R]` and R `[Q,C]` by parameter."""

    def __init__(self, sides: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self.sides = sides

    def compute(self, gradient: ParameterGradient) -> tuple[Tensor, ...]:
        """`[N, P·Q]`."""
        left, right = self.sides[gradient.name]
        like = gradient.like
        return (gradient.two_sided(left.to(like), right.to(like))[0].flatten(1),)
