"""A function run by all processes of a group of their own, one thread each, and how a report of it begins."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["headline", "together"]


def together(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(rank, size, *args)` by `size` new processes (gloo), by rank."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        group = [context.Process(target=_serve, args=(rank, size, folder, function, args)) for rank in range(size)]
        for process in group:
            process.start()
        for process in group:
            process.join()
        # not the exit codes: gloo's threads may abort a process whose work is done
        missing = [rank for rank in range(size) if not _result(folder, rank).exists()]
        if missing:
            raise SystemExit(f"{function.__name__}: no result of ranks {missing} of {size}")
        return [pickle.loads(_result(folder, rank).read_bytes()) for rank in range(size)]


def headline(under: Mapping[str, Any]) -> str:
    """What a report begins with: the conditions that are not in its tables."""
    measured = f"{under['cores']} cores, load {under['load']:.1f} before the start"
    return f"{under['ranks']} ranks, one thread each, {measured}\n"


def _result(folder: str, rank: int) -> Path:
    return Path(folder, f"result-{rank}")


def _serve(rank: int, size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    dist.all_reduce(torch.zeros(1))  # gloo connects now
    _result(folder, rank).write_bytes(pickle.dumps(function(rank, size, *args)))
    dist.barrier()
    dist.destroy_process_group()
