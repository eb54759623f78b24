"""Layers solved one after another, in threads, or in processes: problems share nothing, so the bits are the same."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from queue import SimpleQueue
from typing import Any, Literal, TypeVar

import torch

from layerwise.errors import BadInput
from layerwise.local.solve import Away, Task, solve
from layerwise.local.steps import Workspace

__all__ = ["Workers", "crew"]

Workers = int | tuple[Literal["thread", "process"], int] | None
T = TypeVar("T")
TaskOf = Callable[[T], tuple[Task, Callable[[], Any]]]


class InTurn:
    """One layer after another, with scratch memory that all share."""

    def __init__(self) -> None:
        self._workspace = Workspace()

    def run(self, items: Sequence[T], task_of: TaskOf[T]) -> None:
        """Make and solve a task for each item."""
        for item in items:
            solve(task_of(item)[0], self._workspace)


class Threads:
    """n layers at a time, each thread with scratch memory of its own."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._workspaces: SimpleQueue[Workspace] = SimpleQueue()
        for _ in range(count):
            self._workspaces.put(Workspace())

    def run(self, items: Sequence[T], task_of: TaskOf[T]) -> None:
        """Make and solve a task for each item; the first error in their order is raised when all have ended."""
        threads = torch.get_num_threads()

        def one(item: T) -> None:
            workspace = self._workspaces.get()
            try:
                torch.set_num_threads(threads)  # a new thread starts with torch's own number
                solve(task_of(item)[0], workspace)
            finally:
                self._workspaces.put(workspace)

        with ThreadPoolExecutor(self._count) as pool:
            for done in [pool.submit(one, item) for item in items]:
                done.result()


class Processes:
    """n processes, started at the first step and kept; problems travel there, parameters and their state back."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._pool: ProcessPoolExecutor | None = None

    def run(self, items: Sequence[T], task_of: TaskOf[T]) -> None:
        """Make a task for each item, solve them all elsewhere, and take over the results."""
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
        for item in items:
            task, kind = task_of(item)
            sent.append((task, self._pool.submit(Away.run, Away(task, kind()).content)))
        results = [(task, future.result()) for task, future in sent]
        for task, result in results:
            Away.take(task, result)


def crew(workers: Workers) -> InTurn | Threads | Processes:
    """Those who solve the layers. Raises BadInput for another value than None, n, ("thread", n) or ("process", n)."""
    if workers is None:
        return InTurn()
    pair: Any = ("thread", workers) if isinstance(workers, int) else workers
    good = isinstance(pair, tuple) and len(pair) == 2 and pair[0] in ("thread", "process")
    if not good or not isinstance(pair[1], int) or pair[1] < 1:
        raise BadInput(f'workers is None, a number n ≥ 1, ("thread", n) or ("process", n); got {workers!r}')
    return Threads(pair[1]) if pair[0] == "thread" else Processes(pair[1])
