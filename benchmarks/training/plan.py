"""Which runs a study consists of, and what identifies each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from layerwise import local

from . import trials
from .methods import METHODS
from .problems import PROBLEMS
from .study import study_of

__all__ = ["Key", "Row", "Run", "best", "encode", "finals", "methods_of", "parse", "tuning"]

SAME_NUMBERS_SINCE = "0.1.0"  # the release since which training with the library gives the same bits
WHOLE_EPOCHS = 20  # of finals at most, where a step takes all rows
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
    """One training run. shape: changes of the problem's model, change: of the method, both as `encode` gives them.

    validation: the rows held out are training rows, not test rows. early: first minibatches after each of which the
    accuracy is measured.
    """

    phase: str
    problem: str
    method: str
    trial: int
    seed: int
    epochs: int
    rows: int
    shape: str = ""
    change: str = ""
    validation: bool = False
    early: int = 0

    @property
    def batch(self) -> int:
        """Rows a step."""
        if METHODS[self.method].whole:
            return self.rows
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
        found = {
            "epochs": self.epochs, "rows": self.rows, "test_rows": PROBLEMS[self.problem].test_rows,
            "batch": self.batch, "shape": parse(self.shape), "hyperparameters": self.hyperparameters(),
        }  # fmt: skip
        if self.validation:
            found["test_rows"], found["validation"] = PROBLEMS[self.problem].validation, True
        return found | ({"early": self.early} if self.early else {})

    def code(self) -> str:
        """The version of what ran: of the library's numbers, the problem and the method."""
        problem = PROBLEMS[self.problem]
        of_method = METHODS[self.method].revision + problem.revisions.get(self.method, 0)
        revisions = f"{problem.revision}.{of_method}"
        return f"{SAME_NUMBERS_SINCE}+{revisions}"

    def key(self) -> Key:
        """Problem, method, trial, seed, hash of the configuration, code version."""
        said = json.dumps(self.configuration(), sort_keys=True)
        digest = hashlib.sha256(said.encode()).hexdigest()[:12]
        return self.problem, self.method, self.trial, self.seed, digest, self.code()

    def unavailable(self) -> str:
        """Why it cannot be run here, or ""."""
        if "inner" in parse(self.change) and not hasattr(local, "LocalSteps"):
            return "layerwise.local has no LocalSteps yet"
        return PROBLEMS[self.problem].missing() or METHODS[self.method].missing(PROBLEMS[self.problem].family)


def methods_of(problem: str, chosen: Iterable[str] | None = None) -> list[str]:
    """The methods of the study on a problem; those asked for, also where the budget cut them."""
    allowed = study_of(problem).methods[problem] if chosen is None else tuple(chosen)
    return [m for m in allowed if PROBLEMS[problem].family in METHODS[m].spaces]


def tuning(problem: str, method: str, shape: str = "", change: str = "", phase: str = "tune") -> list[Run]:
    """All trials of a method, one seed, few epochs."""
    known, study = PROBLEMS[problem], study_of(problem)
    epochs, rows, held_out = known.tune_epochs or study.tune_epochs, known.rows - known.validation, known.validation > 0
    return [
        Run(phase, problem, method, t, study.tune_seed, epochs, rows, shape, change, held_out)
        for t in range(known.trials or trials.POINTS)
    ]


def best(runs: Iterable[Run], rows: Mapping[Key, Row]) -> int | None:
    """The trial with the lowest train loss at its end, or the highest accuracy on rows held out; failures excluded.

    Of equal accuracies the lower train loss counts. None where no trial is left. Raises LookupError where a trial has
    no row yet: a winner of part of the trials is not the winner.
    """
    scores: dict[int, tuple[float, ...]] = {}
    for run in runs:
        if run.key() not in rows:
            raise LookupError(f"{run.method} on {run.problem}: trial {run.trial} has not been run")
        row = rows[run.key()]
        if row["status"] == "done":
            by_accuracy = study_of(run.problem).chosen_by == "accuracy" and PROBLEMS[run.problem].classes
            scores[run.trial] = (-float(row["test_accuracy"]),) if by_accuracy else ()
            scores[run.trial] += (float(row["train_loss"]), run.trial)
    return min(scores, key=lambda t: scores[t]) if scores else None


def finals(problem: str, method: str, trial: int) -> list[Run]:
    """The best trial at full length on all training rows, for all seeds."""
    known, study = PROBLEMS[problem], study_of(problem)
    epochs, early = known.final_epochs or study.final_epochs, known.early
    if METHODS[method].whole:
        epochs, early = min(epochs, WHOLE_EPOCHS), 0
    return [Run("final", problem, method, trial, s, epochs, known.rows, early=early) for s in study.final_seeds]
