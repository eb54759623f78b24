"""The inverse of a damped matrix of low rank, such as the mean of few outer products, from a root of it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LOW_RANK_FROM", "ThinInverse", "inverse_of_low_rank", "most_rank", "thin_inverse"]

LOW_RANK_FROM = 512  # rows from which looking for a root pays
_SHARE = 4  # the rank may be this part of the rows
_LEFT = 8  # times eps times the trace: rounding errors of a matrix, and of its factorization
_PIVOTS = 64  # chosen at once


class ThinInverse(NamedTuple):
    """`(A + λI)⁻¹ = I / λ − X Xᵀ` of a matrix `[I,I]` of rank r. thin: X `[I,r]`; damping: λ, a number.

    Products take `2 r` multiply-adds for each element in place of `I`. Source: Woodbury (1950).
    """

    thin: Tensor
    damping: Tensor

    def after(self, w: Tensor) -> Tensor:
        """`w (A + λI)⁻¹` for w `[..., O,I]`."""
        return (w / self.damping).sub_((w @ self.thin) @ self.thin.mT)

    def largest(self) -> Tensor:
        """The largest diagonal entry, which no entry exceeds."""
        return 1 / self.damping - self.thin.square().sum(1).min()

    def dense(self) -> Tensor:
        """`[I,I]`, exactly symmetric."""
        product = self.thin @ self.thin.mT
        result = (product + product.mT).mul_(-0.5)
        result.diagonal().add_(1 / self.damping)
        return result


def most_rank(A: Tensor) -> int:
    """The rank up to which a matrix `[..., i, i]` counts as one of low rank."""
    return A.shape[-1] // _SHARE


def inverse_of_low_rank(A: Tensor, damping: Tensor) -> Tensor | None:
    """`(A + damping I)⁻¹` of symmetric matrices whose rank is at most a quarter of their rows; None for others.

    Shapes: A `[..., i, i]`, damping `[...]`; returns `[..., i, i]`, exactly symmetric.
    """
    found, i = [], A.shape[-1]
    if i >= LOW_RANK_FROM and A.shape[-2:] == (i, i):
        for matrix, extra in zip(A.reshape(-1, i, i), damping.expand(A.shape[:-2]).flatten(), strict=True):
            inverse = thin_inverse(matrix, extra)
            if inverse is None:
                return None
            found.append(inverse.dense())
    return torch.stack(found).reshape(A.shape) if found else None


def thin_inverse(A: Tensor, damping: Tensor) -> ThinInverse | None:
    """The inverse of `A + damping I`, A `[i,i]` symmetric, of a rank of at most a quarter of its rows; None for others.

    With A = L Lᵀ and L `[i,r]`, X = L C⁻ᵀ / √damping with C Cᵀ = damping I + LᵀL, in `i r²` multiply-adds. What L
    leaves of A has a trace of at most `8 eps tr A`, the size of rounding errors; that A is no other matrix of the same
    diagonal is tried on a vector.
    Source: Woodbury (1950); for L, Higham (1990), "Analysis of the Cholesky decomposition of a semi-definite matrix".
    """
    if len(A) < LOW_RANK_FROM or A.dtype not in (torch.float32, torch.float64) or not float(damping) > 0:
        return None
    root = None if _is_of_full_rank(_largest_part(A)) else _root(A)
    if root is None:
        return None
    inner, extra = root.T @ root, damping.double()
    inner.diagonal().add_(extra)
    factor, info = torch.linalg.cholesky_ex(inner)
    thin = torch.linalg.solve_triangular(factor, root.T, upper=False).div_(extra.sqrt()).mT.to(A.dtype)
    good = not bool(info) and bool(torch.isfinite(thin).all()) and math.isfinite(1 / float(damping))
    return ThinInverse(thin, damping.to(A.dtype)) if good else None


def _largest_part(A: Tensor) -> Tensor:
    """The principal submatrix of the largest diagonal entries, of one row more than the rank may be."""
    rows = A.diagonal().topk(most_rank(A) + 1).indices
    return A[rows][:, rows]


def _is_of_full_rank(A: Tensor) -> bool:
    """Whether no pivot of Cholesky's decomposition is of the size of rounding errors.

    Of a part of a matrix it takes a tenth of the time of looking for the root that the matrix then lacks.
    """
    factor, info = torch.linalg.cholesky_ex(A)
    floor = _LEFT * torch.finfo(A.dtype).eps * A.diagonal().sum()
    return not bool(info) and bool(factor.diagonal().min().square() > floor)


def _root(A: Tensor) -> Tensor | None:
    """L `[i,r]`, float64, with L Lᵀ = A to rounding; None where r would be too large, or A has no such root.

    Cholesky's decomposition with pivoting, some pivots at a time, each block by its own eigenvectors.
    """
    i, eps = len(A), torch.finfo(A.dtype).eps
    left = A.diagonal().double()
    floor = _LEFT * eps * float(left.sum())
    root = left.new_empty(i, 0)
    while float(left.clamp(min=0).sum()) > floor:  # NaN and infinity compare false, and are refused below
        pivots = left.topk(_PIVOTS).indices
        rows = A[pivots].double() - root[pivots] @ root.T
        if not bool(torch.isfinite(rows).all()):
            return None
        values, vectors = torch.linalg.eigh(rows[:, pivots])
        kept = values > eps**0.5 * values[-1]
        if float(values[-1]) <= 0 or root.shape[1] + int(kept.sum()) > most_rank(A):
            return None
        new = rows.T @ (vectors[:, kept] / values[kept].sqrt())
        root = torch.cat([root, new], 1)
        left = left - new.square().sum(1)
    signs = torch.randint(2, (i,), generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1).to(A)
    missed = A @ signs - (root @ (root.T @ signs.double())).to(A.dtype)
    return root if float(missed.norm()) <= floor * i**0.5 < math.inf else None
