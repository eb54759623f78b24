"""Benchopt's solvers: the methods, each with its declared trials."""

from __future__ import annotations

import time
from typing import Any

from benchopt import BaseSolver
from benchopt.stopping_criterion import NoCriterion

from benchmarks.probe import Peak
from benchmarks.training import trials
from benchmarks.training.methods import METHODS
from benchmarks.training.plan import Run, parse
from benchmarks.training.problem import Split
from benchmarks.training.problems import PROBLEMS
from benchmarks.training.train import Training


class Solver(BaseSolver):
    """One of METHODS, with the hyperparameters of one trial."""

    name = "method"
    sampling_strategy = "callback"
    stopping_criterion = NoCriterion(strategy="callback")
    parameters = {"method": list(METHODS), "trial": [0], "change": [""]}  # noqa: RUF012

    def skip(self, problem: str, **rest: Any) -> tuple[bool, str | None]:
        """Why the method cannot be run on the problem, or here."""
        if PROBLEMS[problem].family not in METHODS[self.method].spaces:
            return True, f"{self.method} has no trials for {problem}"
        if not 0 <= self.trial < trials.POINTS:
            return True, f"there are trials 0 to {trials.POINTS - 1}"
        reason = self._run_of(problem, **rest).unavailable()
        return bool(reason), reason or None

    def _run_of(
        self, problem: str, shape: str, split: Split, validation: bool, epochs: int, run_seed: int, early: int
    ) -> Run:
        return Run(
            "benchopt", problem, self.method, self.trial, run_seed, epochs, len(split.x), shape, self.change,
            validation, early,
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
