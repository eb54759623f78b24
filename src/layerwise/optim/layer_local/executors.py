"""Who solves the layers of a step: one process in turn, in threads or in processes; or the ranks of a process group.

Problems share nothing, so the bits are the same. Over ranks: `layerwise.optim.layer_local.owners`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from queue import SimpleQueue
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.local.layers.layer import Layer
from layerwise.local.solvers.run import Task, pickled, solve, solve_pickled, take_result
from layerwise.local.solvers.steps import Workspace
from layerwise.local.solvers.values import Anderson, ConjugateGradient, LocalSteps, Newton, Solver

__all__ = ["Executor", "Facts", "GradientJob", "LayerJob", "State", "Workers", "executor_of", "operations"]

Facts = Mapping[str, Any]
State = dict[Any, Any]
Workers = int | tuple[Literal["thread", "process"], int] | None
_TRAFFIC = 12  # an optimizer's passes over a weight and its state, in multiply-adds


class LayerJob(NamedTuple):
    """A layer to be fitted: the parameters that move, by name; what counts multiply-adds; what makes its task.

    cost: asked where work is shared out, not in every step.
    """

    params: Mapping[str, Tensor]
    cost: Callable[[], float]
    task: Callable[[], Task]


class GradientJob(NamedTuple):
    """A parameter without a local problem, which moves along its gradient."""

    params: Mapping[str, Tensor]
    cost: Callable[[], float]
    move: Callable[[], None]


class Executor:
    """Does the jobs of a step. By default it is one process, which agrees with itself."""

    def run(self, jobs: Sequence[LayerJob], rest: Sequence[GradientJob], state: State) -> None:
        """Solve the layers' jobs and do the gradient jobs. state: the optimizer's, by parameter."""
        raise NotImplementedError

    def meet(self, facts: Facts) -> None:
        """Refuse, by name, settings that are not the same in every process."""

    def agreed(
        self, where: str | None, loss: Tensor, facts: Callable[[], Facts], tensors: Callable[[], Mapping[str, Tensor]]
    ) -> str | None:
        """The place that forbids the step in any process, before anything moves; None where there is none.

        facts, tensors: what all processes must have alike.
        """
        return where

    def anywhere(self, where: str | None) -> str | None:
        """The first tensor that is not finite after the step in any process, or None."""
        return where

    def whole(self, state: State, params: Mapping[str, Tensor]) -> State:
        """The state of all parameters, of which some may be kept in other processes."""
        return state

    def loaded(self) -> None:
        """Take note that a state was loaded."""


def operations(solver: Solver, layer: Layer) -> float:
    """Multiply-adds of a layer's local solve, counted roughly: what comes out serves to share the work."""
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
    elif isinstance(solver, Anderson):
        products = solver.steps
    if products:
        return float(2 * products * rows * weights)
    return float(rows * weights + k * i * i * (rows + i + o))  # a memory, a ridge solve, or a function of one's own


class LocalExecutor(Executor):
    """One process: the layers' jobs in some way, then the gradient jobs in turn."""

    def run(self, jobs: Sequence[LayerJob], rest: Sequence[GradientJob], state: State) -> None:
        """Solve the layers' jobs and do the gradient jobs."""
        self._solve(jobs)
        for each in rest:
            each.move()

    def _solve(self, jobs: Sequence[LayerJob]) -> None:
        raise NotImplementedError


class Sequential(LocalExecutor):
    """One layer after another, with scratch memory that all share."""

    def __init__(self) -> None:
        self._workspace = Workspace()

    def _solve(self, jobs: Sequence[LayerJob]) -> None:
        for job in jobs:
            solve(job.task(), self._workspace)


class Threads(LocalExecutor):
    """n layers at a time, each thread with scratch memory of its own; the first error in order when all have ended."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._workspaces: SimpleQueue[Workspace] = SimpleQueue()
        for _ in range(count):
            self._workspaces.put(Workspace())

    def _solve(self, jobs: Sequence[LayerJob]) -> None:
        threads = torch.get_num_threads()

        def one(job: LayerJob) -> None:
            workspace = self._workspaces.get()
            try:
                torch.set_num_threads(threads)  # a new thread starts with torch's own number
                solve(job.task(), workspace)
            finally:
                self._workspaces.put(workspace)

        with ThreadPoolExecutor(self._count) as pool:
            for done in [pool.submit(one, job) for job in jobs]:
                done.result()


class Processes(LocalExecutor):
    """n processes, started at the first step and kept; problems travel there, parameters and their state back."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._pool: ProcessPoolExecutor | None = None

    def _solve(self, jobs: Sequence[LayerJob]) -> None:
        if self._pool is None:
            # a fork of a program with threads may hang; a spawned one imports torch once
            self._pool = ProcessPoolExecutor(
                self._count,
                get_context("spawn"),
                initializer=torch.set_num_threads,
                initargs=(torch.get_num_threads(),),
            )
            weakref.finalize(self, self._pool.shutdown)
        sent = []
        for job in jobs:
            task = job.task()
            sent.append((task, self._pool.submit(solve_pickled, pickled(task))))
        results = [(task, future.result()) for task, future in sent]
        for task, result in results:
            take_result(task, result)


def executor_of(workers: Workers) -> LocalExecutor:
    """Who solves the layers. Raises BadInput for another value than None, n, ("thread", n) or ("process", n)."""
    if workers is None:
        return Sequential()
    pair: Any = ("thread", workers) if isinstance(workers, int) else workers
    good = isinstance(pair, tuple) and len(pair) == 2 and pair[0] in ("thread", "process")
    if not good or not isinstance(pair[1], int) or pair[1] < 1:
        raise BadInput(f'workers is None, a number n ≥ 1, ("thread", n) or ("process", n); got {workers!r}')
    return Threads(pair[1]) if pair[0] == "thread" else Processes(pair[1])
