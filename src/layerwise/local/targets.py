"""Targets of a layer's outputs, from its pre-activations and their cotangents.

A target is any function `(z, g, transfer) -> y` of pre-activations `z`, cotangents `g = ∂L/∂z` of the batch loss as
written, and the transfer function `f` of the local loss (the identity for the squared loss); all shapes `[R,K,O]`.
The targets here are values; γ = None is filled in from the optimizer's parameter groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.local.problem import Clip, target_m
from layerwise.local.transfer import Transfer
from layerwise.operators.ridge import ridge

__all__ = ["GradientStep", "Mirror", "NaturalStep", "Polyak", "Target", "fill_in", "outer_moment", "slope"]

Target = Callable[[Tensor, Tensor, Transfer], Tensor]


@dataclass(frozen=True)
class Polyak:
    """Polyak's step as the unit of a target's γ: `per=Polyak(lower)`, where γ = 1 is the step itself.

        γ ← γ min((L − L*)/Σ_r ⟨g_r, p_r⟩, most),       y = f(z) − γ p,       p = g but for a `NaturalStep`

    The loss, linear in a layer's outputs, falls to L* at γ = 1. over: "layer", the sum over the rows of one layer, so
    that each by itself would bring the loss there; or "net", over the rows of all layers, so that all together would.
    A parameter without a local problem counts by its own gradient. Zero where the loss is not above L*, or where no
    cotangent is left. lower: L*, a lower bound of the loss as written: 0, or its known minimum, such as the entropy
    of smoothed labels. most: γ_b of the stochastic form. The published constant c is 1/γ.
    Raises BadInput for settings that cannot be.
    Source: Polyak, "Introduction to optimization" (1987), section 5.3; over minibatches Loizou et al., "Stochastic
    Polyak step-size for SGD" (2021), equation SPS_max.
    """

    lower: float = 0.0
    over: Literal["layer", "net"] = "layer"
    most: float = math.inf

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lower) and self.over in ("layer", "net") and self.most > 0):
            raise BadInput(f'Polyak needs a finite lower bound, over "layer" or "net", and most > 0; got {self}')

    def step(self, loss: float, slope: float) -> float:
        """The size of one unit, `min((L − L*)/slope, most)`."""
        gap = loss - self.lower
        return min(gap / slope, self.most) if gap > 0 and slope > 0 else 0.0


Per = Literal["batch", "sample"] | Polyak


@dataclass(frozen=True)
class _Step:
    """A step of size γ along a direction of the cotangents, in units that `per` says.

    per: "batch", the loss as written; "sample", N times it, for a mean over the N samples of a batch (a sum over them
    is per sample as written); or `Polyak`.
    """

    gamma: float | None = None
    per: Per = "batch"

    def __post_init__(self) -> None:
        if self.gamma is not None and not 0 < self.gamma < float("inf"):
            raise BadInput(f"a target needs a finite gamma > 0, or None for the optimizer's; got gamma={self.gamma}")
        if self.per not in ("batch", "sample") and not isinstance(self.per, Polyak):
            raise BadInput(f'a target\'s gamma is per "batch", per "sample" or per Polyak(); got per={self.per!r}')

    def __call__(self, z: Tensor, g: Tensor, transfer: Transfer) -> Tensor:
        """The target at the step's own size. Raises BadInput where that depends on the optimizer or on the batch."""
        if self.gamma is None or self.per != "batch":
            raise BadInput(f"{self} has no step size yet: give it one with fill_in(target, size)")
        return self.at(self.gamma, z, g, transfer)

    def at(self, size: float, z: Tensor, g: Tensor, transfer: Transfer) -> Tensor:
        """The target of a step of some size."""
        raise NotImplementedError

    def direction(self, g: Tensor) -> Tensor:
        """What the step goes along, `p`: the cotangents."""
        return g


