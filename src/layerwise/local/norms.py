"""Norm balls: regularizers that keep the change of a layer's weights, `W − W₀`, within a radius of some norm.

A layer is the block-diagonal matrix of its groups `[K,O,I]`, and a bias `[K,O]` a matrix of one column; weight and bias
each have a ball of their own. In a ball, the least of a linear function `⟨G, W⟩` is at a vertex:

    argmin over ‖W − C‖ ≤ r of ⟨G, W⟩  =  C − r vertex(G),      ⟨G, vertex(G)⟩ = the dual norm of G

which is normalized, sign or orthogonalized descent, by the norm. Sources: Bernstein and Newhouse, "Old optimizer, new
norm" (2024), section 2; Pethick et al., "Training deep learning models with norm-constrained LMOs" (2025), section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from layerwise.errors import BadInput

__all__ = ["ColumnNorm", "FrobeniusNorm", "MaxNorm", "NormBall", "RowNorm", "SpectralNorm", "orthogonalized"]

Coefficients = tuple[float, float, float]


@dataclass(frozen=True)
class NormBall:
    """`‖W − C‖ ≤ radius` and `‖b − d‖ ≤ radius`: the regularizer is 0 there, and infinite elsewhere.

    radius: r. around: the centre, "start" for the weights before the step, or "zero". A subclass says the norm of
    matrices `[K,O,I]` by `vertex` and `nearest`, both of the unit ball. Raises BadInput for settings that cannot be.
    """

    radius: float = 1.0
    around: Literal["start", "zero"] = "start"

    def __post_init__(self) -> None:
        if not 0 < self.radius < math.inf or self.around not in ("start", "zero"):
            raise BadInput(f'a norm ball needs a finite radius > 0, around "start" or "zero"; got {self}')

    def __call__(self, weight: Tensor, bias: Tensor | None, gamma: float, average: object) -> NormBall:
        """The ball itself: a regularizer gives the term of a layer's problem."""
        return self

    def vertex(self, g: Tensor) -> Tensor:
        """A point of the unit ball at which `⟨g, D⟩` is largest, `[K,O,I]`; 0 where g is."""
        raise NotImplementedError

    def nearest(self, change: Tensor) -> Tensor:
        """The point of the unit ball nearest to a matrix `[K,O,I]`, in the Frobenius norm."""
        raise NotImplementedError

    def extent(self, shape: torch.Size) -> float:
        """The radius for a matrix `[K,O,I]`."""
        return self.radius

    def lowest(self, g: Tensor, start: Tensor) -> Tensor:
        """The change of a weight or bias from its start to where `⟨g, W⟩` is least in the ball."""
        matrix = _matrix(g)
        to = self.vertex(matrix).view_as(g) * -self.extent(matrix.shape)
        return to if self.around == "start" else to - start

    def projected(self, now: Tensor, start: Tensor) -> Tensor:
        """The point of the ball nearest to a weight or bias."""
        change, centre = (now - start, start) if self.around == "start" else (now, torch.zeros_like(now))
        matrix = _matrix(change)
        size = self.extent(matrix.shape)
        return centre + (self.nearest(matrix / size) * size).view_as(change)


class _LengthBall(NormBall):
    """The largest l2 norm of the parts of a matrix `[K,O,I]` that run over some of its dimensions."""

    _over: ClassVar[tuple[int, ...]]

    def vertex(self, g: Tensor) -> Tensor:
        """`G/‖G‖`, each part at length 1."""
        return _unit(g, self._over)

    def nearest(self, change: Tensor) -> Tensor:
        """`D/max(1, ‖D‖)`, each part."""
        return change / torch.linalg.vector_norm(change, dim=self._over, keepdim=True).clamp_min(1)


@dataclass(frozen=True)
class FrobeniusNorm(_LengthBall):
    """The l2 ball of a whole weight: `vertex(G) = G/‖G‖`, normalized gradient descent."""

    _over: ClassVar[tuple[int, ...]] = (0, 1, 2)


@dataclass(frozen=True)
class RowNorm(_LengthBall):
    """The largest l2 norm of a row, the weights into one output: `vertex(G)` has every row of G at length 1."""

    _over: ClassVar[tuple[int, ...]] = (2,)


@dataclass(frozen=True)
class ColumnNorm(_LengthBall):
    """The largest l2 norm of a column, the weights out of one input: `vertex(G)` has every column at length 1."""

    _over: ClassVar[tuple[int, ...]] = (1,)


