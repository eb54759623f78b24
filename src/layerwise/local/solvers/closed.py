"""Closed forms for the squared local problem: its exact minimiser, and gradient descent after T steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from layerwise.errors import BadInput, NonFinite
from layerwise.local.problem import LocalProblem, contract, predict, pull_gradient, refuse_terms
from layerwise.operators.ridge import ridge
from layerwise.tensors import is_finite, without_grad

__all__ = ["Side", "inputs_with_ones", "largest_curvature", "prox_step", "residual", "spectral_step"]

Side = Literal["auto", "inputs", "rows"]


@without_grad
def prox_step(problem: LocalProblem, side: Side = "auto") -> tuple[Tensor, Tensor | None]:
    """The exact minimiser of the squared local problem with its quadratic terms, as `(ΔW, Δb)`.

        ΔW = −(γ G_w + M) (AᵀA + c I)⁻¹,    G_w = Σ_r g_r a_rᵀ                      (side "inputs": I x I)
           = −γ Gᵀ (AAᵀ + c I)⁻¹ A − M (I − Aᵀ (AAᵀ + c I)⁻¹ A)/c                  (side "rows": R x R)

    with `c` the terms' curvature, 1/η for the proximal term alone, and `M` their gradient at the start, 0 for that
    term: push-through for the first part, Woodbury's identity for the second. A bias is solved for jointly, as one
    more input that is always 1. "auto" takes the smaller matrix; a looked-up table without a bias has a diagonal one.
    This is K-FAC with the input factor alone, FOOF (Benzing, 2022) and, for γ = 1, ProxProp (Frerix et
    al., 2018). Raises BadInput without a quadratic term or for another loss.
    """
    c = problem.stiffness
    if not c > 0:
        raise BadInput(
            "ProximalSolve has no quadratic term that bounds its step: give it eta=η > 0, or the regularizer "
            "Proximal(η) or WeightDecay; a problem of your own prox=η, or a pull"
        )
    _check_squared(problem, "prox_step")
    if _diagonal(problem):
        g, s = _table(problem)
        return -g / (s + c), None
    a, d, m = _squared_rows(problem)
    if _by_rows(a, side):
        gram = a @ a.mT
        moved = -ridge(gram, d.mT, c) @ a
        if m is not None:
            moved = moved - (m - ridge(gram, m @ a.mT, c) @ a) / c
        return _split(problem, moved)
    right = d.mT @ a
    return _split(problem, -ridge(a.mT @ a, right if m is None else right + m, c))


@without_grad
def spectral_step(problem: LocalProblem, rates: Sequence[float], side: Side = "auto") -> tuple[Tensor, Tensor | None]:
    """Gradient descent on the squared local problem after `len(rates)` steps, as `(ΔW, Δb)`.

        ΔW = −(γ G_w + M) h(AᵀA),   h ← h + rate·(1 − (s + c)·h) from 0;  equal rates: h(s) = (1 − (1 − rate·s)ᵀ)/s

    so T steps act as a spectral filter, much as damping by 1/(rate·T) does. `c`, `M`, `side` and the bias as in
    `prox_step`, c = 0 without a quadratic term. Raises BadInput for another loss.
    """
    _check_squared(problem, "spectral_step")
    c = problem.stiffness
    if _diagonal(problem):
        g, s = _table(problem)
        return -g * _filter(s, rates, c)[0], None
    a, d, m = _squared_rows(problem)
    if not _by_rows(a, side):
        s, v = _decomposed(torch.linalg.eigh, a.mT @ a)
        right = d.mT @ a if m is None else d.mT @ a + m
        return _split(problem, -((right @ v) * _filter(s, rates, c)[0].unsqueeze(-2)) @ v.mT)
    s, v = _decomposed(torch.linalg.eigh, a @ a.mT)
    h, slope = _filter(s, rates, c)
    moved = -((d.mT @ v) * h.unsqueeze(-2)) @ (v.mT @ a)
    if m is not None:  # h(AᵀA) = h(0) I + Aᵀ V (h(s) − h(0))/s Vᵀ A
        h0 = _filter(s.new_zeros(()), rates, c)[0]
        moved = moved - m * h0 - ((m @ a.mT @ v) * slope.unsqueeze(-2)) @ (v.mT @ a)
    return _split(problem, moved)


@without_grad
def largest_curvature(problem: LocalProblem) -> Tensor:
    """The largest eigenvalue of `AᵀA + c I` over the groups, with a bias as an input of 1."""
    if _diagonal(problem):
        return _table(problem)[1].max() + problem.stiffness
    a = inputs_with_ones(problem)
    gram = a @ a.mT if _by_rows(a, "auto") else a.mT @ a
    return _decomposed(torch.linalg.eigvalsh, gram).max().clamp_min(0) + problem.stiffness


def _decomposed(decompose: Callable[[Tensor], Any], gram: Tensor) -> Any:
    """The eigendecomposition of a Gram matrix. Raises NonFinite where there is none, as that of huge rows."""
    try:
        return decompose(gram)
    except LinAlgError as error:
        what = f"the Gram matrix {tuple(gram.shape)} of a layer's inputs"
        said = "holds NaN or infinity" if not is_finite(gram) else f"has no eigendecomposition: {error}"
        raise NonFinite(f"{what} {said}") from error


def _filter(s: Tensor, rates: Sequence[float], c: float) -> tuple[Tensor, Tensor]:
    """`h(s)`, and `(h(s) − h(0))/s` by a separate recursion without cancellation."""
    h, h0, slope = torch.zeros_like(s), s.new_zeros(()), torch.zeros_like(s)
    for rate in rates:
        slope = slope - rate * ((s + c) * slope + h0)
        h, h0 = h + rate * (1 - (s + c) * h), h0 + rate * (1 - c * h0)
    return h, slope


def _diagonal(problem: LocalProblem) -> bool:
    """Whether `AᵀA` is diagonal: a looked-up table without a bias."""
    return problem.indexed and problem.bias is None


def _table(problem: LocalProblem) -> tuple[Tensor, Tensor]:
    """The gradient at the start `[1,O,I]`, and how often each row of the table was looked up, `[I]`."""
    size_in, leaning = problem.weight.shape[-1], pull_gradient(problem)
    g = contract(residual(problem), problem.a, size_in)
    counts = torch.bincount(problem.a, minlength=size_in).to(g.dtype)
    return g if leaning is None else g + leaning[0], counts


def _check_squared(problem: LocalProblem, asker: str) -> None:
    refuse_terms(problem, asker)
    if not problem.transfer.is_squared:
        raise BadInput(
            f"{asker} is a closed form for the squared loss, and the problem has {problem.transfer.name}'s "
            "matching loss: use local steps, Newton or Anderson, or the squared loss"
        )


def residual(problem: LocalProblem) -> Tensor:
    """`z − target` at the starting weights, `[R,K,O]`."""
    return predict(problem) - problem.target if problem.g is None else problem.gamma * problem.g


def inputs_with_ones(problem: LocalProblem) -> Tensor:
    """Inputs `[K,R,I]`, with a 1 for the bias."""
    a = problem.a
    if problem.indexed:
        a = torch.nn.functional.one_hot(a, problem.weight.shape[-1]).to(problem.weight.dtype).unsqueeze(1)
    a = a.transpose(0, 1)
    return a if problem.bias is None else torch.cat((a, a.new_ones(*a.shape[:-1], 1)), -1)


def _squared_rows(problem: LocalProblem) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inputs `[K,R,I]`, `z − target` at the start `[K,R,O]`, and the quadratic terms' gradient `[K,O,I]` or None."""
    leaning = pull_gradient(problem)
    m = None if leaning is None else leaning[0]
    if leaning is not None and leaning[1] is not None:
        m = torch.cat((leaning[0], leaning[1].unsqueeze(-1)), -1)
    return inputs_with_ones(problem), residual(problem).transpose(0, 1), m


def _by_rows(a: Tensor, side: Side) -> bool:
    return side == "rows" or (side == "auto" and a.shape[-2] < a.shape[-1])


def _split(problem: LocalProblem, moved: Tensor) -> tuple[Tensor, Tensor | None]:
    return (moved, None) if problem.bias is None else (moved[..., :-1], moved[..., -1])
