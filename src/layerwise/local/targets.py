"""Targets of a layer's outputs, from its pre-activations and their cotangents.

A target is any function `(z, g, transfer) -> y` of pre-activations `z`, cotangents `g = ∂L/∂z` of the batch loss as
written, and the transfer function `f` of the local loss (the identity for the squared loss); all shapes `[R,K,O]`.
The targets here are values; γ = None is filled in from the optimizer's parameter groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from layerwise.errors import BadInput
from layerwise.local.problem import Clip, target_m
from layerwise.local.transfer import Transfer
from layerwise.operators.ridge import ridge

__all__ = ["GradientStep", "Mirror", "NaturalStep", "Target", "factor", "fill_in"]

Target = Callable[[Tensor, Tensor, Transfer], Tensor]
Per = Literal["batch", "sample"]


@dataclass(frozen=True)
class _Step:
    """A step of size γ; with per="sample", γ multiplies the gradient of N times the loss, N samples in the batch."""

    gamma: float | None = None
    per: Per = "batch"

    def __post_init__(self) -> None:
        if self.gamma is not None and not 0 < self.gamma < float("inf"):
            raise BadInput(f"a target needs a finite gamma > 0, or None for the optimizer's; got gamma={self.gamma}")
        if self.per not in ("batch", "sample"):
            raise BadInput(f'a target\'s gamma is per "batch" or per "sample"; got per={self.per!r}')

    def _size(self) -> float:
        if self.gamma is None or self.per == "sample":
            raise BadInput(
                f"{self} has no step size yet: give it gamma and a batch with fill_in(target, gamma, samples)"
            )
        return self.gamma


@dataclass(frozen=True)
class GradientStep(_Step):
    """LocoProp's target, `y = f(z) − γ g`: the first local gradient is γ times backprop's.

    gamma: γ, against the gradient of the loss as written. per: with "sample", γ stands for γN under a mean over N
    samples, so that γ = 1 under a softmax or sigmoid output means "the target is the label" at every batch size.
    clip: None, "bounded" or "range", as in `target_m`: clipped targets keep far-solved problems bounded below.
    Raises BadInput for settings that cannot be. Source: Amid, Anil and Warmuth (2022), section 3.
    """

    clip: Clip = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip not in (None, "bounded", "range"):
            raise BadInput(f'clip={self.clip!r} is unknown: use "range", "bounded" or None')

    def __call__(self, z: Tensor, g: Tensor, transfer: Transfer) -> Tensor:
        """`f(z) − γ g`, clipped where asked."""
        return target_m(z, g, self._size(), transfer, self.clip)


@dataclass(frozen=True)
class Mirror(_Step):
    """A step in the dual coordinates, `y = f(z − γ g)`: always in the range of f, so never in need of clipping.

    The first local gradient is `f(z) − f(z − γ g) ≈ γ f'(z) g`, which a saturated unit damps; it is not a multiple of
    backprop's, save under the squared loss, where the target is that of `GradientStep`. per: as there.
    Source: mirror descent with the potential F (Nemirovski and Yudin, 1983), one step.
    """

    def __call__(self, z: Tensor, g: Tensor, transfer: Transfer) -> Tensor:
        """`f(z − γ g)`."""
        return transfer.f(z - self._size() * g)


@dataclass(frozen=True)
class NaturalStep(_Step):
    """A step preconditioned on the output side, `y = f(z) − γ (B + λ tr(B)/O I)⁻¹ g` with `B = Σ_r g_r g_rᵀ` by group.

    damping: λ, in units of B's mean diagonal. The squared problem with these targets, solved exactly, is a step of
    K-FAC with the empirical Fisher's output factor, `−γ (B + λ_B)⁻¹ G (A + λ_A)⁻¹`. per: as for `GradientStep`.
    Raises BadInput for settings that cannot be, NonFinite where B has no inverse.
    Source: Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature" (2015).
    """

    damping: float = 1e-3
    decomposes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.damping < float("inf"):
            raise BadInput(f"NaturalStep needs a finite damping ≥ 0; got {self}")

    def __call__(self, z: Tensor, g: Tensor, transfer: Transfer) -> Tensor:
        """`f(z) − γ (B + λ tr(B)/O I)⁻¹ g`."""
        rows = g.transpose(0, 1)
        second = rows.mT @ rows
        damping = self.damping * second.diagonal(dim1=-2, dim2=-1).mean(-1)
        return transfer.f(z) - self._size() * ridge(second, rows, damping).transpose(0, 1)


def factor(target: Target, gamma: float, samples: int) -> float:
    """The factor of a parameter's gradient: γ, times N for a target per sample."""
    return gamma * samples if getattr(target, "per", "batch") == "sample" else gamma


def fill_in(target: Target, gamma: float, samples: int) -> Target:
    """The target with the optimizer's γ for a batch of N samples; a user's function as it is."""
    if not isinstance(target, _Step):
        return target
    return replace(target, gamma=factor(target, gamma, samples), per="batch")
