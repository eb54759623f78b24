"""What the study knows of a method: a factory (model, parameters, hyperparameters) -> step, and the ranges searched.

Every method has the same number of trials and at most three searched hyperparameters, each over its own range,
declared before anything is run. What is not searched is `fixed`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

__all__ = ["Batch", "Factory", "Method", "Parameters", "Range", "Space", "Step", "Stepping", "stepping"]


class Batch(Protocol):
    """The rows of a step: called, the loss of the model on them, no gradient taken."""

    @property
    def x(self) -> Tensor: ...

    @property
    def y(self) -> Tensor: ...

    def __call__(self) -> Tensor: ...


class Step(Protocol):
    """One step on a batch; the loss before it. `optimizer`, where it has one, is what a schedule of rates turns."""

    def __call__(self, batch: Batch, /) -> Tensor: ...


Parameters = list[nn.Parameter]
Factory = Callable[[nn.Module, Parameters, Mapping[str, Any]], Step]


@dataclass(frozen=True)
class Range:
    """Where a hyperparameter is searched.

    scale: "linear"; "log"; or "one-minus", for which 1 − value is spread evenly on a log scale.
    """

    low: float
    high: float
    scale: Literal["linear", "log", "one-minus"] = "log"

    def at(self, u: float) -> float:
        """The value at u in [0, 1), to three digits."""
        if self.scale == "linear":
            return float(f"{self.low + u * (self.high - self.low):.3g}")
        if self.scale == "log":
            return float(f"{self.low * (self.high / self.low) ** u:.3g}")
        gap = float(f"{(1 - self.low) * ((1 - self.high) / (1 - self.low)) ** u:.3g}")
        return round(1 - gap, 9)


@dataclass(frozen=True)
class Space:
    """The hyperparameters of a method on a family of problems: searched, and fixed.

    period: steps after which its costs repeat.
    """

    ranges: Mapping[str, Range]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    period: int = 1


def _here() -> str:
    return ""


@dataclass(frozen=True)
class Method:
    """An optimizer as the study knows it.

    spaces: by family of problems; a method is not run on a family that it has no space for. batch: rows a step,
    default the problem's. whole: every step takes all rows, in their order. first_order: one of the baselines that
    the goals are set against. revision: raised when the rule changes, so that earlier rows no longer count.
    unavailable: why it cannot be run here, "" where it can; needs: the same by family.
    """

    name: str
    make: Factory
    spaces: Mapping[str, Space]
    batch: int | None = None
    whole: bool = False
    first_order: bool = False
    revision: int = 1
    unavailable: Callable[[], str] = _here
    needs: Mapping[str, Callable[[], str]] = field(default_factory=dict)

    def missing(self, family: str) -> str:
        """Why it cannot be run here on a family of problems, or ""."""
        return self.unavailable() or self.needs.get(family, _here)()


@dataclass(frozen=True)
class Stepping:
    """A step by a rule, with the optimizer whose rates a schedule may turn."""

    rule: Callable[[Batch], Tensor]
    optimizer: torch.optim.Optimizer

    def __call__(self, batch: Batch) -> Tensor:
        return self.rule(batch)


def stepping(optimizer: torch.optim.Optimizer, times: int = 1) -> Stepping:
    """Backprop and one step of an optimizer, `times` on each batch; the loss before the first."""

    def once(batch: Batch) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = batch()
        loss.backward()
        optimizer.step()
        return loss.detach()

    def rule(batch: Batch) -> Tensor:
        first = once(batch)
        for _ in range(times - 1):
            once(batch)
        return first

    return Stepping(rule, optimizer)
