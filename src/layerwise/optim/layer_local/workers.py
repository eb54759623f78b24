"""Layers solved one after another, in threads, or in processes: problems share nothing, so the bits are the same.

Over the ranks of a process group: `layerwise.optim.layer_local.owners`.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from queue import SimpleQueue
from typing import Any, Literal

import torch

from layerwise.errors import BadInput
from layerwise.local.solvers.run import Away, solve
from layerwise.local.solvers.steps import Workspace
from layerwise.optim.layer_local.jobs import Crew, Job, Rest

__all__ = ["Workers", "crew"]

Workers = int | tuple[Literal["thread", "process"], int] | None


class Here(Crew):
    """One process: the jobs in some way, then the rest in turn."""

    def run(self, jobs: Sequence[Job], rest: Sequence[Rest], state: dict[Any, Any]) -> None:
        """Solve the jobs and move the rest."""
        self._solve(jobs)
        for each in rest:
            each.move()

    def _solve(self, jobs: Sequence[Job]) -> None:
        raise NotImplementedError


class InTurn(Here):
    """One layer after another, with scratch memory that all share."""

    def __init__(self) -> None:
        self._workspace = Workspace()

    def _solve(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            solve(job.task()[0], self._workspace)


class Threads(Here):
    """n layers at a time, each thread with scratch memory of its own; the first error in order when all have ended."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._workspaces: SimpleQueue[Workspace] = SimpleQueue()
        for _ in range(count):
            self._workspaces.put(Workspace())

    def _solve(self, jobs: Sequence[Job]) -> None:
        threads = torch.get_num_threads()

        def one(job: Job) -> None:
            workspace = self._workspaces.get()
            try:
                torch.set_num_threads(threads)  # a new thread starts with torch's own number
                solve(job.task()[0], workspace)
            finally:
                self._workspaces.put(workspace)

        with ThreadPoolExecutor(self._count) as pool:
            for done in [pool.submit(one, job) for job in jobs]:
                done.result()


class Processes(Here):
    """n processes, started at the first step and kept; problems travel there, parameters and their state back."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._pool: ProcessPoolExecutor | None = None

    def _solve(self, jobs: Sequence[Job]) -> None:
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
            task, kind = job.task()
            sent.append((task, self._pool.submit(Away.run, Away(task, kind()).content)))
        results = [(task, future.result()) for task, future in sent]
        for task, result in results:
            Away.take(task, result)


def crew(workers: Workers) -> Here:
    """Those who solve the layers. Raises BadInput for another value than None, n, ("thread", n) or ("process", n)."""
    if workers is None:
        return InTurn()
    pair: Any = ("thread", workers) if isinstance(workers, int) else workers
    good = isinstance(pair, tuple) and len(pair) == 2 and pair[0] in ("thread", "process")
    if not good or not isinstance(pair[1], int) or pair[1] < 1:
        raise BadInput(f'workers is None, a number n ≥ 1, ("thread", n) or ("process", n); got {workers!r}')
    return Threads(pair[1]) if pair[0] == "thread" else Processes(pair[1])
