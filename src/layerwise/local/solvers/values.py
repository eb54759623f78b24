"""Solvers of a layer's local problem, as values: each is a function `problem -> (ΔW, Δb)`, and changes nothing.

Any function of that form is a solver. `LocalSteps` alone has state, its optimizer's; called by itself it starts afresh.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.local.problem import LocalProblem
from layerwise.local.solvers.closed import Side, largest_curvature, prox_step, spectral_step
from layerwise.local.solvers.conditional import conditional_gradient, harmonic
from layerwise.local.solvers.descent import anderson, conjugate_gradient, newton
from layerwise.local.solvers.steps import Form, Schedule, StepPlan, constant, linear_floor, local_steps
from layerwise.local.solvers.stopping import Stop
from layerwise.local.solvers.tf_rmsprop import TFRMSProp

__all__ = [
    "Anderson", "ConditionalGradient", "ConjugateGradient", "LocalSteps", "Newton", "ProximalSolve", "Solver",
    "Spectral", "default_lr", "made_optimizer", "name_of",
]  # fmt: skip

Update = tuple[Tensor, Tensor | None]
Solver = Callable[[LocalProblem], Update]
# Fewer rows a step cost the squared loss accuracy and save nothing (benchmarks/training/defaults.py).
_FEWEST = 100
_SCHEDULES: dict[str, Schedule] = {"linear_floor": linear_floor, "constant": constant}


@dataclass(frozen=True)
class LocalSteps:
    """T steps of a first-order optimizer: LocoProp as published.

    steps: T. optimizer: TFRMSProp, any class of `torch.optim`, or a function from parameter groups and `lr=` to an
    optimizer (`functools.partial(torch.optim.Adam, betas=(0.8, 0.9))`); its rate is the parameter group's `lr`.
    rows: rows for each step, a number, "all", or "auto" for R/T, rounded up, and at least 100 (or R) with the squared
    loss; all with form="gram". schedule: what the local rate is multiplied by at step t of T, "linear_floor"
    (`max(1 − t/T, 1/4)`), "constant" or a function of both. state: "persistent" from batch to batch, or "fresh" at
    each. form: as in `StepPlan`. stop: a rule `(decreases, costs, outer) -> bool`, such as `marginal_value`, by which a
    layer stops before T steps: asked when the gradient of the next step is there, which is taken too; an accelerator
    is waited for at each step.
    Raises BadInput for settings that cannot be.
    """

    steps: int = 10
    optimizer: Callable[..., torch.optim.Optimizer] = TFRMSProp
    rows: int | Literal["auto", "all"] = "auto"
    schedule: Schedule | Literal["linear_floor", "constant"] = "linear_floor"
    state: Literal["persistent", "fresh"] = "persistent"
    form: Form = "auto"
    stop: Stop | None = None
    balls: ClassVar[bool] = True

    def __post_init__(self) -> None:
        counts = [self.steps] if self.rows in ("auto", "all") else [self.steps, self.rows]
        if not all(isinstance(n, int) and n >= 1 for n in counts):
            raise BadInput(f"LocalSteps needs whole steps ≥ 1, and whole rows ≥ 1, 'all' or 'auto'; got {self}")
        if not (callable(self.schedule) or self.schedule in _SCHEDULES):
            raise BadInput(
                f"LocalSteps knows the schedules {', '.join(_SCHEDULES)}, or a function of t and T; got {self}"
            )
        if self.state not in ("persistent", "fresh") or self.form not in ("auto", "plain", "gram"):
            raise BadInput(f'LocalSteps has state "persistent" or "fresh", form "auto", "plain" or "gram"; got {self}')
        if self.stop is not None and not callable(self.stop):
            raise BadInput(f"LocalSteps stops by a function (decreases, costs, outer) -> bool, or None; got {self}")
        if not callable(self.optimizer):
            raise BadInput(f"LocalSteps needs an optimizer class, or a function that makes one; got {self.optimizer!r}")
        if self.optimizer is not TFRMSProp and _runs_a_closure(self.optimizer):  # solvers are made at each step
            raise BadInput(
                f"LocalSteps takes each step along one local gradient, and {self.optimizer!r} runs a closure in its "
                "step: choose an optimizer whose step() takes none, or lw.local.Newton or Anderson"
            )

    @property
    def kind(self) -> Callable[..., torch.optim.Optimizer]:
        """The optimizer's class, also of a `functools.partial` of it; else the function that makes one."""
        return getattr(self.optimizer, "func", self.optimizer)

    @property
    def rule(self) -> Schedule:
        """The schedule as a function."""
        return _SCHEDULES[self.schedule] if isinstance(self.schedule, str) else self.schedule

    def share(self, problem: LocalProblem) -> int | None:
        """The number of rows for each step; None for all."""
        if self.rows == "all" or (self.rows == "auto" and self.form == "gram"):
            return None
        if self.rows != "auto":
            return self.rows
        share = -(-problem.a.shape[0] // self.steps)
        return max(share, _FEWEST) if problem.transfer.is_squared else share

    def __call__(self, problem: LocalProblem, lr: float | None = None) -> Update:
        """`(ΔW, Δb)` after T steps of a new optimizer at a rate, its own by default."""
        start = problem
        problem = replace(
            problem, weight=problem.weight.clone(), bias=None if problem.bias is None else problem.bias.clone()
        )
        params = [p for p in (problem.weight, problem.bias) if p is not None]
        optimizer = made_optimizer(self.optimizer, params, _own_lr(self.optimizer) if lr is None else lr)
        rows = self.share(problem)
        local_steps(problem, optimizer, StepPlan(self.steps, rows, self.form, self.rule, stop=self.stop))
        moved = [new - old for new, old in zip(params, (start.weight, start.bias), strict=False) if old is not None]
        return moved[0], moved[1] if len(moved) > 1 else None


def made_optimizer(kind: Callable[..., Any], params: Sequence[Tensor], lr: float, names: Sequence[str] = ()) -> Any:
    """A local optimizer with a group for each parameter. Raises BadInput where its class does not take them."""
    try:
        return kind([{"params": [p]} for p in params], lr=lr)
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{n} {tuple(p.shape)}" for n, p in zip(names or ["a tensor"] * 2, params, strict=False))
        raise BadInput(
            f"LocalSteps' optimizer {getattr(kind, '__name__', kind)} does not take {given} at lr={lr}: {error}. "
            "Choose another solver for these, layers={pattern: {'solver': ...}}, or leave them to another optimizer"
        ) from error


def _runs_a_closure(optimizer: Callable[..., torch.optim.Optimizer]) -> bool:
    """Whether the step of an optimizer's class, or of a `functools.partial` of it, demands a closure (L-BFGS)."""
    step = getattr(getattr(optimizer, "func", optimizer), "step", None)
    closure = inspect.signature(step).parameters.get("closure") if step is not None else None
    return closure is not None and closure.default is inspect.Parameter.empty


@dataclass(frozen=True)
class ProximalSolve:
    """The squared problem with its quadratic terms solved exactly, by Cholesky: see `prox_step`.

    eta: η of a proximal term of its own, in place of the problem's. side: "inputs" (I x I), "rows" (R x R,
    push-through) or the smaller one.
    """

    eta: float | None = None
    side: Side = "auto"
    squared_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self, self.eta is None or 0 < self.eta < math.inf, "eta > 0 or None")
        _check(self, self.side in ("auto", "inputs", "rows"), 'side "auto", "inputs" or "rows"')

    def __call__(self, problem: LocalProblem) -> Update:
        """`(ΔW, Δb)`."""
        return prox_step(problem if self.eta is None else replace(problem, prox=self.eta), self.side)


