"""Executors solve the local problems of a step: one after another, in threads, or in worker processes.

Problems share nothing, so the bits are the same. Over the ranks of a process group: `optim.layer_local.owners`.
"""

from __future__ import annotations

import multiprocessing
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from queue import SimpleQueue
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils import _python_dispatch

from layerwise.errors import BadInput
from layerwise.local.layers.layer import Layer
from layerwise.local.solvers.run import pickled, solve, solve_pickled, solve_together, take_result
from layerwise.local.solvers.task import Task
from layerwise.local.solvers.values import Anderson, ConditionalGradient, ConjugateGradient, LocalSteps, Newton, Solver
from layerwise.local.solvers.workspace import Workspace

__all__ = [
    "Executor",
    "Facts",
    "GradientJob",
    "LayerJob",
    "LocalExecutor",
    "State",
    "Workers",
    "executor_of",
    "operations",
]

Facts = Mapping[str, Any]
State = dict[Any, Any]
Workers = int | tuple[Literal["thread", "process"], int] | None
_LARGE = 3e8  # multiply-adds of all local solves for which threads are worth their start
_TRAFFIC = 12  # an optimizer's passes over a weight and its state, in multiply-adds


class LayerJob(NamedTuple):
    """A layer to be fitted: its parameters by name, and functions for its cost in multiply-adds and its task."""

    params: Mapping[str, Tensor]
    cost: Callable[[], float]
    task: Callable[[], Task]


class GradientJob(NamedTuple):
    """A parameter without a local problem, which moves along its gradient."""

    params: Mapping[str, Tensor]
    cost: Callable[[], float]
    move: Callable[[], None]


class Executor:
    """Solves the layers of a step, and agrees with other processes on it; the base class is for a single process."""

    def run(self, jobs: Sequence[LayerJob], rest: Sequence[GradientJob], state: State) -> None:
        """Fit the layers, then move the parameters without a local problem. state: the optimizer's, by parameter."""
        raise NotImplementedError

    def meet(self, facts: Facts) -> None:
        """Raise BadInput, by name, for settings that differ between processes."""

    def agreed(
        self, where: str | None, loss: Tensor, facts: Callable[[], Facts], tensors: Callable[[], Mapping[str, Tensor]]
    ) -> str | None:
        """The first reason in any process to skip the step, before anything moves; None where there is none.

        where: this process's reason. facts, tensors: must be equal in all processes.
        """
        return where

    def anywhere(self, where: str | None) -> str | None:
        """The first non-finite tensor after the step in any process, or None. where: this process's."""
        return where

    def fail(self, error: BaseException) -> None:
        """Tell other processes that this one's step has failed."""

    def whole(self, state: State, params: Mapping[str, Tensor]) -> State:
        """The optimizer state of all parameters, gathered from the processes that keep it."""
        return state

    def loaded(self) -> None:
        """Called after a state was loaded."""


