"""Seconds a step, methods in an interleaved run with Adam: what a shared machine's clock can still say.

A row holds one such run of one problem. A method's cost is its ratio to Adam's step in the same run; seconds of a
curve are steps, times that ratio, times the seconds of Adam's step in the newest full run.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.probe import interleaved

from . import trials
from .methods import METHODS
from .plan import methods_of
from .problem import Split
from .problems import PROBLEMS
from .rows import FOLDER, append, read
from .study import study_of
from .train import Training

__all__ = ["FILE", "REFERENCE", "measure", "measured", "rules", "seconds"]

REFERENCE = "adam"
REPEATS = 15
FILE = FOLDER / "step_time.jsonl"


def gentle(method: str, problem: str) -> int:
    """The trial with the lowest rate: one whose training goes on while it is timed."""
    points = trials.declared(study_of(problem).name)[method][PROBLEMS[problem].family]
    return min(range(len(points)), key=lambda t: points[t].get("lr", 0.0))


def stepper(problem: str, split: Split, method: str) -> Callable[[], None]:
    """One period of steps of a method on the problem's batches, over and over."""
    known, chosen = PROBLEMS[problem], METHODS[method]
    hyper = trials.hyperparameters(method, known.family, gentle(method, problem))
    batch = len(split.x) if chosen.whole else chosen.batch or known.batch
    training = Training(problem, split, method, hyper, 0, batch)
    index: Iterator[torch.Tensor | slice] = itertools.cycle(torch.arange(len(split.x) // batch * batch).split(batch))
    if chosen.whole:
        index = itertools.repeat(slice(None))

    def steps() -> None:
        for _ in range(chosen.spaces[known.family].period):
            training.step(next(index))

    return steps


def measure(
    problem: str, methods: Iterable[str] | None = None, repeats: int = REPEATS, rows: int | None = None
) -> dict[str, Any]:
    """Lower quartiles of CPU seconds a step, and of measuring the loss over all rows; methods not here are named."""
    known = PROBLEMS[problem]
    split = known.split(rows or known.rows)
    wanted = list(dict.fromkeys([REFERENCE, *methods_of(problem, methods)]))
    missing = {m: METHODS[m].missing(known.family) for m in wanted if METHODS[m].missing(known.family)}
    found = [m for m in wanted if m not in missing]
    runs: dict[str, Callable[[], object]] = {m: stepper(problem, split, m) for m in found}
    runs["_losses"] = Training(problem, split, "sgd", {"lr": 0.0}, 0, known.batch).losses
    total = interleaved(runs, repeats)
    now = rules(problem, found)
    each = {m: total[m] / now["periods"][m] for m in found}
    return {
        "problem": problem,
        "rows": len(split.x),
        "seconds": {m: round(s, 6) for m, s in each.items()},
        "relative": {m: round(s / each[REFERENCE], 4) for m, s in each.items()},
        "losses_seconds": round(total["_losses"], 4),
        **now,
        "unavailable": missing,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "when": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()),
    }


def rules(problem: str, methods: Iterable[str]) -> dict[str, dict[str, int]]:
    """What must be as it was for a kept time to count: the revision of each method, and the steps of its period."""
    known, family = [METHODS[m] for m in methods], PROBLEMS[problem].family
    return {
        "revisions": {m.name: m.revision for m in known},
        "periods": {m.name: m.spaces[family].period for m in known},
    }


def record(
    problem: str, methods: Iterable[str] | None = None, repeats: int = REPEATS, file: Path = FILE
) -> dict[str, Any]:
    """Measure and keep the row."""
    row = measure(problem, methods, repeats)
    append(file, row)
    return row


def measured(problem: str, file: Path = FILE) -> tuple[dict[str, float], float]:
    """(seconds a step by method, seconds to measure the losses) from the kept rows.

    Of each method the row with the most repeats counts, of those the newest; only the method's present revision, timed
    over the period that it has now: a lower quartile over shorter ones need not see what the method amortises.
    Empty and NaN where nothing has been measured. A problem may share another's times.
    """
    problem = PROBLEMS[problem].timed_as or problem
    now = rules(problem, [m for m, method in METHODS.items() if PROBLEMS[problem].family in method.spaces])
    rows = [r for r in read(file) if r["problem"] == problem]
    rows.sort(key=lambda r: r["repeats"])  # stable: the newest of the most repeats is last
    if not rows:
        return {}, float("nan")
    reference = rows[-1]["seconds"][REFERENCE]
    relative = {
        m: ratio for r in rows for m, ratio in r["relative"].items()
        if all(r[rule][m] == value.get(m) for rule, value in now.items())
    }  # fmt: skip
    return {m: ratio * reference for m, ratio in relative.items()}, rows[-1]["losses_seconds"]


def seconds(problem: str, method: str, file: Path = FILE) -> float:
    """Seconds a step of a method, NaN where that has not been measured."""
    return measured(problem, file)[0].get(method, float("nan"))
