"""Step length and damping: KL clipping, the quadratic model, Levenberg-Marquardt, as pure functions.

Sums over parameters are in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from layerwise.operators.curvature import GGN
from layerwise.replay.rerun import Rerun

__all__ = ["ExactGGN", "best_step", "bound", "clip_factor", "dot", "levenberg_marquardt"]

_LEAST, _MOST = 1e-12, 1e12  # λ stays a divisor without overflow


def dot(one: Mapping[str, Tensor], two: Mapping[str, Tensor], weights: Mapping[str, float] | None = None) -> float:
    """Sum over the parameters of `one` of w <one, two>."""
    if not one:
        return 0.0
    device = next(iter(one.values())).device
    dots = torch.stack([(x * two[name]).sum().to(device, torch.float64) for name, x in one.items()]).tolist()
    return sum(d * (1.0 if weights is None else weights[name]) for name, d in zip(one, dots, strict=True))


def clip_factor(
    gradients: Mapping[str, Tensor], directions: Mapping[str, Tensor], rates: Mapping[str, float], clip: float | None
) -> float:
    """ν = min(1, sqrt(κ / sum over parameters of lr² g·d)), at which the step's quadratic form is at most κ.

    Source: Ba, Grosse and Martens (2017), "Distributed second-order optimization using Kronecker-factored
    approximations", section 5.
    """
    if clip is None or not directions:
        return 1.0
    return bound(dot(directions, gradients, {name: rate**2 for name, rate in rates.items()}), clip)


def bound(size: float, clip: float | None) -> float:
    """min(1, sqrt(clip / size))."""
    return min(1.0, math.sqrt(clip / size)) if clip is not None and size > 0 else 1.0


def best_step(
    gradients: Mapping[str, Tensor],
    directions: Sequence[Mapping[str, Tensor]],
    products: Sequence[Mapping[str, Tensor]],
    damping: Mapping[str, float],
) -> list[float]:
    """The coefficients of directions that minimize the damped quadratic model of the loss.

    argmin_c M(sum_i c_i d_i),  M(δ) = ∇L·δ + ½ δᵀGδ + ½ sum over parameters of λ |δ|²;  products: G d_i.
    Linearly dependent directions get the coefficients of least norm.
    Source: Martens and Grosse (2015), sections 6.4 (one direction) and 7 (with the step before).
    """
    matrix = [
        [dot(one, product) + dot(one, two, damping) for two, product in zip(directions, products, strict=True)]
        for one in directions
    ]
    slopes = torch.tensor([dot(d, gradients) for d in directions], dtype=torch.float64)
    square = torch.tensor(matrix, dtype=torch.float64)
    if not (torch.isfinite(square).all() and torch.isfinite(slopes).all()):
        return [math.nan] * len(directions)
    scale = square.diagonal().abs().sqrt().clamp(min=torch.finfo(torch.float64).tiny)  # directions of any length
    unit = (square + square.mT) / 2 / scale[:, None] / scale
    found: list[float] = (-(torch.linalg.pinv(unit, hermitian=True) @ (slopes / scale)) / scale).tolist()
    return found


def levenberg_marquardt(damping: float, ratio: float, every: int) -> float:
    """λ after a step that changed the loss by `ratio` times the prediction of its quadratic model.

    λ ω where ratio > 3/4, λ / ω where ratio < 1/4 (or is NaN), ω = (19/20)^every.
    Source: Martens and Grosse (2015), section 6.5.
    """
    omega = 0.95**every
    if ratio > 0.75:
        damping *= omega
    elif not ratio >= 0.25:
        damping /= omega
    return min(max(damping, _LEAST), _MOST)


class ExactGGN(GGN):
    """The exact `GGN` of a closure, whose own backward call is left out."""

    def __init__(self, rerun: Rerun) -> None:
        super().__init__(rerun.model, rerun.closure)

    def _refuse_backward(self, *_: Any) -> Any:
        return None

    @property
    def _asked(self) -> str:
        return "the quadratic model of the step"

    def times(self, direction: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The product with a direction, which is zero for parameters that it does not name."""
        full = {n: direction[n] if n in direction else torch.zeros_like(p) for n, p in self._parameters.items()}
        found = self @ full
        return {name: found[name] for name in direction}
