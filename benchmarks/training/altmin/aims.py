"""What the project aims at on the nets of the study: test accuracy in percent after an epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.probe import table
from benchmarks.training.problems import PROBLEMS

__all__ = ["AIMS", "aims_of", "aims_table"]

_BINARY, _ROWS = {3: 97.5, 5: 98.0}, {1: 65.0, 2: 72.0}
AIMS: dict[str, dict[str, dict[int, float]]] = {  # problem, method, epoch
    "mnist-2x100": {"am-adam": {1: 97.3}, "am-sgd": {1: 96.8}, "am-mem": {1: 96.4}},
    "mnist-lenet5": {"am-adam": {1: 98.6}},
    "mnist-binary-2x500": {"am-adam": _BINARY, "am-sgd": _BINARY, "am-mem": _BINARY},
    "mnist-rows-rnn15": {"am-adam": _ROWS, "am-sgd": _ROWS, "am-mem": _ROWS},
}


def aims_of(problem: str, method: str) -> dict[int, float]:
    """Accuracy by epoch; a problem of one epoch has those of the net it is."""
    return AIMS.get(PROBLEMS[problem].timed_as or problem, {}).get(method, {})


def aims_table(finals: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> str:
    """Mean and range over seeds beside each aim, as Markdown; "-" where a run has ended before."""
    lines = []
    for problem, final in finals.items():
        for method, rows in final.items():
            for epoch, aim in aims_of(problem, method).items():
                found = [100 * r["accuracy_curve"][epoch] for r in rows if len(r["accuracy_curve"]) > epoch]
                whole = len(found) == len(rows)
                said = f"{sum(found) / len(found):.2f} [{min(found):.2f}, {max(found):.2f}]" if whole else "-"
                lines.append([problem, method, epoch, f"{aim:g}", said])
    return table(("problem", "method", "after epoch", "aim", "mean over seeds [range]"), lines, numbers=False)
