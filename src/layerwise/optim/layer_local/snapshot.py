"""Snapshot of parameters and optimizer state before a step: restores them, or writes old − new into `.grad`."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from layerwise.tensors import is_finite

__all__ = ["Snapshot"]


class Snapshot:
    """Copies of named parameters and of their optimizer state.

    replaced: parameters whose state is never written in place and checked by its solver; it is not copied.
    """

    def __init__(
        self, params: Iterable[tuple[str, Tensor]], state: dict[Any, Any], replaced: Collection[str] = ()
    ) -> None:
        self._params = [(name, p, p.detach().clone()) for name, p in params]
        self._state, self._replaced = state, replaced
        self._before = {
            p: dict(state[p]) if name in replaced else copy.deepcopy(dict(state[p]))
            for name, p, _ in self._params
            if p in state
        }

    def spoiled(self) -> str | None:
        """The first parameter with NaN or infinity in its value or state, or None."""
        for name, p, _ in self._params:
            state = {} if name in self._replaced else self._state.get(p, {})
            kept = [v for v in state.values() if isinstance(v, Tensor) and v.is_floating_point()]
            if not (is_finite(p) and all(is_finite(v) for v in kept)):
                return f"the solution of {name}'s local problem"
        return None

    @torch.no_grad()
    def put_back(self) -> None:
        """Restore parameters and state."""
        for _, p, value in self._params:
            p.copy_(value)
            self._state.pop(p, None)
            if p in self._before:
                self._state[p] = self._before[p]

    @torch.no_grad()
    def to_gradients(self) -> None:
        """Restore the parameters, and write the movement `old − new` into their `.grad`."""
        for _, p, value in self._params:
            p.grad = value - p
            p.copy_(value)
