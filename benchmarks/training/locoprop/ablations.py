"""The ablations of LocoProp's study: local steps, loss, inner optimizer, batch, width, depth, ReLU."""

from __future__ import annotations

from typing import Any

from benchmarks.training.plan import Run, encode, tuning

from .plan import MAIN

__all__ = ["ABLATED", "ablations"]

ABLATED = ("locoprop-m", "adam")
_CHANGES: dict[str, dict[str, Any]] = {  # each tuned anew, all of it LocoProp-M on the main problem
    "steps 2": {"steps": 2}, "steps 5": {"steps": 5}, "steps 20": {"steps": 20},
    "squared loss, rows N/T": {"loss": "squared", "rows": 100},
    "inner SGD": {"inner": "SGD"}, "inner Adam": {"inner": "Adam"},
}  # fmt: skip
_SHAPES: dict[str, dict[str, Any]] = {
    "half as wide": {"width": 0.5}, "two layers fewer": {"fewer": 1}, "two layers more": {"fewer": -1},
    "ReLU": {"activation": "relu"},
}  # fmt: skip
_BATCHES = (250, 500)


def ablations() -> dict[str, dict[str, list[Run]]]:
    """Runs by ablation and method; every one is tuned by the same trials, and its best is reported."""
    table: dict[str, dict[str, list[Run]]] = {"as in the study": {m: tuning(MAIN, m) for m in ABLATED}}

    def ablation(method: str, shape: str = "", change: str = "") -> list[Run]:
        return tuning(MAIN, method, shape, change, phase="ablation")

    for name, change in _CHANGES.items():
        table[name] = {"locoprop-m": ablation("locoprop-m", change=encode(change))}
    for batch in _BATCHES:
        table[f"batch {batch}"] = {m: ablation(m, change=encode({"batch": batch})) for m in ABLATED}
    for name, shape in _SHAPES.items():
        table[name] = {m: ablation(m, shape=encode(shape)) for m in ABLATED}
    return table
