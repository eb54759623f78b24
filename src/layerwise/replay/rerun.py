"""The closure of a step once more, as it ran: with codes, for inputs after a step, for its loss or its curvature."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Self

import torch
from torch import Tensor, nn

from layerwise.replay.state import RunState, check_loss
from layerwise.tape.tape import Tape
from layerwise.tape.uses import named_parameters_of

__all__ = ["Rerun"]


class Rerun:
    """Runs a closure as it ran the first time, from the same random numbers and buffers, and leaves no trace.

    Made before the first run; entered after it. At the exit generators and buffers are as at the entry. A
    backward pass that the closure starts is left out by the tapes that record it. gradients: whether `.grad` is empty
    inside, and as at the entry afterwards.
    """

    def __init__(
        self, model: nn.Module | Mapping[str, Tensor], closure: Callable[..., Tensor], gradients: bool = True
    ) -> None:
        self.model, self._closure, self._gradients = model, closure, gradients
        self._start = RunState(model)

    def __enter__(self) -> Self:
        self._now = RunState(self.model, self._gradients)
        if self._gradients:
            for p in named_parameters_of(self.model).values():
                p.grad = None
        return self

    def __exit__(self, *exc: object) -> None:
        self._now.put_back()

    def rewind(self) -> None:
        """Bring generators and buffers to where they were before the first run."""
        self._start.put_back()

    def closure(self) -> Tensor:
        """The closure from where the first run began."""
        self.rewind()
        return self.run()

    def run(self, *given: Tensor) -> Tensor:
        """The closure from where everything stands."""
        return self._closure(*given)

    def loss(self) -> float:
        """The loss at the present parameters. Graphs of earlier runs may no longer be differentiated."""
        with torch.enable_grad(), Tape(self.model, lambda *backward: None):
            loss = self.closure()
        check_loss(loss)
        return float(loss.detach())
