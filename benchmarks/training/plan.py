"""Which runs the study consists of, and what identifies each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import layerwise as lw
from layerwise import local

from . import trials
from .methods import METHODS
from .problems import PROBLEMS

__all__ = [
    "CUT", "FINAL_EPOCHS", "FINAL_SEEDS", "MAIN", "STUDY", "TUNE_EPOCHS", "Key", "Run", "ablations", "best", "encode",
    "finals", "methods_of", "parse", "tuning",
]  # fmt: skip

MAIN = "mnist-autoencoder"
TUNE_EPOCHS, TUNE_SEED = 3, 100  # a seed that no final run has
FINAL_EPOCHS, FINAL_SEEDS = 20, (0, 1, 2)

# What the budget has no room for: on the secondary problems, methods that are not needed for the goals there.
STUDY: dict[str, tuple[str, ...]] = {
    MAIN: tuple(METHODS),
    "fashion-autoencoder": ("momentum", "rmsprop", "adam", "kfac", "locoprop-m"),
    "curves-autoencoder": ("momentum", "rmsprop", "adam", "shampoo", "kfac", "locoprop-m", "locoprop-s"),
    "fashion-convnet": ("momentum", "adam", "shampoo", "muon", "kfac", "locoprop-m"),
    "text-transformer": ("adam", "soap", "muon", "kfac", "locoprop-m"),
}
CUT = {p: tuple(m for m in METHODS if m not in kept and PROBLEMS[p].family in METHODS[m].spaces)
       for p, kept in STUDY.items()}  # fmt: skip

Key = tuple[str, str, int, int, str, str]
Row = Mapping[str, Any]


def encode(changes: Mapping[str, Any]) -> str:
    """`{"steps": 4, "rows": "all"}` as `rows=all;steps=4`: a parameter of Benchopt's is one word."""
    return ";".join(f"{name}={value}" for name, value in sorted(changes.items()))


def parse(word: str) -> dict[str, Any]:
    """The inverse of `encode`; numbers become numbers."""

    def value(said: str) -> Any:
        for kind in (int, float):
            try:
                return kind(said)
            except ValueError:
                continue
        return said

    return {name: value(said) for name, _, said in (part.partition("=") for part in word.split(";") if part)}


@dataclass(frozen=True)
class Run:
    """One training run. shape: changes of the problem's model, change: of the method, both as `encode` gives them."""

    phase: str
    problem: str
    method: str
    trial: int
    seed: int
    epochs: int
    rows: int
    shape: str = ""
    change: str = ""

    @property
    def batch(self) -> int:
        """Rows a step."""
        own = parse(self.change).get("batch", METHODS[self.method].batch)
        return int(own or PROBLEMS[self.problem].batch)

    @property
    def steps(self) -> int:
        """Steps in all; the last batch of an epoch may be a short one."""
        return self.epochs * -(-self.rows // self.batch)

    def hyperparameters(self) -> dict[str, Any]:
        """What the method's factory gets."""
        chosen = trials.hyperparameters(self.method, PROBLEMS[self.problem].family, self.trial)
        changed = {**chosen, **parse(self.change)}
        changed.pop("batch", None)
        return changed

    def configuration(self) -> dict[str, Any]:
        """All that the result depends on, less seed and code."""
        return {
            "epochs": self.epochs, "rows": self.rows, "test_rows": PROBLEMS[self.problem].test_rows,
            "batch": self.batch, "shape": parse(self.shape), "hyperparameters": self.hyperparameters(),
        }  # fmt: skip

    def code(self) -> str:
        """The version of what ran: of the package, the problem and the method."""
        revisions = f"{PROBLEMS[self.problem].revision}.{METHODS[self.method].revision}"
        return f"{lw.__version__}+{revisions}"

    def key(self) -> Key:
        """Problem, method, trial, seed, hash of the configuration, code version."""
        said = json.dumps(self.configuration(), sort_keys=True)
        digest = hashlib.sha256(said.encode()).hexdigest()[:12]
        return self.problem, self.method, self.trial, self.seed, digest, self.code()

    def unavailable(self) -> str:
        """Why it cannot be run here, or ""."""
        if "inner" in parse(self.change) and not hasattr(local, "LocalSteps"):
            return "layerwise.local has no LocalSteps yet"
        return METHODS[self.method].unavailable()


def methods_of(problem: str, chosen: Iterable[str] | None = None) -> list[str]:
    """The methods of the study on a problem; those asked for, also where the budget cut them."""
    allowed = STUDY[problem] if chosen is None else tuple(chosen)
    return [m for m in allowed if PROBLEMS[problem].family in METHODS[m].spaces]


def tuning(problem: str, method: str, shape: str = "", change: str = "", phase: str = "tune") -> list[Run]:
    """All trials of a method, one seed, few epochs."""
    rows = PROBLEMS[problem].rows
    return [Run(phase, problem, method, t, TUNE_SEED, TUNE_EPOCHS, rows, shape, change) for t in range(trials.POINTS)]


def best(runs: Iterable[Run], rows: Mapping[Key, Row]) -> int | None:
    """The trial with the lowest train loss at its end, failures excluded; None where none is left.

    Raises LookupError where a trial has no row yet: a winner of part of the trials is not the winner.
    """
    scores: dict[int, float] = {}
    for run in runs:
        if run.key() not in rows:
            raise LookupError(f"{run.method} on {run.problem}: trial {run.trial} has not been run")
        scores[run.trial] = float(rows[run.key()]["train_loss"])
    finite = {trial: loss for trial, loss in scores.items() if loss < float("inf")}
    return min(finite, key=lambda t: (finite[t], t)) if finite else None


def finals(problem: str, method: str, trial: int) -> list[Run]:
    """The best trial at full length, for all seeds."""
    rows = PROBLEMS[problem].rows
    return [Run("final", problem, method, trial, seed, FINAL_EPOCHS, rows) for seed in FINAL_SEEDS]


ABLATED = ("locoprop-m", "adam")
_CHANGES: dict[str, dict[str, Any]] = {  # each tuned anew, all of it LocoProp-M on the main problem
    "steps 2": {"steps": 2}, "steps 5": {"steps": 5}, "steps 20": {"steps": 20},
    "squared loss, rows N/T": {"loss": "squared", "rows": 100},
    "inner SGD": {"inner": "SGD"}, "inner Adam": {"inner": "Adam"},
}  # fmt: skip
_SHAPES: dict[str, dict[str, Any]] = {
    "half as wide": {"width": 0.5}, "two layers fewer": {"fewer": 1}, "two layers more": {"fewer": -1},
    "ReLU": {"activation": "relu"},
}  # fmt: skip
_BATCHES = (250, 500)


def ablations() -> dict[str, dict[str, list[Run]]]:
    """Runs by ablation and method; every one is tuned by the same trials, and its best is reported."""
    table: dict[str, dict[str, list[Run]]] = {"as in the study": {m: tuning(MAIN, m) for m in ABLATED}}

    def ablation(method: str, shape: str = "", change: str = "") -> list[Run]:
        return tuning(MAIN, method, shape, change, phase="ablation")

    for name, change in _CHANGES.items():
        table[name] = {"locoprop-m": ablation("locoprop-m", change=encode(change))}
    for batch in _BATCHES:
        table[f"batch {batch}"] = {m: ablation(m, change=encode({"batch": batch})) for m in ABLATED}
    for name, shape in _SHAPES.items():
        table[name] = {m: ablation(m, shape=encode(shape)) for m in ABLATED}
    return table
