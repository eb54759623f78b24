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

from layerwise.errors import BadInput
from layerwise.local.layers.layer import Layer
from layerwise.local.solvers.run import pickled, solve, solve_pickled, solve_together, take_result
from layerwise.local.solvers.stopping import TRAFFIC
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


class LayerJob(NamedTuple):
    """A layer to be fitted: its parameters by name, and functions for its cost in multiply-adds and its task.

    free: whether its local steps are of any size.
    """

    params: Mapping[str, Tensor]
    cost: Callable[[], float]
    task: Callable[[], Task]
    free: bool = False


class GradientJob(NamedTuple):
    """A parameter without a local problem, which moves along its gradient.

    free: by steps of any size. slope: the batch's loss, and its gradient in the parameter.
    """

    params: Mapping[str, Tensor]
    cost: Callable[[], float]
    move: Callable[[], None]
    free: bool = False
    slope: tuple[Tensor, Tensor] | None = None


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
        return float(solver.steps * weights * (2 * min(taken, rows) + TRAFFIC))
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
    """Solves one layer after another, in one scratch memory; on an accelerator side by side, for fewer launches."""

    def __init__(self) -> None:
        self._workspaces = [Workspace()]

    def _solve(self, jobs: Sequence[LayerJob]) -> None:
        if not all(p.is_cpu for job in jobs for p in job.params.values()):
            self._workspaces += [Workspace() for _ in jobs[len(self._workspaces) :]]
            solve_together([job.task() for job in jobs], self._workspaces[: len(jobs)])
            return
        for job in jobs:
            solve(job.task(), self._workspaces[0])


class Threads(LocalExecutor):
    """Solves n layers at a time, each thread in its own scratch memory; raises the first layer's error at the end."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._workspaces: SimpleQueue[Workspace] = SimpleQueue()
        for _ in range(count):
            self._workspaces.put(Workspace())

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has threads of its own."""
        return Threads, (self._count,)

    def _solve(self, jobs: Sequence[LayerJob]) -> None:
        threads = torch.get_num_threads()

        def one(job: LayerJob) -> None:
            workspace = self._workspaces.get()
            try:
                torch.set_num_threads(threads)  # a new thread starts with torch's own number
                solve(job.task(), workspace)
            finally:
                self._workspaces.put(workspace)

        with futures.ThreadPoolExecutor(self._count) as pool:
            for done in [pool.submit(one, job) for job in jobs]:
                done.result()


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
