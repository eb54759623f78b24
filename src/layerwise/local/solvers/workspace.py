"""Scratch memory that local steps use again and again."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["Workspace"]

_MOST_VIEWS = 256


class Workspace:
    """Scratch memory for layers solved one after another: a flat buffer per name, grown as needed; and constants."""

    def __init__(self) -> None:
        self._flat: dict[Any, Tensor] = {}
        self._shaped: dict[Any, Tensor] = {}  # cached views of the buffers, and constants

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies are empty."""
        return Workspace, ()

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised tensor of a shape, with the type and device of `like`."""
        key = (name, shape, like.dtype, like.device)
        found = self._shaped.get(key)
        if found is None:
            place, size = (name, like.dtype, like.device), math.prod(shape)
            flat = self._flat.get(place)
            if flat is None or flat.numel() < size:
                flat = self._flat[place] = torch.empty(size, dtype=like.dtype, device=like.device)
                self._shaped.clear()  # views keep the old buffer alive
            found = self._keep(key, flat[:size].view(shape))
        return found

    def constant(self, value: float, size: int, like: Tensor) -> Tensor:
        """A read-only vector of one number."""
        key = (value, size, like.dtype, like.device)
        found = self._shaped.get(key)
        return self._keep(key, like.new_full((size,), value)) if found is None else found

    def _keep(self, key: Any, made: Tensor) -> Tensor:
        if len(self._shaped) >= _MOST_VIEWS:
            self._shaped.clear()
        self._shaped[key] = made
        return made
