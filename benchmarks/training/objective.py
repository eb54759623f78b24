"""Benchopt's objective: train and test loss, and where there are classes accuracy.

A curve has a point an epoch, taken in the callback with the clock stopped; in the finals of classifiers also one after
each first minibatch.
"""

from __future__ import annotations

import math
from typing import Any

from benchopt import BaseObjective
from benchopt.stopping_criterion import NoCriterion

from benchmarks.training.locoprop.plan import MAIN
from benchmarks.training.plan import parse
from benchmarks.training.problem import Split
from benchmarks.training.study import study_of
from benchmarks.training.train import Training


class Objective(BaseObjective):
    """Train and test loss over all rows."""

    name = "training"
    min_benchopt_version = "1.10"
    sampling_strategy = "callback"
    stopping_criterion = NoCriterion(strategy="callback")
    parameters = {"epochs": [3], "seed": [study_of(MAIN).tune_seed], "early": [0]}  # noqa: RUF012
    test_config = {"epochs": 1, "dataset": {"problem": MAIN, "rows": 64}}  # noqa: RUF012

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
