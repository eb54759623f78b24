"""What the demonstrations share: data, nets, steps of every method, pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerwise as lw
from benchmarks import probe
from benchmarks.training.altmin.nets import dense
from benchmarks.training.method import Stepping, stepping
from benchmarks.training.problem import Split
from benchmarks.training.problems import PROBLEMS
from layerwise import local

__all__ = [
    "METHODS", "Batch", "Demonstration", "accuracy", "batches", "held_out", "make", "mean", "mnist", "net", "picture",
    "rounded", "split_of", "train", "why_not",
]  # fmt: skip

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Demonstration:
    """A statement: what is measured (small: in seconds, for tests), the picture of it, and the sentence."""

    measure: Callable[[bool], dict[str, Any]]
    draw: Callable[[Mapping[str, Any], Path], None]
    sentence: Callable[[Mapping[str, Any]], str]


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of a step; called, the model's cross entropy on them."""

    model: nn.Module
    x: Tensor
    y: Tensor

    def __call__(self) -> Tensor:
        return F.cross_entropy(self.model(self.x), self.y)


# -- methods ----------------------------------------------------------------------------------------------

METHODS: dict[str, Callable[[nn.Module, Settings], Stepping]] = {
    "Adam": lambda m, s: stepping(torch.optim.Adam(m.parameters(), fused=True, **s)),
    "SGD": lambda m, s: stepping(torch.optim.SGD(m.parameters(), **s)),
    "AM-Adam": lambda m, s: _altmin(m, weights="adam", **s),
    "AM-SGD": lambda m, s: _altmin(m, weights="sgd", **s),
    "AM-mem": lambda m, s: _altmin(m, weights=local.Memory(**s)),  # type: ignore[attr-defined, unused-ignore]
}


def _altmin(model: nn.Module, **settings: Any) -> Stepping:
    optimizer = lw.AltMin(model, **settings)
    return Stepping(optimizer.step, optimizer)


def make(method: str, model: nn.Module, settings: Settings) -> Stepping:
    """A step of a method on a model."""
    return METHODS[method](model, settings)


def why_not(method: str, settings: Settings) -> str:
    """Why the library does not take a method with these settings, or ""."""
    try:
        make(method, nn.Linear(2, 2), settings)
    except (AttributeError, TypeError, ValueError) as error:
        return f"layerwise does not take what {method} with {dict(settings)} needs yet: {error}"
    return ""


# -- data and training --------------------------------------------------------------------------------------


def mnist(rows: int, test_rows: int) -> Split:
    """The first rows of MNIST, as the study has them."""
    return PROBLEMS["mnist-2x100"].load(rows, test_rows)


def split_of(small: bool, rows: int, test_rows: int) -> Split:
    """MNIST; a few hundred rows of it where the demonstration is to be small."""
    return mnist(400, 100) if small else mnist(rows, test_rows)


def held_out(data: Split) -> Split:
    """The last tenth of the training rows in place of the test rows: what settings are chosen by."""
    n = len(data.x) // 10
    return replace(data, x=data.x[:-n], y=data.y[:-n], x_test=data.x[-n:], y_test=data.y[-n:])


def net(seed: int, hidden: Sequence[int] = (100, 100), activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    """A dense net for MNIST."""
    return dense(784, *hidden, 10, activation=activation)(seed, {})


def batches(n: int, batch: int, seed: int) -> list[Tensor]:
    """The indices of an epoch's minibatches."""
    return list(torch.randperm(n, generator=torch.Generator().manual_seed(seed)).split(batch))


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of right answers."""
    return float((model(x).argmax(1) == y).double().mean())


def train(step: Stepping, model: nn.Module, x: Tensor, y: Tensor, index: Sequence[Tensor]) -> None:
    """A step on each minibatch."""
    for rows in index:
        step(Batch(model, x[rows], y[rows]))


def mean(values: Sequence[float]) -> float:
    """The mean."""
    return sum(values) / len(values)


# -- results ------------------------------------------------------------------------------------------------


def rounded(value: Any) -> Any:
    """The figures of a result to six digits, as JSON has them."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {str(k): rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list | tuple) else value


@contextmanager
def picture(path: Path, panels: int = 1) -> Iterator[Any]:
    """Axes to draw on, saved at the end."""
    figure = probe.figure(6 * panels, 4.6)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    yield axes
    for one in axes:
        one.grid(alpha=0.3)
        if one.get_legend_handles_labels()[0]:
            one.legend(fontsize=8)
    probe.save(figure, path)
