"""Gradient scalers: by what `torch.amp.GradScaler` multiplied a loss, and what it took out of gradients again."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.autograd.graph import Node

__all__ = ["SCALER_CALLS", "GradientsLeft", "ScalerCalls", "factor_in"]

_UNSCALE = torch._amp_foreach_non_finite_check_and_unscale_
_ROUNDED = 1e-2  # relative, of a largest entry that was multiplied in half precision
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
        factor = factor_in(func, args)
        if factor is not None and out.grad_fn is not None:
            self.factors[out.grad_fn] = factor.detach().clone()  # the scaler updates its own in place

    def taken_out(self, grad: Tensor) -> float:
        """What a scaler has multiplied a gradient by; 1 where it has not."""
        found = 1.0
        for factor in self._looks(grad):
            found *= float(factor)
        return found

    def has_looked(self, grad: Tensor) -> bool:
        """Whether a scaler has looked for NaN and infinity in a gradient."""
        return len(self._looks(grad)) > 0

    def _looks(self, grad: Tensor) -> list[Tensor]:
        return [factor for g, factor in self._unscaled
                if g is grad or (grad.is_sparse and g.data_ptr() == grad._values().data_ptr())]  # fmt: skip


class GradientsLeft:
    """The gradients that passes of a scaled loss left in `.grad` of parameters, to tell later what was done to them.

    scale: of the loss. calls: those of scalers so far.
    """

    def __init__(self, params: Iterable[Tensor], scale: float, calls: ScalerCalls) -> None:
        self._params = list(params)
        grads = [p.grad for p in self._params if p.grad is not None]
        self._factor = scale * min(map(calls.taken_out, grads), default=1.0)
        self._looked = any(map(calls.has_looked, grads))
        self._sizes = self._largest()

    def _largest(self) -> Tensor:
        """The largest absolute entry of each gradient; −1 where there is none."""
        grads = [None if p.grad is None else p.grad._values() if p.grad.is_sparse else p.grad for p in self._params]
        there = [g.detach() for g in grads if g is not None]
        norms = torch._foreach_norm(there, float("inf")) if there else ()
        sizes = iter(torch.stack([n.to(norms[0].device) for n in norms]).tolist() if norms else ())  # one wait
        return torch.tensor([-1.0 if g is None else next(sizes) for g in grads], dtype=torch.float64)

    def awaits(self) -> bool:
        """Whether the scaler has still to look for NaN and infinity in these gradients."""
        known = bool((self._sizes > 0).any() or (self._sizes < 0).all())  # zeros do not tell
        return not self._looked and self._factor != 1 and known and self.factor() == self._factor

    def factor(self) -> float | None:
        """The scaler's factor that is still in the gradients; None where something else was written to them, too.

        Read off their values: a scaler that takes its factor out leaves no other mark, not even on `_version`.
        """
        if self._factor == 1:
            return 1.0
        now, then = self._largest(), self._sizes
        if ((now < 0) != (then < 0)).any():
            return None
        ratios = (now / then)[then > 0]
        for found, ratio in ((self._factor, 1.0), (1.0, 1 / self._factor)):
            if bool(((ratios / ratio - 1).abs() < _ROUNDED).all()):
                return found
        return None


def factor_in(func: Any, args: Any) -> Tensor | None:
    """By what a call that a mode handles now multiplies a loss, where a gradient scaler made it; else None."""
    factor = args[1] if func is Tensor.mul and len(args) == 2 else None
    if isinstance(factor, Tensor) and not factor.dim() and not factor.requires_grad and _called_by_a_scaler():
        return factor
    return None


def _called_by_a_scaler() -> bool:
    """Whether `GradScaler.scale` made the call that a mode handles now."""
    frame = sys._getframe(2)
    for _ in range(12):  # modes of others lie between
        if frame is None or isinstance(frame.f_locals.get("self"), GradScaler):
            break
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None and frame.f_code.co_name in ("scale", "apply_scale")
