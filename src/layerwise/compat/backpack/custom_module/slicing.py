"""Slices as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["Slicing"]


class Slicing(nn.Module):
    """`x[slice_info]`."""

    def __init__(self, slice_info: Any) -> None:
        super().__init__()
        self.slice_info = slice_info

    def forward(self, input: Tensor) -> Tensor:
        """The slice."""
        return input[self.slice_info]
