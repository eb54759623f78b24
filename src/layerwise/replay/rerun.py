"""Runs a step's closure again from the same random state: with codes, or for the loss or curvature after a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Self

import torch
from torch import Tensor, nn

from layerwise.replay.state import RunState, check_loss
from layerwise.tape.modes import WithoutScalers
from layerwise.tape.tape import Tape
from layerwise.tape.uses import named_parameters_of

__all__ = ["Rerun"]


class Rerun:
    """Runs a closure again with the random numbers and buffers of its first run, and restores all state at exit.

    Construct it before the first run, and enter it after that run. Leaving it restores generators and buffers to their
    state at entry. The tapes that record the closure skip its backward passes. gradients: whether `.grad` is None
    inside and restored at exit.
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
        """Restore generators and buffers to their state before the first run."""
        self._start.put_back()

    def closure(self) -> Tensor:
        """Run the closure from the state before the first run."""
        self.rewind()
        return self.run()

    def run(self, *given: Tensor) -> Tensor:
        """Run the closure from the present state; gives its loss without a gradient scaler's factor."""
        with WithoutScalers():
            return self._closure(*given)

    def loss(self) -> float:
        """The loss at the present parameters. Graphs of earlier runs can no longer be backpropagated through."""
        with torch.enable_grad(), Tape(self.model, lambda *backward: None):
            loss = self.closure()
        check_loss(loss)
        return float(loss.detach())
