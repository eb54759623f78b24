"""AM-mem: a layer fitted to all batches so far through running moments of inputs and codes, in constant memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from layerwise.errors import BadInput, NonFinite
from layerwise.local.problem import LocalProblem, pull_gradient, refuse_terms
from layerwise.local.solvers.closed import inputs_with_ones, residual
from layerwise.operators.low_rank import LOW_RANK_FROM
from layerwise.operators.ridge import by_cholesky, coordinate_descent, inverse, ridge
from layerwise.tensors import Verdict, WrongAssumption, is_finite, largest_entries, together_finite, without_grad

__all__ = ["Memory", "mairal", "moments_misfit"]

Update = tuple[Tensor, Tensor | None]
Forget = Callable[[int, int], float]
StepBound = Callable[[Tensor], Tensor]  # the largest multiple of a step that may be taken


def mairal(step: int, rows: int) -> float:
    """The share β of the memory kept at step t with minibatches of η rows: early batches fade, late ones stay.

        β = (θ + 1 − η)/(θ + 1),   θ = tη for t < η,   η² + t − η beyond

    Source: Mairal, Bach, Ponce and Sapiro, "Online dictionary learning for sparse coding" (2009), section 3.4.
    """
    theta = step * rows if step < rows else rows**2 + step - rows
    return (theta + 1 - rows) / (theta + 1)


class _System(NamedTuple):
    """The system `W (A/n + λ I) = right` for W or its step; l1: λ of |W|₁ by column."""

    w: Tensor
    seen: Tensor
    right: Tensor
    damping: Tensor
    l1: Tensor | None


@dataclass(frozen=True)
class Memory:
    """AM-mem: the squared local problem of all batches seen, through running moments of inputs and codes.

        A ← β A + Σ_r a_r a_rᵀ,   n ← β n + R,   ρ = R/n,            [I,I], rows counted by n; a 1 for the bias
        absolute:   B ← β B + Σ_r c_r a_rᵀ,   W ← (B/n) (A/n + λ I)⁻¹
        recentred:  W ← W − min(1, u) s (1/R) Σ_r (z_r − c_r) a_rᵀ (A/n + λ I)⁻¹,   s = min(1, gain·ρ)

    `z` are the outputs at the present weights. The absolute form fits codes that were made at older weights. Recentring
    replaces the old part of B by `W A`, which the present weights fit, so that only the new residual moves them, by its
    share ρ of the memory: forgetting is the learning rate, and `gain` multiplies it.

    The memory hardly damps directions that it has hardly seen. u is where the batch's own squared error, a parabola
    along the step, is again what it was before the step: longer steps take a fresh inverse, and end there. This is rare
    on a steady stream, and lets the stream change.

    forget: β = 1 − forget, 0 never forgets; "mairal", the schedule of that name; or a function `(step, rows) -> β`.
    In the long run ρ is `forget`: 0.05 is a window of 20 batches, and with the default gain of 20 a batch then counts
    as much as the window; without forgetting s falls as 20/t. gain = 1 is the memory as it stands.
    solve: "exact" (`ridge`) or "columns", block-coordinate descent over columns of W, `sweeps` times (a term |W|₁
    needs these). ridge: λ over the mean of A/n's diagonal; by default 3 recentred, where it pulls to the present
    weights, and 1e-4 absolute, where it pulls to zero. every: for how many steps an inverse of A serves at most, for
    "exact", recentred; early ones serve for as many as came before them.
    Rows are positions of convolutions, time steps and further uses of a weight, too: the moments sum over them. The
    moments live in the optimizer's state, by the weight's name, and do not grow with the number of samples.
    Raises BadInput for settings that cannot be; NonFinite where a solution is not finite.
    Source: Choromanska et al. (2019), algorithms 1 and 3; Mairal et al. (2009).
    """

    forget: float | Literal["mairal"] | Forget = 0.05
    solve: Literal["exact", "columns"] = "exact"
    recentre: bool = True
    ridge: float | None = None
    sweeps: int = 1
    every: int = 10
    gain: float = 20.0
    squared_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        known = self.forget == "mairal" or callable(self.forget)
        known = known or (isinstance(self.forget, int | float) and 0 <= self.forget < 1)
        counts = all(isinstance(n, int) and n >= 1 for n in (self.sweeps, self.every))
        damped = (self.ridge is None or 0 <= self.ridge < float("inf")) and 0 < self.gain < float("inf")
        if not (known and counts and damped and self.solve in ("exact", "columns")):
            raise BadInput(
                'Memory needs forget in [0, 1), "mairal" or a function; solve "exact" or "columns"; finite ridge ≥ 0 '
                f"and gain > 0; whole sweeps and every ≥ 1; got {self}"
            )

    def keeps(self, step: int, rows: int) -> float:
        """β at step t = 1, 2, ... for a batch of `rows` rows, clipped to [0, 1]."""
        if self.forget == "mairal":
            kept = mairal(step, rows)
        else:
            kept = self.forget(step, rows) if callable(self.forget) else 1 - float(self.forget)
        return min(max(float(kept), 0.0), 1.0)

    def __call__(self, problem: LocalProblem) -> Update:
        """`(ΔW, Δb)` from this batch alone."""
        return self.step(problem, {})

    @without_grad
    def step(
        self, problem: LocalProblem, state: dict[str, Any], l1: float = 0.0, rate: float = 1.0,
        verdict: Verdict | None = None,
    ) -> Update:  # fmt: skip
        """`(ΔW, Δb)`; replaces entries of the state, never in place.

        l1: λ of a term λ|W|₁ beside the squared errors' mean over rows. rate: the factor the update will be taken with.
        verdict: takes what is otherwise waited for: that an old inverse goes not too far, that Cholesky inverts, and
        that the solution is finite. It raises WrongAssumption, or NonFinite.
        """
        refuse_terms(problem, "Memory")
        _check(self, problem, state, l1)
        a, delta = inputs_with_ones(problem), residual(problem).transpose(0, 1)  # [K,R,I], [K,R,O]
        rows, step = a.shape[-2], int(state.get("steps", 0)) + 1
        kept = self.keeps(step, rows) * float(state.get("rows", 0.0))
        share = rows / (kept + rows)
        seen = _average(state.get("A"), a.mT, a, share)
        w = _weight_and_bias(problem)
        fresh: dict[str, Any] = {"A": seen, "rows": kept + rows, "steps": step}
        diagonal = seen.diagonal(dim1=-2, dim2=-1)
        # the diagonal bounds all entries; an accelerator is waited for once, at the end
        if diagonal.device.type == "cpu" and not is_finite(diagonal):
            raise NonFinite(f"a moment of the layer's inputs, after {step} of its batches, holds NaN or infinity")
        damping = self._ridge * diagonal.mean(-1) + problem.stiffness / rows
        leaning = _pull_gradient_with_bias(problem)
        sparse = _thresholds(w, l1, problem.bias is not None) if l1 else None
        if self.recentre:
            strength = min(1.0, self.gain * share)
            pull = (delta.mT @ a).mul_(-strength / rows)
            pull = pull if leaning is None else pull - leaning / rows
            bound = partial(_largest_step, pull, a, strength, problem.stiffness, rate)
            moved = self._recentred(_System(w, seen, pull, damping, sparse), bound, state, fresh, verdict)
        else:
            codes = w @ a.mT - delta.mT
            fresh["B"] = _average(state.get("B"), codes, a, share)
            # quadratic terms hold W around their centres, not around zero
            right = fresh["B"] if leaning is None else fresh["B"] - leaning / rows
            right = right + w * (problem.stiffness / rows)
            moved = self._absolute(_System(w, seen, right, damping, sparse)) - w
        bad = f"the solution of a Memory of {step} batches (a larger ridge bounds it) holds NaN or infinity"
        if verdict is not None:
            for _, largest in largest_entries({"A": diagonal, "W": moved}):
                verdict.ask(largest, partial(_judge_finite, bad))
        elif not together_finite((diagonal, moved)):
            raise NonFinite(bad)
        state |= fresh
        return (moved, None) if problem.bias is None else (moved[..., :-1], moved[..., -1])

    @property
    def _ridge(self) -> float:
        return self.ridge if self.ridge is not None else 3.0 if self.recentre else 1e-4

    @property
    def judged_late(self) -> bool:
        """Whether a step needs nothing of its numbers on the host before its end."""
        return self.recentre and self.solve == "exact" and self.every > 1

    def _recentred(
        self, asked: _System, bound: StepBound, state: dict[str, Any], fresh: dict[str, Any], verdict: Verdict | None
    ) -> Tensor:
        if self.solve == "columns":
            moved = self._columns(asked)
        elif self.every == 1:
            moved = ridge(asked.seen, asked.right, asked.damping)
        else:
            served = self._by_old_inverse(asked, bound, state, fresh, verdict)
            if served is not None:
                return served
            fresh["inverse"], fresh["inverted"] = _inverse(asked, fresh["rows"], verdict), fresh["steps"]
            moved = asked.right @ fresh["inverse"]
        return moved * bound(moved).clamp(max=1)

    def _by_old_inverse(
        self, asked: _System, bound: StepBound, state: dict[str, Any], fresh: dict[str, Any], verdict: Verdict | None
    ) -> Tensor | None:
        """The step by the last inverse; None where it goes too far, or a new inverse is due."""
        made = int(state.get("inverted", 0))
        if not made or fresh["steps"] - made >= min(self.every, made):
            return None
        moved = asked.right @ state["inverse"]
        short = bound(moved) < 1
        if verdict is not None:
            verdict.ask(~short, _judge_assumed)
        elif bool(short.any()):
            return None
        fresh["inverse"], fresh["inverted"] = state["inverse"], made
        return moved

    def _columns(self, asked: _System) -> Tensor:
        w, seen, pull, damping, l1 = asked
        if l1 is None:
            return coordinate_descent(torch.zeros_like(w), seen, pull, self.sweeps, damping)
        eye = torch.eye(seen.shape[-1], dtype=seen.dtype, device=seen.device)
        held = seen + damping[..., None, None] * eye
        return coordinate_descent(w, held, w @ held + pull, self.sweeps, l1=l1) - w

    def _absolute(self, asked: _System) -> Tensor:
        w, seen, right, damping, l1 = asked
        if self.solve == "columns":
            return coordinate_descent(w, seen, right, self.sweeps, damping, 0.0 if l1 is None else l1)
        return ridge(seen, right, damping)


def moments_misfit(weight: Tensor, state: Mapping[str, Any]) -> list[str]:
    """What of saved moments cannot be those of a weight."""
    if missing := [key for key in ("A", "rows", "steps") if key not in state]:
        return [f"lacks {', '.join(missing)}"]
    if foreign := sorted(set(state) - {"A", "B", "rows", "steps", "inverse", "inverted"}):
        return [f"has {', '.join(foreign)}, which belongs to another optimizer"]
    if ("inverse" in state) != ("inverted" in state):
        return ["has one of inverse and inverted"]
    if not _is_number(state["rows"]):
        return [f"has rows {state['rows']!r}, which is no number of at least 0"]
    if wrong := [key for key in ("steps", "inverted") if not _is_count(state.get(key, 0))]:
        return [f"has {wrong[0]} {state[wrong[0]]!r}, which is no whole number of at least 0"]
    seen: Any = state["A"]
    numel = weight.numel()
    size = tuple(seen.shape) if isinstance(seen, Tensor) else ()
    square = len(size) == 3 and size[1] == size[2]
    if not square or all(i < 1 or numel % (size[0] * i) for i in (size[2], size[2] - 1)):
        return [f"has moments A of shape {size}, which a weight of {numel} elements does not have"]
    for key in ("A", "B", "inverse"):
        t = state.get(key, seen)
        if not isinstance(t, Tensor) or t.dtype != weight.dtype or t.shape[:1] + t.shape[2:] != (size[0], size[2]):
            form = f"shape {tuple(t.shape)}, {t.dtype}" if isinstance(t, Tensor) else type(t).__name__
            return [f"has {key} of {form} beside A of {size} and a weight of {weight.dtype}"]
    if bool((seen.diagonal(dim1=-2, dim2=-1) < 0).any()):
        return ["has moments A with a negative diagonal, and they are of squares"]
    return []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and _is_number(value)


def _inverse(asked: _System, rows: float, verdict: Verdict | None) -> Tensor:
    if verdict is None or asked.seen.shape[-1] >= LOW_RANK_FROM:
        return inverse(asked.seen, asked.damping, rows)
    found, sound = by_cholesky(asked.seen, None, asked.damping)
    verdict.ask(sound, _judge_assumed)
    return found


def _judge_assumed(flags: list[float]) -> None:
    if not all(flags):
        raise WrongAssumption


def _judge_finite(bad: str, largest: list[float]) -> None:
    if not all(map(math.isfinite, largest)):
        raise NonFinite(bad)


def _largest_step(pull: Tensor, a: Tensor, strength: float, stiffness: float, rate: float, moved: Tensor) -> Tensor:
    """The u of a step D, `[K,1,1]`: `2 tr(Pᵀ D)/(rate (s |a Dᵀ|²/R + η |D|²/R))`, infinite where D does not descend.

    P is the descent of the batch's problem, s its squared errors' weight, and η that of its quadratic terms.
    """
    both, rows = (-2, -1), a.shape[-2]
    slope = (pull * moved).sum(both, keepdim=True)
    errors = torch.linalg.vector_norm(a @ moved.mT, dim=both, keepdim=True).square()
    bend = strength * errors
    if stiffness:
        bend = bend + stiffness * torch.linalg.vector_norm(moved, dim=both, keepdim=True).square()
    return torch.where(slope > 0, 2 * slope / (bend * (rate / rows)), torch.inf)


def _average(old: Tensor | None, left: Tensor, right: Tensor, share: float) -> Tensor:
    """`(1 − ρ) old + (ρ/R) left right`, new memory."""
    scale = share / right.shape[-2]
    if old is None:
        return (left @ right).mul_(scale)
    return torch.baddbmm(old, left, right, beta=1 - share, alpha=scale)


def _weight_and_bias(problem: LocalProblem) -> Tensor:
    """Weight and bias as `[K,O,I']`."""
    return problem.weight if problem.bias is None else torch.cat((problem.weight, problem.bias.unsqueeze(-1)), -1)


def _pull_gradient_with_bias(problem: LocalProblem) -> Tensor | None:
    """The quadratic terms' gradient at the start, `[K,O,I']`."""
    found = pull_gradient(problem)
    if found is None or found[1] is None:
        return None if found is None else found[0]
    return torch.cat((found[0], found[1].unsqueeze(-1)), -1)


def _thresholds(w: Tensor, l1: float, bias: bool) -> Tensor:
    """λ for each column of weights, 0 for that of the bias."""
    found = w.new_full((w.shape[-1],), l1)
    if bias:
        found[-1] = 0.0
    return found


def _check(memory: Memory, problem: LocalProblem, state: dict[str, Any], l1: float) -> None:
    if problem.indexed or not problem.transfer.is_squared:
        raise BadInput(
            f"a Memory solves squared problems on rows of numbers, and this one has {problem.transfer.name}'s matching "
            "loss or looks rows up: use local steps for it"
        )
    if l1 and memory.solve == "exact":
        raise BadInput('a term |W|₁ has no exact solve: give Memory solve="columns"')
    size = problem.weight.shape[-1] + (problem.bias is not None)
    if "A" in state and state["A"].shape[-1] != size:
        raise BadInput(
            f"the memory holds moments of {state['A'].shape[-1]} inputs, and the layer has {size} (with a 1 for a "
            "bias): the bias was frozen or thawed since, or a state of another model was loaded; make a new optimizer, "
            "whose memory starts anew"
        )
