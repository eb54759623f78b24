"""Parallel branches and their sum as modules."""

from __future__ import annotations

from collections import OrderedDict
from functools import reduce
from operator import add
from typing import Any

from torch import Tensor, nn

from layerwise.errors import BadInput

__all__ = ["ActiveIdentity", "Parallel", "SumModule"]


class Branch(nn.ModuleDict):
    """Apply several modules, named as in `nn.Sequential`, to one input; returns the tuple of outputs."""

    def __init__(self, *args: Any) -> None:
        named = args[0] if len(args) == 1 and isinstance(args[0], OrderedDict) else None
        super().__init__(named or {str(i): module for i, module in enumerate(args)})

    def forward(self, input: Tensor) -> tuple[Any, ...]:
        return tuple(module(input) for module in self.values())


class SumModule(nn.Module):
    """The sum of its inputs, which must have one shape."""

    def forward(self, *input: Tensor) -> Tensor:
        """`x_1 + ... + x_k`. Raises BadInput for shapes that differ."""
        shapes = {tuple(x.shape) for x in input}
        if len(shapes) != 1:
            raise BadInput(f"SumModule takes tensors of one shape, got {[tuple(x.shape) for x in input]}")
        return reduce(add, input)


class Parallel(nn.Module):
    """Apply several modules to one input, and merge their outputs by `merge_module`, by default `SumModule()`.

    args: the modules, or one OrderedDict of them. They are children of `.branch`, named as in `nn.Sequential`.
    """

    def __init__(self, *args: Any, merge_module: nn.Module | None = None) -> None:
        super().__init__()
        self.branch = Branch(*args)
        self.merge = SumModule() if merge_module is None else merge_module

    def forward(self, input: Tensor) -> Tensor:
        """The merged outputs."""
        return self.merge(*self.branch(input))


class ActiveIdentity(nn.Module):
    """The identity, under its name in older BackPACK releases."""

    def forward(self, input: Tensor) -> Tensor:
        """The input itself."""
        return input
