"""The trials: the same number of Sobol points for every method, fixed in a file a study before anything is run."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import torch

from .methods import METHODS
from .study import STUDIES

__all__ = ["POINTS", "declare", "declared", "hyperparameters", "text"]

POINTS, SEED = 8, 2022


def declare(study: str) -> dict[str, dict[str, list[dict[str, float]]]]:
    """The points of a study by method and family of problems.

    Scrambled Sobol sequences (Owen 1998) of one seed: methods with equally many searched hyperparameters get the
    same points of the unit cube, each in its own ranges.
    """
    points: dict[str, dict[str, list[dict[str, float]]]] = {}
    families = STUDIES[study].families
    for method in METHODS.values():
        spaces = {family: space for family, space in method.spaces.items() if family in families}
        if not spaces:
            continue
        points[method.name] = {}
        for family, space in spaces.items():
            engine = torch.quasirandom.SobolEngine(len(space.ranges), scramble=True, seed=SEED)
            cube = engine.draw(POINTS, dtype=torch.float64).tolist()
            points[method.name][family] = [
                {name: r.at(u) for (name, r), u in zip(space.ranges.items(), row, strict=True)} for row in cube
            ]
    return points


def text(study: str) -> str:
    """The contents of a study's file."""
    return json.dumps({"points": POINTS, "seed": SEED, "trials": declare(study)}, indent=1) + "\n"


@cache
def declared(study: str) -> dict[str, dict[str, list[dict[str, float]]]]:
    """The points as the repository holds them."""
    held = json.loads(STUDIES[study].trials.read_text(encoding="utf-8"))
    found: dict[str, dict[str, list[dict[str, float]]]] = held["trials"]
    return found


def hyperparameters(method: str, family: str, trial: int) -> dict[str, Any]:
    """All hyperparameters of a trial, the fixed ones too."""
    study = next(s.name for s in STUDIES.values() if family in s.families)
    return {**METHODS[method].spaces[family].fixed, **declared(study)[method][family][trial]}
