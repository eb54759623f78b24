"""What the report says of a classifier: accuracy over the first minibatches and by epoch, and what a step costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.probe import table
from benchmarks.training.plan import Run, methods_of, tuning
from benchmarks.training.problems import PROBLEMS
from benchmarks.training.study import study_of
from benchmarks.training.summaries import Finals, Row, by_problem, interval, median, number, seeds

__all__ = ["EARLY", "accuracy_table", "epoch_cost", "summary_table", "tuning_table", "unavailable"]

EARLY = (10, 50, 100)  # minibatches that the table has
REFERENCE = "adam"


def epoch_cost(problem: str, configuration: Mapping[str, Any], method: str, seconds: Mapping[str, float]) -> float:
    """Seconds of an epoch's steps over those of Adam's at the problem's batch; NaN where either is not timed."""
    rows = configuration["rows"]
    steps, own = -(-rows // configuration["batch"]), -(-rows // PROBLEMS[problem].batch)
    return steps * seconds.get(method, math.nan) / (own * seconds.get(REFERENCE, math.nan))


def accuracy_table(problem: str, final: Finals, seconds: Mapping[str, float]) -> str:
    """Accuracy in percent on test rows after the first minibatches, an epoch and all of them, as Markdown."""
    points = [e for e in EARLY if e <= PROBLEMS[problem].early]
    head = (
        "method", "trial", "batch", "seeds", *(f"after {e}" for e in points), "epoch 1 [95 %]", "last epoch [95 %]",
        "test loss", "step / Adam's", "epoch / Adam's",
    )  # fmt: skip
    lines = []
    step = seconds.get(REFERENCE, math.nan)
    for method, rows in final.items():
        kept = rows[0]["configuration"]
        early = [_percent(median([r["early_curve"][e] for r in rows if len(r["early_curve"]) > e])) for e in points]
        first = [r["accuracy_curve"][1] if len(r["accuracy_curve"]) > 1 else -math.inf for r in rows]
        lines.append([
            PROBLEMS[problem].label(method), rows[0]["trial"], kept["batch"], seeds(rows), *early, _spread(first),
            _spread([r["test_accuracy"] for r in rows]), number(median([r["test_loss"] for r in rows]), 3),
            number(seconds.get(method, math.nan) / step, 3),
            number(epoch_cost(problem, kept, method, seconds), 3),
        ])  # fmt: skip
    return table(head, lines, numbers=False)


def summary_table(finals: Mapping[str, Finals]) -> str:
    """Accuracy in percent on every problem after epoch 1 and the last, means over seeds, as Markdown."""

    def cell(problem: str, method: str) -> str:
        rows = finals[problem][method]
        first, *_ = interval([r["accuracy_curve"][1] if len(r["accuracy_curve"]) > 1 else -math.inf for r in rows])
        last, *_ = interval([r["test_accuracy"] for r in rows])
        one = all(r["configuration"]["epochs"] == 1 for r in rows)
        return _percent(last) if one else f"{_percent(first)}, {_percent(last)}"

    return by_problem(finals, cell)


def tuning_table(problem: str, rows: Mapping[Any, Row]) -> str:
    """Accuracy in percent on the rows held out of the training rows, by method and trial, the best in bold."""
    lines: list[list[str]] = []
    for method in methods_of(problem):
        runs = tuning(problem, method)
        found = [float(rows[r.key()]["test_accuracy"]) if r.key() in rows else math.nan for r in runs]
        if not all(map(math.isnan, found)):
            high = max((v for v in found if math.isfinite(v)), default=math.nan)
            cells = (f"**{_percent(v)}**" if v == high else _percent(v) for v in found)
            lines.append([PROBLEMS[problem].label(method), *cells])
    return table(["method", *map(str, range(len(lines[0]) - 1))], lines, numbers=False) if lines else ""


def unavailable(problem: str) -> list[str]:
    """The methods of the study that cannot be run here, each with its reason."""
    runs: Iterator[Run] = (tuning(problem, m)[0] for m in study_of(problem).methods[problem])
    return [f"{r.method}: {r.unavailable()}" for r in runs if r.unavailable()]


def _percent(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{100 * value:.2f}" if abs(value) <= 1 else "failed"


def _spread(values: Sequence[float]) -> str:
    mean, low, high = interval(values)
    return f"{_percent(mean)} [{_percent(low)}, {_percent(high)}]" if math.isfinite(mean) else "failed"
