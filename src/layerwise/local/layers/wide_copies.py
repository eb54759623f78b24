"""Parameters in half precision are fitted as float32 copies, whose optimizer state is kept in float32, too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from layerwise.local.layers.layer import Layer
from layerwise.local.layers.record import Recorded
from layerwise.tensors import HALF, wide_type, without_grad

__all__ = ["WideCopies", "keep_digits"]

State = MutableMapping[Tensor, dict[str, Any]]


class WideCopies:
    """float32 copies of parameters in half precision; their memory is kept from step to step."""

    def __init__(self) -> None:
        self._kept: dict[Tensor, Tensor] = {}

    @without_grad
    def of(self, run: Recorded, state: Any) -> tuple[Recorded, Any]:
        """The run on copies of its parameters in half precision, as they are now, and an optimizer's state by them.

        Both are themselves where there is none.
        """
        params = run.tape.parameters
        if {p.dtype for p in params.values()}.isdisjoint(HALF):
            return run, state
        names = [name for layer in run.layers for name in layer.names] + list(run.gradients)
        found = {name: self._copy(params[name]) for name in names if params[name].dtype in HALF}
        if found:
            torch._foreach_copy_(list(found.values()), [params[name].detach() for name in found])
        run = replace(run, layers=[_on_copies(layer, found) for layer in run.layers], copies=found)
        return run, _StateOfCopies(state, {copy: params[name] for name, copy in found.items()})

    def _copy(self, p: Tensor) -> Tensor:
        kept = self._kept.get(p)
        if kept is None or (kept.shape, kept.stride(), kept.device) != (p.shape, p.stride(), p.device):
            kept = self._kept[p] = torch.empty_like(p.detach(), dtype=wide_type(p.dtype))
        return kept

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies are empty."""
        return WideCopies, ()


def _on_copies(layer: Layer, copies: Mapping[str, Tensor]) -> Layer:
    found = copies.get(layer.name)
    if found is None:
        return layer
    return replace(layer, parameter=found, others=tuple(_on_copies(part, copies) for part in layer.others))


class _StateOfCopies(MutableMapping[Tensor, dict[str, Any]]):
    """An optimizer's state by parameter, in which a copy stands for its parameter. of: the parameter of each copy."""

    def __init__(self, state: State, of: Mapping[Tensor, Tensor]) -> None:
        self._state, self._of = state, of

    def __getitem__(self, p: Tensor) -> dict[str, Any]:
        return self._state[self._of.get(p, p)]

    def __setitem__(self, p: Tensor, own: dict[str, Any]) -> None:
        self._state[self._of.get(p, p)] = own

    def __delitem__(self, p: Tensor) -> None:
        del self._state[self._of.get(p, p)]

    def __contains__(self, p: object) -> bool:
        return self._of.get(p, p) in self._state  # type: ignore[call-overload]

    def get(self, p: Tensor, default: Any = None) -> Any:
        """As of a dict; the state itself would make what is missing."""
        return self._state.get(self._of.get(p, p), default)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def keep_digits(p: Tensor, own: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Put the saved state of a parameter in half precision in place of what torch made of it, in the parameter's type.

    That of earlier releases, in half precision, becomes float32.
    """
    for key, t in saved.items() if p.dtype in HALF else ():
        if isinstance(t, Tensor) and t.dim() and t.is_floating_point():
            own[key] = t.detach().to(p.device, wide_type(p.dtype), copy=True)
