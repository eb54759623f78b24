"""Step length and damping: KL clipping, the quadratic model, Levenberg-Marquardt, as pure functions.

Sums over parameters are in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import NonFinite
from layerwise.operators.curvature import GGN
from layerwise.replay.rerun import Rerun
from layerwise.tensors import Verdict, largest_entries

__all__ = [
    "AFTER_STEP", "ExactGGN", "bad_step", "best_step", "bound", "clip_factor", "descend", "dot", "levenberg_marquardt",
]  # fmt: skip

AFTER_STEP = "the parameters after the step"

_LEAST, _MOST = 1e-12, 1e12  # λ stays a divisor without overflow


def dot(one: Mapping[str, Tensor], two: Mapping[str, Tensor], weights: Mapping[str, float] | None = None) -> float:
    """Sum over the parameters of `one` of w <one, two>."""
    if not one:
        return 0.0
    device = next(iter(one.values())).device
    dots = torch.stack([(x * two[name]).sum().to(device, _widest(device)) for name, x in one.items()]).tolist()
    return sum(d * (1.0 if weights is None else weights[name]) for name, d in zip(one, dots, strict=True))


def _sum_of_dots(one: Mapping[str, Tensor], two: Mapping[str, Tensor], names: list[str]) -> Tensor:
    """Sum over some parameters of <one, two>, in a few launches whatever their number, without a wait."""
    products = torch._foreach_mul([one[name] for name in names], [two[name] for name in names])
    device = products[0].device
    return torch.cat([x.reshape(-1).to(device) for x in products]).sum(dtype=_widest(device))


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # which has none


def clip_factor(
    gradients: Mapping[str, Tensor], directions: Mapping[str, Tensor], rates: Mapping[str, float], clip: float | None,
    late: bool,
) -> float | Tensor:  # fmt: skip
    """ν = min(1, sqrt(κ / sum over parameters of lr² g·d)), at which the step's quadratic form is at most κ.

    Source: Ba, Grosse and Martens (2017), "Distributed second-order optimization using Kronecker-factored
    approximations", section 5. late: as a tensor, which the host does not wait for.
    """
    if clip is None or not directions:
        return 1.0
    if late:
        alike: dict[float, list[str]] = {}
        for name in directions:
            alike.setdefault(rates[name] ** 2, []).append(name)
        sizes = [square * _sum_of_dots(directions, gradients, names) for square, names in alike.items()]
        size = sizes[0] if len(sizes) == 1 else torch.stack(sizes).sum()
        return torch.where(size > 0, (clip / size).sqrt().clamp(max=1), 1.0)
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


def bad_step(verdict: Verdict, after: Sequence[Tensor]) -> str | None:
    """The reason not to step, of all that a step has asked. after: what it would write."""

    def judge(largest: list[float]) -> None:
        if not all(map(math.isfinite, largest)):
            raise NonFinite(AFTER_STEP)

    for _, largest in largest_entries({str(i): t for i, t in enumerate(after)}):
        verdict.ask(largest, judge)
    try:
        verdict.read()
    except NonFinite as error:
        return str(error)
    return None


def descend(
    named: Mapping[str, Tensor],
    directions: Mapping[str, Tensor],
    before: Mapping[str, Tensor | None],
    factor: float | Tensor,
    groups: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """P ← (1 - lr·weight_decay) p - lr m and m ← β m + ν d (without momentum ν d), in new memory.

    before: the buffers m, or None. factor: ν. Parameters of equal settings move in a few launches.
    """
    values: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    alike: dict[Any, list[str]] = {}
    for name in directions:
        lr, momentum, decay = (groups[name][key] for key in ("lr", "momentum", "weight_decay"))
        momentum = 0.0 if before[name] is None else momentum
        alike.setdefault((lr, momentum, decay), []).append(name)
    for (lr, momentum, decay), names in alike.items():
        ps, ds = [named[n] for n in names], [directions[n] for n in names]
        if not momentum:
            ms = torch._foreach_mul(ds, factor)
        else:
            ms = torch._foreach_mul([m for n in names if (m := before[n]) is not None], momentum)
            more, alpha = (torch._foreach_mul(ds, factor), 1.0) if isinstance(factor, Tensor) else (ds, factor)
            torch._foreach_add_(ms, more, alpha=alpha)
        if decay:
            new = torch._foreach_mul(ps, 1 - lr * decay)
            torch._foreach_sub_(new, ms, alpha=lr)
        else:
            new = torch._foreach_sub(ps, ms, alpha=lr)
        values |= zip(names, new, strict=True)
        buffers |= zip(names, ms, strict=True)
    return values, buffers


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
