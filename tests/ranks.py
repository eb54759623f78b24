"""Functions run by several processes of one group (gloo, one thread each), as `torchrun` would start them.

The processes are started once a test session and reused: importing torch takes longer than most tests.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 240  # seconds for one function; machines can be busy


class Ranks:
    """A group of processes that stand by."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._pipes, self._processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, self._folder.name, there), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(rank, *args)` in all ranks, by rank; function and arguments are picklable, results too.

        Raises RuntimeError with the tracebacks of the ranks that failed.
        """
        for pipe in self._pipes:
            pipe.send((function, args))
        results, errors = [], []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(TIMEOUT):
                self.stop()
                raise RuntimeError(f"rank {rank} gave no answer within {TIMEOUT} s; the ranks wait for each other")
            ok, value = pipe.recv()
            results.append(value)
            if not ok:
                errors.append(f"rank {rank}:\n{value}")
        if errors:
            self.stop()  # the others may wait inside a collective
            raise RuntimeError("\n".join(errors))
        return results

    def stop(self) -> None:
        """End the processes; the next `ranks(size)` starts new ones."""
        for process in self._processes:
            process.kill()
            process.join()
        ranks.cache_clear()


@cache
def ranks(size: int = 2) -> Ranks:
    """The group of this many processes."""
    group = Ranks(size)
    atexit.register(group.stop)
    return group


def said_by_the_survivor(function: Callable[..., Any]) -> tuple[bool, Any]:
    """Whether `function(rank)` ended well on rank 0 of two, and its answer, where rank 1 ends itself on the way."""
    group = Ranks(2)
    try:
        for pipe in group._pipes:
            pipe.send((function, ()))
        assert group._pipes[0].poll(60)
        ok, said = group._pipes[0].recv()
    finally:
        group.stop()
        group._folder.cleanup()
    return ok, said


def _serve(rank: int, size: int, folder: str, pipe: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    store = Path(folder) / "store"
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT)
    )
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        default = torch.get_default_dtype()
        try:
            torch.manual_seed(0)
            answer = (True, function(rank, *args))
        except BaseException:
            answer = (False, traceback.format_exc())
        torch.set_default_dtype(default)
        pipe.send(answer)
