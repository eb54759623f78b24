"""Do updates vanish with depth? Size of the first updates by layer, of sigmoid nets 2 to 30 layers deep.

A layer's update is `‖ΔW‖/‖W‖` over the first minibatches, the median over them. Rates scale all layers of a method
alike, so what is compared is the fall from the last hidden layer to the first. In double precision: what is below
1e-16 of a weight is lost, and counts as 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from .common import Batch, Demonstration, batches, make, net, picture, split_of, why_not

__all__ = ["DEMONSTRATION"]

DEPTHS, WIDTH, BATCH, STEPS = (2, 4, 8, 16, 30), 50, 200, 10
MOVES = 1e-6
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "backprop, SGD": ("SGD", {"lr": 0.1}),
    "backprop, Adam": ("Adam", {"lr": 1e-3}),
    "AM-SGD, Jacobi codes": ("AM-SGD", {"lr": 0.1}),
    "AM-SGD, swept codes": ("AM-SGD", {"lr": 0.1, "codes": "sweep"}),
    "AM-Adam, swept codes": ("AM-Adam", {"lr": 1e-3, "codes": "sweep"}),
    "AM-Adam, published settings": ("AM-Adam", {"preset": "published"}),
    "AM-SGD, Gauss-Newton codes": ("AM-SGD", {"lr": 0.1, "codes": "gauss-newton", "coupling": 3.0}),
}


def updates(method: str, settings: Mapping[str, Any], depth: int, data: Any, steps: int) -> list[float]:
    """The median relative update by layer, the first layer first."""
    model = net(0, (WIDTH,) * depth, nn.Sigmoid).double()
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    step, found = make(method, model, settings), []
    for rows in batches(len(data.x), BATCH, 0)[:steps]:
        before = [w.detach().clone() for w in weights]
        step(Batch(model, data.x[rows].double(), data.y[rows]))
        moves = [(w.detach() - b).norm() / b.norm() for w, b in zip(weights, before, strict=True)]
        found.append(torch.stack(moves).tolist())
    return [median(moves) for moves in zip(*found, strict=True)]


def measure(small: bool = False) -> dict[str, Any]:
    """Updates by method and depth."""
    data = split_of(small, 5_000, 100)
    result: dict[str, Any] = {"title": "sigmoid nets of 50 units a layer, MNIST", "updates": {}}
    result["unavailable_methods"] = {}
    for name, (method, settings) in METHODS.items():
        reason = why_not(method, settings)
        if reason:
            result["unavailable_methods"][name] = reason
            continue
        result["updates"][name] = {
            str(d): updates(method, settings, d, data, 2 if small else STEPS) for d in (DEPTHS[:2] if small else DEPTHS)
        }
    return result


def _fall(sizes: list[float]) -> float:
    """The first layer's update over the last hidden layer's."""
    return sizes[0] / sizes[-2] if sizes[-2] else float("nan")


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Updates by layer at the greatest depth, and first over last hidden by depth."""
    with picture(path, 2) as (by_layer, by_depth):
        for number, (name, table) in enumerate(result["updates"].items()):
            deepest = table[list(table)[-1]]
            style = {"color": f"C{number}", "label": name, "marker": "."}
            by_layer.plot(range(1, len(deepest) + 1), [max(v, 1e-20) for v in deepest], **style)
            by_depth.plot([int(d) for d in table], [max(_fall(v), 1e-20) for v in table.values()], **style)
        by_layer.xaxis.get_major_locator().set_params(integer=True)
        by_layer.set(xlabel="layer", ylabel="update, relative to the weight (none: 1e-20)", yscale="log",
                     title=f"{result['title']}, {max(map(int, table))} hidden layers")  # fmt: skip
        by_depth.set_xticks([int(d) for d in table])
        by_depth.set(xlabel="hidden layers", ylabel="first layer's update / last hidden layer's", yscale="log")


def moving(sizes: list[float]) -> int:
    """How many layers move by more than MOVES of their weight."""
    return sum(size > MOVES for size in sizes)


def sentence(result: Mapping[str, Any]) -> str:
    """First over last hidden layer in a net of middling depth, and how many layers move in the deepest."""
    depths = list(next(iter(result["updates"].values())))
    some, deepest = depths[len(depths) // 2], depths[-1]
    falls = [f"{name} {_fall(table[some]):.1e}" for name, table in result["updates"].items()]
    moved = [f"{name} {moving(table[deepest])}" for name, table in result["updates"].items()]
    missing = "".join(f" {reason}." for reason in result["unavailable_methods"].values())
    return (
        f"With {some} hidden layers, the first layer's update over the last hidden one's: {', '.join(falls)}. With "
        f"{deepest}, layers of {int(deepest) + 1} that move by more than {MOVES:g} of their weight: "
        f"{', '.join(moved)}.{missing}"
    )


DEMONSTRATION = Demonstration(measure, draw, sentence)
