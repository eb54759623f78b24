"""AltMin untuned beside tuned Adam on images that its defaults were not tuned on: Fashion-MNIST, a constant rate.

Two dense nets after six epochs, the smaller and LeNet-5 after their first 30 minibatches. Adam's rate is the best of
five in each case, on a tenth of the training rows held out and a seed of its own; `lw.AltMin(model)` has no choice to
make.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import layerwise as lw
from benchmarks.training.altmin.nets import Model, dense, lenet5
from benchmarks.training.altmin.problems import FASHION, images
from benchmarks.training.method import Stepping
from benchmarks.training.problem import Split

from .common import Demonstration, accuracy, batches, held_out, make, mean, picture, train

__all__ = ["DEMONSTRATION"]

RATES, BATCH, TUNE_SEED, SEEDS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), 200, 100, (0, 1, 2)


@dataclass(frozen=True)
class Case:
    """A net, the shape of its images, and for how many minibatches it is trained; epochs of all rows in their place."""

    title: str
    net: Model
    shape: tuple[int, ...]
    minibatches: int = 0
    epochs: int = 1


_DENSE = dense(784, 100, 100, 10)
CASES = (
    Case("dense 2 x 100, six epochs", _DENSE, (784,), epochs=6),
    Case("dense 2 x 500, six epochs", dense(784, 500, 500, 10), (784,), epochs=6),
    Case("dense 2 x 100, 30 minibatches", _DENSE, (784,), 30),
    Case("LeNet-5, 30 minibatches", lenet5(), (1, 28, 28), 30),
)


def run(case: Case, rate: float | None, seed: int, data: Split) -> float:
    """Test accuracy in % after training by Adam of a rate, or by AltMin where that is None."""
    model = case.net(seed, {})
    if rate is None:
        ours = lw.AltMin(model)
        step = Stepping(ours.step, ours)
    else:
        step = make("Adam", model, {"lr": rate})
    index = [i for epoch in range(case.epochs) for i in batches(len(data.x), BATCH, 1000 * epoch + seed)]
    train(step, model, data.x, data.y, index[: case.minibatches or None])
    return 100 * accuracy(model, data.x_test, data.y_test)


def measure(small: bool = False) -> dict[str, Any]:
    """Accuracies of both by case and seed, and those that Adam's rates were chosen by."""
    rows, seeds = [], SEEDS[:1] if small else SEEDS
    for case in CASES:
        data = images("fashion_mnist", FASHION, case.shape)(*((600, 300) if small else (60_000, 10_000)))
        held = held_out(data)
        tried = {rate: run(case, rate, TUNE_SEED, held) for rate in RATES}
        best = max(tried, key=tried.__getitem__)
        rows.append({
            "case": case.title, "tried": tried, "rate": best, "Adam": [run(case, best, s, data) for s in seeds],
            "AltMin": [run(case, None, s, data) for s in seeds],
        })  # fmt: skip
    return {"title": "Fashion-MNIST: AltMin untuned, Adam tuned", "cases": rows}


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Error of every seed by case."""
    with picture(path) as (axes,):
        rows = list(reversed(result["cases"]))
        for number, method in enumerate(("Adam", "AltMin")):
            for place, row in enumerate(rows):
                errors, heights = [100 - a for a in row[method]], [place - 0.15 * number] * len(row[method])
                label = None if place else method
                axes.plot(errors, heights, "o", color=f"C{number}", alpha=0.6, label=label)
        axes.set_yticks(range(len(rows)), [row["case"].replace(", ", "\n") for row in rows])
        axes.set(xlabel="test error, %", title=result["title"], ylim=(-0.6, len(rows) - 0.6))


def sentence(result: Mapping[str, Any]) -> str:
    """Mean and range of both in each case."""

    def spread(found: list[float]) -> str:
        return f"{mean(found):.2f} % [{min(found):.2f} to {max(found):.2f}]"

    said = [
        f"{row['case']}: AltMin {spread(row['AltMin'])}, Adam {spread(row['Adam'])} at rate {row['rate']:g}"
        for row in result["cases"]
    ]
    return f"Test images right, {len(result['cases'][0]['Adam'])} seeds: {'; '.join(said)}."


DEMONSTRATION = Demonstration(measure, draw, sentence)
