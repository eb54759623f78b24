"""Inner products of the per-sample gradients."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from layerwise.errors import Undefined
from layerwise.gradient.parameter import ParameterGradient
from layerwise.quantities.base import ByParameter, Context, Quantity, Union
from layerwise.quantities.first_order import sample_factor

__all__ = ["PairwiseDot"]


class PairwiseDot(Quantity):
    """The inner products of all pairs of per-sample gradients, per parameter; `.total` over all parameters.

    G[n,m] = <g_n, g_m>, `[N,N]`, symmetric and positive semidefinite, squared loss per squared parameter unit; the
    diagonal is `SquaredNorm`. `scale="sample"`: N² <g_n, g_m> for a mean loss. Memory N² for each parameter, and a
    few samples' gradients, never `[N,P]`. One batch at a time: the products of samples of two batches need the
    gradients of both, so a second backward pass in one context is refused.
    Raises SamplesMixed, or Undefined (a second backward pass).
    Source: Schneider, Dangel and Hennig (2021).
    """

    computed_first = True  # SquaredNorm reads the norms off the diagonal
    wirtinger = True

    def numbers(self, gradient: ParameterGradient) -> int:
        """V·N²."""
        return gradient.size.numel() * gradient.size[1]

    def compute(self, gradient: ParameterGradient) -> tuple[Tensor, ...]:
        """`[N,N]`."""
        return (gradient.pairwise_dot()[0],)

    def check_union(self, seen: Union, batch: Union) -> None:
        """Refuse a second batch."""
        raise Undefined(
            f"asked for PairwiseDot of {seen.samples} samples and {batch.samples} more from a further backward pass: "
            "the products between the two batches are not available; observe them in two contexts, or as one batch"
        )

    def finish(self, values: Mapping[str, tuple[Tensor, ...]], union: Union, context: Context) -> ByParameter:
        """The Gram matrices by parameter; the total is the Gram matrix of whole gradients, `[N,N]`."""
        factor = sample_factor(union) ** 2
        dots = {k: v[0] * factor if factor != 1 else v[0] for k, v in values.items()}
        return ByParameter(dots, sum(dots.values()) if dots else None)  # type: ignore[arg-type]
