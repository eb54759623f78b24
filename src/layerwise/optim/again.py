"""The closure of a step once more: its loss after the step, or products with its exact curvature before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from layerwise.operators.curvature import GGN
from layerwise.program import Buffers, Gradients, RandomState
from layerwise.replay import check_loss
from layerwise.tape import Tape
from layerwise.uses import named_parameters_of

__all__ = ["ExactGGN", "Rerun"]


class Rerun:
    """Runs a closure as it ran the first time, from the same random numbers and buffers, and leaves no trace.

    Made before the first run; entered after it. At the exit generators, buffers and `.grad` are as at the entry. A
    backward pass that the closure starts is left out.
    """

    def __init__(self, model: nn.Module | Mapping[str, Tensor], closure: Callable[[], Tensor]) -> None:
        self.model, self._closure = model, closure
        self._devices = {p.device for p in named_parameters_of(model).values()}
        self._start = self._states()

    def _states(self) -> tuple[Buffers, RandomState]:
        return Buffers(self.model), RandomState(self._devices)

    def __enter__(self) -> Self:
        parameters = named_parameters_of(self.model).values()
        self._now = (*self._states(), Gradients(parameters, values=False))
        for p in parameters:
            p.grad = None
        return self

    def __exit__(self, *exc: Any) -> None:
        for state in self._now:
            state.put_back()

    def closure(self) -> Tensor:
        """The closure once more."""
        for state in self._start:
            state.put_back()
        return self._closure()

    def loss(self) -> float:
        """The loss at the present parameters. Graphs of earlier runs may no longer be differentiated."""
        with torch.enable_grad(), Tape(self.model, lambda *backward: None):
            loss = self.closure()
        check_loss(loss)
        return float(loss.detach())


class ExactGGN(GGN):
    """`GGN`, of a closure that may call backward, which is left out."""

    def __init__(self, rerun: Rerun) -> None:
        super().__init__(rerun.model, rerun.closure)

    def _refuse_backward(self, *_: Any) -> Any:
        return None

    @property
    def _asked(self) -> str:
        return "the quadratic model of the step"

    def times(self, direction: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The product with one direction, zero for the parameters that it does not name."""
        full = {n: direction[n] if n in direction else torch.zeros_like(p) for n, p in self._parameters.items()}
        found = self @ full
        return {name: found[name] for name in direction}
