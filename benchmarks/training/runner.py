"""Run planned runs one after another through Benchopt, each in a process of its own, and add their rows.

A process of its own is what makes a row of everything: of a run that is killed for its memory or by the time
limit as well, and its peak memory is its own. The parent imports Benchopt in no process but the fork server's.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import multiprocessing
import resource
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from . import pool
from .plan import Run
from .rows import Rows, row_of

__all__ = ["LIMIT", "Broken", "Unavailable", "curve_of", "execute", "missing_benchopt", "perform"]

HERE = Path(__file__).parent
LIMIT = 1800  # CPU seconds a run may take before it counts as failed
STALLED = 40  # times as many by the wall clock, on a machine shared with others, mean that it hangs


class Unavailable(RuntimeError):
    """A run cannot take place here, and says why; it gets no row."""


class Broken(RuntimeError):
    """A run ended in an error that says nothing of the method: a mistake in the program, a file that is missing."""


def missing_benchopt() -> str:
    """Why Benchopt cannot be used, or ""."""
    found = importlib.util.find_spec("benchopt") is not None
    return "" if found else "Benchopt is not installed: make benchmarks"


def perform(
    runs: Iterable[Run], rows: Rows, threads: int = 1, limit: int = LIMIT, parallel: Path | None = None
) -> tuple[int, int, int]:
    """Perform the runs that have no row yet; (performed, failed among them, left out as unavailable).

    parallel: the configuration of a pool to spread them over.
    """
    counts = [0, 0, 0]

    def missing() -> Iterator[Run]:
        said: set[str] = set()
        for run in runs:
            reason = run.unavailable()
            if reason:
                counts[2] += 1
                if f"{run.method}{run.change}" not in said:
                    said.add(f"{run.method}{run.change}")
                    print(f"unavailable: {run.method} {run.change}: {reason}", flush=True)
            elif run.key() not in rows.load(run.problem):
                yield run

    performed = partial(execute, threads=threads, limit=limit)
    done = ((run, performed(run)) for run in missing())
    for run, row in done if parallel is None else pool.spread(missing(), parallel, performed):
        rows.add(row)
        counts[0] += 1
        counts[1] += row["status"] == "failed"
        print(
            f"{run.problem} {run.method} trial {run.trial} seed {run.seed} {run.shape} {run.change}: "
            f"train {row['train_loss']:.4g}  test {row['test_loss']:.4g}  "
            + (f"accuracy {row['test_accuracy']:.4f}  " if "test_accuracy" in row else "")
            + f"{row['clock'].get('wall_seconds', math.nan):.0f} s  {row['failure']}",
            flush=True,
        )
    return counts[0], counts[1], counts[2]


def execute(run: Run, threads: int = 1, limit: int = LIMIT) -> dict[str, Any]:
    """Perform one run and return its row, whichever way training ended.

    Raises Unavailable, Broken, and InterruptedError: then there is no result, and no row.
    """
    reason = missing_benchopt() or run.unavailable()
    if reason:
        raise Unavailable(reason)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.training.runner", "benchmarks.training.train", "benchopt.runner"])
    ours, theirs = context.Pipe(duplex=False)
    start = time.perf_counter()
    child = context.Process(target=_child, args=(theirs, run, threads, limit))
    child.start()
    theirs.close()
    try:
        answer = _answer(ours, child, limit)
    finally:
        if child.is_alive():
            child.kill()
        child.join()
        ours.close()
    clock = {"wall_seconds": round(time.perf_counter() - start, 1), **answer.get("clock", {}), **_provenance(threads)}
    accuracies, early = answer.get("accuracies", ()), answer.get("early", ())
    return row_of(run, answer.get("curve", ()), answer.get("failure", ""), clock, accuracies, early)


def _answer(ours: Connection, child: Any, limit: int) -> dict[str, Any]:
    """What the child sends, or how it ended without."""
    if not ours.poll(limit * STALLED):
        return {"failure": f"stopped after {limit * STALLED} s by the wall clock"}
    try:
        answer: dict[str, Any] = ours.recv()
    except EOFError:
        child.join()
        if child.exitcode in (-signal.SIGINT, -signal.SIGTERM):
            raise InterruptedError("the run was interrupted from outside: it has no row") from None
        if child.exitcode == -signal.SIGXCPU:
            return {"failure": f"stopped after {limit} s of CPU time"}
        return {"failure": f"the process ended with code {child.exitcode}; -9 is what a lack of memory leads to"}
    if "broken" in answer:
        raise Broken(answer["broken"])
    return answer


def _child(pipe: Connection, run: Run, threads: int, limit: int) -> None:
    """Perform the run by Benchopt's runner and send the curve."""
    import torch

    torch.set_num_threads(threads)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 60))  # SIGXCPU at the first, SIGKILL at the second
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            points = _through_benchopt(run)
        curve, failure = curve_of(points)
        accuracies = [float(p["objective_accuracy"]) for p in points if not p["objective_early"]][: len(curve)]
        early = [float(p["objective_accuracy"]) for p in points if p["objective_early"]]
        if not failure and len(curve) != run.epochs + 1:
            failure = f"the curve has {len(curve) - 1} epochs of {run.epochs}"
        clock = {
            "cpu_seconds": round(float(points[-1]["objective_cpu_seconds"]), 2),
            "run_cpu_seconds": round(time.process_time(), 2),  # measuring, reading data and Benchopt, too
            "memory_mb": round(float(points[-1]["objective_memory"]), 1),
        }
        pipe.send({"curve": curve, "failure": failure, "clock": clock, "accuracies": accuracies, "early": early})
    except Exception as error:  # Benchopt raises RuntimeError for what it has printed a traceback of
        pipe.send({"broken": f"{type(error).__name__}: {error}\n{said.getvalue()}"})


def _through_benchopt(run: Run) -> list[Mapping[str, Any]]:
    """The points of the run's curve, from Benchopt's own result file."""
    import pandas as pd
    from benchopt.runner import run_benchmark

    with tempfile.TemporaryDirectory() as folder:
        path = run_benchmark(
            HERE,
            solver_names=_only("method", method=run.method, trial=run.trial, change=run.change),
            dataset_names=_only(
                "problem", problem=run.problem, rows=run.rows, shape=run.shape, validation=run.validation
            ),
            objective_filters=_only("training", epochs=run.epochs, seed=run.seed, early=run.early),
            max_runs=run.epochs + 1 + (run.early + 1 if run.early else 0),
            plot_result=False,
            no_cache=True,  # the rows are the cache: they outlive the machine
            show_progress=False,
            output_file=str(Path(folder) / "run.parquet"),
        )
        found: list[Mapping[str, Any]] = pd.read_parquet(path).to_dict("records")
    return found


def _only(plugin: str, **parameters: Any) -> list[dict[str, dict[str, list[Any]]]]:
    """One value of each parameter of a plugin, as Benchopt asks for it."""
    return [{plugin: {name: [value] for name, value in parameters.items()}}]


def curve_of(points: Iterable[Mapping[str, Any]]) -> tuple[list[tuple[float, float]], str]:
    """(train, test) loss by epoch up to the first failure, and that failure."""
    curve: list[tuple[float, float]] = []
    for point in points:
        if point["objective_failure"]:
            return curve, str(point["objective_failure"])
        if point["objective_early"]:
            continue
        curve.append((float(point["objective_value"]), float(point["objective_test_loss"])))
    return curve, ""


def _provenance(threads: int) -> dict[str, Any]:
    """When and from which commit; no part of what identifies a row."""
    command = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {"threads": threads, "commit": commit, "when": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime())}
