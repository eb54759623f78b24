"""The `watch()` contexts of a trainer's optimizers, opened and closed by its callbacks."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from layerwise.errors import BadInput

__all__ = ["TrainerContexts"]


class TrainerContexts:
    """Enters and leaves `opt.watch()` of those of a trainer's optimizers that have it."""

    def __init__(self) -> None:
        self._stack: ExitStack | None = None

    def open(self, optimizers: Iterable[Any]) -> None:
        """Enter, unless that is done. Raises BadInput where none of the optimizers can be watched."""
        if self._stack is not None:
            return
        found = [inner for inner in map(_inner, optimizers) if hasattr(inner, "watch")]
        if not found:
            raise BadInput("asked to watch the steps of a trainer that has none of the optimizers of lw.optim")
        with ExitStack() as stack:
            for optimizer in found:
                stack.enter_context(optimizer.watch())
            self._stack = stack.pop_all()

    def close(self, error: BaseException | None = None) -> None:
        """Leave, where it is entered; after an error without what was recorded."""
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.__exit__(None if error is None else type(error), error, None)


def _inner(optimizer: Any) -> Any:
    """The optimizer that a trainer has wrapped."""
    while not hasattr(optimizer, "watch") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
