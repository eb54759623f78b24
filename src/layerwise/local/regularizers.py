"""Regularizers: quadratic terms that pull a layer's weights to a centre while it is fitted.

A regularizer is any function `(weight, bias, gamma, average) -> Pull`, or to a norm ball (`norms`), of the starting
weight `[K,O,I]`, the starting bias `[K,O]` or None, the optimizer's γ, and the running averages `(weight, bias)` that
an attribute `decay` asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from layerwise.errors import BadInput
from layerwise.local.problem import Pull, Term

__all__ = ["Average", "Elastic", "Proximal", "Regularizer", "WeightDecay"]

Average = tuple[Tensor, Tensor | None]
Regularizer = Callable[[Tensor, Tensor | None, float, Average | None], Term]


@dataclass(frozen=True)
class Proximal:
    """`(‖W − W₀‖² + ‖b − b₀‖²)/2η` around the weights before the step, beside the local losses of all rows."""

    eta: float

    def __post_init__(self) -> None:
        if not 0 < self.eta < float("inf"):
            raise BadInput(f"Proximal needs a finite eta > 0: got eta={self.eta}")

    def __call__(self, weight: Tensor, bias: Tensor | None, gamma: float, average: Average | None) -> Pull:
        """The term."""
        return Pull(1 / self.eta)


@dataclass(frozen=True)
class WeightDecay:
    """`γ·rate/2 (‖W‖² + ‖b‖²)`: the first local gradient is γ times that of the loss plus `rate/2 (‖W‖² + ‖b‖²)`."""

    rate: float

    def __post_init__(self) -> None:
        if not 0 <= self.rate < float("inf"):
            raise BadInput(f"WeightDecay needs a finite rate ≥ 0: got rate={self.rate}")

    def __call__(self, weight: Tensor, bias: Tensor | None, gamma: float, average: Average | None) -> Pull:
        """The term, with an expanded zero for its centre."""
        zero = weight.new_zeros(())
        return Pull(gamma * self.rate, zero.expand_as(weight), None if bias is None else zero.expand_as(bias))


@dataclass(frozen=True)
class Elastic:
    """`γ·rate/2 (‖W − W̄‖² + ‖b − b̄‖²)` with running averages `W̄ ← decay·W̄ + (1 − decay)·W`, the first one W itself.

    The averages take the weights before each step; they are state of the optimizer, saved and loaded with it.
    Source: elastic averaging (Zhang, Choromanska and LeCun, 2015) with one worker.
    """

    rate: float
    decay: float = 0.99

    def __post_init__(self) -> None:
        if not (0 <= self.rate < float("inf") and 0 <= self.decay < 1):
            raise BadInput(f"Elastic needs a finite rate ≥ 0 and a decay in [0, 1): got {self}")

    def __call__(self, weight: Tensor, bias: Tensor | None, gamma: float, average: Average | None) -> Pull:
        """The term. Raises BadInput without averages."""
        if average is None:
            raise BadInput("Elastic pulls to running averages of the weights, and was given none")
        return Pull(gamma * self.rate, *average)