def operations(solver: Solver, layer: Layer) -> float:
    """Rough multiply-adds of a layer's local solve, by which layers are shared out."""
    k, o, i = layer.matrix().shape
    rows = sum(part.use.call.out_shape.numel() for part in layer.parts) / max(k * o, 1)
    weights = k * o * i
    if isinstance(solver, LocalSteps):
        taken = rows if solver.rows == "all" else -(-rows // solver.steps) if solver.rows == "auto" else solver.rows
        return float(solver.steps * weights * (2 * min(taken, rows) + _TRAFFIC))
    products = 0
    if isinstance(solver, Newton):
        products = solver.iterations * solver.inner
    elif isinstance(solver, ConjugateGradient):
        products = solver.iterations
    elif isinstance(solver, Anderson | ConditionalGradient):
        products = solver.steps
    if products:
        return float(2 * products * rows * weights)
    return float(rows * weights + k * i * i * (rows + i + o))  # a memory, a ridge solve, or a function of one's own


class LocalExecutor(Executor):
    """Base of the executors of a single process."""

    def run(self, jobs: Sequence[LayerJob], rest: Sequence[GradientJob], state: State) -> None:
        """Solve the layers' jobs and do the gradient jobs."""
        self._solve(jobs)
        for each in rest:
            each.move()

    def _solve(self, jobs: Sequence[LayerJob]) -> None:
        raise NotImplementedError


class Sequential(LocalExecutor):
    """Solves one layer after another; side by side on an accelerator, and where torch has several threads.

    On an accelerator that takes fewer launches. On a CPU a product is too small to gain much from a second thread, so
    each of torch's threads solves large layers alone, the costliest first.
    """

    def __init__(self) -> None:
        self._workspaces = [Workspace()]

    def _solve(self, jobs: Sequence[LayerJob]) -> None:
        if any(p.device.type != "cpu" for job in jobs for p in job.params.values()):
            solve_together([job.task() for job in jobs], self._enough(len(jobs)))
            return
        threads = torch.get_num_threads()
        if threads > 1 and len(jobs) > 1 and not _has_context() and sum(job.cost() for job in jobs) >= _LARGE:
            ordered = sorted(jobs, key=lambda job: job.cost(), reverse=True)
            _side_by_side(ordered, self._enough(threads), lambda task: _is_torchs_own(task.optimizer), threads=1)
            return
        for job in jobs:
            solve(job.task(), self._workspaces[0])

    def _enough(self, count: int) -> list[Workspace]:
        self._workspaces += [Workspace() for _ in range(count - len(self._workspaces))]
        return self._workspaces[:count]


class Threads(LocalExecutor):
    """Solves n layers at a time, each thread in its own scratch memory; raises the first layer's error at the end."""

    def __init__(self, count: int) -> None:
        self._workspaces = [Workspace() for _ in range(count)]

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has threads of its own."""
        return Threads, (len(self._workspaces),)

    def _solve(self, jobs: Sequence[LayerJob]) -> None:
        _side_by_side(jobs, self._workspaces, lambda _: True, torch.get_num_threads())


def _side_by_side(
    jobs: Sequence[LayerJob], workspaces: Sequence[Workspace], apart: Callable[[Task], bool], threads: int
) -> None:
    """Solve as many layers at a time as there are workspaces, with so many of torch's threads for each.

    apart: whether a task may leave this thread. Tasks are made in this one, since a target can be a user's function.
    """
    here, free = torch.get_num_threads(), SimpleQueue[Workspace]()
    for workspace in workspaces:
        free.put(workspace)

    def one(task: Task, workspace: Workspace) -> None:
        try:
            torch.set_num_threads(threads)  # a new thread starts with torch's own number
            solve(task, workspace)
        finally:
            free.put(workspace)

    try:
        with futures.ThreadPoolExecutor(len(workspaces)) as pool:
            sent = []
            for job in jobs:
                task, workspace = job.task(), free.get()
                if apart(task):
                    sent.append(pool.submit(one, task, workspace))
                else:
                    one(task, workspace)
            for done in sent:
                done.result()
    finally:
        torch.set_num_threads(here)  # of threads to come, too


def _has_context() -> bool:
    """Whether this thread runs under something that another thread would not: autocast, or a mode that sees calls."""
    return torch.is_autocast_enabled("cpu") or bool(_python_dispatch._get_current_dispatch_mode_stack())


def _is_torchs_own(optimizer: torch.optim.Optimizer | None) -> bool:
    """Whether local steps run no code of a user's."""
    return type(optimizer).__module__.partition(".")[0] in ("torch", "layerwise")


class Processes(LocalExecutor):
    """Solves layers in n worker processes: problems are pickled there, parameters and optimizer state back."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._pool: futures.ProcessPoolExecutor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has processes of its own."""
        return Processes, (self._count,)

    def _solve(self, jobs: Sequence[LayerJob]) -> None:
        if self._pool is None:
            # a fork of a program with threads may hang; a spawned one imports torch once
            self._pool = futures.ProcessPoolExecutor(
                self._count,
                multiprocessing.get_context("spawn"),
                initializer=torch.set_num_threads,
                initargs=(torch.get_num_threads(),),
            )
            weakref.finalize(self, self._pool.shutdown)
        sent = []
        try:
            for job in jobs:
                task = job.task()
                sent.append((task, self._pool.submit(solve_pickled, pickled(task))))
            results = [(task, future.result()) for task, future in sent]
        except futures.BrokenExecutor:  # a process died: the next step starts new ones
            pool, self._pool = self._pool, None
            pool.shutdown()
            raise
        except BaseException:
            for _, future in sent:
                future.cancel()
            raise
        for task, result in results:
            take_result(task, result)


def executor_of(workers: Workers) -> LocalExecutor:
    """The executor for `workers=`. Raises BadInput for another value than None, n, ("thread", n) or ("process", n)."""
    if workers is None:
        return Sequential()
    pair: Any = ("thread", workers) if isinstance(workers, int) else workers
    good = isinstance(pair, tuple) and len(pair) == 2 and pair[0] in ("thread", "process")
    if not good or not isinstance(pair[1], int) or pair[1] < 1:
        raise BadInput(f'workers is None, a number n ≥ 1, ("thread", n) or ("process", n); got {workers!r}')
    return Threads(pair[1]) if pair[0] == "thread" else Processes(pair[1])
