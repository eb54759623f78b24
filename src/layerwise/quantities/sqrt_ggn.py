"""The root of the generalized Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from layerwise.errors import Undefined
from layerwise.gradient.parameter import ParameterGradient
from layerwise.graph.cotangents import Exact, Sampled
from layerwise.quantities.base import ByParameter, Context, Quantity, Union, positive, takes_draws

__all__ = ["SqrtGGN"]


class SqrtGGN(Quantity):
    """The columns of a root of the generalized Gauss-Newton matrix. Heavy on memory.

    s[v,n] = J_n^T r[v,n], `[V,N,*shape]` per parameter, with r the columns of a root of the Hessian of sample n's
    loss term in the outputs and J_n their Jacobian. With all parameters concatenated, sum_{v,n} s s^T is the
    GGN of the loss as written, cross-parameter blocks included; the columns' Gram matrix has its nonzero spectrum.
    `draws=None` is exact: V = (C-1)·P for C classes and P loss terms a sample (P for an elementwise loss). With
    `draws=k` there are V = k sampled columns and the sum is unbiased. Columns of several losses are
    concatenated. Batches are concatenated along N; where their V differ, missing columns are zero.

    Memory V·N·P for P parameters, twice that at its peak: a backward pass of more than `max_elements` numbers is
    refused before it runs. Units: square root of the loss per parameter unit.
    Raises UnknownLoss, SamplesMixed, BadInput, or Undefined (a loss without a root, or above `max_elements`).
    Source: Dangel, Kunstner and Hennig (2020); Dangel, Tatzel and Hennig (2022).
    """

    powers: tuple[float, ...] = (0.5,)
    concatenate = True
    stacks = True

    @takes_draws
    def __init__(
        self, draws: int | None = None, generator: torch.Generator | None = None, max_elements: int = 2**28
    ) -> None:
        self.draws = positive("SqrtGGN's draws", draws)
        positive("SqrtGGN's max_elements", max_elements, none=False)
        self.max_elements = max_elements
        self.cotangent = Exact() if draws is None else Sampled(draws, generator)

    def check_size(self, columns: int, samples: int, sizes: Mapping[str, int]) -> None:
        """Raise Undefined for a root of more than `max_elements` numbers."""
        p = sum(sizes.values())
        if columns * samples * p > self.max_elements:
            largest = max(sizes, key=lambda name: sizes[name])
            raise Undefined(
                f"asked for {self!r}, which would hold V·N·P = {columns}·{samples}·{p} = {columns * samples * p} "
                f"numbers (of {largest!r} alone {columns * samples * sizes[largest]}), above "
                f"max_elements={self.max_elements}; raise it, take a smaller batch or sampled columns, freeze "
                "parameters, or ask for DiagGGN"
            )

    def numbers(self, gradient: ParameterGradient) -> int:
        """V·N·P."""
        return gradient.size.numel() * gradient.shape.numel()

    def compute(self, gradient: ParameterGradient) -> tuple[Tensor, ...]:
        """`[N,v,*shape]`, samples first, so that batches join along them."""
        return (gradient.per_sample().transpose(0, 1),)

    def finish(self, values: Mapping[str, tuple[Tensor, ...]], union: Union, context: Context) -> ByParameter:
        """`[V,N,*shape]`, keyed by parameter."""
        return ByParameter({name: value[0].transpose(0, 1) for name, value in values.items()})

    def __repr__(self) -> str:
        return f"SqrtGGN(draws={self.draws})" if self.draws else "SqrtGGN()"
