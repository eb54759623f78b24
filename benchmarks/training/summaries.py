"""What the report says of several runs: intervals over seeds, and the time to a target."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.probe import table

from .methods import METHODS

__all__ = [
    "Finals", "Row", "by_problem", "epochs_to", "interval", "median", "memory", "number", "seeds", "target",
]  # fmt: skip

RESAMPLES = 10_000

Row = Mapping[str, Any]
Finals = Mapping[str, Sequence[Row]]  # rows by method


def interval(values: Sequence[float], level: float = 0.95, seed: int = 0) -> tuple[float, float, float]:
    """Mean and percentile-bootstrap interval of the mean over seeds; infinite where a value is.

    With three seeds the interval spans little more than their range; it says how far seeds differ, not how far a
    fourth could lie. Source: Efron, "Bootstrap Methods: Another Look at the Jackknife" (1979).
    """
    if not values:
        return math.nan, math.nan, math.nan
    if not all(map(math.isfinite, values)):
        return math.inf, math.inf, math.inf
    data = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    means = data[torch.randint(len(data), (RESAMPLES, len(data)), generator=generator)].mean(1)
    edges = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(means, edges).tolist()
    return float(data.mean()), low, high


def median(values: Sequence[float]) -> float:
    """The median, for values that may be infinite; NaN of none."""
    return statistics.median_low(values) if values else math.nan


def number(value: float, digits: int = 4) -> str:
    """As text; "-" for NaN."""
    return "-" if math.isnan(value) else f"{value:.{digits}g}"


def epochs_to(row: Row, level: float) -> float:
    """The first epoch, between two by straight line, at which the train loss is at most `level`; else infinity.

    A failed run is never there.
    """
    curve = row["train_curve"]
    if row["status"] != "done":
        return math.inf
    for epoch, loss in enumerate(curve):
        if loss <= level:
            if epoch == 0:
                return 0.0
            before = curve[epoch - 1]
            return epoch - 1 + (before - level) / (before - loss)
    return math.inf


def target(final: Finals, baselines: Iterable[str]) -> tuple[str, float]:
    """The baseline with the lowest median final train loss, and that loss; "" and infinity where there is none."""
    scores = {m: median([float(r["train_loss"]) for r in final[m]]) for m in baselines if final.get(m)}
    finite = {m: loss for m, loss in scores.items() if math.isfinite(loss)}
    name = min(finite, key=lambda m: finite[m], default="")
    return name, finite.get(name, math.inf)


def by_problem(finals: Mapping[str, Finals], cell: Callable[[str, str], str]) -> str:
    """A row for each method that has final runs, a column for each problem, `cell(problem, method)`, as Markdown."""
    rows = [
        [method, *(cell(problem, method) if method in final else "" for problem, final in finals.items())]
        for method in METHODS if any(method in final for final in finals.values())
    ]  # fmt: skip
    return table(["method", *finals], rows, numbers=False)


def seeds(rows: Sequence[Row]) -> str:
    """How many seeds ran, and how many of them failed."""
    failed = sum(r["status"] == "failed" for r in rows)
    return f"{len(rows)}" + (f" ({failed} failed)" if failed else "")


def memory(rows: Sequence[Row]) -> str:
    """Median of the peaks in MB."""
    return number(median([mb for r in rows if math.isfinite(mb := float(r["clock"].get("memory_mb", "nan")))]))
