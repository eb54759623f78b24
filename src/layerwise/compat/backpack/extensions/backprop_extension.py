"""The base of extensions: a layerwise quantity, and the parameter attribute (field) for its result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import BadInput, Undefined
from layerwise.quantities.base import Quantity

__all__ = ["BackpropExtension", "Subsampled"]


class BackpropExtension:
    """Base of the extensions.

    savefield: the attribute of a parameter that holds its result. subsampling: the indices of the
    samples that a result with a sample axis contains; None: all of them.
    """

    second_order = False  # whether the graph is differentiated twice
    keeps_graph = False  # whether the result needs the graph after the backward pass

    def __init__(self, savefield: str, subsampling: Sequence[int] | None = None) -> None:
        self.savefield = savefield
        self._subsampling = None if subsampling is None else list(subsampling)

    def get_subsampling(self) -> list[int] | None:
        """The indices of the samples in the result, or None for all."""
        return self._subsampling

    def set_module_extension(self, module: Any, extension: Any, overwrite: bool = False) -> None:
        """Raises Undefined: layers need no module extensions here, and a given one would never be called."""
        raise Undefined(
            f"asked to register a rule for {module} in {type(self).__name__}, but quantities are computed from the "
            "torch calls that a module makes, for any module: leave the registration out"
        )

    def quantity(self) -> Quantity:
        """The quantity to observe; its result maps parameter names to fields."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}(savefield={self.savefield!r})"


class Subsampled:
    """Mixin for quantities whose values begin with a sample axis: keeps only some samples."""

    index: list[int] | None = None

    def confined(self, value: Tensor) -> Tensor:
        """`[N, ...]` -> `[len(index), ...]`."""
        if self.index is None:
            return value
        n = len(value)
        if any(not -n <= i < n for i in self.index):
            raise BadInput(f"subsampling asks for the samples {self.index}, but the batch has {n}")
        return value[torch.tensor(self.index, dtype=torch.long, device=value.device)]
