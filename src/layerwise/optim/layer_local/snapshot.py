"""Snapshot of parameters and optimizer state before a step: restores them, or writes old − new into `.grad`."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from layerwise.tensors import all_finite, is_finite

__all__ = ["Backups", "Snapshot"]

Backups = dict[tuple[int, str], Tensor]
"""Memory of the copies, kept from step to step, by the parameter's identity and the key of its state."""


# Means of gradients, which the parameter has just been moved by: one that is not finite shows there, too.
_IN_PARAMETER = frozenset(("exp_avg", "momentum_buffer", "momentum"))


class Snapshot:
    """Copies of named parameters and of their optimizer state.

    replaced: parameters whose state is never written in place; it is not copied. backups: memory to copy into.
    """

    def __init__(
        self,
        params: Iterable[tuple[str, Tensor]],
        state: dict[Any, Any],
        replaced: Collection[str] = (),
        backups: Backups | None = None,
    ) -> None:
        self._params, self._state = list(params), state
        self._before: dict[Any, dict[str, Any]] = {}
        self._copied: list[tuple[Tensor, Tensor]] = []
        self._values: list[Tensor] = []
        backups = {} if backups is None else backups
        with torch.no_grad():
            for name, p in self._params:
                self._values.append(self._copy(p, backups, (id(p), "")))
                if p in state:
                    own = dict(state[p])
                    self._before[p] = own
                    for key, value in own.items() if name not in replaced else ():
                        if isinstance(value, Tensor):
                            self._copy(value, backups, (id(p), key))
                        elif not isinstance(value, int | float | None):
                            own[key] = copy.deepcopy(value)
            if self._copied:
                torch._foreach_copy_([to for _, to in self._copied], [t.detach() for t, _ in self._copied])

    def _copy(self, t: Tensor, backups: Backups, key: tuple[int, str]) -> Tensor:
        """The tensor that will hold a copy."""
        to = backups.get(key)
        if to is None or to.dtype is not t.dtype or to.shape != t.shape or to.device != t.device:
            to = backups[key] = torch.empty_like(t.detach())
        self._copied.append((t, to))
        return to

    def spoiled(self) -> str | None:
        """The first parameter with NaN or infinity in its value or state, or None."""
        held = [
            (name, [p, *(v for key, v in self._state.get(p, {}).items()
                         if key not in _IN_PARAMETER and isinstance(v, Tensor) and v.dim())])
            for name, p in self._params
        ]  # fmt: skip
        if all_finite([t for _, tensors in held for t in tensors]):
            return None
        bad = (name for name, tensors in held if not all(is_finite(t) for t in tensors if t.is_floating_point()))
        name = next(bad, None)
        return None if name is None else f"the solution of {name}'s local problem"

    @torch.no_grad()
    def put_back(self) -> None:
        """Restore parameters and state."""
        for t, value in self._copied:
            t.detach().copy_(value)
        for _, p in self._params:
            self._state.pop(p, None)
            if p in self._before:
                self._state[p] = self._before[p]

    @torch.no_grad()
    def to_gradients(self, factor: float = 1.0) -> None:
        """Restore the parameters, and write the movement `old − new`, times a factor, into their `.grad`."""
        params = [p.detach() for _, p in self._params]
        moved = [value - p for p, value in zip(params, self._values, strict=True)]
        if params:
            torch._foreach_copy_(params, self._values)
        for (_, p), grad in zip(self._params, moved, strict=True):
            p.grad = grad if factor == 1 else grad * factor
