"""Run the trials behind the settings of `layerwise demo` and show the best of each method.

    python -m benchmarks.training.tune_demo [--methods Adam RMSProp ...] [--epochs N] [--seeds 101 102]

Every trial takes the demo's number of epochs, and the same seeds, which are not the demo's: they give other
splits, initial weights and minibatches. The lowest mean train loss wins. Copy the winners to `CHOSEN` in
`src/layerwise/demo/methods.py`; `tests/test_demo.py` compares the two.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import probe
from layerwise.demo import EPOCHS
from layerwise.demo.digits import digits
from layerwise.demo.methods import METHODS, TRIALS, Settings
from layerwise.demo.train import train


def trial(method: str, settings: Settings, seeds: Sequence[int], epochs: int) -> dict[str, Any]:
    """Losses after `epochs`, means over the seeds; None and the reason where one of them fails."""
    last = []
    for seed in seeds:
        *_, row = train(digits(seed), {method: settings}, seed=seed, epochs=epochs)
        if row.error or row.train_loss is None or row.test_loss is None:
            return {"method": method, "settings": settings, "train_loss": None, "error": row.error}
        last.append((row.train_loss, row.test_loss, row.seconds))
    means = dict(
        zip(("train_loss", "test_loss", "seconds"), map(statistics.mean, zip(*last, strict=True)), strict=True)
    )
    return {"method": method, "settings": settings, **means}


def best(trials: Sequence[dict[str, Any]], method: str) -> Settings | None:
    """The settings of the lowest train loss among the trials of `method`; None where all failed."""
    done = [line for line in trials if line["method"] == method and line["train_loss"] is not None]
    return min(done, key=lambda line: line["train_loss"])["settings"] if done else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trials and print the winners."""
    parser = probe.parser("benchmarks.training.tune_demo", __doc__, epochs=EPOCHS, seeds=[101, 102],
                          out=probe.RESULTS / "tune_demo.json")  # fmt: skip
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    arguments = probe.parsed(parser, argv)
    kept = probe.read(arguments.out)["trials"] if arguments.out.is_file() else []
    lines = [line for line in kept if line["method"] not in arguments.methods]
    for method in arguments.methods:
        for settings in TRIALS[method]:
            line = trial(method, settings, arguments.seeds, arguments.epochs)
            lines.append(line)
            print(" ".join(f"{key}={value}" for key, value in line.items()), flush=True)
    chosen = {method: best(lines, method) for method in METHODS}
    body = {"epochs": arguments.epochs, "seeds": arguments.seeds, "chosen": chosen, "trials": lines}
    probe.write(arguments.out, body)
    for method, winner in chosen.items():
        print(f"best of {method}: {winner}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
