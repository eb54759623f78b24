"""Curvature as one number for each parameter, without tensors of the parameter's shape."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from layerwise.errors import Undefined
from layerwise.gradient.parameter import ParameterGradient
from layerwise.graph.cotangents import Sampled
from layerwise.quantities import ByParameter, DiagGGN, Quantity
from layerwise.quantities.base import Context, Union

__all__ = ["GGNTrace", "LargestEigenvalue"]


class GGNTrace(DiagGGN):
    """The trace of each parameter's block of the generalized Gauss-Newton matrix, 0-dim each.

    Several backward passes add up, as their gradients do: the trace is that of the sum of the losses as written.
    """

    powers = (0,)  # batches are added without reweighting

    def numbers(self, gradient: ParameterGradient) -> int:
        """One."""
        return 1

    def compute(self, gradient: ParameterGradient) -> tuple[Tensor, ...]:
        """The sum over v and n of the squared norms of the root columns' gradients."""
        return (gradient.squared_norm().sum(),)


class LargestEigenvalue(Quantity):
    """The largest eigenvalue of each parameter's block of the sampled GGN, from its Gram matrix, 0-dim each.

    `.total` is the largest eigenvalue of the whole matrix, from the sum of the Gram matrices.
    """

    powers = (1,)

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.cotangent = Sampled(1, generator)

    def numbers(self, gradient: ParameterGradient) -> int:
        """N²."""
        return int(gradient.size[1] ** 2)

    def compute(self, gradient: ParameterGradient) -> tuple[Tensor, ...]:
        """`[N,N]`."""
        if gradient.column:
            raise Undefined(
                "asked for the largest eigenvalue of the sampled GGN of a loss that several calls make; their roots' "
                "products with one another are not available, use lw.GGN(model, closure) instead"
            )
        return (gradient.pairwise_dot()[0],)

    def check_union(self, seen: Union, batch: Union) -> None:
        """Raise Undefined for a second batch."""
        raise Undefined(
            f"asked for the largest eigenvalue of the sampled GGN of {seen.samples} samples and {batch.samples} more "
            "from a further backward pass: the products between the two batches' roots are not available; measure each "
            "by itself"
        )

    def finish(self, values: Mapping[str, tuple[Tensor, ...]], union: Union, context: Context) -> ByParameter:
        """The largest eigenvalues by parameter."""
        grams = {name: v[0] for name, v in values.items()}
        eigenvalues = {name: _largest(gram) for name, gram in grams.items()}
        return ByParameter(eigenvalues, _largest(torch.stack(list(grams.values())).sum(0)) if grams else None)


def _largest(gram: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(gram)[-1]