@dataclass(frozen=True)
class GradientStep(_Step):
    """LocoProp's target, `y = f(z) − γ g`: the first local gradient is γ times backprop's.

    gamma: γ, against the gradient of the loss as written. per: with "sample", γ stands for γN under a mean over N
    samples, so that γ = 1 under a softmax or sigmoid output means "the target is the label" at every batch size; with
    a `Polyak`, γ counts Polyak's steps.
    clip: None, "bounded" or "range", as in `target_m`: clipped targets keep far-solved problems bounded below.
    Raises BadInput for settings that cannot be. Source: Amid, Anil and Warmuth (2022), section 3.
    """

    clip: Clip = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip not in (None, "bounded", "range"):
            raise BadInput(f'clip={self.clip!r} is unknown: use "range", "bounded" or None')

    def at(self, size: float, z: Tensor, g: Tensor, transfer: Transfer) -> Tensor:
        """`f(z) − γ g`, clipped where asked."""
        return target_m(z, g, size, transfer, self.clip)


@dataclass(frozen=True)
class Mirror(_Step):
    """A step in the dual coordinates, `y = f(z − γ g)`: always in the range of f, so never in need of clipping.

    The first local gradient is `f(z) − f(z − γ g) ≈ γ f'(z) g`, which a saturated unit damps; it is not a multiple of
    backprop's, save under the squared loss, where the target is that of `GradientStep`. per: as there.
    Source: mirror descent with the potential F (Nemirovski and Yudin, 1983), one step.
    """

    def at(self, size: float, z: Tensor, g: Tensor, transfer: Transfer) -> Tensor:
        """`f(z − γ g)`."""
        return transfer.f(z - size * g)


@dataclass(frozen=True)
class NaturalStep(_Step):
    """A step preconditioned on the output side, `y = f(z) − γ (B + λ tr(B)/O I)⁻¹ g` with `B = Σ_r g_r g_rᵀ` by group.

    damping: λ, in units of B's mean diagonal. decay: of a running mean of B, saved with the state; None for the
    batch's own. second: `[K,O,O]`, the mean that stands for B. The squared problem with these targets, solved
    exactly, is a step of K-FAC with the empirical Fisher's output factor, `−γ (B + λ_B)⁻¹ G (A + λ_A)⁻¹`; so is one
    gradient step of any loss beside `Whitening`. per: as for `GradientStep`.
    Raises BadInput for settings that cannot be, NonFinite where B has no inverse.
    Source: Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature" (2015).
    """

    damping: float = 1e-3
    decay: float | None = None
    second: Tensor | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.damping < float("inf") and (self.decay is None or 0 <= self.decay < 1)):
            raise BadInput(f"NaturalStep needs a finite damping ≥ 0, and a decay in [0, 1) or None; got {self}")

    def at(self, size: float, z: Tensor, g: Tensor, transfer: Transfer) -> Tensor:
        """`f(z) − γ (B + λ tr(B)/O I)⁻¹ g`."""
        return transfer.f(z) - size * self.direction(g)

    def direction(self, g: Tensor) -> Tensor:
        """`(B + λ tr(B)/O I)⁻¹ g`."""
        second = outer_moment(g) if self.second is None else self.second
        damping = self.damping * second.diagonal(dim1=-2, dim2=-1).mean(-1)
        return ridge(second, g.transpose(0, 1), damping).transpose(0, 1)


def outer_moment(g: Tensor) -> Tensor:
    """`B = Σ_r g_r g_rᵀ` by group, `[K,O,O]`."""
    rows = g.transpose(0, 1)
    return rows.mT @ rows


def fill_in(target: Target, size: float, name: str = "a layer") -> Target:
    """The target of a layer at a step size of the optimizer's; what a user's function gives is checked."""
    return partial(target.at, size) if isinstance(target, _Step) else partial(_like_outputs, target, name)


def _like_outputs(target: Target, name: str, z: Tensor, g: Tensor, transfer: Transfer) -> Tensor:
    y: Any = target(z, g, transfer)
    if not isinstance(y, Tensor) or y.shape != z.shape:
        given = f"a tensor {tuple(y.shape)}" if isinstance(y, Tensor) else repr(y)
        raise BadInput(f"the target of {name} is {given}; (z, g, transfer) -> y gives one like z, {tuple(z.shape)}")
    return y


def slope(target: Target | None, g: Tensor) -> Tensor:
    """`Σ_r ⟨g_r, p_r⟩`: how fast the loss falls along a target's direction; along g for a function or None."""
    p = target.direction(g) if isinstance(target, _Step) else g
    return torch.dot(g.flatten(), p.flatten())
