"""The trials: the same number of Sobol points for every method, fixed in trials.json before anything is run."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .methods import METHODS

__all__ = ["FILE", "POINTS", "declare", "declared", "hyperparameters", "text"]

POINTS, SEED = 8, 2022
FILE = Path(__file__).with_name("trials.json")


def declare() -> dict[str, dict[str, list[dict[str, float]]]]:
    """The points by method and family of problems.

    Scrambled Sobol sequences (Owen 1998) of one seed: methods with equally many searched hyperparameters get the
    same points of the unit cube, each in its own ranges.
    """
    points: dict[str, dict[str, list[dict[str, float]]]] = {}
    for method in METHODS.values():
        points[method.name] = {}
        for family, space in method.spaces.items():
            engine = torch.quasirandom.SobolEngine(len(space.ranges), scramble=True, seed=SEED)
            cube = engine.draw(POINTS, dtype=torch.float64).tolist()
            points[method.name][family] = [
                {name: r.at(u) for (name, r), u in zip(space.ranges.items(), row, strict=True)} for row in cube
            ]
    return points


def text() -> str:
    """The file's contents."""
    return json.dumps({"points": POINTS, "seed": SEED, "trials": declare()}, indent=1) + "\n"


@cache
def declared() -> dict[str, dict[str, list[dict[str, float]]]]:
    """The points as the repository holds them."""
    found: dict[str, dict[str, list[dict[str, float]]]] = json.loads(FILE.read_text(encoding="utf-8"))["trials"]
    return found


def hyperparameters(method: str, family: str, trial: int) -> dict[str, Any]:
    """All hyperparameters of a trial, the fixed ones too."""
    return {**METHODS[method].spaces[family].fixed, **declared()[method][family][trial]}
