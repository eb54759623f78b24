"""Functions without a derivative: their gradient is zero, and codes pass them by a surrogate gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    """The function, with the rule as its derivative; without a rule, zero: the derivative almost everywhere."""

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
    """An elementwise function without a derivative; its gradient is zero, save where codes cross it.

    function: of a tensor, keeps shape and type. rule: how codes cross it, see `Hard`. Raises BadInput for a function
    that keeps neither.
    """
    if has_torch_function_unary(z):  # modes, too: some answer with `crossed`
        return handle_torch_function(hard, (z,), z, function, rule)
    return _Hard.apply(z, function, None)


def crossed(z: Tensor, function: Callable[[Tensor], Tensor] = sign, rule: Rule = StraightThrough()) -> Tensor:  # noqa: B008
    """`hard`, with the rule in place of a derivative."""
    if has_torch_function_unary(z):
        return handle_torch_function(crossed, (z,), z, function, rule)
    return _Hard.apply(z, function, rule)


class crossing(TorchFunctionMode):
    """Inside, gradients cross every `Hard` function by its rule: backpropagation with straight-through estimators.

    `AltMin` crosses by itself, and needs none of this; it makes the usual baseline.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (crossed if func is hard else func)(*args, **(kwargs or {}))


class Hard(nn.Module):
    """An elementwise activation without a derivative, and the rule by which codes cross it.

    Backpropagation's gradient is zero below it, as the function's own derivative is: nothing is pretended. `AltMin`
    moves the code before it by the rule, within the block between two codes.

        Quantize = lambda: lw.nn.Hard(torch.round, lw.nn.StraightThrough(4.0))

    function: of a tensor, keeps shape and type. rule: `StraightThrough` (default), `Smooth`, `Hinge`, or a function
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
    """±1, with sign(0) = −1: neurons that fire or do not. rule: as for `Hard`."""

    def __init__(self, rule: Rule | None = None) -> None:
        super().__init__(sign, rule)
