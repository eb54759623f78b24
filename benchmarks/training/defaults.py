"""How the optimizers' defaults were chosen: a grid of settings on small problems of several kinds.

    python -m benchmarks.training.defaults [--methods LocoProp AltMin Adam] [--out benchmarks/results/defaults.json]

Prints the train loss after a few epochs with a constant rate, one seed, for every setting on every problem:
scikit-learn's digits (a tanh autoencoder, ReLU and tanh classifiers, a small convolutional net), and one epoch of
MNIST by a ReLU classifier (test error in percent) where the data is at hand. Settings already in the file are
not run again. Adam at several rates stands beside them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerwise as lw
from benchmarks import data, probe
from layerwise.demo.digits import autoencoder, digits, reconstruction_loss


@dataclass(frozen=True)
class Task:
    """A model, its loss on a batch of rows, the figure to report, and how long to train."""

    make: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Tensor], Tensor]
    score: Callable[[nn.Module], float]
    rows: int
    batch: int
    epochs: int


def classifier(sizes: Sequence[int], activation: type[nn.Module]) -> nn.Module:
    """A dense net with default initial weights from seed 0."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i, o in pairwise(sizes):
        layers += [nn.Linear(i, o), activation()]
    return nn.Sequential(*layers[:-1])


def convolutional() -> nn.Module:
    """Two convolutions and two dense layers for 8 x 8 images."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def tasks() -> dict[str, Task]:
    """The problems by name."""
    from sklearn.datasets import load_digits

    problem = digits(0)
    held = load_digits()
    x, y = torch.as_tensor(held.data, dtype=torch.float32) / 16, torch.as_tensor(held.target)
    found = {
        "autoencoder": Task(
            lambda: autoencoder(0), lambda m, i: reconstruction_loss(m, problem.x_train[i]),
            lambda m: float(reconstruction_loss(m, problem.x_train)), len(problem.x_train), 100, 10,
        ),
    }  # fmt: skip

    def classify(make: Callable[[], nn.Module], batch: int, epochs: int) -> Task:
        return Task(
            make, lambda m, i: F.cross_entropy(m(x[i]), y[i]), lambda m: float(F.cross_entropy(m(x), y)),
            len(x), batch, epochs,
        )  # fmt: skip

    found["relu"] = classify(lambda: classifier((64, 100, 100, 10), nn.ReLU), 50, 3)
    found["tanh"] = classify(lambda: classifier((64, 100, 100, 10), nn.Tanh), 200, 6)
    found["conv"] = classify(convolutional, 100, 3)
    if data.available("mnist"):
        mnist = data.load("mnist", flat=True)
        a, b = (mnist.x_train - 0.1307) / 0.3081, (mnist.x_test - 0.1307) / 0.3081
        found["mnist error %"] = Task(
            lambda: classifier((784, 100, 100, 10), nn.ReLU), lambda m, i: F.cross_entropy(m(a[i]), mnist.y_train[i]),
            lambda m: 100 * float((m(b).argmax(1) != mnist.y_test).float().mean()), len(a), 200, 1,
        )  # fmt: skip
    return found


def _grid(**choices: tuple[Any, ...]) -> list[dict[str, Any]]:
    return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


METHODS: dict[str, tuple[Callable[..., torch.optim.Optimizer], list[dict[str, Any]]]] = {
    "Adam": (lambda m, **kw: torch.optim.Adam(m.parameters(), **kw), _grid(lr=(1e-3, 3e-3, 1e-2))),
    "LocoProp": (
        lw.LocoProp,
        [
            {},
            *_grid(steps=(10,), momentum=(0.99,), lr=(3e-5, 1e-4), gamma=(10.0,)),
            *_grid(steps=(10,), momentum=(0.99,), lr=(5e-5,), gamma=(100.0,)),
            *_grid(steps=(10,), momentum=(0.9, 0.999), lr=(1e-5, 3e-4), gamma=(10.0,)),
            *_grid(steps=(4,), momentum=(0.9,), lr=(3e-4, 1e-3), gamma=(10.0,)),
            *_grid(steps=(4,), momentum=(0.99,), lr=(1e-4,), gamma=(10.0,)),
            *_grid(loss=("squared",), rows=("auto", "all")),
        ],
    ),
    "KFAC": (
        lw.optim.KFAC,
        [
            {},
            *_grid(update_factors_every=(10,), update_inverses_every=(100,)),
            *_grid(lr=(0.1,), damping=(0.03,), kl_clip=(1e-3,)),
            *_grid(kl_clip=(1e-3,)),
        ],
    ),
    "AltMin": (
        lw.AltMin,
        [
            {},
            *_grid(steps=(2, 4), coupling=(0.03, 0.3), lr=(4e-3, 8e-3)),
            *_grid(steps=(2,), coupling=(0.05, 0.1), lr=(4e-3,)),
        ],
    ),
}


def train(task: Task, make: Callable[[nn.Module], torch.optim.Optimizer]) -> float | None:
    """The score after training; None where it is not finite."""
    model = task.make()
    optimizer = make(model)
    ours = isinstance(optimizer, (lw.LocoProp, lw.AltMin, lw.optim.KFAC))
    for epoch in range(task.epochs):
        order = torch.randperm(task.rows, generator=torch.Generator().manual_seed(epoch))
        for index in order.split(task.batch):
            if ours:
                optimizer.step(partial(task.loss, model, index))  # type: ignore[arg-type]
            else:
                optimizer.zero_grad()
                task.loss(model, index).backward()
                optimizer.step()
    with torch.no_grad():
        score = task.score(model)
    return round(score, 4) if score == score and abs(score) != float("inf") else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing and print the table."""
    parser = probe.parser("benchmarks.training.defaults", __doc__, out=probe.RESULTS / "defaults.json")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    arguments = probe.parsed(parser, argv)
    problems = tasks()
    rows = probe.read(arguments.out) if arguments.out.is_file() else []
    print(f"{'':62}" + "".join(f"{name:>15}" for name in problems))
    for method in arguments.methods:
        make, grid = METHODS[method]
        for settings in grid:
            row = next((r for r in rows if r["method"] == method and r["settings"] == settings), None)
            if row is None or set(row["scores"]) != set(problems):
                scores = {n: train(t, lambda m: make(m, **settings)) for n, t in problems.items()}  # noqa: B023
                rows = [r for r in rows if r is not row]
                row = {"method": method, "settings": settings, "scores": scores}
                rows.append(row)
                probe.write(arguments.out, rows)
            said = f"{method} {settings or 'defaults'}"
            print(f"{said:62}" + "".join(f"{row['scores'][name]!s:>15}" for name in problems), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
