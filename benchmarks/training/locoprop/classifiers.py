"""LocoProp, and its local result before Muon, beside Muon and Adam on two nets for images: equal seconds of steps.

    python -m benchmarks.training.locoprop.classifiers [--out benchmarks/results/classifiers.json]

Declared beforehand: three rates a method on seed 0, the one of the lowest train loss again on two more seeds. All other
settings are those that the study chose on the convnet, γ for the rows of a batch. The steps of a run are its seconds
over the seconds of a step, both of processor time, the lower quartile of an interleaved run of all methods. Prints its
budget first. Runs already in the file are not run again, and a problem's steps are timed once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import layerwise as lw
from benchmarks import probe
from benchmarks.training.locoprop.combinations import ADAM, Muon, Step, batches, before, plain, run_missing
from benchmarks.training.problem import Split, accuracy, mean_loss
from benchmarks.training.problems import PROBLEMS

__all__ = ["METHODS", "PILOTS", "SEEDS", "Pilot", "end", "main", "prices", "run"]

SEEDS, REPEATS, PARTS = (0, 1, 2), 9, 3
_MUON, _LOCAL = (0.01, 0.037, 0.1), (2.8e-4, 5.7e-4, 1.1e-3)


@dataclass(frozen=True)
class Pilot:
    """The seconds of a run on a problem, Adam's rates, and γ."""

    seconds: float
    adam: tuple[float, ...]
    gamma: float

    @property
    def rates(self) -> dict[str, tuple[float, ...]]:
        """The rates of each method."""
        return {"adam": self.adam, "muon": _MUON, "locoprop-m": _LOCAL, "locoprop-m > muon": _MUON}


PILOTS = {
    "fashion-convnet": Pilot(30.0, (2.5e-3, 5.1e-3, 1e-2), 2740.0),
    "fashion-resnet8": Pilot(60.0, (5e-4, 1.6e-3, 5e-3), 2740.0 * 200 / 500),
}


def _locoprop(model: nn.Module, gamma: float, **words: Any) -> lw.LocoProp:
    return lw.LocoProp(model, **{"gamma": gamma, "steps": 4, "momentum": 0.9457, "lr": 5.7e-4, **words})


METHODS: dict[str, Callable[[nn.Module, float, float], Step]] = {  # model, rate, γ
    "adam": lambda m, lr, _: plain(torch.optim.Adam(m.parameters(), lr=lr, **ADAM)),
    "muon": lambda m, lr, _: plain(Muon(m, lr)),
    "locoprop-m": lambda m, lr, gamma: _locoprop(m, gamma, lr=lr).step,
    "locoprop-m > muon": lambda m, lr, gamma: before(_locoprop(m, gamma, write="grad"), Muon(m, lr)),
}


def prices(problem: str, split: Split, repeats: int = REPEATS) -> dict[str, float]:
    """Seconds of processor time of a step of each method, from one interleaved run."""
    known, pilot = PROBLEMS[problem], PILOTS[problem]

    def stepper(method: str) -> Callable[[], object]:
        model = known.model(0, {})
        step = METHODS[method](model, pilot.rates[method][0], pilot.gamma)
        indices = batches(len(split.x), known.batch, 0)

        def once() -> None:
            index = next(indices)
            step(partial(known.loss, model, split.x[index], split.y[index]))

        return once

    return probe.interleaved({method: stepper(method) for method in pilot.rates}, repeats, warm_up=2)


def run(problem: str, split: Split, steps: int, method: str, rate: float, seed: int) -> dict[str, Any]:
    """Train for the steps; train loss after each part of them, test loss and test error in percent at the end."""
    known, pilot = PROBLEMS[problem], PILOTS[problem]
    torch.manual_seed(seed)
    model = known.model(seed, {})
    step = METHODS[method](model, rate, pilot.gamma)
    indices, rows, curve = batches(len(split.x), known.batch, seed), known.measured or len(split.x), []
    for count in range(1, steps + 1):
        index = next(indices)
        step(partial(known.loss, model, split.x[index], split.y[index]))
        if count in {steps * part // PARTS for part in range(1, PARTS + 1)}:
            curve.append(round(mean_loss(known, model, split.x[:rows], split.y[:rows]), 4))
    held = split.x_test, split.y_test
    row = {"problem": problem, "method": method, "rate": rate, "seed": seed, "steps": steps, "train": curve}
    error = 100 * (1 - accuracy(known, model, *held))
    return {**row, "test": round(mean_loss(known, model, *held), 4), "error": round(error, 2)}


def end(row: Mapping[str, Any]) -> float:
    """The train loss that a rate is chosen by."""
    return float(row["train"][-1])


def _priced(out: Path, problem: str, split: Split) -> Mapping[str, float]:
    """A problem's prices from the file, measured and put there where it has none."""
    found = probe.read(out) if out.exists() else {}
    if problem not in found:
        conditions = probe.conditions(repeats=REPEATS, threads=1)
        found[problem] = {**conditions, "seconds a step": {m: round(s, 5) for m, s in prices(problem, split).items()}}
        probe.write(out, found)
    held: Mapping[str, float] = found[problem]["seconds a step"]
    return held


def main(out: Path) -> None:
    """Run what the file lacks; the prices lie in a file beside it."""
    torch.set_num_threads(1)
    for problem, pilot in PILOTS.items():
        split = PROBLEMS[problem].split(PROBLEMS[problem].rows)
        each = _priced(out.with_name(f"{out.stem}_prices.json"), problem, split)
        print(problem, each, flush=True)

        def one(method: str, rate: float, seed: int) -> dict[str, Any]:
            steps = round(pilot.seconds / each[method])  # noqa: B023
            return run(problem, split, steps, method, rate, seed)  # noqa: B023

        run_missing(out, pilot.rates, SEEDS, pilot.seconds, one, end, problem=problem)


if __name__ == "__main__":
    main(Path(sys.argv[2] if sys.argv[1:2] == ["--out"] else "benchmarks/results/classifiers.json"))
