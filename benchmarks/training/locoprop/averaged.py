"""LocoProp-M and the best first-order method on MNIST's autoencoder, both with weight decay and averaged weights.

    python -m benchmarks.training.locoprop.averaged [--out benchmarks/results/averaged.json]

Declared beforehand: the settings of the study's finals, which had neither; four rates of weight decay a method on
seed 0, `rate/2 ‖W‖²` beside the mean loss of a batch for both, the one of the least held-out loss again on two more
seeds. Weights are averaged over about an epoch, `W̄ ← W̄ + (batch/rows)(W − W̄)` after each step. Losses are those of
the averages; the held-out images are 2,000 of MNIST's training images that nothing is trained on. Seconds are steps
times those of one, its decay and average included, both from one interleaved run. Runs already in the file are not
run again.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import layerwise as lw
from benchmarks import probe
from benchmarks.training.locoprop.combinations import chosen, run_missing
from benchmarks.training.problem import Split, mean_loss
from benchmarks.training.problems import PROBLEMS
from benchmarks.training.report import finals_of
from benchmarks.training.rows import Rows
from benchmarks.training.study import STUDIES
from benchmarks.training.summaries import interval, median
from benchmarks.training.train import Training

__all__ = ["DECAYS", "METHODS", "Averaged", "held_out", "main", "prices", "run", "sentence"]

PROBLEM, OURS, THEIRS = "mnist-autoencoder", "locoprop-m-250", "rmsprop-100"
DECAYS = (0.0, 3e-4, 1e-3, 3e-3)
METHODS: dict[str, Callable[[float], dict[str, Any]]] = {
    THEIRS: lambda rate: {"weight_decay": rate},
    OURS: lambda rate: {"regularizer": lw.local.WeightDecay(rate)} if rate else {},
}
EPOCHS, SEEDS, HELD_OUT, REPEATS = STUDIES["locoprop"].final_epochs, (0, 1, 2), 2_000, 15


class Averaged:
    """A method's training, and the running average of its weights."""

    def __init__(self, split: Split, method: str, settings: Mapping[str, Any], rate: float, seed: int) -> None:
        batch, known = int(settings["batch"]), PROBLEMS[PROBLEM]
        hyper = {**settings["hyperparameters"], **METHODS[method](rate)}
        self._training = Training(PROBLEM, split, method, hyper, seed, batch)
        average = get_ema_multi_avg_fn(1 - batch / known.rows)
        self.average = AveragedModel(self._training.model, multi_avg_fn=average)

    def step(self, index: torch.Tensor | slice) -> None:
        """One step, and its weights' part in the average."""
        self._training.step(index)
        self.average.update_parameters(self._training.model)

    def epoch(self) -> None:
        """Train on every row once."""
        for index in self._training.batches():
            self.step(index)
        self._training.epochs += 1

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> float:
        """The mean loss of the averaged weights."""
        return round(mean_loss(PROBLEMS[PROBLEM], self.average, x, y), 3)


def held_out() -> Split:
    """The training images after those of the study, in the place of its test images."""
    known = PROBLEMS[PROBLEM]
    return replace(known, validation=HELD_OUT).split(known.rows, validation=True)


def run(settings: Mapping[str, Any], method: str, rate: float, seed: int, epochs: int = EPOCHS) -> dict[str, Any]:
    """The averages' losses after each epoch."""
    known = PROBLEMS[PROBLEM]
    split, apart = known.split(known.rows), held_out()
    averaged = Averaged(split, method, settings, rate, seed)
    curves: dict[str, list[float]] = {"train": [], "test": [], "held_out": []}
    for _ in range(epochs):
        averaged.epoch()
        pairs = (split.x, split.y), (split.x_test, split.y_test), (apart.x_test, apart.y_test)
        for curve, pair in zip(curves.values(), pairs, strict=True):
            curve.append(averaged.loss(*pair))
    return {"problem": PROBLEM, "method": method, "rate": rate, "seed": seed, **curves}


def prices(settings: Mapping[str, Mapping[str, Any]], decays: Mapping[str, float], repeats: int) -> dict[str, float]:
    """Seconds of processor time of a step of each method, from one interleaved run."""
    split = PROBLEMS[PROBLEM].split(PROBLEMS[PROBLEM].rows)

    def stepper(method: str) -> Callable[[], None]:
        averaged = Averaged(split, method, settings[method], decays[method], 0)
        indices = cycle(torch.arange(len(split.x)).split(settings[method]["batch"]))
        return lambda: averaged.step(next(indices))

    return probe.interleaved({method: stepper(method) for method in decays}, repeats, warm_up=2)


def sentence(found: Sequence[dict[str, Any]], seconds: Mapping[str, float], batch: Mapping[str, int]) -> str:
    """What each ends at, and the share of the other's seconds after which ours has its train loss."""
    best = chosen(found, lambda row: float(row["held_out"][-1]))
    epoch = {method: seconds[method] * math.ceil(PROBLEMS[PROBLEM].rows / batch[method]) for method in best}
    level = median([row["train"][-1] for row in best[THEIRS]])

    def reached(row: Mapping[str, Any]) -> float:
        return next((n for n, loss in enumerate(row["train"], 1) if loss <= level), math.inf)

    said = []
    for method, rows in best.items():
        train, test = (interval([row[curve][-1] for row in rows]) for curve in ("train", "test"))
        after = median([reached(row) for row in rows])
        told = (f"{value[0]:.1f} [{value[1]:.1f}, {value[2]:.1f}]" for value in (train, test))
        said.append("{} with decay {:g}: train {}, test {} after {:.0f} s, ".format(
            method, rows[0]["rate"], *told, len(rows[0]["train"]) * epoch[method]
        ) + f"train {level:.1f} after {after * epoch[method]:.1f} s")  # fmt: skip
    share = median([reached(row) for row in best[OURS]]) * epoch[OURS] / (
        median([reached(row) for row in best[THEIRS]]) * epoch[THEIRS]
    )  # fmt: skip
    return f"{'; '.join(said)}: {share:.2f} of the seconds."


def main(out: Path) -> None:
    """Run what the file lacks, and say what it holds; the prices lie in a file beside it."""
    torch.set_num_threads(1)
    final = finals_of(PROBLEM, Rows().load(PROBLEM).values())
    settings = {method: final[method][0]["configuration"] for method in METHODS}
    run_missing(
        out, dict.fromkeys(METHODS, DECAYS), SEEDS, 100.0, lambda method, *rest: run(settings[method], method, *rest),
        lambda row: float(row["held_out"][-1]), problem=PROBLEM,
    )  # fmt: skip
    found = probe.read(out)
    beside = out.with_name(f"{out.stem}_prices.json")
    if not beside.exists():
        decays = {m: rows[0]["rate"] for m, rows in chosen(found, lambda row: float(row["held_out"][-1])).items()}
        each = {m: round(s, 5) for m, s in prices(settings, decays, REPEATS).items()}
        probe.write(beside, {**probe.conditions(repeats=REPEATS, threads=1), "seconds a step": each})
    print(sentence(found, probe.read(beside)["seconds a step"], {m: s["batch"] for m, s in settings.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[2] if sys.argv[1:2] == ["--out"] else "benchmarks/results/averaged.json"))
