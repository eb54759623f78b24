"""Whether and how far to step: what is not finite, KL clipping, the quadratic model, Levenberg-Marquardt.

Sums over parameters are in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import NonFinite
from layerwise.operators.curvature import GGN
from layerwise.optim.deferred import Late
from layerwise.optim.second_order.watched_batch import Watched
from layerwise.quantities.kronecker.factor_sums import Factors
from layerwise.ranks.sums import tensors_of
from layerwise.replay.rerun import Rerun
from layerwise.tape.uses import first_bad_call
from layerwise.tensors import Verdict, is_finite, norms, widened

__all__ = [
    "AFTER_STEP", "ExactGGN", "ask_after", "ask_safe", "best_step", "bound", "clip_factor", "combined", "descend",
    "dot", "levenberg_marquardt", "predicted_change", "unsafe", "write_late",
]  # fmt: skip

AFTER_STEP = "the parameters after the step"

_LEAST, _MOST = 1e-12, 1e12  # λ stays a divisor without overflow


def dot(one: Mapping[str, Tensor], two: Mapping[str, Tensor], weights: Mapping[str, float] | None = None) -> float:
    """Sum over the parameters of `one` of w <one, two>."""
    if not one:
        return 0.0
    products = [(widened(x) * widened(two[name])).sum() for name, x in one.items()]
    first = products[0]
    if any(x.dtype != first.dtype or x.device != first.device for x in products):
        products = [x.to(first.device, _widest(first.device)) for x in products]
    dots = torch.stack(products).tolist()
    return sum(d * (1.0 if weights is None else weights[name]) for name, d in zip(one, dots, strict=True))


def _weighted_dot(one: Mapping[str, Tensor], two: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """As `dot`, in a few launches whatever the number of parameters, without a wait."""
    products = torch._foreach_mul([widened(x) for x in one.values()], [widened(two[name]) for name in one])
    torch._foreach_mul_(products, [weights[name] for name in one])
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
        size = _weighted_dot(directions, gradients, {name: rate**2 / clip for name, rate in rates.items()})
        first = next(iter(directions.values()))  # multi-tensor operations take a number of their own type alone
        return torch.rsqrt(size.clamp(min=1), out=first.new_empty(()))
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


def combined(coefficients: Sequence[float], values: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Sum of c_k v_k, by parameter."""
    first, *rest = zip(coefficients, values, strict=True)
    total = {name: first[0] * x for name, x in first[1].items()}
    for c, v in rest:
        total = {name: x + c * v[name] for name, x in total.items()}
    return total


def predicted_change(
    gradients: Mapping[str, Tensor], moves: dict[str, Tensor],
    ggn: Callable[[dict[str, Tensor]], Mapping[str, Tensor]], damping: Mapping[str, float],
) -> float:  # fmt: skip
    """The change of the loss in its damped quadratic model, <d, g> + (<d, G d> + λ<d, d>) / 2."""
    return dot(moves, gradients) + (dot(moves, ggn(moves)) + dot(moves, moves, damping)) / 2


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
        alike.setdefault((lr, momentum, decay, named[name].device, named[name].dtype), []).append(name)
    for (lr, momentum, decay, *kind), names in alike.items():
        ps, ds = [named[n] for n in names], [directions[n] for n in names]
        factor = factor.to(*kind) if isinstance(factor, Tensor) else factor
        olds = [m for n in names if (m := before[n]) is not None] if momentum else []
        if not olds or isinstance(factor, Tensor):
            ms = torch._foreach_mul(ds, factor)
            if olds:
                torch._foreach_add_(ms, olds, alpha=momentum)
        else:
            ms = torch._foreach_mul(olds, momentum)
            torch._foreach_add_(ms, ds, alpha=factor)
        if decay:
            new = torch._foreach_mul(ps, 1 - lr * decay)
            torch._foreach_sub_(new, ms, alpha=lr)
        else:
            new = torch._foreach_sub(ps, ms, alpha=lr)
        values |= zip(names, new, strict=True)
        buffers |= zip(names, ms, strict=True)
    return values, buffers


def write_late(
    late: Late, state: Mapping[Any, dict[str, Any]], named: Mapping[str, Tensor], values: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
) -> None:  # fmt: skip
    """Write a step where its device finds it good; a bad first one leaves zeros as momentum, the same as none.

    values, buffers: what `descend` gave.
    """
    for name, m in buffers.items():
        state[named[name]].setdefault("momentum", torch.zeros_like(m))
    held = [state[named[name]]["momentum"] for name in buffers]
    late.write([*(named[name] for name in values), *held], [*values.values(), *buffers.values()])
    late.commit()


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