@dataclass(frozen=True)
class ConjugateGradient:
    """The squared problem by conjugate gradient: see `conjugate_gradient`."""

    iterations: int = 50
    tol: float = 1e-6
    squared_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self, _whole(self.iterations) and self.tol >= 0, "whole iterations ≥ 1 and tol ≥ 0")

    def __call__(self, problem: LocalProblem) -> Update:
        """`(ΔW, Δb)`."""
        return conjugate_gradient(problem, self.iterations, self.tol)


@dataclass(frozen=True)
class Spectral:
    """T steps of gradient descent on the squared problem in closed form: see `spectral_step`.

    rate: of the steps; None for one over the problem's largest curvature.
    """

    steps: int = 10
    rate: float | None = None
    schedule: Schedule | Literal["linear_floor", "constant"] = "constant"
    squared_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        known = callable(self.schedule) or self.schedule in _SCHEDULES
        _check(
            self, _whole(self.steps) and known, f"whole steps ≥ 1 and a schedule: {', '.join(_SCHEDULES)}, a function"
        )
        _check(self, self.rate is None or 0 < self.rate < math.inf, "rate > 0 or None")

    def __call__(self, problem: LocalProblem) -> Update:
        """`(ΔW, Δb)`."""
        rate = self.rate
        if rate is None:
            largest = float(largest_curvature(problem))
            rate = 1 / largest if largest > 0 else 0.0
        rule = _SCHEDULES[self.schedule] if isinstance(self.schedule, str) else self.schedule
        return spectral_step(problem, [rate * rule(t, self.steps) for t in range(self.steps)])


