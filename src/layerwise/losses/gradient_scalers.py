"""Gradient scalers: by what `torch.amp.GradScaler` multiplied a loss, and what it took out of gradients again."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.autograd.graph import Node

__all__ = ["SCALER_CALLS", "ScalerCalls"]

_UNSCALE = torch._amp_foreach_non_finite_check_and_unscale_
SCALER_CALLS = frozenset((Tensor.mul, _UNSCALE))


class ScalerCalls:
    """What gradient scalers did inside a context.

    factors: what each scaled loss was multiplied by, by the node of the product.
    """

    def __init__(self) -> None:
        self.factors: dict[Node, Tensor] = {}
        self._unscaled: list[tuple[Tensor, Tensor]] = []

    def note(self, func: Any, args: Any, out: Any) -> None:
        """Note a call of `SCALER_CALLS`, where a scaler made it. out: its result."""
        if func is _UNSCALE:
            self._unscaled += [(g, args[2]) for g in args[0]]
            return
        factor = args[1] if len(args) == 2 else None
        if isinstance(factor, Tensor) and not factor.dim() and not factor.requires_grad and _called_by_a_scaler():
            node = out.grad_fn
            if node is not None:
                self.factors[node] = factor.detach().clone()  # the scaler updates its own in place

    def taken_out(self, grad: Tensor) -> float:
        """What a scaler has multiplied a gradient by; 1 where it has not."""
        found = 1.0
        for g, factor in self._unscaled:
            if g is grad or (grad.is_sparse and g.data_ptr() == grad._values().data_ptr()):
                found *= float(factor)
        return found


def _called_by_a_scaler() -> bool:
    """Whether `GradScaler.scale` made the call that a mode handles now."""
    frame = sys._getframe(2)
    for _ in range(12):  # modes of others lie between
        if frame is None or isinstance(frame.f_locals.get("self"), GradScaler):
            break
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None and frame.f_code.co_name in ("scale", "apply_scale")
