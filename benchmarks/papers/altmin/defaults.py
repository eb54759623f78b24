"""What AltMin's defaults reach untuned, each variant with one configuration for all nets: test accuracy by epoch.

The aims are the project's, of the first epochs. Nothing was tried: it is `lw.AltMin(model, weights=...)` as it stands,
at a constant rate or, where the problem says so, one that falls over the epochs of the case.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.altmin.aims import aims_of
from benchmarks.training.figures import log_scale
from benchmarks.training.problem import Split
from benchmarks.training.problems import PROBLEMS
from benchmarks.training.train import Training

from .common import Demonstration, mean, picture

__all__ = ["DEMONSTRATION"]

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Case:
    """A net with a variant, which the study knows by the same name in small letters, for some epochs."""

    problem: str
    variant: str
    epochs: int


CASES = (
    Case("mnist-2x100", "AM-Adam", 1),
    Case("mnist-2x100", "AM-SGD", 1),
    Case("mnist-2x100", "AM-mem", 1),
    Case("mnist-lenet5", "AM-Adam", 1),
    Case("mnist-2x100-one-epoch", "AM-Adam", 1),
    Case("mnist-2x100-one-epoch", "AM-SGD", 1),
    Case("mnist-2x100-one-epoch", "AM-mem", 1),
    Case("mnist-lenet5-one-epoch", "AM-Adam", 1),
    Case("mnist-binary-2x500", "AM-Adam", 5),
    Case("mnist-rows-rnn15", "AM-Adam", 2),
)


def run(case: Case, data: Split, seed: int) -> list[float]:
    """Test accuracy in % after each epoch, trained as the study trains, with no hyperparameter given."""
    batch = PROBLEMS[case.problem].batch
    training = Training(case.problem, data, case.variant.lower(), {}, seed, batch, epochs=case.epochs)
    still, found = [p.detach().clone() for p in training.model.parameters()], []
    for _ in range(case.epochs):
        training.epoch()
        found.append(100 * training.accuracy())
    unmoved = [n for (n, p), s in zip(training.model.named_parameters(), still, strict=True) if torch.equal(p, s)]
    if unmoved:
        raise RuntimeError(f"{case.variant} on {case.problem} left {', '.join(unmoved)} where they were")
    return found


def measure(small: bool = False) -> dict[str, Any]:
    """Accuracies of every case by seed and epoch."""
    rows = []
    for case in CASES:
        known = PROBLEMS[case.problem]
        data = known.load(400, 500) if small else known.split(known.rows)
        shown, seeds = (replace(case, epochs=1), SEEDS[:1]) if small else (case, SEEDS)
        found = [run(shown, data, seed) for seed in seeds]
        aims = [{"epoch": e, "accuracy": a} for e, a in aims_of(case.problem, case.variant.lower()).items()]
        rows.append({"problem": case.problem, "title": known.title, "variant": case.variant, "batch": known.batch,
                     "aims": aims, "accuracy": found})  # fmt: skip
    return {"title": "AltMin's defaults, untuned", "cases": rows}


def _at(row: Mapping[str, Any], epoch: int) -> list[float]:
    return [curve[min(epoch, len(curve)) - 1] for curve in row["accuracy"]]


def _aims(result: Mapping[str, Any]) -> Sequence[tuple[Mapping[str, Any], int, float]]:
    return [(row, aim["epoch"], aim["accuracy"]) for row in result["cases"] for aim in row["aims"]]


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Error of every seed beside what is to be reached."""
    with picture(path) as (axes,):
        aims = _aims(result)
        for place, (row, epoch, aim) in enumerate(reversed(aims)):
            axes.plot([100 - aim] * 2, [place - 0.3, place + 0.3], "k-", label="aim" if not place else None)
            errors = [100 - a for a in _at(row, epoch)]
            axes.plot(errors, [place] * len(errors), "o", color="C0", alpha=0.6, label="a seed" if not place else None)
        axes.set_yticks(range(len(aims)), [f"{r['variant']}, {r['problem']}, epoch {e}" for r, e, _ in reversed(aims)])
        axes.set(xlabel="test error, %", title=result["title"])
        log_scale(axes, "x")


def sentence(result: Mapping[str, Any]) -> str:
    """Mean accuracy and aim of each case."""
    said = [
        f"{row['variant']} on {row['problem']} after epoch {epoch} {mean(_at(row, epoch)):.2f} % "
        f"[{min(_at(row, epoch)):.2f} to {max(_at(row, epoch)):.2f}], aim {aim:g}"
        for row, epoch, aim in _aims(result)
    ]
    return f"Untuned defaults, {len(result['cases'][0]['accuracy'])} seeds: {'; '.join(said)}."


DEMONSTRATION = Demonstration(measure, draw, sentence)
