"""Tune, train to the end, time, ablate and report.

    python -m benchmarks.training --dry-run                  what the study will take, and what is left of it
    python -m benchmarks.training step-time                  seconds a step, interleaved
    python -m benchmarks.training tune                       8 trials of every method, 3 epochs each
    python -m benchmarks.training final                      the best trial: 3 seeds, 20 epochs
    python -m benchmarks.training ablations                  local steps, loss, batch, width, depth, ReLU
    python -m benchmarks.training report                     tables and figures from the rows
    python -m benchmarks.training declare                    write the trials anew
    python -m benchmarks.training --study altmin ...         the same of the study of alternating minimization
    python -m benchmarks.training --study second-order ...   the same of that of curvature

Every finished run is a row in benchmarks/training/rows; what has a row is not run again, so each command goes on
where it was stopped. `--problem` and `--method` take part of the study; several instances may run at once on
different problems.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import budget, report, step_time, trials
from .locoprop.ablations import ablations
from .locoprop.plan import MAIN
from .methods import METHODS
from .plan import Run, best, finals, methods_of, tuning
from .problems import PROBLEMS
from .rows import FOLDER, Rows
from .runner import LIMIT, missing_benchopt, perform
from .study import STUDIES

PARTS = ("tune", "final", "step-time", "ablations", "report", "declare")


def runs_of(part: str, problems: Sequence[str], methods: Sequence[str] | None, rows: Rows) -> list[Run]:
    """The runs of a part of the study; finals of a method only once all its trials have a row."""
    if part == "ablations" and MAIN not in problems:
        print(f"no ablations: all are of {MAIN}", file=sys.stderr)
        return []
    if part == "ablations":
        return [
            run for by_method in ablations().values() for method, runs in by_method.items() for run in runs
            if methods is None or method in methods
        ]  # fmt: skip
    runs: list[Run] = []
    for problem in problems:
        for method in methods_of(problem, methods):
            trial_runs = tuning(problem, method)
            if part == "tune":
                runs += trial_runs
            elif not trial_runs[0].unavailable():
                runs += _finals(problem, method, trial_runs, rows)
    return runs


def _finals(problem: str, method: str, trial_runs: list[Run], rows: Rows) -> list[Run]:
    try:
        trial = best(trial_runs, rows.load(problem))
    except LookupError as error:
        print(f"no final runs: {error}", file=sys.stderr)
        return []
    if trial is None:
        print(f"no final runs: all trials of {method} on {problem} failed", file=sys.stderr)
        return []
    return finals(problem, method, trial)


def estimated(problems: Sequence[str], rows: Rows, times: Path, in_full: bool) -> str:
    """The estimate of the study on some problems, as text."""

    def step_times(problem: str) -> tuple[dict[str, float], float]:
        return step_time.measured(problem, times)

    parts = budget.estimate(step_times, rows.load, problems)
    used = budget.used(row for problem in problems for row in rows.load(problem).values())
    return budget.table(parts, budget.assumed(problems, step_times), used, in_full)


def main(argv: Sequence[str] | None = None) -> int:
    """0 where all was done, 1 where a part could not be, 2 where it cannot start."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.split("\n")[0])
    parser.add_argument("part", nargs="?", choices=PARTS)
    parser.add_argument("--dry-run", action="store_true", help="print the estimate and stop")
    parser.add_argument("--study", choices=list(STUDIES), default="locoprop")
    parser.add_argument("--problem", nargs="+", choices=list(PROBLEMS), help="of the study")
    parser.add_argument("--method", nargs="+", choices=list(METHODS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=step_time.REPEATS, help="of step-time")
    parser.add_argument("--limit", type=int, default=LIMIT, help="CPU seconds after which a run counts as failed")
    parser.add_argument("--rows", type=Path, default=FOLDER, help="folder of the rows")
    parser.add_argument("--parallel-config", type=Path, help="a pool to spread runs over, as Benchopt takes it")
    arguments = parser.parse_args(argv)
    study = STUDIES[arguments.study]
    problems = arguments.problem or list(study.methods)
    if not set(problems) <= set(study.methods):
        parser.error(f"the study {study.name} has the problems {', '.join(study.methods)}; got {', '.join(problems)}")
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    torch.set_num_threads(arguments.threads)
    rows = Rows(arguments.rows)
    times = arguments.rows / step_time.FILE.name
    if arguments.dry_run or arguments.part is None:
        print(estimated(problems, rows, times, arguments.part is not None))
        return 0
    if arguments.part == "declare":
        study.trials.write_text(trials.text(study.name), encoding="utf-8")
        return 0
    if arguments.part == "report":
        print(report.write(rows, problems, times))
        return 0
    if arguments.part == "step-time":
        for problem in dict.fromkeys(PROBLEMS[p].timed_as or p for p in problems):
            if PROBLEMS[problem].missing():
                print(f"{problem} is not timed: {PROBLEMS[problem].missing()}")
                continue
            row = step_time.record(problem, arguments.method, arguments.repeats, times)
            print(problem, row["relative"], f"Adam {row['seconds']['adam']:.4f} s", row["unavailable"], flush=True)
        return 0
    if missing_benchopt():
        print(f"error: {missing_benchopt()}", file=sys.stderr)
        return 2
    runs = runs_of(arguments.part, problems, arguments.method, rows)
    done, failed, left_out = perform(runs, rows, arguments.threads, arguments.limit, arguments.parallel_config)
    print(f"{arguments.part}: {done} runs, {failed} of them failed; {left_out} unavailable; {len(runs)} planned")
    return 1 if left_out else 0


if __name__ == "__main__":
    sys.exit(main())
