"""Runs spread over a pool by Benchopt's own backends: processes here (loky), dask, or SLURM (submitit).

The pool's file is the one that `benchopt run --parallel-config` takes: `backend: dask`, `n_jobs: 2`, or a
`dask_address`; `backend: submitit` with SLURM's parameters. Rows are written by the process that spreads the runs, as
they come; a worker that dies takes no row with it. Dask gives the run of a dead worker to another one; loky and SLURM
end the command, and the same command goes on where it stopped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from .plan import Run

__all__ = ["spread"]

Row = dict[str, Any]


def spread(runs: Iterable[Run], config: Path, perform: Callable[[Run], Row]) -> Iterator[tuple[Run, Row]]:
    """Perform runs on the pool that a file configures; each with its row, as they end."""
    # a run has a process of its own, which dask's workers may not start while they are daemons
    os.environ.setdefault("DASK_DISTRIBUTED__WORKER__DAEMON", "False")
    from benchopt.benchmark import Benchmark
    from benchopt.parallel_backends import check_parallel_config, parallel_run

    settings = check_parallel_config(str(config), None)
    if settings["backend"] != "submitit":
        settings.setdefault("batch_size", 1)  # a run is long, and a lost worker should lose one
    asked = ({"run": run, "perform": perform} for run in runs)
    for run, row, _ in parallel_run(Benchmark(Path(__file__).parent), _one, asked, settings):
        yield run, row


def _one(run: Run, perform: Callable[[Run], Row]) -> tuple[Run, Row]:
    return run, perform(run)
