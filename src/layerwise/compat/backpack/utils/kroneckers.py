"""Kronecker products of factors `[A, B, ...]`: dense, times vectors, and inverted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

from layerwise.errors import BadInput

__all__ = [
    "apply_inv_kfac_mat_prod",
    "apply_kfac_mat_prod",
    "inv_kfac_mat_prod",
    "inv_kfacs",
    "kfac_mat_prod",
    "kfacs_to_mat",
    "two_kfacs_to_mat",
]

_SMALLEST = 1e-8  # lower bound of |eigenvalue| before inversion


def two_kfacs_to_mat(A: Tensor, B: Tensor) -> Tensor:
    """A (x) B."""
    return torch.kron(A.contiguous(), B.contiguous())


def kfacs_to_mat(factors: Sequence[Tensor]) -> Tensor:
    """A (x) B (x) ..."""
    return reduce(two_kfacs_to_mat, factors)


def kfac_mat_prod(factors: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """The function M -> (A (x) B (x) ...) M, for a matrix `[D, V]` or a vector `[D]`."""
    if any(factor.dim() != 2 for factor in factors):
        raise BadInput(f"Kronecker factors must be matrices, got {[tuple(factor.shape) for factor in factors]}")

    def product(mat: Tensor) -> Tensor:
        columns = mat.reshape(len(mat), -1)
        out = columns.reshape(*(factor.shape[1] for factor in factors), columns.shape[1])
        for axis, factor in enumerate(factors):
            out = torch.tensordot(factor, out, ([1], [axis])).movedim(0, axis)
        return out.reshape(-1, columns.shape[1]) if mat.dim() == 2 else out.reshape(-1)

    return product


def apply_kfac_mat_prod(factors: Sequence[Tensor], mat: Tensor) -> Tensor:
    """(A (x) B (x) ...) M."""
    return kfac_mat_prod(factors)(mat)


def inv_kfacs(factors: Sequence[Tensor], shift: float | Sequence[float] | None = None) -> list[Tensor]:
    """(A + s_1 I)^-1, (B + s_2 I)^-1, ... of symmetric factors; one shift for all, one for each, or none.

    Eigenvalues of modulus below 1e-8 count as 1e-8.
    """
    each = list(shift) if isinstance(shift, (list, tuple)) else [shift or 0.0] * len(factors)
    if len(each) != len(factors):
        raise BadInput(f"got {len(each)} shifts for {len(factors)} Kronecker factors; give one for each")
    inverses = []
    for factor, s in zip(factors, each, strict=True):
        values, vectors = torch.linalg.eigh(factor)
        inverse = (values + s).reciprocal().clamp(-1 / _SMALLEST, 1 / _SMALLEST)
        inverses.append(vectors * inverse @ vectors.mT)
    return inverses


def inv_kfac_mat_prod(
    factors: Sequence[Tensor], shift: float | Sequence[float] | None = None
) -> Callable[[Tensor], Tensor]:
    """The function M -> ((A + s_1 I)^-1 (x) (B + s_2 I)^-1 (x) ...) M."""
    return kfac_mat_prod(inv_kfacs(factors, shift))


def apply_inv_kfac_mat_prod(
    factors: Sequence[Tensor], mat: Tensor, shift: float | Sequence[float] | None = None
) -> Tensor:
    """((A + s_1 I)^-1 (x) (B + s_2 I)^-1 (x) ...) M."""
    return inv_kfac_mat_prod(factors, shift)(mat)
