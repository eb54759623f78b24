"""Solves one layer's local problem in place: in this thread, another one, or another process, with the same bits."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.local.layers.layer import shaped
from layerwise.local.problem import LocalProblem, refuse_terms
from layerwise.local.solvers.memory import Memory
from layerwise.local.solvers.steps import local_steps, taken_steps
from layerwise.local.solvers.task import Task, in_batches, plan_of
from layerwise.local.solvers.tf_rmsprop import RMSPropStep, TFRMSProp
from layerwise.local.solvers.values import LocalSteps, name_of
from layerwise.local.solvers.workspace import Owned, Workspace
from layerwise.local.whitening import whitened
from layerwise.tensors import without_grad

__all__ = ["pickled", "solve", "solve_pickled", "solve_together", "take_result"]


@without_grad
def solve(task: Task, workspace: Workspace | None = None) -> None:
    """Move the parameters of a task. Raises BadInput where a solver's result does not fit them."""
    problem, solver = task.problem, task.solver
    if problem.ball is not None and not getattr(solver, "balls", False):
        refuse_terms(replace(problem, metric=None), name_of(solver))
    if isinstance(solver, LocalSteps):
        assert task.optimizer is not None
        local_steps(problem, task.optimizer, plan_of(task, solver), _owned(task), workspace)
        _forget(task, solver)
        return
    if isinstance(solver, Memory):
        assert task.state is not None
        l1 = task.l1 / (task.scale * problem.a.shape[0])
        update = solver.step(problem, task.state, l1, max(task.rates), task.verdict)
    elif task.l1:
        raise BadInput(f"a term l1·|W|₁ goes with local steps or a Memory; {solver!r} knows none")
    else:
        white, plain = whitened(problem)
        update = solver(white)
        _refuse_misfit(task, (white.weight, white.bias), update)
        update = plain(update)
    parts = problem.weight, problem.bias
    for part, moved, rate in zip(parts, update, [*task.rates, 0.0], strict=False):
        if part is not None and moved is not None:
            part.add_(moved, alpha=rate)


def _refuse_misfit(task: Task, parts: tuple[Tensor | None, ...], update: Any) -> None:
    wanted = [None if p is None else tuple(p.shape) for p in parts]
    pair = update if isinstance(update, tuple | list) else [update]
    given = [tuple(u.shape) if isinstance(u, Tensor) else u for u in pair]
    if given != wanted:
        raise BadInput(
            f"the solver {name_of(task.solver)} gave, for {task.name}, updates of shapes {given} for a weight and bias "
            f"of {wanted}, [K,O,I] and [K,O]; it must return one of each shape, ΔW and Δb (None without a bias)"
        )


def _owned(task: Task) -> Owned:
    return Owned(task.params[0], task.params[1] if len(task.params) > 1 else None, task.fold, task.name)


def _forget(task: Task, solver: LocalSteps) -> None:
    if solver.state == "fresh" and task.optimizer is not None:
        for p in task.params:
            task.optimizer.state.pop(p, None)


@without_grad
def solve_together(tasks: Sequence[Task], workspaces: Sequence[Workspace]) -> None:
    """As `solve` for each task; all that take local steps by TFRMSProp step side by side, in fewer launches.

    Those of equal shape and settings are one task for groups of rows. workspaces: scratch memory, one for each task,
    since all are held at once.
    """
    under_way: list[Iterator[Callable[[], Any]]] = []
    together: list[tuple[Task, LocalSteps]] = []
    moved: dict[int, RMSPropStep] = {}
    try:
        batches = in_batches(tasks)
        for (task, members, _), workspace in zip(batches, workspaces, strict=False):
            if isinstance(task.solver, LocalSteps) and isinstance(task.optimizer, TFRMSProp):
                plan = plan_of(task, task.solver)
                together += [(member, task.solver) for member in members]
                under_way.append(taken_steps(task.problem, task.optimizer, plan, _owned(task), workspace))
            else:
                solve(task, workspace)
        left = list(under_way)
        while left:
            found = [(run, step) for run in left if (step := next(run, None)) is not None]
            moves = [step for _, step in found if isinstance(step, RMSPropStep)]
            if moves:
                moved |= {id(step): step for step in moves}
                TFRMSProp.together(moves)
            left = [run for run, _ in found]
    finally:
        for run in under_way:  # an error of one: rates and `.grad`s of all are put back
            run.close()  # type: ignore[attr-defined]
        TFRMSProp.settle(list(moved.values()))
    for batch in batches:
        batch.finish()
    for task, steps in together:
        _forget(task, steps)


def pickled(task: Task) -> bytes:
    """A task as bytes, for `solve_pickled` in another process. Raises BadInput for what cannot be pickled."""
    problem, weight = task.problem, task.problem.weight
    groups = [] if task.optimizer is None else [
        {k: v for k, v in group.items() if k != "params"} for group in task.optimizer.param_groups
    ]  # fmt: skip
    state = [] if task.optimizer is None else [dict(task.optimizer.state.get(p, {})) for p in task.params]
    zero = weight.new_zeros(())
    bias = None if problem.bias is None else zero.expand(problem.bias.shape)
    bare = replace(problem, weight=zero.expand(weight.shape), bias=bias)
    content = {
        "problem": bare, "solver": task.solver, "params": [p.detach() for p in task.params], "rates": task.rates,
        "groups": groups, "state": state, "kind": task.kind, "layout": (tuple(weight.shape), weight.stride()),
        "scale": task.scale, "memory": task.state, "l1": task.l1, "name": task.name,
    }  # fmt: skip
    try:
        return pickle.dumps(content)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise BadInput(
            "layers are solved in other processes only with solvers, schedules, optimizers and transfer functions "
            f"that can be pickled (no lambdas): {error}. "
            "Name them at the top of a module, or use workers=n for threads"
        ) from error


def solve_pickled(content: bytes) -> bytes:
    """Solve a pickled task; the parameters and their state, as bytes for `take_result`."""
    found = pickle.loads(content)
    params: list[Tensor] = found["params"]
    shape, stride = found["layout"]
    view = params[0].as_strided(shape, stride, params[0].storage_offset())
    problem: LocalProblem = found["problem"]
    bias = params[1].view(problem.bias.shape) if problem.bias is not None else None
    optimizer = None
    if isinstance(found["solver"], LocalSteps):
        optimizer = found["kind"]([{"params": [p]} for p in params], lr=0.0)
        for p, group, given, state in zip(params, optimizer.param_groups, found["groups"], found["state"], strict=True):
            group.update(given)
            if state:
                optimizer.state[p] = state

    def fold(w: Tensor) -> Tensor:
        out = torch.empty_like(params[0])
        shaped(out, view).copy_(w)
        return out

    problem = replace(problem, weight=view, bias=bias)
    more = found["scale"], found["memory"], found["l1"]
    solve(Task(problem, found["solver"], found["name"], params, found["rates"], optimizer, fold, *more))
    states = [] if optimizer is None else [dict(optimizer.state.get(p, {})) for p in params]
    return pickle.dumps((params, states, found["memory"]))


@without_grad
def take_result(task: Task, result: bytes) -> None:
    """Put a result of `solve_pickled` into the task's parameters and their state."""
    params, states, memory = pickle.loads(result)
    for p, new in zip(task.params, params, strict=True):
        p.copy_(new)
    if task.state is not None:
        task.state.update(memory)
    if task.optimizer is not None:
        for p, state in zip(task.params, states, strict=True):
            if state:
                task.optimizer.state[p] = state
            else:
                task.optimizer.state.pop(p, None)
