"""Damped least squares by a sequence of ever more robust solvers, ending in a finite result or a typed error.

One function serves the exact local problem of LocoProp-S, the preconditioner of FOOF and the running moments of AM-mem:
all three solve `W (A + damping I) = B` with a positive semidefinite `A`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from layerwise.errors import BadInput, NonFinite
from layerwise.operators.low_rank import inverse_of_low_rank, most_rank
from layerwise.tensors import is_finite

__all__ = ["by_cholesky", "coordinate_descent", "inverse", "ridge"]

_TYPES = (torch.float32, torch.float64)
JITTERS = (1.0, 10.0, 100.0)  # times `floor`: at the size of the rounding errors in A itself


def ridge(A: Tensor, B: Tensor, damping: float | Tensor = 0.0) -> Tensor:
    """Solve the regularized normal equations of a linear layer.

    W (A + damping I) = B, that is `argmin_W ½ tr(W A Wᵀ) − tr(W Bᵀ) + ½ damping |W|²`.

    The symmetric part of A is used. Cholesky is tried first; where it fails, Cholesky with a diagonal jitter of 1, 10
    and 100 times `i · eps · largest eigenvalue`; where that fails too, the eigendecomposition in float64, with its
    spectrum clamped from below at the same size. Where `A + damping I` is zero, the solution is that of least norm,
    W = 0.

    Shapes: A `[..., i, i]`, B `[..., o, i]`, damping a number or `[...]`; returns `[..., o, i]`.
    Units: damping has the units of A.
    Raises: `NonFinite` where A, B or the damping have NaN or infinity, or where the solution is beyond
    the range of its dtype; `BadInput` for shapes or types that do not fit, or a negative damping.
    Source: Hoerl and Kennard 1970; as a layer's update, Benzing 2022, "Gradient descent on
    neurons and its link to approximate second-order optimization" (FOOF).
    """
    if B.ndim < 2 or A.shape[-1:] != B.shape[-1:] or A.dtype != B.dtype or A.device != B.device:
        raise BadInput(
            f"ridge: A is {A.dtype} {tuple(A.shape)} on {A.device} and B {B.dtype} {tuple(B.shape)} on "
            f"{B.device}; expected A [..., i, i] and B [..., o, i] of one type on one device."
        )
    return _solve("ridge", A, B, damping)


@torch.no_grad()
def by_cholesky(A: Tensor, B: Tensor | None, damping: float | Tensor = 0.0) -> tuple[Tensor, Tensor]:
    """`ridge`, or for B = None `inverse`, by Cholesky alone: the solutions, and whether each is theirs, `[...]`.

    Nothing is waited for, and nothing raised: where a flag is False, `ridge` or `inverse` tells why, or finds another
    way. Shapes: as those.
    """
    damped = _symmetric(A)
    damped.diagonal(dim1=-2, dim2=-1).add_(damping[..., None] if isinstance(damping, Tensor) else damping)
    factor, info = torch.linalg.cholesky_ex(damped)
    if B is None:  # torch waits for an inverse from the factor
        eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        found = torch.cholesky_solve(eye.expand_as(factor), factor)
        found = (found + found.mT).div_(2)
    else:
        batch = torch.broadcast_shapes(factor.shape[:-2], B.shape[:-2])
        factor, B = factor.expand(*batch, *factor.shape[-2:]), B.expand(*batch, *B.shape[-2:])
        found = torch.cholesky_solve(B.mT, factor).mT
    given, made = ((t.abs() < math.inf).all(-1).all(-1) for t in (damped, found))
    return found, (info == 0) & given & made & (damping >= 0)


def inverse(A: Tensor, damping: float | Tensor = 0.0, terms: float = 0.0) -> Tensor:
    """Invert a damped positive semidefinite matrix by the solvers of `ridge`.

    (A + damping I)⁻¹, exactly symmetric; the zero matrix where `A + damping I` is zero. A large matrix of low rank is
    inverted by a root of it (`inverse_of_low_rank`), which is not looked for where A is known to be a mean of so many
    outer products (`terms`) that its rank may be larger.

    Shapes: A `[..., i, i]`, damping a number or `[...]`; returns `[..., i, i]`. Units: one over A's.
    Raises: as `ridge`.
    """
    with torch.no_grad():
        extra = damping.to(A.dtype) if isinstance(damping, Tensor) else A.new_full((), damping)
        found = inverse_of_low_rank(A, extra) if terms <= most_rank(A) else None
        return _solve("inverse", A, None, damping) if found is None else found


def coordinate_descent(
    W: Tensor, A: Tensor, B: Tensor, sweeps: int = 1, damping: float | Tensor = 0.0, l1: float | Tensor = 0.0
) -> Tensor:
    """Improve W by coordinate descent: exact minimization over one column after the other.

    w_j += (b_j − W a_j) / A_jj for all columns j, `sweeps` times, where A includes the damping; converges to
    `ridge(A, B, damping)`. Columns with A_jj = 0 do not change. l1: λ of a term λ|W|₁ added to `ridge`'s objective, a
    number or `[i]`, one for each column: w_j is then soft-thresholded at λ/A_jj, which is still the exact minimum over
    the column.

    Shapes: W and B `[..., o, i]`, A `[..., i, i]`; returns a new `[..., o, i]`.
    Raises: as `ridge`; `BadInput` for a negative l1.
    Source: Mairal, Bach, Ponce and Sapiro 2010, "Online learning for matrix factorization", algorithm 2; with l1,
    Friedman, Hastie, Höfling and Tibshirani 2007, "Pathwise coordinate optimization".
    """
    if W.shape != B.shape or W.dtype != B.dtype:
        raise BadInput(
            f"coordinate_descent: W is {W.dtype} {tuple(W.shape)}, B {B.dtype} {tuple(B.shape)}; expected the same."
        )
    if A.shape[-1:] != B.shape[-1:] or A.dtype != B.dtype:
        raise BadInput(
            f"coordinate_descent: A is {A.dtype} {tuple(A.shape)}, B {B.dtype} {tuple(B.shape)}; expected "
            "[..., i, i] and [..., o, i] of one type."
        )
    if not (torch.isfinite(B).all() and torch.isfinite(W).all()):
        raise NonFinite("coordinate_descent: W or B holds NaN or infinity; skip this batch.")
    damped = _damped("coordinate_descent", A, damping)
    W = W.clone()
    threshold = torch.as_tensor(l1, dtype=W.dtype, device=W.device).expand(A.shape[-1])
    if not (threshold >= 0).all():
        raise BadInput(f"coordinate_descent: l1 is {l1}; it must not be negative.")
    sparse = bool(threshold.any())
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    step = torch.where(diagonal > 0, 1 / diagonal, 0.0)
    for _ in range(sweeps):
        for j in range(A.shape[-1]):
            residual = B[..., j] - (W @ damped[..., :, j, None])[..., 0]
            W[..., j] += residual * step[..., j, None]
            if sparse:
                w, most = W[..., j], threshold[j] * step[..., j, None]
                W[..., j] = w.sign() * (w.abs() - most).clamp_min(0)
    if not torch.isfinite(W).all():
        raise NonFinite(f"coordinate_descent: the result is beyond the range of {W.dtype}; raise the damping.")
    return W


def _damped(name: str, A: Tensor, damping: float | Tensor) -> Tensor:
    """The checked, symmetrized `A + damping I`."""
    if A.ndim < 2 or A.shape[-1] != A.shape[-2] or A.dtype not in _TYPES:
        raise BadInput(f"{name}: A is {A.dtype} {tuple(A.shape)}; expected a square float32 or float64 [..., i, i].")
    extra = torch.as_tensor(damping, dtype=A.dtype, device=A.device)
    if not is_finite(A) or not is_finite(extra):
        raise NonFinite(f"{name}: A {tuple(A.shape)} or the damping holds NaN or infinity; skip this batch.")
    if (extra < 0).any():
        raise BadInput(f"{name}: damping is {damping}; it must not be negative.")
    symmetric = _symmetric(A)
    symmetric.diagonal(dim1=-2, dim2=-1).add_(extra[..., None])
    return symmetric


def _symmetric(A: Tensor) -> Tensor:
    half = A / 2  # the sum of two large entries may overflow
    return half + half.mT


def _floor(A: Tensor) -> Tensor:
    """The size of the rounding errors of a finite A, i · eps · (bound on the largest eigenvalue), `[...]`."""
    i, most = A.shape[-1], torch.finfo(A.dtype).max
    largest = _symmetric(A).abs().sum(-1).amax(-1) if i else A.new_zeros(A.shape[:-2])
    return i * torch.finfo(A.dtype).eps * largest.clamp(max=most)


def _solve(name: str, A: Tensor, B: Tensor | None, damping: float | Tensor) -> Tensor:
    """`B (A + damping I)⁻¹`, or the inverse for B = None; each matrix of the batch falls back by itself."""
    if A.device.type != "cpu" and A.ndim > 1 and A.shape[-1] == A.shape[-2] and A.dtype in _TYPES and A.numel():
        found, sound = by_cholesky(A, B, damping)
        if bool(sound.all()):
            return found
    with torch.no_grad():
        if B is not None and not is_finite(B):
            raise NonFinite(f"{name}: B {tuple(B.shape)} holds NaN or infinity; skip this batch.")
        damped = _damped(name, A, damping)
        batch = damped.shape[:-2]
        if B is not None:
            batch = torch.broadcast_shapes(batch, B.shape[:-2])
            damped = damped.expand(*batch, *damped.shape[-2:])
            B = B.expand(*batch, *B.shape[-2:])
        result, good = _cholesky(damped, B)
        if good.all():
            return result
        result, floor = result.clone(), _floor(A).expand(batch)
        for at in (~good).nonzero().tolist():
            where = tuple(at)
            rhs = None if B is None else B[where]
            result[where] = _last_rungs(name, damped[where], rhs, float(floor[where]))
        return result


def _cholesky(damped: Tensor, B: Tensor | None) -> tuple[Tensor, Tensor]:
    """The solutions, and for each matrix whether it was positive definite and its solution finite."""
    factor, info = torch.linalg.cholesky_ex(damped)
    if B is None:
        if bool(info.any()):  # a failed factor may have a zero pivot, for which cholesky_inverse raises
            eye = torch.eye(damped.shape[-1], dtype=damped.dtype, device=damped.device)
            factor = torch.where((info == 0)[..., None, None], factor, eye)
        result = torch.cholesky_inverse(factor)
        result = (result + result.mT).div_(2)
    else:
        result = torch.cholesky_solve(B.mT, factor).mT
    good = info == 0
    return result, good if is_finite(result) else good & torch.isfinite(result).all(-1).all(-1)


def _last_rungs(name: str, damped: Tensor, B: Tensor | None, floor: float) -> Tensor:
    """The fallbacks for one matrix that is not positive definite: jitter, then the clamped spectrum."""
    eye = torch.eye(len(damped), dtype=damped.dtype, device=damped.device)
    for jitter in JITTERS:
        if floor > 0:
            result, good = _cholesky(damped + jitter * floor * eye, B)
            if good:
                return result
    scale = float(damped.abs().max())  # rescales, so that the decomposition neither overflows nor underflows
    if scale == 0:
        return torch.zeros_like(damped if B is None else B)
    try:
        values, basis = torch.linalg.eigh(damped.double() / scale)
    except LinAlgError as error:
        raise NonFinite(f"{name}: the eigendecomposition of {tuple(damped.shape)} failed: {error}") from error
    values = values.clamp(min=max(floor / scale, torch.finfo(torch.float64).eps))
    right = (basis / values) @ basis.mT / scale
    result = (right if B is None else B.double() @ right).to(damped.dtype)
    if not torch.isfinite(result).all():
        raise NonFinite(
            f"{name}: the solution is beyond the range of {damped.dtype}: the largest entry of "
            f"A + damping I is {scale:.1e}; raise the damping."
        )
    return result
