"""What the study knows of a problem: data, a model from a seed, and the loss of a batch."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import data

__all__ = ["Problem", "Split", "accuracy", "class_loss", "mean_loss"]


@dataclass(frozen=True, eq=False)
class Split:
    """Rows to train on and rows held out, and where they came from."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    source: str


@dataclass(frozen=True)
class Problem:
    """A model and its data.

    family: which of a method's spaces of hyperparameters is tuned. load: the first `rows` and `test_rows` rows.
    model: from a seed and a shape, `{"width": 1, "fewer": 0, "activation": "tanh"}` where the problem can vary.
    loss: of a batch, a mean over it. batch: rows a step, where the method has none of its own.
    timed_as: the problem whose step times are this one's too, since model and batch are the same.
    revision: raised when a change makes earlier rows another problem's; revisions: by method, raised when the library
    comes to do something else here with it.

    classes: the loss is of `model(x)` against a class, so that accuracy is measured, too. validation: rows at the
    end of the training rows that trials are chosen by, and not trained on until the finals; 0: no such rows, trials
    are chosen by their train loss. trials: how many of the declared ones are run, the first, 0 for all.
    tune_epochs, final_epochs: 0 for the study's. early: after how many first
    minibatches the finals' accuracy is measured, on the first `early_rows` test rows. measured: training rows that
    the train loss is measured on, 0 for all. schedule: of the rate. data: the set it needs. labels: names in
    figures of methods that mean something particular here.
    """

    name: str
    title: str
    family: str
    load: Callable[[int, int], Split]
    model: Callable[[int, Mapping[str, Any]], nn.Module]
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    rows: int = 10_000
    test_rows: int = 2_000
    batch: int = 1000
    timed_as: str = ""
    revision: int = 1
    revisions: Mapping[str, int] = field(default_factory=dict)
    classes: bool = False
    validation: int = 0
    trials: int = 0
    tune_epochs: int = 0
    final_epochs: int = 0
    early: int = 0
    early_rows: int = 1000
    measured: int = 0
    schedule: Literal["", "linear"] = ""
    data: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)

    def missing(self) -> str:
        """Why its data cannot be had here, or "": the folder of data that is named lacks the set."""
        lacking = self.data and os.environ.get(data.VARIABLE) and not data.available(self.data)
        return f"{self.data} is not in the folder that {data.VARIABLE} names" if lacking else ""

    def label(self, method: str) -> str:
        """A method's name here."""
        return self.labels.get(method, method)

    def split(self, rows: int, validation: bool = False) -> Split:
        """The first `rows` rows to train on, with the test rows, or with the validation rows in their place."""
        if not validation:
            return self.load(rows, self.test_rows)
        found = self.load(rows + self.validation, 0)
        return replace(
            found, x=found.x[:rows], y=found.y[:rows], x_test=found.x[rows:], y_test=found.y[rows:],
            source=f"{found.source}; held out: the {self.validation} training rows after the first {rows}",
        )  # fmt: skip


def class_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross entropy."""
    return F.cross_entropy(model(x), y)


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients: batch norm by its averages, which no measurement moves."""
    training = model.training
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        model.train(training)


def mean_loss(problem: Problem, model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The loss over all rows, a batch at a time, so that measuring takes no more memory than training."""
    parts = zip(x.split(problem.batch), y.split(problem.batch), strict=True)
    with _measuring(model):
        return math.fsum(float(problem.loss(model, a, b)) * len(a) for a, b in parts) / len(x)


def accuracy(problem: Problem, model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of rows whose class has the largest output; a row with an output that is not a number is wrong."""
    right = 0
    with _measuring(model):
        for a, b in zip(x.split(problem.batch), y.split(problem.batch), strict=True):
            out = model(a)
            right += int(((out.argmax(1) == b) & out.isfinite().all(1)).sum())
    return right / len(x)
