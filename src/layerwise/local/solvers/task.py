"""What is to be solved: a layer's problem with its solver and optimizer; tasks of equal shape and settings as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerwise.local.layers.layer import shaped
from layerwise.local.problem import LocalProblem
from layerwise.local.solvers.steps import StepPlan
from layerwise.local.solvers.tf_rmsprop import TFRMSProp
from layerwise.local.solvers.values import LocalSteps, Solver
from layerwise.tensors import Verdict

__all__ = ["Task", "in_batches", "plan_of"]


class Task(NamedTuple):
    """A problem, the parameters of which its weights are views, and their optimizer.

    name: the layer's. params: the weight and, if it is fitted, the bias. rates: their groups' `lr`, the factor of a
    closed form's update. optimizer: of local steps, None for another solver; kind: its class. fold: from `[K,O,I]` to
    the weight's shape.
    scale: factor of the objective of local steps. state: of a `Memory`, kept from batch to batch. l1: λ of a term λ|W|₁
    beside `scale` times the problem: a soft threshold of lr·λ after each local step, or in a `Memory`'s columns.
    verdict: takes what a `Memory` would wait for.
    """

    problem: LocalProblem
    solver: Solver
    name: str
    params: list[Tensor]
    rates: list[float]
    optimizer: torch.optim.Optimizer | None
    fold: Callable[[Tensor], Tensor]
    scale: float = 1.0
    state: dict[str, Any] | None = None
    l1: float = 0.0
    kind: Any = None
    verdict: Verdict | None = None


def plan_of(task: Task, solver: LocalSteps) -> StepPlan:
    """The local steps of a task."""
    rows = solver.share(task.problem)
    return StepPlan(solver.steps, rows, solver.form, solver.rule, task.scale, task.l1, solver.stop)


class JointTask(NamedTuple):
    """A task that stands for others. finish: gives them what it solved, once its steps are taken."""

    task: Task
    members: Sequence[Task]
    finish: Callable[[], None]


def in_batches(tasks: Sequence[Task]) -> list[JointTask]:
    """The tasks, those of equal shape and settings as one, whose weights are copies side by side."""
    alike: dict[Any, list[Task]] = {}
    for number, task in enumerate(tasks):
        alike.setdefault(number if (form := _form(task)) is None else form, []).append(task)
    return [JointTask(some[0], some, _nothing) if len(some) == 1 else _as_one(some) for some in alike.values()]


def _nothing() -> None:
    """A task alone moved its own weights."""


def _form(task: Task) -> Any:
    """What tasks of one batch have in common; None for a task alone."""
    problem, solver, optimizer = task.problem, task.solver, task.optimizer
    if not isinstance(solver, LocalSteps) or not isinstance(optimizer, TFRMSProp) or solver.stop is not None:
        return None
    terms = problem.prox, problem.ball, problem.metric, problem.rest
    bare = not problem.pulls and all(term is None for term in terms)
    if not bare or problem.indexed or task.l1:
        return None
    numbers = [tuple(value for key, value in group.items() if key != "params") for group in optimizer.param_groups]
    tensors = problem.weight, problem.a, problem.bias, problem.g
    layout = tuple(None if t is None else (t.shape, t.dtype, t.device) for t in tensors)
    return layout, problem.transfer, problem.gamma, solver, task.scale, tuple(numbers)


def _as_one(tasks: Sequence[Task]) -> JointTask:
    """One task for several: their groups of rows one after another, weights and state copied."""
    first, problems = tasks[0], [task.problem for task in tasks]
    parts = list(zip(*((p.weight, p.bias) for p in problems), strict=True))
    params = [torch.cat(column) for column in parts[: len(first.params)]]
    optimizer = TFRMSProp([{"params": [p]} for p in params])
    copied: list[tuple[Tensor, Sequence[Any]]] = list(zip(params, parts, strict=False))
    for n, (p, given) in enumerate(zip(params, optimizer.param_groups, strict=True)):
        theirs = first.optimizer.param_groups[n]  # type: ignore[union-attr]
        given.update({key: value for key, value in theirs.items() if key != "params"})
        views = [problem.weight if n == 0 else problem.bias for problem in problems]
        held = [task.optimizer.state_of(task.params[n]) for task in tasks]  # type: ignore[union-attr]
        for key, column in zip(("mean_square", "momentum_buffer"), zip(*held, strict=True), strict=True):
            pieces = [shaped(t, view) for t, view in zip(column, views, strict=True)]  # type: ignore[arg-type]
            optimizer.state[p][key] = torch.cat(pieces)
            copied.append((optimizer.state[p][key], pieces))
    rows: dict[str, Any] = {
        name: None if getattr(problems[0], name) is None else torch.cat([getattr(p, name) for p in problems], 1)
        for name in ("a", "target", "g")
    }
    bias = params[1] if len(params) > 1 else None
    problem = replace(problems[0], weight=params[0], bias=bias, **rows)
    name = " and ".join(task.name for task in tasks)
    one = first._replace(problem=problem, name=name, params=params, optimizer=optimizer, fold=_same)
    return JointTask(one, tasks, partial(_give_back, copied))


def _same(w: Tensor) -> Tensor:
    return w


def _give_back(copied: Sequence[tuple[Tensor, Sequence[Tensor]]]) -> None:
    pairs = [(piece, new) for joined, pieces in copied
             for piece, new in zip(pieces, joined.split(len(pieces[0])), strict=True)]  # fmt: skip
    torch._foreach_copy_([piece for piece, _ in pairs], [new for _, new in pairs])
