"""Permutation of axes as a module."""

from __future__ import annotations

from torch import Tensor, nn

from layerwise.errors import BadInput

__all__ = ["Permute"]


class Permute(nn.Module):
    """Permute the axes of a batch; the first axis stays first.

    dims: the new order of the axes; with `init_transpose=True` the two axes to exchange.
    """

    def __init__(self, *dims: int, init_transpose: bool = False) -> None:
        super().__init__()
        if (0 in dims) if init_transpose else (not dims or dims[0] != 0):
            raise BadInput(f"Permute must leave the batch axis 0 where it is, got {dims}")
        self.dims = dims
        self.init_transpose = init_transpose

    def forward(self, input: Tensor) -> Tensor:
        """A view with the new order of axes."""
        return input.transpose(*self.dims) if self.init_transpose else input.permute(self.dims)
