"""The diagonal of the generalized Gauss-Newton matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from layerwise.gradient.parameter import ParameterGradient
from layerwise.graph.cotangents import Exact, Sampled
from layerwise.quantities.base import Quantity, positive, takes_draws

__all__ = ["DiagGGN"]


class DiagGGN(Quantity):
    """The diagonal of the generalized Gauss-Newton matrix of the loss as written.

    diag(sum_n J_n^T H_n J_n), `[*shape]`, with J the Jacobian of the outputs and H the Hessian of the loss
    with respect to them. `draws=None` backpropagates all columns of a root of H and is exact; `draws=k` takes k
    sampled columns and is unbiased (for a likelihood loss, the sampled Fisher's diagonal).
    `per_sample=True`: diag(J_n^T H_n J_n) for each sample, `[N, *shape]`, whose sum is the diagonal; memory N·P.
    Raises UnknownLoss, SamplesMixed, or Undefined (a loss without a root).
    Source: Schraudolph (2002); Dangel et al. (2020), eq. 19.
    """

    powers = (1,)

    @takes_draws
    def __init__(
        self, draws: int | None = None, generator: torch.Generator | None = None, per_sample: bool = False
    ) -> None:
        self.draws = positive("DiagGGN's draws", draws)
        self.per_sample = self.concatenate = per_sample
        self.cotangent = Exact() if draws is None else Sampled(draws, generator)

    def numbers(self, gradient: ParameterGradient) -> int:
        """P, or N·P."""
        return gradient.shape.numel() * (gradient.size[1] if self.per_sample else 1)

    def compute(self, gradient: ParameterGradient) -> tuple[Tensor, ...]:
        """`[*shape]`, or `[N, *shape]`."""
        return (gradient.squares() if self.per_sample else gradient.second_moment(),)

    def __repr__(self) -> str:
        given = [f"draws={self.draws}"] if self.draws else []
        return f"DiagGGN({', '.join([*given, *(['per_sample=True'] if self.per_sample else [])])})"
