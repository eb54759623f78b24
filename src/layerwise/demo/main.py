"""The demo from start to end; imported only after the extras are known to be installed."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from . import plots, report
from .digits import SIZES, Problem, digits
from .layers import Layer, observed_layers
from .methods import CHOSEN
from .screen import show_table, watched
from .train import BATCH, relative_to, step_seconds, train

__all__ = ["compare"]

OBSERVED = ("LocoProp-M", "Adam")


def compare(out: Path, *, seed: int, epochs: int, seconds_limit: float) -> bool:
    """See `layerwise.demo.run`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the layers are too small for more: waiting for a second thread costs all methods more
    try:
        return _compare(out, seed, epochs, seconds_limit)
    finally:
        torch.set_num_threads(threads)


def _compare(out: Path, seed: int, epochs: int, seconds_limit: float) -> bool:
    start, console, problem = time.perf_counter(), Console(), digits(seed)
    say = partial(console.print, soft_wrap=True, highlight=False, markup=False)
    sizes = "-".join(map(str, SIZES))
    n_train, n_test = len(problem.x_train), len(problem.x_test)
    say(f"An autoencoder {sizes} on {n_train} handwritten digits ({n_test} for test), batch {BATCH}, seed {seed}.")

    training = train(problem, CHOSEN, seed=seed, epochs=epochs, seconds_limit=seconds_limit)
    rows = list(watched(training, list(CHOSEN), epochs, console))
    reached = max(row.epoch for row in rows)
    ratios = relative_to(step_seconds(problem, CHOSEN, seed=seed), "Adam")
    head = report.header(CHOSEN, ratios, seed=seed, epochs=epochs, stopped_early=reached < epochs)
    report.write_json(out / "results.json", head, rows)
    plots.curves(out / "curves.png", rows, problem.floor_train, problem.floor_test)
    layers, errors = _observed(problem, seed)
    plots.layers(out / "layers.png", layers)
    errors |= {row.method: row.error for row in rows if row.error}

    show_table(report.table(rows, ratios), console)
    for name, text in errors.items():
        say(f"failed: {name}: {text}")
    if reached < epochs:
        say(f"stopped after {reached} of {epochs} epochs: --seconds-limit {seconds_limit:g} was used up")
    floors = f"{problem.floor_train:.3f} (train) and {problem.floor_test:.3f} (test)"
    say(f"Losses in nats an image; no model can go below {floors}. {time.perf_counter() - start:.0f} s in all.")
    say("wrote " + ", ".join(str(out / name) for name in ("results.json", "curves.png", "layers.png")))
    return not errors


def _observed(problem: Problem, seed: int) -> tuple[dict[str, list[Layer]], dict[str, str]]:
    """The layer measures for each observed method, and the errors of failed ones."""
    layers, errors = {}, {}
    for method in OBSERVED:
        try:
            layers[method] = observed_layers(problem, method, CHOSEN[method], seed=seed)
        except Exception as error:  # reported at the end; the other results are valid
            errors[f"layers of {method}"] = f"{type(error).__name__}: {error}"
    return layers, errors
