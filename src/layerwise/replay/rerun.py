"""The closure of a step once more: its loss after the step, or products with its exact curvature before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from layerwise.replay.state import Buffers, Gradients, RandomState, check_loss
from layerwise.tape.tape import Tape
from layerwise.tape.uses import named_parameters_of

__all__ = ["Rerun"]


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
