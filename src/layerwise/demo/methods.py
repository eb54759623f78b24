"""The methods that the demo compares: name -> settings -> optimizer.

All run by `opt.step(closure)`, under one learning rate schedule. Our methods run with their
defaults (`{}`). For the baselines `CHOSEN` holds the best of eight `TRIALS`, judged by the train loss
after the demo's own number of epochs, on other seeds than the demo's: `python -m benchmarks.training.tune_demo`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

import layerwise as lw

__all__ = ["CHOSEN", "METHODS", "TRIALS", "Method", "Settings"]

Settings = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """A method; make: (model, **settings) -> optimizer; backward: whether the closure calls `loss.backward()`."""

    make: Callable[..., torch.optim.Optimizer]
    backward: bool = False


METHODS: dict[str, Method] = {
    "LocoProp-M": Method(lambda model, **kw: lw.LocoProp(model, **kw)),
    "LocoProp-S": Method(lambda model, **kw: lw.LocoProp(model, loss="squared", **kw)),
    "AltMin (Adam)": Method(lambda model, **kw: lw.AltMin(model, weights="adam", **kw)),
    "RMSProp": Method(lambda model, **kw: torch.optim.RMSprop(model.parameters(), **kw), backward=True),
    "Adam": Method(lambda model, **kw: torch.optim.Adam(model.parameters(), **kw), backward=True),
}


def _grid(**choices: tuple[Any, ...]) -> list[Settings]:
    return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


TRIALS: dict[str, list[Settings]] = {
    "LocoProp-M": [{}],
    "LocoProp-S": [{}],
    "AltMin (Adam)": [{}],
    "RMSProp": _grid(lr=(2.5e-4, 5e-4, 1e-3, 2e-3), momentum=(0.5, 0.9)),
    "Adam": _grid(lr=(2e-3, 3e-3, 5e-3, 7e-3, 1e-2, 1.4e-2, 2e-2, 3e-2)),
}

CHOSEN: dict[str, Settings] = {
    "LocoProp-M": {},
    "LocoProp-S": {},
    "AltMin (Adam)": {},
    "RMSProp": {"lr": 5e-4, "momentum": 0.9},
    "Adam": {"lr": 1e-2},
}
