"""Surrogate gradients (straight-through and variants) of functions without a derivative.

A rule is any function `(z, h, g) -> dz` of the input, the output and the cotangent of the output, all of one shape.
The classes of this module are picklable, so that they can be sent to other processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import BadInput

__all__ = ["Hinge", "Rule", "Smooth", "StraightThrough"]

Rule = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class StraightThrough:
    """`g` where |z| ≤ width, 0 beyond, as if the function were the identity there.

    Source: Hinton (2012); with the window, Hubara, Courbariaux, Soudry, El-Yaniv and Bengio (2016), "Binarized neural
    networks".
    """

    width: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, self.width)

    def __call__(self, z: Tensor, h: Tensor, g: Tensor) -> Tensor:
        """The cotangent of the input."""
        return g * (z.abs() <= self.width)


@dataclass(frozen=True)
class Smooth:
    """`g s'(z)` with a smooth surrogate s, any elementwise differentiable function; default tanh."""

    surrogate: Callable[[Tensor], Tensor] = torch.tanh

    def __post_init__(self) -> None:
        if not callable(self.surrogate):
            raise BadInput(f"Smooth needs a function of a tensor; got {self.surrogate!r}")

    def __call__(self, z: Tensor, h: Tensor, g: Tensor) -> Tensor:
        """The cotangent of the input."""
        with torch.enable_grad():
            x = z.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.surrogate(x).sum(), x)
        return g * slope


@dataclass(frozen=True)
class Hinge:
    """The gradient of `|g| max(0, margin − z s)`, with `s = −sign(g)` the side that lowers `g·h`.

    It is g wherever z is not yet beyond `margin` on the wanted side. Unlike with `StraightThrough`, an input far on the
    wrong side therefore still moves back.
    """

    margin: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, self.margin)

    def __call__(self, z: Tensor, h: Tensor, g: Tensor) -> Tensor:
        """The cotangent of the input."""
        return g * (z * g.sign() > -self.margin)


def _positive(rule: Any, value: float) -> None:
    if not 0 < value < float("inf"):
        raise BadInput(f"{type(rule).__name__} needs a finite positive number; got {rule}")
