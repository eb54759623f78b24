"""Measures of a training step: each is a pure function from the observed step to numbers by parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from layerwise.monitor.reduced import GGNTrace, LargestEigenvalue
from layerwise.quantities import NoiseScale, PairwiseDot, Quantity
from layerwise.quantities.base import takes_draws
from layerwise.tensors import wide_type, widened

__all__ = [
    "Measure",
    "Step",
    "alignment",
    "curvature",
    "default",
    "gradient_norm",
    "largest_eigenvalue",
    "loss",
    "noise_scale",
    "signal_to_noise",
    "update_cosine",
    "update_size",
]

WHOLE = ""  # the name of the whole model's number


@dataclass(frozen=True)
class Step:
    """The input of a measure: one training step.

    L is the sum of all losses whose backward ran in the step, one or several (gradient accumulation).
    number: of the step, from 0. loss: L, 0-dim. gradient: what was added to each `.grad`, before any clipping.
    before, after: the parameters at the step's start and end. All by parameter name, `[*shape]`, detached.
    """

    number: int
    loss: Tensor
    gradient: Mapping[str, Tensor]
    before: Mapping[str, Tensor]
    after: Mapping[str, Tensor]


def _none(generator: torch.Generator) -> Sequence[Quantity]:
    return ()


@dataclass(frozen=True)
class Measure:
    """A name, a pure function, and the quantities that it needs.

    name: of the series; a number of a parameter is logged as "name/parameter", that of the whole model as "name".
    of: `(step, *results) -> {parameter name: number}`, numbers as floats or 0-dim tensors, the whole model's under
    the name ""; results are those of the quantities, in order. quantities: a function that makes new quantities for
    each step, from a generator seeded by the step's number.

        weight_norm = Measure("weight_norm", lambda step: {n: p.norm() for n, p in step.after.items()})
    """

    name: str
    of: Callable[..., Mapping[str, Tensor | float]]
    quantities: Callable[[torch.Generator], Sequence[Quantity]] = _none


# -- from the gradient and the parameters alone -------------------------------------------------------------


def loss() -> Measure:
    """The loss L, in its own units."""
    return Measure("loss", _loss)


def gradient_norm() -> Measure:
    """The Euclidean norm ‖∂L/∂θ‖ by parameter and whole, loss per parameter unit."""
    return Measure("gradient_norm", _gradient_norm)


def update_size() -> Measure:
    """The relative size of the step, ‖θ_after − θ_before‖ / ‖θ_before‖, by parameter and whole; no unit.

    Infinite for a parameter that was zero and moved, NaN for one that was zero and stayed so.
    """
    return Measure("update_size", _update_size)


def update_cosine() -> Measure:
    """The cosine of the step with steepest descent, ⟨Δθ, −g⟩ / (‖Δθ‖ ‖g‖) with g = ∂L/∂θ, by parameter and whole.

    1 for plain gradient descent; smaller the more an optimizer, a preconditioner or a layer-local problem turns the
    step away from the gradient. NaN where either is zero.
    """
    return Measure("update_cosine", _update_cosine)


# What they compute stands at the top level, so that monitors can be pickled.


def _loss(step: Step) -> dict[str, Tensor]:
    return {WHOLE: step.loss}


def _gradient_norm(step: Step) -> dict[str, Tensor]:
    return _norms(step.gradient)


def _update_size(step: Step) -> dict[str, Tensor]:
    moved, size = _norms(_moves(step)), _norms(step.before)
    return {name: moved[name] / size[name] for name in moved}


def _update_cosine(step: Step) -> dict[str, Tensor]:
    moves = {name: d for name, d in _moves(step).items() if name in step.gradient}
    dots = {name: -(widened(d) * step.gradient[name]).sum() for name, d in moves.items()}
    down = {name: step.gradient[name] for name in moves}
    a, b = _norms(moves), _norms(down)
    dots |= {WHOLE: _sum(dots)} if dots else {}
    return {name: dot / (a[name] * b[name]) for name, dot in dots.items()}


def _moves(step: Step) -> dict[str, Tensor]:
    return {name: step.after[name] - old for name, old in step.before.items()}


def _norms(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Euclidean norms by name, and under "" that of all tensors together."""
    if not tensors:
        return {}
    norms = {name: torch.linalg.vector_norm(t, dtype=wide_type(t.dtype)) for name, t in tensors.items()}
    return {**norms, WHOLE: _sum({name: n.square() for name, n in norms.items()}).sqrt()}


