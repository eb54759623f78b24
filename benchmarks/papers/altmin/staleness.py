"""Layers that update asynchronously: accuracy against how many minibatches old their codes may be.

At the rate that serves layers that wait, and at a third or a quarter of it: old codes make a rate less stable.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.training.figures import log_scale

from .common import Demonstration, accuracy, batches, make, mean, net, picture, split_of, train, why_not

__all__ = ["DEMONSTRATION"]

STALENESS, SEEDS, BATCH = tuple(range(9)), (0, 1, 2), 200
RATES = {"AM-Adam": (4e-3, 1e-3), "AM-SGD": (3e-2, 1e-2)}


def measure(small: bool = False) -> dict[str, Any]:
    """Test accuracy after one epoch, by method, staleness and seed, beside layers that wait for each other."""
    found: dict[str, Any] = {"title": "MNIST, 2 x 100, one epoch", "batch": BATCH, "rates": RATES, "accuracy": {}}
    data = split_of(small, 60_000, 10_000)
    seeds, bounds = (SEEDS[:1], STALENESS[:3]) if small else (SEEDS, STALENESS)
    for method, lr in ((m, lr) for m, rates in RATES.items() for lr in rates):
        reason = why_not(method, {"lr": lr, "schedule": "async", "staleness": 0})
        if reason:
            return {"unavailable": reason}
        table: dict[str, list[float]] = {}
        for bound in (None, *bounds):
            how = {} if bound is None else {"schedule": "async", "staleness": bound}
            scores = []
            for seed in seeds:
                model = net(seed)
                train(make(method, model, {"lr": lr, **how}), model, data.x, data.y, batches(len(data.x), BATCH, seed))
                scores.append(accuracy(model, data.x_test, data.y_test))
            table["together" if bound is None else str(bound)] = scores
        found["accuracy"][f"{method}, rate {lr:g}"] = table
    return found


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Test error against staleness, a dot a seed."""
    with picture(path) as (axes,):
        for number, (arm, table) in enumerate(result["accuracy"].items()):
            bounds = [int(b) for b in table if b != "together"]
            axes.plot(bounds, [100 - 100 * mean(table[str(b)]) for b in bounds], color=f"C{number}", label=arm)
            for b in bounds:
                axes.plot([b] * len(table[str(b)]), [100 - 100 * v for v in table[str(b)]], ".", color=f"C{number}")
            axes.axhline(100 - 100 * mean(table["together"]), color=f"C{number}", linestyle=":")
        axes.plot([], [], color="grey", linestyle=":", label="layers wait for each other")
        axes.set(xlabel="staleness: minibatches", ylabel="test error, %", title=result["title"])
        log_scale(axes)


def sentence(result: Mapping[str, Any]) -> str:
    """Accuracy without and with the greatest staleness."""
    said = []
    for arm, table in result["accuracy"].items():
        last = list(table)[-1]
        said.append(
            f"{arm}, has {100 * mean(table['0']):.2f} % at staleness 0 and {100 * mean(table[last]):.2f} % at {last}"
            f" ({100 * mean(table['together']):.2f} % when layers wait)"
        )
    return "After one epoch of MNIST " + "; ".join(said) + "."


DEMONSTRATION = Demonstration(measure, draw, sentence)
