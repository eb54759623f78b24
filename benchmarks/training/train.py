"""The training loop itself: an epoch at a time, the same for every method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .methods import METHODS
from .problem import Problem, Split, accuracy, mean_loss
from .problems import PROBLEMS

__all__ = ["Diverged", "Rows", "Training", "rate"]

WARM_UP = 0.05  # of the steps, where the rate changes


class Diverged(ArithmeticError):
    """A loss is not a finite number."""


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a step; called, the model's loss on them."""

    problem: Problem
    model: nn.Module
    x: Tensor
    y: Tensor

    def __call__(self) -> Tensor:
        return self.problem.loss(self.model, self.x, self.y)


def rate(step: int, steps: int) -> float:
    """The factor of the rate in step 0, 1, ... of `steps`: up over a twentieth of them, then down to 0 by a line."""
    rise = max(1, round(WARM_UP * steps))
    return min((step + 1) / rise, (steps - step) / max(1, steps - rise))


class Training:
    """A model in training by one method.

    Initial weights depend on the seed alone, an epoch's order on seed and epoch: methods with equal batches see
    equal batches. epochs: in all, needed where the problem has a schedule of the rate.
    """

    def __init__(
        self, problem: str, split: Split, method: str, hyper: Mapping[str, Any], seed: int, batch: int,
        shape: Mapping[str, Any] | None = None, epochs: int = 0,
    ) -> None:  # fmt: skip
        self.problem, self.split, self.seed, self.batch = PROBLEMS[problem], split, seed, batch
        self.model = self.problem.model(seed, shape or {})
        torch.manual_seed(seed)  # for methods that sample
        self._step = METHODS[method].make(self.model, list(self.model.parameters()), hyper)
        self._whole = METHODS[method].whole
        self._groups = getattr(getattr(self._step, "optimizer", None), "param_groups", [])
        self._rates = [group.get("lr") for group in self._groups]
        self._steps = epochs * -(-len(split.x) // batch) if self.problem.schedule else 0
        self.epochs = self.steps = 0

    def step(self, index: Tensor | slice) -> Tensor:
        """One step on the rows of an index; the loss before it."""
        if self._steps:
            for group, base in zip(self._groups, self._rates, strict=True):
                group["lr"] = base * rate(self.steps, self._steps)
        loss = self._step(Rows(self.problem, self.model, self.split.x[index], self.split.y[index]))
        self.steps += 1
        return loss

    def batches(self) -> Iterator[Tensor | slice]:
        """Indices of the coming epoch's batches."""
        if self._whole:
            yield slice(None)
            return
        generator = torch.Generator().manual_seed(10_000 * self.seed + self.epochs)
        yield from torch.randperm(len(self.split.x), generator=generator).split(self.batch)

    def epoch(self, early: int = 0, measure: Callable[[], object] = lambda: None) -> None:
        """Train on every row once. Raises Diverged where a batch's loss is not finite.

        measure: called at the start of training and after each of its `early` first minibatches of the problem's size.
        """
        each = max(1, self.problem.batch // self.batch)  # steps a minibatch
        if early and not self.steps:
            measure()
        for number, index in enumerate(self.batches()):
            loss = float(self.step(index))
            if not math.isfinite(loss):
                raise Diverged(f"the loss is {loss} at step {number + 1} of epoch {self.epochs + 1}")
            if self.steps % each == 0 and self.steps // each <= early:
                measure()
        self.epochs += 1

    def losses(self) -> tuple[float, float]:
        """Train and test loss now, over all rows. Raises Diverged where one is not finite."""
        split, rows = self.split, self.problem.measured or len(self.split.x)
        train = mean_loss(self.problem, self.model, split.x[:rows], split.y[:rows])
        test = mean_loss(self.problem, self.model, split.x_test, split.y_test)
        if not (math.isfinite(train) and math.isfinite(test)):
            raise Diverged(f"the loss after epoch {self.epochs} is {train} on train and {test} on test")
        return train, test

    def accuracy(self, rows: int | None = None) -> float:
        """The share of right answers on the first `rows` rows held out, or on all; NaN where there are no classes."""
        if not self.problem.classes:
            return math.nan
        return accuracy(self.problem, self.model, self.split.x_test[:rows], self.split.y_test[:rows])
