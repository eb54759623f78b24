"""The demo from start to end; imported only when the extras are known to be there."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from . import plots, report
from .layers import Layer, observed_layers
from .methods import CHOSEN
from .problem import digits
from .screen import show_table, watched
from .train import BATCH, relative_to, step_seconds, train

__all__ = ["compare"]

OBSERVED = ("LocoProp-M", "Adam")


def compare(out: Path, *, seed: int, epochs: int, seconds_limit: float) -> bool:
    """See `layerwise.demo.run`."""
    start, console, problem = time.perf_counter(), Console(), digits(seed)
    n_train, n_test = len(problem.x_train), len(problem.x_test)
    console.print(
        f"A 64-128-64-16-64-128-64 autoencoder on {n_train} handwritten digits ({n_test} for test), "
        f"batch {BATCH}, {epochs} epochs, seed {seed}.",
        highlight=False,
    )
    rows = list(
        watched(
            train(problem, CHOSEN, seed=seed, epochs=epochs, seconds_limit=seconds_limit),
            list(CHOSEN),
            epochs,
            console,
        )
    )
    reached = max(row.epoch for row in rows)
    ratios = relative_to(step_seconds(problem, CHOSEN, seed=seed), "Adam")
    head = report.header(CHOSEN, ratios, seed=seed, epochs=epochs, stopped_early=reached < epochs)
    report.write_json(out / "results.json", head, rows)
    plots.curves(out / "curves.png", rows, problem.floor_train, problem.floor_test)

    errors = {row.method: row.error for row in rows if row.error}
    layers: dict[str, list[Layer]] = {}
    for method in OBSERVED:
        try:
            layers[method] = observed_layers(problem, method, CHOSEN[method], seed=seed)
        except Exception as error:  # shown below; the other results stand
            errors[f"layers of {method}"] = f"{type(error).__name__}: {error}"
    plots.layers(out / "layers.png", layers)

    show_table(report.table(rows, ratios), console)
    for name, text in errors.items():
        console.print(f"failed: {name}: {text}", soft_wrap=True, highlight=False, markup=False)
    if reached < epochs:
        console.print(f"stopped after {reached} of {epochs} epochs: --seconds-limit {seconds_limit:g} was used up")
    console.print(
        f"{time.perf_counter() - start:.0f} s; losses in nats an image, no model can go below "
        f"{problem.floor_train:.3f} (train) and {problem.floor_test:.3f} (test).",
        highlight=False,
    )
    files = ", ".join(str(out / name) for name in ("results.json", "curves.png", "layers.png"))
    console.print(f"wrote {files}", soft_wrap=True, highlight=False, markup=False)
    return not errors
