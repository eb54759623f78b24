"""Modes of torch functions, which may be left in another order than they were entered in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from layerwise.losses.gradient_scalers import SCALER_CALLS, ScalerCalls, factor_in
from layerwise.tape.calls import BACKWARD
from layerwise.tape.pull import backward_arguments

__all__ = ["PassWatch", "WithoutScalers", "active", "end_after", "leave"]


def active() -> int:
    """The number of active modes."""
    return len(_get_current_function_mode_stack())


def end_after(count: int) -> None:
    """End all but the first active modes: those whose `__exit__` an interrupt cut short, or left out."""
    for mode in reversed(_get_current_function_mode_stack()[count:]):
        mode.__exit__(None, None, None)


def leave(mode: TorchFunctionMode) -> None:
    """End a mode, and leave those that were entered after it; nothing is done where it is not active."""
    after: list[TorchFunctionMode] = []
    if any(other is mode for other in _get_current_function_mode_stack()):
        while (last := _pop_mode()) is not mode:
            after.append(last)
    for other in reversed(after):
        _push_mode(other)


class PassWatch(TorchFunctionMode):
    """Notes the backward passes and the calls of gradient scalers inside the context, and records nothing else.

    on_backward: called as `on_backward(total, weight, run)` instead of a backward pass from a tensor, times its weights
        or None; it must call `run()`.
    """

    def __init__(self, on_backward: Callable[[Tensor, Tensor | None, Callable[[], Any]], Any]) -> None:
        super().__init__()
        self.scaler_calls = ScalerCalls()
        self._on_backward = on_backward

    def __torch_function__(self, func: Any, types: Iterable[Any], args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in BACKWARD:
            return self._on_backward(*backward_arguments(func, args, kwargs), lambda: func(*args, **kwargs))
        out = func(*args, **kwargs)
        if func in SCALER_CALLS:
            self.scaler_calls.note(func, args, out)
        return out

    def __exit__(self, *exc: Any) -> None:
        leave(self)


class WithoutScalers(TorchFunctionMode):
    """Leaves out the factors of gradient scalers: inside the context `scaler.scale(loss)` is the loss.

    For runs of a closure of which no gradient reaches `.grad`, so that nobody takes the factor out again.
    """

    def __torch_function__(self, func: Any, types: Iterable[Any], args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if factor_in(func, args) is not None else func(*args, **(kwargs or {}))

    def __exit__(self, *exc: Any) -> None:
        leave(self)
