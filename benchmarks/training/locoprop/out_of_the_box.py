"""LocoProp as it comes, on images that its defaults were not tuned on, beside tuned first-order methods, by seconds.

    python -m benchmarks.training.locoprop.out_of_the_box [--out benchmarks/results/out_of_the_box.json]

The deep autoencoder of Fashion-MNIST, `lw.LocoProp(model)` at two sizes of a batch, as long as the study's finals, on
their seeds. First-order methods are the study's finals on this problem, each the best of eight trials. Seconds are the
study's: steps times the seconds of one in an interleaved run, for LocoProp those of the tuned method, which differs in
numbers alone. Runs already in the file are not run again.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import probe
from benchmarks.training.methods import METHODS
from benchmarks.training.problem import Split
from benchmarks.training.problems import PROBLEMS
from benchmarks.training.report import finals_of, seconds_per_epoch
from benchmarks.training.rows import Rows
from benchmarks.training.step_time import measured
from benchmarks.training.study import STUDIES
from benchmarks.training.summaries import Finals, epochs_to, interval, median, target
from benchmarks.training.train import Training

__all__ = ["main", "run", "sentence"]

PROBLEM, TIMED = "fashion-autoencoder", {1000: "locoprop-m", 250: "locoprop-m-250"}  # by batch
EPOCHS, SEEDS = STUDIES["locoprop"].final_epochs, STUDIES["locoprop"].final_seeds


def run(batch: int, seed: int, split: Split, epochs: int = EPOCHS) -> dict[str, Any]:
    """Losses by epoch, trained as the study trains, with no hyperparameter given; keys as a row of the study has."""
    training = Training(PROBLEM, split, TIMED[batch], {}, seed, batch)
    losses = [training.losses()]
    for _ in range(epochs):
        training.epoch()
        losses.append(training.losses())
    train, test = ([round(pair[part], 3) for pair in losses] for part in (0, 1))
    return {
        "method": TIMED[batch], "seed": seed, "status": "done", "configuration": {"rows": len(split.x), "batch": batch},
        "train_curve": train, "test_curve": test,
    }  # fmt: skip


def sentence(found: Sequence[dict[str, Any]], final: Finals, step_seconds: dict[str, float]) -> str:
    """The best first-order method, and for each batch of ours the share of its seconds until its level is reached."""
    name, level = target(final, [method for method in final if METHODS[method].first_order])
    epochs = median([epochs_to(row, level) for row in final[name]])
    whole = epochs * seconds_per_epoch(final[name][0], step_seconds)
    tests = interval([row["test_loss"] for row in final[name]])
    said = [f"{name} ends lowest of the first-order methods: train {level:.1f}, test {tests[0]:.1f}, {whole:.1f} s"]
    for batch, method in TIMED.items():
        rows = [row for row in found if row["method"] == method]
        reached = median([epochs_to(row, level) for row in rows])
        share = reached * seconds_per_epoch(rows[0], step_seconds) / whole
        end, test = (interval([row[curve][-1] for row in rows])[0] for curve in ("train_curve", "test_curve"))
        when = f"there in {share:.2f} of these seconds" if math.isfinite(share) else "never there"
        said.append(f"defaults, batches of {batch}: {when}, after {EPOCHS} epochs train {end:.1f}, test {test:.1f}")
    return "; ".join(said) + "."


def main(out: Path) -> None:
    """Run what the file lacks, and say what it holds."""
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = probe.read(out) if out.exists() else []
    split = PROBLEMS[PROBLEM].split(PROBLEMS[PROBLEM].rows)
    for batch in TIMED:
        for seed in SEEDS:
            if not any((row["method"], row["seed"]) == (TIMED[batch], seed) for row in found):
                found.append(run(batch, seed, split))
                probe.write(out, found)
    print(sentence(found, finals_of(PROBLEM, Rows().load(PROBLEM).values()), measured(PROBLEM)[0]))


if __name__ == "__main__":
    main(Path(sys.argv[2] if sys.argv[1:2] == ["--out"] else "benchmarks/results/out_of_the_box.json"))