def _sum(numbers: Mapping[str, Tensor]) -> Tensor:
    first = next(iter(numbers.values()))
    return torch.stack([n.to(first) for n in numbers.values()]).sum()


# -- from quantities ----------------------------------------------------------------------------------------


def noise_scale() -> Measure:
    """The simple gradient noise scale tr Σ / |G|², by parameter and whole, in samples: `lw.NoiseScale`.

    Infinite where the batch is too small to estimate |G|². Needs per-sample gradients.
    Source: McCandlish et al. (2018), eq. 2.9.
    """
    return Measure("noise_scale", _with_total, partial(_asked, partial(NoiseScale, snr=False)))


def signal_to_noise() -> Measure:
    """The median over a parameter's elements of h² / s²: squared mean over variance of the samples' gradients.

    By parameter, and over all elements; no unit; about 0.45/N for pure noise. The elements are those of
    `lw.NoiseScale().snr`. Needs per-sample gradients.
    Source: Mahsereci et al. (2017), who stop training when the mean over elements falls to 1/N.
    """
    return Measure("signal_to_noise", _medians, partial(_asked, NoiseScale))


def _medians(step: Step, noise: Any) -> dict[str, Tensor]:
    flat = {name: r.flatten() for name, r in noise.snr.items() if r.numel()}
    whole = torch.cat([r.to(next(iter(flat.values()))) for r in flat.values()]) if flat else None
    found = {name: r.median() for name, r in flat.items()}
    return found if whole is None else {**found, WHOLE: whole.median()}


def alignment() -> Measure:
    """The mean cosine between the gradients of two samples of the batch, by parameter and whole: `lw.PairwiseDot`.

    mean over n ≠ m of ⟨g_n, g_m⟩ / (‖g_n‖ ‖g_m‖), in [−1/(N−1), 1]; 0 for a pair with a zero gradient. Needs
    per-sample gradients, one backward pass in the step, N ≥ 2 (NaN for N = 1), and memory N² for each parameter.
    Source: Fort et al. (2019), stiffness measured by the cosine.
    """
    return Measure("alignment", _cosines, partial(_asked, PairwiseDot))


def _cosines(step: Step, dots: Any) -> dict[str, Tensor]:
    return {**{name: _cosine(d) for name, d in dots.items()}, WHOLE: _cosine(sum(dots.values()))}


def _cosine(dots: Tensor) -> Tensor:
    n = len(dots)
    if n < 2:
        return dots.new_full((), float("nan"))
    size = dots.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(size > 0, 1 / size, torch.zeros_like(size))
    cosines = dots * inverse[:, None] * inverse[None, :]
    return (cosines.sum() - cosines.diagonal().sum()) / (n * (n - 1))


@takes_draws
def curvature(draws: int | None = 1) -> Measure:
    """The trace of the generalized Gauss-Newton matrix of L, by parameter and whole: `lw.DiagGGN`.

    Σ_n tr J_nᵀ H_n J_n, loss per squared parameter unit; draws=k: unbiased, from k sampled columns; None: exact.
    Needs per-sample gradients, and a loss whose Hessian has a root.
    Source: Dangel et al. (2020), eq. 19; Schneider, Dangel and Hennig (2021), instrument "HessTrace".
    """
    return Measure("curvature", _with_total, partial(_drawn, partial(GGNTrace, draws)))


def largest_eigenvalue() -> Measure:
    """The largest eigenvalue of the sampled generalized Gauss-Newton matrix of L, by diagonal block and whole.

    λ_max of Σ_n s_n s_nᵀ with s_n sample n's gradient from one sampled column, computed from the Gram matrix
    `[N,N]` of the s_n. The estimate is biased upwards, mostly for small N, since λ_max is convex in the matrix.
    Needs per-sample gradients, one loss call and one backward pass in the step.
    Source: Dangel, Tatzel and Hennig (2022), ViViT.
    """
    return Measure("largest_eigenvalue", _with_total, partial(_drawn, LargestEigenvalue))


def _asked(quantity: Callable[[], Quantity], generator: torch.Generator) -> list[Quantity]:
    return [quantity()]


def _drawn(quantity: Callable[[torch.Generator], Quantity], generator: torch.Generator) -> list[Quantity]:
    return [quantity(generator)]


def _with_total(step: Step, found: Any) -> dict[str, Tensor]:
    return {**found, WHOLE: found.total}


def default() -> tuple[Measure, ...]:
    """Loss, gradient norm, update size and cosine, noise scale, alignment, and curvature from one sampled column."""
    return (loss(), gradient_norm(), update_size(), update_cosine(), noise_scale(), alignment(), curvature())