# What is not finite -------------------------------------------------------------------------------


def unsafe(watched: Watched, grads: Mapping[str, Tensor], damping: Callable[[str], float]) -> str | None:
    """The first reason not to step on a batch, or None."""
    if watched.bad is not None:
        return watched.bad
    verdict = Verdict()
    late = None if watched.loss is None or watched.loss.device.type == "cpu" else watched.loss  # else it was read
    if watched.suspect is None:
        ask_safe(verdict, watched, late, grads, damping)
    else:
        _ask_gradient(verdict, watched, grads, damping, norms(list(grads.values())))
    return verdict.reason(NonFinite) or watched.suspect


def ask_safe(
    verdict: Verdict, watched: Watched, loss: Tensor | None, grads: Mapping[str, Tensor],
    damping: Callable[[str], float], after: Sequence[Tensor] = (),
) -> list[Tensor]:  # fmt: skip
    """As `unsafe`, when the verdict is read; NonFinite then holds the reason.

    Asks for the loss too (None: it was read), and for what else the batch has left to be read. Returns the norms of
    `after`, for `ask_after`, which are found in one launch with the others.
    """

    def judge_loss(found: list[float]) -> None:
        if not math.isfinite(found[0]):
            raise NonFinite(first_bad_call(watched.uses) or "the loss")

    places = list(_places(watched))
    sizes = norms([*grads.values(), *after, *(x for *_, x in places)])
    if loss is not None:
        verdict.ask(loss, judge_loss, ["the loss"])
    _ask_gradient(verdict, watched, grads, damping, sizes[: len(grads)])
    verdict.join(watched.unread)
    if places:
        _ask_curvature(verdict, watched, places, sizes[len(grads) + len(after) :])
    return sizes[len(grads) : len(grads) + len(after)]


def ask_after(verdict: Verdict, after: Sequence[Tensor], sizes: Sequence[Tensor]) -> None:
    """Ask for what a step would write. sizes: the norm of each."""

    def judge(found: list[float]) -> None:
        for x, size in zip(after, found, strict=True):
            if not math.isfinite(size) and not is_finite(x):
                raise NonFinite(AFTER_STEP)

    verdict.ask(sizes, judge, [AFTER_STEP] * len(after))


def _ask_gradient(
    verdict: Verdict, watched: Watched, grads: Mapping[str, Tensor], damping: Callable[[str], float],
    sizes: Sequence[Tensor],
) -> None:  # fmt: skip
    """The first gradient for which `|g|² / λ`, a bound of the preconditioned product, overflows or is NaN.

    sizes: |g| of each.
    """

    def judge(found: list[float]) -> None:
        for (name, g), size in zip(grads.items(), found, strict=True):
            if not size * size / damping(name) < torch.finfo(g.dtype).max:
                raise NonFinite(first_bad_call(watched.uses) or f"the gradient of {name}")

    limits = [math.sqrt(damping(name)) * math.sqrt(torch.finfo(g.dtype).max) for name, g in grads.items()]

    def good(found: Tensor) -> Tensor:
        if len(set(limits)) == 1:
            return found < limits[0]
        return torch.stack(torch._foreach_mul(found.unbind(), [1 / limit for limit in limits])) < 1

    verdict.ask(sizes, judge, [f"the gradient of {name}" for name in grads], good)


_Place = tuple[str, str, Tensor]  # what, of which parameter


def _places(watched: Watched) -> Iterator[_Place]:
    """The tensors of the measured blocks (or sums, before `finish`)."""
    for name, measured in watched.blocks.items():
        what = "the curvature" if measured.block.form == "diagonal" else "a Kronecker factor"
        yield from ((what, name, x) for x in measured.tensors())
    for found in watched.found:
        for name, value in found.values.items():
            what = "a Kronecker factor" if isinstance(value[0], Factors) else "the curvature"
            yield from ((what, name, t) for part in found.parts(name) for t in tensors_of(part))


def _ask_curvature(verdict: Verdict, watched: Watched, places: Sequence[_Place], sizes: Sequence[Tensor]) -> None:
    """The first tensor of the curvature that holds NaN or infinity. sizes: the norm of each."""

    def judge(found: list[float]) -> None:
        for (what, name, x), size in zip(places, found, strict=True):
            if not math.isfinite(size) and not is_finite(x):
                raise NonFinite(first_bad_call(watched.uses) or f"{what} of {name}")

    # a norm may overflow where no entry does, but takes a tenth of the time
    verdict.ask(sizes, judge, [f"{what} of {name}" for what, name, _ in places])
