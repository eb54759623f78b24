"""A stream of permuted MNIST tasks in constant memory: what is left of the old tasks.

Every task permutes the pixels anew; a method sees each task's rows once, and never again. The settings of each
method are three, declared here; the one with the best mean accuracy over all tasks at the end, on training rows held
out and a seed of its own, is run on three other seeds. Source of the task: Goodfellow et al., "An Empirical
Investigation of Catastrophic Forgetting" (2013).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .common import Demonstration, accuracy, batches, held_out, make, mean, net, picture, split_of, train, why_not

__all__ = ["DEMONSTRATION"]

TASKS, ROWS, BATCH = 5, 10_000, 200
TUNE_SEED, SEEDS = 100, (0, 1, 2)
SETTINGS: dict[str, Sequence[Mapping[str, Any]]] = {
    "Adam": ({"lr": 3e-4}, {"lr": 1e-3}, {"lr": 3e-3}),
    "AM-Adam": ({"lr": 3e-4}, {"lr": 1e-3}, {"lr": 3e-3}),
    "AM-SGD": ({"lr": 3e-3}, {"lr": 1e-2}, {"lr": 3e-2}),
    "AM-mem": ({"forget": 0.05}, {"forget": 0.02}, {"forget": 0.005}),
}


def _pixels(task: int, seed: int) -> Tensor:
    """The order of the pixels; the first task's is their own."""
    generator = torch.Generator().manual_seed(99 * seed + task)
    return torch.arange(784) if task == 0 else torch.randperm(784, generator=generator)


def run(method: str, settings: Mapping[str, Any], seed: int, data: Any, tasks: int) -> list[list[float]]:
    """Accuracy on each task so far, after each task."""
    model = net(seed)
    step, found = make(method, model, settings), []
    for task in range(tasks):
        train(step, model, data.x[:, _pixels(task, seed)], data.y, batches(len(data.x), BATCH, 1000 * seed + task))
        found.append([accuracy(model, data.x_test[:, _pixels(t, seed)], data.y_test) for t in range(task + 1)])
    return found


def measure(small: bool = False) -> dict[str, Any]:
    """Accuracies by method, seed, task reached and task."""
    data, tasks = split_of(small, ROWS, 2_000), 2 if small else TASKS
    found: dict[str, Any] = {
        "title": f"permuted MNIST, {tasks} tasks of {len(data.x):,} images, each seen once", "tasks": tasks,
        "tried": {}, "chosen": {}, "accuracy": {}, "unavailable_methods": {},
    }  # fmt: skip
    for method, choices in SETTINGS.items():
        reason = why_not(method, choices[0])
        if reason:
            found["unavailable_methods"][method] = reason
            continue
        tried = [mean(run(method, s, TUNE_SEED, held_out(data), tasks)[-1]) for s in choices]
        chosen = choices[max(range(len(tried)), key=lambda i: tried[i])]
        found["tried"][method] = [{**s, "mean accuracy": a} for s, a in zip(choices, tried, strict=True)]
        found["chosen"][method] = dict(chosen)
        found["accuracy"][method] = [run(method, chosen, s, data, tasks) for s in (SEEDS[:1] if small else SEEDS)]
    return found


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Mean accuracy over the tasks so far, and accuracy on the first."""
    reached = range(1, result["tasks"] + 1)
    with picture(path, 2) as (overall, first):
        for number, (method, runs) in enumerate(result["accuracy"].items()):
            for axes, of in ((overall, mean), (first, lambda a: a[0])):
                curves = [[100 * of(after) for after in one] for one in runs]
                for curve in curves:
                    axes.plot(reached, curve, color=f"C{number}", linewidth=0.6, alpha=0.6)
                middle = [mean([c[t] for c in curves]) for t in range(len(reached))]
                axes.plot(reached, middle, color=f"C{number}", marker="o", label=f"{method} {result['chosen'][method]}")
        overall.set(xlabel="tasks seen", ylabel="mean test accuracy on them, %", title=result["title"])
        first.set(xlabel="tasks seen", ylabel="test accuracy on the first, %", xticks=list(reached))
        overall.set_xticks(list(reached))


def sentence(result: Mapping[str, Any]) -> str:
    """Mean accuracy over all tasks, and that on the first, at the end."""
    said = [
        f"{method} {100 * mean([mean(r[-1]) for r in runs]):.1f} % "
        f"(first task {100 * mean([r[-1][0] for r in runs]):.1f} %)"
        for method, runs in result["accuracy"].items()
    ]
    missing = "".join(f" {reason}." for reason in result["unavailable_methods"].values())
    return f"After {result['tasks']} tasks, mean accuracy over all of them: {', '.join(said)}.{missing}"


DEMONSTRATION = Demonstration(measure, draw, sentence)
