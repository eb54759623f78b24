"""Alternating minimization as an initialization: AM-Adam for some minibatches, then Adam with a fresh state.

Adam's rate is the best of three for Adam alone, and AM-Adam's the best of the same three before a switch after 50
minibatches: on training rows held out, and a seed of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.training.figures import log_scale

from .common import Batch, Demonstration, accuracy, batches, held_out, make, mean, net, picture, split_of

__all__ = ["DEMONSTRATION"]

SWITCH, RATES, BATCH, EVERY = (0, 10, 50, 100), (1e-3, 3e-3, 1e-2), 200, 10
TUNE_SEED, TUNE_SWITCH, SEEDS, STEPS = 100, 50, (0, 1, 2), 300


def run(switch: int, rates: tuple[float, float], seed: int, data: Any, steps: int) -> list[float]:
    """Test accuracy at the start and after every tenth minibatch. rates: of Adam, and of AM-Adam before it."""
    model, found = net(seed), []
    ours = make("AM-Adam", model, {"lr": rates[1]})
    step = make("Adam", model, {"lr": rates[0]})
    epochs = range(-(-steps * BATCH // len(data.x)))
    index = [i for epoch in epochs for i in batches(len(data.x), BATCH, 1000 * epoch + seed)][:steps]
    for number, rows in enumerate(index):
        if number % EVERY == 0:
            found.append(accuracy(model, data.x_test, data.y_test))
        (ours if number < switch else step)(Batch(model, data.x[rows], data.y[rows]))
    return [*found, accuracy(model, data.x_test, data.y_test)]


def measure(small: bool = False) -> dict[str, Any]:
    """Curves by minibatch of the switch and seed."""
    data, steps = split_of(small, 60_000, 10_000), 30 if small else STEPS
    switch = SWITCH[:2] if small else SWITCH
    rows = held_out(data)
    alone = {lr: run(0, (lr, 0.0), TUNE_SEED, rows, steps)[-1] for lr in RATES}
    adam = max(alone, key=lambda r: alone[r])
    before = {lr: run(min(TUNE_SWITCH, steps // 2), (adam, lr), TUNE_SEED, rows, steps)[-1] for lr in RATES}
    rates = adam, max(before, key=lambda r: before[r])
    seeds = SEEDS[:1] if small else SEEDS
    return {
        "title": "MNIST, 2 x 100: AM-Adam first, then Adam",
        "rates": {"Adam": rates[0], "AM-Adam": rates[1]},
        "tried": {name: {str(r): a for r, a in t.items()} for name, t in (("Adam", alone), ("AM-Adam", before))},
        "every": EVERY,
        "steps": steps,
        "accuracy": {str(s): [run(s, rates, seed, data, steps) for seed in seeds] for s in switch},
    }


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Test error against minibatches."""
    with picture(path) as (axes,):
        for number, (switch, curves) in enumerate(result["accuracy"].items()):
            steps = [result["every"] * i for i in range(1, len(curves[0]))]
            for curve in curves:
                axes.plot(steps, [100 * (1 - v) for v in curve[1:]], color=f"C{number}", linewidth=0.5, alpha=0.6)
            middle = [100 * (1 - mean([c[i] for c in curves])) for i in range(1, len(curves[0]))]
            label = "Adam alone" if switch == "0" else f"AM-Adam for {switch} minibatches"
            axes.plot(steps, middle, color=f"C{number}", label=label)
        axes.set(xlabel="minibatches of 200", ylabel="test error, %", title=result["title"])
        log_scale(axes)


def sentence(result: Mapping[str, Any]) -> str:
    """Accuracy at the end by switch."""
    ends = {s: 100 * mean([c[-1] for c in curves]) for s, curves in result["accuracy"].items()}
    said = [f"{value:.2f} % after {s} of AM-Adam" for s, value in ends.items() if s != "0"]
    return (
        f"After {result['steps']} minibatches: Adam alone (rate {result['rates']['Adam']:g}) {ends['0']:.2f} %; "
        f"switched to Adam, {', '.join(said)} (rate {result['rates']['AM-Adam']:g})."
    )


DEMONSTRATION = Demonstration(measure, draw, sentence)
