"""The bases of Benchopt's plugins: `objective.py`, `datasets/` and `solvers/` only name things.

Benchopt's data set is one of PROBLEMS, its solver one of METHODS, and its curve has a point an epoch, taken in
the callback with the clock stopped; in the finals of classifiers also one after each first minibatch.
"""

from __future__ import annotations

import math
import time
from typing import Any

from benchopt import BaseDataset, BaseObjective, BaseSolver
from benchopt.stopping_criterion import NoCriterion

from . import trials
from .locoprop.plan import MAIN
from .memory import Peak
from .methods import METHODS
from .plan import Run, parse
from .problem import Split
from .problems import PROBLEMS
from .study import study_of
from .train import Training

__all__ = ["TrainingDataset", "TrainingObjective", "TrainingSolver"]


class TrainingDataset(BaseDataset):
    """A problem: its data, and the shape of its model."""

    name = MAIN
    parameters = {"rows": [0], "shape": [""], "validation": [False]}  # noqa: RUF012  0: the problem's own number

    def get_data(self) -> dict[str, Any]:
        """What the objective gets."""
        problem = PROBLEMS[self.name]
        rows = self.rows or problem.rows - (problem.validation if self.validation else 0)
        split = problem.split(rows, self.validation)
        return {"problem": self.name, "shape": self.shape, "split": split, "validation": self.validation}


class TrainingObjective(BaseObjective):
    """Train and test loss over all rows."""

    name = "training"
    min_benchopt_version = "1.10"
    sampling_strategy = "callback"
    stopping_criterion = NoCriterion(strategy="callback")
    parameters = {"epochs": [3], "seed": [study_of(MAIN).tune_seed], "early": [0]}  # noqa: RUF012
    test_config = {"epochs": 1, "dataset": {"rows": 64}}  # noqa: RUF012

    def set_data(self, problem: str, shape: str, split: Split, validation: bool) -> None:
        """Keep the problem."""
        self.problem, self.shape, self.split, self.validation = problem, shape, split, validation

    def get_objective(self) -> dict[str, Any]:
        """What the solver gets."""
        return {
            "problem": self.problem, "shape": self.shape, "split": self.split, "validation": self.validation,
            "epochs": self.epochs, "run_seed": self.seed, "early": self.early,
        }  # fmt: skip

    def evaluate_result(self, training: Training | None, failure: str, early: bool, **clock: float) -> dict[str, Any]:
        """The losses now, infinite from a failure on; what the clock says is passed through.

        An early point has the accuracy on few rows alone, and its value is the share of wrong answers.
        """
        train, test, accuracy = math.inf, math.inf, math.nan
        if training is not None and not failure and early:
            accuracy = training.accuracy(training.problem.early_rows)
            train, test = 1 - accuracy, 1 - accuracy
        elif training is not None and not failure:
            try:
                train, test = training.losses()
                accuracy = training.accuracy()
            except ArithmeticError as error:
                failure = f"{type(error).__name__}: {error}"
        return {"value": train, "test_loss": test, "accuracy": accuracy, "early": early, "failure": failure, **clock}

    def get_one_result(self) -> dict[str, Any]:
        """A result before any step, for `benchopt test`."""
        untrained = Training(self.problem, self.split, "sgd", {"lr": 0.0}, 0, len(self.split.x), parse(self.shape))
        return {"training": untrained, "failure": "", "early": False, "cpu_seconds": 0.0, "memory": 0.0}


class TrainingSolver(BaseSolver):
    """A method, with the hyperparameters of one trial."""

    name = "sgd"
    sampling_strategy = "callback"
    stopping_criterion = NoCriterion(strategy="callback")
    parameters = {"trial": [0], "change": [""]}  # noqa: RUF012

    def skip(self, problem: str, **rest: Any) -> tuple[bool, str | None]:
        """Why the method cannot be run on the problem, or here."""
        if PROBLEMS[problem].family not in METHODS[self.name].spaces:
            return True, f"{self.name} has no trials for {problem}"
        if not 0 <= self.trial < trials.POINTS:
            return True, f"there are trials 0 to {trials.POINTS - 1}"
        reason = self._run_of(problem, **rest).unavailable()
        return bool(reason), reason or None

    def _run_of(
        self, problem: str, shape: str, split: Split, validation: bool, epochs: int, run_seed: int, early: int
    ) -> Run:
        return Run(
            "benchopt", problem, self.name, self.trial, run_seed, epochs, len(split.x), shape, self.change, validation,
            early,
        )  # fmt: skip

    def set_objective(self, **objective: Any) -> None:
        """Keep what is to be trained."""
        self.split, self.plan = objective["split"], self._run_of(**objective)

    def get_next(self, stop_val: int) -> int:
        """A point after every epoch."""
        return stop_val + 1

    def run(self, callback: Any) -> None:
        """Train, calling back before the first epoch and after each; a failure ends the curve with a last point."""
        plan, self.training, self.failure, self.cpu_seconds, self.early = self.plan, None, "", 0.0, False
        measuring = 0.0

        def first_minibatches() -> None:
            nonlocal measuring
            begun = time.process_time()
            self.early = True
            callback()
            self.early = False
            measuring += time.process_time() - begun

        self._peak = Peak()
        try:
            self.training = Training(
                plan.problem, self.split, plan.method, plan.hyperparameters(), plan.seed, plan.batch, parse(plan.shape),
                plan.epochs,
            )  # fmt: skip
            for _ in range(plan.epochs):
                if not callback():
                    return
                start, measuring = time.process_time(), 0.0
                self.training.epoch(plan.early, first_minibatches)
                self.cpu_seconds += time.process_time() - start - measuring
        except (ArithmeticError, RuntimeError, MemoryError) as error:  # torch's linear solvers raise RuntimeError
            self.failure = f"{type(error).__name__}: {error}"
        callback()

    def get_result(self) -> dict[str, Any]:
        """What the objective evaluates."""
        clock = {"cpu_seconds": self.cpu_seconds, "memory": self._peak.mb()}
        return {"training": self.training, "failure": self.failure, "early": self.early, **clock}
