"""What the zoo's models are put together from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["Apply", "Mean", "leaf"]


class Apply(nn.Module):
    """A module made of named parts and a function of it and the input."""

    def __init__(self, forward: Callable[..., object], **parts: nn.Module | nn.Parameter | Tensor):
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.function = forward

    def forward(self, *x: Tensor, **kw: object) -> object:
        return self.function(self, *x, **kw)


class Mean(nn.Module):
    """The mean over some axes."""

    def __init__(self, *axes: int):
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.axes)


def leaf(*shape: int) -> nn.Parameter:
    """A bare parameter, normal with deviation 1/2."""
    return nn.Parameter(0.5 * torch.randn(shape))
