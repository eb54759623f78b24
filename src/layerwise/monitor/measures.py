"""What can be measured at a step: each measure is one pure function of what was seen, to numbers by parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerwise.monitor.reduced import GGNTrace, LargestEigenvalue
from layerwise.quantities import NoiseScale, PairwiseDot, Quantity
from layerwise.quantities.base import takes_draws

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
    """One step as the measures see it.

    L is the sum of what backward was called on in the step, one number or several (gradient accumulation).
    number: of the step, from 0. loss: L, 0-dim. gradient: what was added to each `.grad`, before anyone clipped it.
    before, after: the parameters at the step's start and end. All by name, `[*shape]`; nothing requires grad.
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
    the name ""; results are those of the quantities, in order. quantities: makes them anew for each step, from a
    generator for draws, which is seeded by the step's number.

        weight_norm = Measure("weight_norm", lambda step: {n: p.norm() for n, p in step.after.items()})
    """

    name: str
    of: Callable[..., Mapping[str, Tensor | float]]
    quantities: Callable[[torch.Generator], Sequence[Quantity]] = _none


# -- from the gradient and the parameters alone -------------------------------------------------------------


def loss() -> Measure:
    """L, in units of the loss."""
    return Measure("loss", lambda step: {WHOLE: step.loss})


def gradient_norm() -> Measure:
    """The Euclidean norm ‖∂L/∂θ‖ by parameter and whole, loss per parameter unit."""
    return Measure("gradient_norm", lambda step: _norms(step.gradient))


def update_size() -> Measure:
    """The relative size of the step, ‖θ_after − θ_before‖ / ‖θ_before‖, by parameter and whole; no unit.

    Infinite for a parameter that left zero, NaN for one that stayed there.
    """

    def of(step: Step) -> dict[str, Tensor]:
        moved, size = _norms(_moves(step)), _norms(step.before)
        return {name: moved[name] / size[name] for name in moved}

    return Measure("update_size", of)


def update_cosine() -> Measure:
    """The cosine of the step with steepest descent, ⟨Δθ, −g⟩ / (‖Δθ‖ ‖g‖) with g = ∂L/∂θ, by parameter and whole.

    1 for plain gradient descent; how far an optimizer, a preconditioner or a layer's local problem turns away from
    the global gradient. NaN where either is zero.
    """

    def of(step: Step) -> dict[str, Tensor]:
        moves = {name: d for name, d in _moves(step).items() if name in step.gradient}
        dots = {name: -(d * step.gradient[name]).sum() for name, d in moves.items()}
        down = {name: step.gradient[name] for name in moves}
        a, b = _norms(moves), _norms(down)
        dots |= {WHOLE: _sum(dots)} if dots else {}
        return {name: dot / (a[name] * b[name]) for name, dot in dots.items()}

    return Measure("update_cosine", of)


def _moves(step: Step) -> dict[str, Tensor]:
    return {name: step.after[name] - old for name, old in step.before.items()}


def _norms(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By name, and of all together."""
    if not tensors:
        return {}
    norms = {name: torch.linalg.vector_norm(t) for name, t in tensors.items()}
    return {**norms, WHOLE: _sum({name: n.square() for name, n in norms.items()}).sqrt()}


def _sum(numbers: Mapping[str, Tensor]) -> Tensor:
    first = next(iter(numbers.values()))
    return torch.stack([n.to(first) for n in numbers.values()]).sum()


# -- from quantities ----------------------------------------------------------------------------------------


def noise_scale() -> Measure:
    """The simple gradient noise scale tr Σ / |G|², by parameter and whole, in samples: `lw.NoiseScale`.

    Infinite where the batch is too small to see the gradient. Needs the samples told apart.
    Source: McCandlish et al. (2018), eq. 2.9.
    """
    return Measure("noise_scale", _with_total, lambda generator: [NoiseScale(snr=False)])


def signal_to_noise() -> Measure:
    """The median over a parameter's elements of h² / s²: squared mean over variance of the samples' gradients.

    By parameter, and over all elements; no unit; about 0.45/N where there is noise alone. Elements are those of
    `lw.NoiseScale().snr`. Needs the samples told apart.
    Source: Mahsereci et al. (2017), who stop training where elements fall to 1/N in the mean.
    """

    def of(step: Step, noise: Any) -> dict[str, Tensor]:
        flat = {name: r.flatten() for name, r in noise.snr.items() if r.numel()}
        whole = torch.cat([r.to(next(iter(flat.values()))) for r in flat.values()]) if flat else None
        found = {name: r.median() for name, r in flat.items()}
        return found if whole is None else {**found, WHOLE: whole.median()}

    return Measure("signal_to_noise", of, lambda generator: [NoiseScale()])


def alignment() -> Measure:
    """The mean cosine of two samples' gradients in the batch, by parameter and whole: `lw.PairwiseDot`.

    mean over n ≠ m of ⟨g_n, g_m⟩ / (‖g_n‖ ‖g_m‖), in [−1/(N−1), 1]; 0 for a pair with a zero gradient. Needs the
    samples told apart, one backward pass in the step, N ≥ 2 (NaN below), and memory N² for each parameter.
    Source: Fort et al. (2019), stiffness measured by the cosine.
    """

    def of(step: Step, dots: Any) -> dict[str, Tensor]:
        return {**{name: _cosine(d) for name, d in dots.items()}, WHOLE: _cosine(sum(dots.values()))}

    return Measure("alignment", of, lambda generator: [PairwiseDot()])


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

    Σ_n tr J_nᵀ H_n J_n, loss per squared parameter unit; draws=k: from k sampled columns, without bias; None: exact.
    Needs the samples told apart, and a loss with a root.
    Source: Dangel et al. (2020), eq. 19; Schneider, Dangel and Hennig (2021), instrument "HessTrace".
    """
    return Measure("curvature", _with_total, lambda generator: [GGNTrace(draws, generator)])


def largest_eigenvalue() -> Measure:
    """The largest eigenvalue of the sampled generalized Gauss-Newton matrix of L, by parameter's block and whole.

    λ_max of Σ_n s_n s_nᵀ with s_n sample n's gradient from one sampled column, taken off the Gram matrix `[N,N]` of
    the s_n. Sampled, and too large in the mean: the largest eigenvalue is convex in the matrix, most so for small N.
    Needs the samples told apart, one loss call and one backward pass in the step.
    Source: Dangel, Tatzel and Hennig (2022), ViViT.
    """
    return Measure("largest_eigenvalue", _with_total, lambda generator: [LargestEigenvalue(generator)])


def _with_total(step: Step, found: Any) -> dict[str, Tensor]:
    return {**found, WHOLE: found.total}


def default() -> tuple[Measure, ...]:
    """Loss, gradient norm, update size and cosine, noise scale, alignment, and curvature from one sampled column."""
    return (loss(), gradient_norm(), update_size(), update_cosine(), noise_scale(), alignment(), curvature())
