"""Functions without a useful derivative: gradient zero, or a surrogate gradient inside `AltMin` and `crossing`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary

from layerwise.errors import BadInput
from layerwise.nn.rules import Rule, StraightThrough

__all__ = ["Hard", "Sign", "crossed", "crossing", "hard", "sign"]


def sign(z: Tensor) -> Tensor:
    """±1, and −1 at 0."""
    return torch.where(z > 0, torch.ones_like(z), -torch.ones_like(z))


class _Hard(torch.autograd.Function):
    """The function, with a surrogate gradient `rule` as its backward; without a rule its backward is zero."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, function: Callable[[Tensor], Tensor], rule: Rule | None) -> Tensor:
        with torch.no_grad():
            h = function(z)
        if not isinstance(h, Tensor) or h.shape != z.shape or h.dtype != z.dtype:
            seen = f"{h.dtype} {tuple(h.shape)}" if isinstance(h, Tensor) else type(h).__name__
            raise BadInput(f"{function!r} made {seen} of {z.dtype} {tuple(z.shape)}; it must keep shape and type")
        h = h.clone() if h.data_ptr() == z.data_ptr() else h
        ctx.rule = rule
        if rule is not None:
            ctx.save_for_backward(z, h)
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,) = grads
        return (torch.zeros_like(g) if ctx.rule is None else ctx.rule(*ctx.saved_tensors, g)), None, None


def hard(z: Tensor, function: Callable[[Tensor], Tensor] = sign, rule: Rule = StraightThrough()) -> Tensor:  # noqa: B008
    """Apply an elementwise function without a derivative; its gradient is zero, unless surrogate gradients are in use.

    function: of a tensor, keeps shape and dtype. rule: the surrogate gradient, see `Hard`. Raises BadInput for a
    function that changes shape or dtype.
    """
    if has_torch_function_unary(z):  # also true under function modes, some of which call `crossed`
        return handle_torch_function(hard, (z,), z, function, rule)
    return _Hard.apply(z, function, None)


def crossed(z: Tensor, function: Callable[[Tensor], Tensor] = sign, rule: Rule = StraightThrough()) -> Tensor:  # noqa: B008
    """`hard`, with the surrogate gradient `rule` as its backward."""
    if has_torch_function_unary(z):
        return handle_torch_function(crossed, (z,), z, function, rule)
    return _Hard.apply(z, function, rule)


class crossing(TorchFunctionMode):
    """Context in which every `Hard` function backpropagates its surrogate gradient (straight-through estimation).

    This gives the usual baseline; `AltMin` uses surrogate gradients by itself and does not need it.
    """

    _inside = 0

    @property
    def ended(self) -> bool:
        """Whether it was left, so that it does nothing, even where an interrupt kept it among torch's modes."""
        return not self._inside

    def __enter__(self) -> Self:
        super().__enter__()
        self._inside += 1  # at last, for after an interrupt `with` does not call `__exit__`
        return self

    def __exit__(self, *exc: Any) -> None:
        self._inside -= 1
        super().__exit__(*exc)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (crossed if func is hard and not self.ended else func)(*args, **(kwargs or {}))


class Hard(nn.Module):
    """An elementwise activation without a useful derivative, and its surrogate gradient.

    Plain backpropagation gets its true derivative, zero. `AltMin` updates the code before it by the surrogate gradient,
    only within the block between two codes.

        Quantize = lambda: lw.nn.Hard(torch.round, lw.nn.StraightThrough(4.0))

    function: of a tensor, keeps shape and dtype. rule: `StraightThrough` (default), `Smooth`, `Hinge`, or a function
    `(z, h, g) -> dz` of input, output and the output's cotangent. Raises BadInput for what is no function.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], rule: Rule | None = None) -> None:
        super().__init__()
        rule = StraightThrough() if rule is None else rule
        if not callable(function) or not callable(rule) or isinstance(rule, type):
            raise BadInput(f"Hard needs a function of a tensor and a rule (z, h, g) -> dz; got {function!r}, {rule!r}")
        self.function, self.rule = function, rule

    def forward(self, z: Tensor) -> Tensor:
        """The function of z."""
        return hard(z, self.function, self.rule)

    def extra_repr(self) -> str:
        """For printing."""
        return f"{getattr(self.function, '__name__', self.function)}, {self.rule}"


class Sign(Hard):
    """±1, with sign(0) = −1: neurons that fire or do not. rule: surrogate gradient, as for `Hard`."""

    def __init__(self, rule: Rule | None = None) -> None:
        super().__init__(sign, rule)
