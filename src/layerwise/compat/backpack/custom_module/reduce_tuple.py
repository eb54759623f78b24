"""Selection of one output of a module that returns several, as a module."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["ReduceTuple"]


class ReduceTuple(nn.Module):
    """Element `index` of a tuple, such as the output of an RNN without its state."""

    def __init__(self, index: int = 0) -> None:
        super().__init__()
        self.index = index

    def forward(self, input: tuple[Any, ...]) -> Any:
        """The element."""
        return input[self.index]
