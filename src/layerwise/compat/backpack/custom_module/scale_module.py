"""Multiplication by a constant as a module."""

from __future__ import annotations

from torch import Tensor, nn

from layerwise.errors import BadInput

__all__ = ["ScaleModule"]


class ScaleModule(nn.Module):
    """`weight * x` for a constant float."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        if not isinstance(weight, float):
            raise BadInput(f"ScaleModule takes a float, got {weight!r}")
        self.weight = weight

    def forward(self, input: Tensor) -> Tensor:
        """The scaled input."""
        return input * self.weight
