"""The training loop itself: an epoch at a time, the same for every method."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .methods import METHODS
from .problems import PROBLEMS, Split, mean_loss

__all__ = ["Diverged", "Training"]


class Diverged(ArithmeticError):
    """A loss is not a finite number."""


class Training:
    """A model in training by one method.

    Initial weights depend on the seed alone, an epoch's order on seed and epoch: methods with equal batches see
    equal batches.
    """

    def __init__(
        self, problem: str, split: Split, method: str, hyper: Mapping[str, Any], seed: int, batch: int,
        shape: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.problem, self.split, self.seed, self.batch = PROBLEMS[problem], split, seed, batch
        self.model = self.problem.model(seed, shape or {})
        torch.manual_seed(seed)  # for methods that sample
        self._step = METHODS[method].make(self.model, list(self.model.parameters()), hyper)
        self.epochs = 0

    def step(self, index: Tensor) -> Tensor:
        """One step on the rows of an index; the loss before it."""
        x, y = self.split.x[index], self.split.y[index]
        return self._step(lambda: self.problem.loss(self.model, x, y))

    def batches(self) -> Iterator[Tensor]:
        """Indices of the coming epoch's batches."""
        generator = torch.Generator().manual_seed(10_000 * self.seed + self.epochs)
        yield from torch.randperm(len(self.split.x), generator=generator).split(self.batch)

    def epoch(self) -> None:
        """Train on every row once. Raises Diverged where a batch's loss is not finite."""
        for number, index in enumerate(self.batches()):
            loss = float(self.step(index))
            if not math.isfinite(loss):
                raise Diverged(f"the loss is {loss} at step {number + 1} of epoch {self.epochs + 1}")
        self.epochs += 1

    def losses(self) -> tuple[float, float]:
        """Train and test loss now, over all rows. Raises Diverged where one is not finite."""
        split = self.split
        train = mean_loss(self.problem, self.model, split.x, split.y)
        test = mean_loss(self.problem, self.model, split.x_test, split.y_test)
        if not (math.isfinite(train) and math.isfinite(test)):
            raise Diverged(f"the loss after epoch {self.epochs} is {train} on train and {test} on test")
        return train, test