@dataclass(frozen=True)
class ConditionalGradient:
    """T steps of the conditional gradient method (Frank-Wolfe) within a norm ball: see `conditional_gradient`.

    It takes any loss, and needs a regularizer that is a ball, such as `SpectralNorm`. steps = 1 is steepest descent in
    the ball's norm. schedule: the step sizes, "harmonic" (`2/(t + 2)`), "constant" or a function of t and T.
    """

    steps: int = 1
    schedule: Schedule | Literal["harmonic", "constant"] = "harmonic"
    balls: ClassVar[bool] = True

    def __post_init__(self) -> None:
        known = callable(self.schedule) or self.schedule in ("harmonic", "constant")
        _check(self, _whole(self.steps) and known, 'whole steps ≥ 1 and a schedule: "harmonic", "constant", a function')

    def __call__(self, problem: LocalProblem) -> Update:
        """`(ΔW, Δb)`."""
        named = harmonic if self.schedule == "harmonic" else constant
        return conditional_gradient(problem, self.steps, self.schedule if callable(self.schedule) else named)


@dataclass(frozen=True)
class Anderson:
    """Accelerated gradient descent on any local problem: see `anderson`."""

    steps: int = 20
    memory: int = 5
    tol: float = 1e-8

    def __post_init__(self) -> None:
        _check(
            self, _whole(self.steps) and _whole(self.memory) and self.tol >= 0, "whole steps, memory ≥ 1 and tol ≥ 0"
        )

    def __call__(self, problem: LocalProblem) -> Update:
        """`(ΔW, Δb)`."""
        return anderson(problem, self.steps, self.memory, self.tol)


@dataclass(frozen=True)
class Newton:
    """Newton's method on any local problem, made for the matching loss: see `newton`."""

    iterations: int = 10
    damping: float = 0.0
    inner: int = 50
    tol: float = 1e-8

    def __post_init__(self) -> None:
        good = _whole(self.iterations) and _whole(self.inner) and 0 <= self.damping < math.inf and self.tol >= 0
        _check(self, good, "whole iterations and inner ≥ 1, a finite damping ≥ 0 and tol ≥ 0")

    def __call__(self, problem: LocalProblem) -> Update:
        """`(ΔW, Δb)`."""
        return newton(problem, self.iterations, self.damping, self.inner, self.tol)


def _whole(n: object) -> bool:
    return isinstance(n, int) and n >= 1


def _check(solver: object, good: bool, needs: str) -> None:
    if not good:
        raise BadInput(f"{type(solver).__name__} needs {needs}; got {solver}")


def name_of(solver: Any) -> str:
    """A short name for tables."""
    if isinstance(solver, LocalSteps):
        kind = getattr(solver.kind, "__name__", "an optimizer")
        return f"{'at most ' if solver.stop else ''}{solver.steps} steps of {kind}"
    return type(solver).__name__ if not hasattr(solver, "__name__") else str(solver.__name__)


def _own_lr(make: Callable[..., torch.optim.Optimizer]) -> float:
    """The default rate of an optimizer."""
    try:
        found = make([{"params": [torch.zeros(1, 1)]}]).defaults["lr"]
        return float(found)
    except (TypeError, KeyError, AttributeError) as error:
        raise BadInput(f"the optimizer of LocalSteps, {make!r}, has no default lr: give lr=") from error


def default_lr(solver: Any) -> float | None:
    """The default rate of a solver: its optimizer's for other local steps than TFRMSProp's, 1 for all the others.

    None for TFRMSProp, whose rate goes with the loss.
    """
    if not isinstance(solver, LocalSteps):
        return 1.0
    return None if solver.optimizer is TFRMSProp else _own_lr(solver.optimizer)