@dataclass(frozen=True)
class MaxNorm(NormBall):
    """The l∞ ball of the elements: `vertex(G) = sign(G)`, sign descent."""

    def vertex(self, g: Tensor) -> Tensor:
        """`sign(G)`."""
        return g.sign()

    def nearest(self, change: Tensor) -> Tensor:
        """Elements clipped to [−1, 1]."""
        return change.clamp(-1, 1)


def _decomposable(matrix: Tensor) -> Tensor:
    """A matrix in half precision in float32, in which torch decomposes it."""
    return matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix


@dataclass(frozen=True)
class SpectralNorm(NormBall):
    """The largest singular value: `vertex(G) = U Vᵀ` of `G = U S Vᵀ`, the orthogonalized update of Muon.

    steps: of Newton-Schulz's iteration, which leaves singular values between about 0.7 and 1.2 in the place of 1, so
    that the ball is kept up to a fifth; None for the exact factor, by a singular value decomposition. coefficients,
    eps: of the iteration, as `torch.optim.Muon`'s by default. dtype: in which it runs, None for the weight's own.
    adjust: the radius times √max(1, O/I) with "original", times 0.2 √max(O, I) with "match_rms_adamw", as torch's
    `adjust_lr_fn`. Projections are exact, by a decomposition.
    Source: Jordan et al., "Muon" (2024); Bernstein and Newhouse (2024), section 2.3.
    """

    steps: int | None = 5
    coefficients: Coefficients = (3.4445, -4.7750, 2.0315)
    eps: float = 1e-7
    dtype: torch.dtype | None = torch.bfloat16
    adjust: Literal["original", "match_rms_adamw"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = self.steps is None or (isinstance(self.steps, int) and self.steps >= 1)
        known = self.adjust in (None, "original", "match_rms_adamw")
        if not (whole and known and len(self.coefficients) == 3 and self.eps > 0):
            raise BadInput(
                "SpectralNorm needs whole steps ≥ 1 or None, three coefficients, eps > 0, and adjust None, "
                f'"original" or "match_rms_adamw"; got {self}'
            )

    def vertex(self, g: Tensor) -> Tensor:
        """`U Vᵀ`, or Newton-Schulz's approximation."""
        if self.steps is None:
            u, s, vt = torch.linalg.svd(_decomposable(g), full_matrices=False)
            kept = s > s.amax(-1, keepdim=True) * max(g.shape[-2:]) * torch.finfo(g.dtype).eps
            return ((u * kept.unsqueeze(-2)) @ vt).to(g.dtype)
        dtype = g.dtype if self.dtype is None else self.dtype
        return orthogonalized(g.to(dtype), self.steps, self.coefficients, self.eps).to(g.dtype)

    def nearest(self, change: Tensor) -> Tensor:
        """Singular values clipped to 1."""
        u, s, vt = torch.linalg.svd(_decomposable(change), full_matrices=False)
        return ((u * s.clamp_max(1).unsqueeze(-2)) @ vt).to(change.dtype)

    def extent(self, shape: torch.Size) -> float:
        """The radius, adjusted to a matrix `[K,O,I]`."""
        size_out, size_in = shape[-2:]
        if self.adjust == "original":
            return self.radius * math.sqrt(max(1, size_out / size_in))
        return self.radius * 0.2 * math.sqrt(max(size_out, size_in)) if self.adjust else self.radius


def orthogonalized(g: Tensor, steps: int, coefficients: Coefficients, eps: float) -> Tensor:
    """Newton-Schulz's iteration `X ← a X + (b X Xᵀ + c (X Xᵀ)²) X` from `G/‖G‖`, of each matrix of `[K,O,I]`.

    In the type of G, and with torch's operations in torch's order, so that `torch.optim.Muon` has the same bits.
    """
    a, b, c = coefficients
    single = g.shape[0] == 1
    x = g[0] if single else g
    fma = torch.addmm if single else torch.baddbmm
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm() if single else torch.linalg.matrix_norm(x, keepdim=True)).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = fma(x, fma(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.mT if tall else x
    return x.unsqueeze(0) if single else x


def _matrix(t: Tensor) -> Tensor:
    return t if t.dim() == 3 else t.unsqueeze(-1)


def _unit(g: Tensor, dims: tuple[int, ...]) -> Tensor:
    """G at length 1 over some dimensions, 0 where it is 0; its largest element goes first, as squares underflow."""
    most = g.abs().amax(dims, keepdim=True)
    scaled = g / torch.where(most > 0, most, 1)
    return scaled / torch.linalg.vector_norm(scaled, dim=dims, keepdim=True).clamp_min(1)
