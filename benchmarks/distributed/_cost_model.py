"""The cost of a step on P ranks: messages of `α + n/β` seconds, and computation by its operations. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np

from layerwise.ranks.ownership import assigned

__all__ = [
    "CLUSTER",
    "OPERATIONS",
    "RANKS",
    "WAYS",
    "WIDE",
    "Layers",
    "Rates",
    "fitted",
    "in_stages",
    "operations",
    "owned",
    "predicted",
    "worth",
]

RANKS = [2**k for k in range(11)]
WAYS = ("layers", "data", "stages")
WIDE = [(4096, 4096)] * 64, 4096  # a deep net on a cluster: its layers, its batch
CLUSTER = {"wait": 2e-5, "bytes a second": 1e10}  # assumed, not measured: a fast network between machines

Layers = Sequence[tuple[int, int]]
Rates = Mapping[str, float]


# -- counting: what a part of a step grows with, layer by layer -----------------------------------------------


OPERATIONS: dict[str, Callable[[int, int, int], float]] = {
    "run": lambda i, o, n: 6.0 * n * i * o,  # forward and backward
    "rest": lambda i, o, n: 6.0 * n * i * o,  # of a step of LocoProp: that and the record
    "solve": lambda i, o, n: 4.0 * n * i * o,  # T local steps on N/T rows each
    "codes": lambda i, o, n: 6.0 * n * i * o,  # the forward pass and the moves of the codes
    "weights": lambda i, o, n: 4.0 * n * i * o,  # AltMin's step on each layer
    "products": lambda i, o, n: 2.0 * i * o * (i + o),  # with K-FAC's inverses, every step
    "factors": lambda i, o, n: 2.0 * n * (i * i + o * o),
    "inverses": lambda i, o, n: float(i**3 + o**3),
}


def operations(part: str, net: Layers, batch: int) -> list[float]:
    """Of each layer."""
    return [OPERATIONS[part](i, o, batch) for i, o in net]


def owned(work: Sequence[float], ranks: int) -> list[list[int]]:
    """The items of each rank, shared out as the library does."""
    held: list[list[int]] = [[] for _ in range(ranks)]
    for n, rank in assigned(dict(enumerate(work)), ranks, {}).items():
        held[rank].append(n)
    return held


def in_stages(work: Sequence[float], stages: int) -> float:
    """The most work of a stage, where consecutive items are cut into stages as evenly as can be."""
    low, high = max(work), sum(work)
    for _ in range(60):
        most, used, here = (low + high) / 2, 1, 0.0
        for w in work:
            used, here = (used + 1, w) if here + w > most else (used, here + w)
        low, high = (low, most) if used <= stages else (most, high)
    return high


# -- the model ------------------------------------------------------------------------------------------------


def predicted(way: str, ranks: int, net: Layers, batch: int, rates: Rates, network: Rates, slow: float = 1.0) -> float:
    """Seconds of a step. slow: by how much each process computes slower, where they share cores."""
    wait, each = network["wait"], 1 / network["bytes a second"]
    weights = [4.0 * (i * o + o) for i, o in net]

    def seconds(part: str, which: Sequence[int] | None = None) -> float:
        counted = operations(part, net, batch)
        return rates[part] * slow * sum(counted if which is None else (counted[n] for n in which))

    def broadcast(size: float) -> float:
        return math.ceil(math.log2(ranks)) * (wait + size * each) if ranks > 1 else 0.0

    def total(size: float) -> float:
        return 2 * (ranks - 1) * wait + 2 * (ranks - 1) / ranks * size * each

    if way == "layers":
        mine = owned(operations("solve", net, batch), ranks)
        return (
            seconds("rest") + max(seconds("solve", own) for own in mine)
            + sum(broadcast(sum(weights[n] for n in own)) for own in mine if own)
        )  # fmt: skip
    if way == "data":
        mine = owned(operations("inverses", net, batch), ranks)
        factors = sum(4.0 * (i * i + o * o) for i, o in net)
        each_step = seconds("run") / ranks + max(seconds("products", own) for own in mine) + total(sum(weights))
        each_step += sum(broadcast(sum(weights[n] for n in own)) for own in mine if own)
        every_10 = seconds("factors") / ranks + total(factors)
        return each_step + every_10 / 10 + max(seconds("inverses", own) for own in mine) / 100
    stages = min(ranks, len(net))
    border = 4.0 * batch * max(o for _, o in net)
    most = rates["weights"] * slow * in_stages(operations("weights", net, batch), stages)
    return seconds("codes") / slow + most + 2 * (stages - 1) * (wait + border * each)


def worth(times: Mapping[int, float], gain: float = 0.1) -> int:
    """The largest number of ranks up to which every doubling makes a step at least 10 % shorter."""
    ranks = sorted(times)
    for before, after in pairwise(ranks):
        if times[after] > (1 - gain) * times[before]:
            return before
    return ranks[-1]


def fitted(messages: Mapping[int, float]) -> dict[str, float]:
    """α and β of `α + n/β`, by least squares of the relative error; a wait is at least a microsecond."""
    size, seconds = (np.array(list(v), dtype=float) for v in (messages.keys(), messages.values()))
    columns = np.stack([1 / seconds, size / seconds], 1)
    (wait, each), *_ = np.linalg.lstsq(columns, np.ones_like(size), rcond=None)
    return {"wait": max(float(wait), 1e-6), "bytes a second": 1 / float(each)}
