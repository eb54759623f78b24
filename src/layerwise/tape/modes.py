"""Modes of torch functions, which may be left in another order than they were entered in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor
from torch._C import _pop_torch_function_stack, _push_on_torch_function_stack
from torch._C._dynamo.guards import set_is_in_mode_without_ignore_compile_internals
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils import _python_dispatch as dispatch

from layerwise.losses.gradient_scalers import SCALER_CALLS, ScalerCalls, factor_in
from layerwise.tape.calls import BACKWARD
from layerwise.tape.pull import backward_arguments

__all__ = [
    "LeavableMode",
    "PassWatch",
    "WithoutScalers",
    "active",
    "dispatch_flags_kept",
    "end_after",
    "end_dispatch_modes",
]

_FLAGS = (
    "_is_in_torch_dispatch_mode",
    "_is_in_non_infra_torch_dispatch_mode",
    "_is_in_any_mode_without_ignore_compile_internals",
)


def active() -> int:
    """The number of active modes."""
    return len(_get_current_function_mode_stack())


def end_after(count: int) -> None:
    """End all but the first active modes: those whose `__exit__` an interrupt cut short, or left out."""
    for mode in reversed(_get_current_function_mode_stack()[count:]):
        mode.__exit__(None, None, None)


def end_dispatch_modes() -> None:
    """Take the modes of torch's dispatcher that have ended, which an interrupt left there, from its stack."""
    modes = dispatch._get_current_dispatch_mode_stack()
    living = [mode for mode in modes if not getattr(mode, "ended", False)]
    if len(living) < len(modes):
        for _ in modes:
            dispatch._pop_mode()
        for mode in living:
            dispatch._push_mode(mode)


@contextmanager
def dispatch_flags_kept() -> Iterator[None]:
    """Leave what torch notes of active modes as it is, whatever interrupts them: else it compiles nothing any more."""
    kept = {name: getattr(dispatch, name) for name in _FLAGS}
    try:
        yield
    finally:
        vars(dispatch).update(kept)
        set_is_in_mode_without_ignore_compile_internals(kept[_FLAGS[-1]])


def _become(wanted: Sequence[TorchFunctionMode]) -> None:
    """Make these the active modes."""
    now = _get_current_function_mode_stack()
    same = 0
    while same < min(len(now), len(wanted)) and now[same] is wanted[same]:
        same += 1
    for _ in now[same:]:
        _pop_torch_function_stack()
    for mode in wanted[same:]:
        _push_on_torch_function_stack(mode)


class LeavableMode(TorchFunctionMode):
    """A mode that may be left before those that were entered after it.

    torch takes a mode from its stack while that handles a function, and where an interrupt arrives then it puts it back
    when the error is forgotten, long after `__exit__`. Such a mode does nothing, and is taken away as soon as another
    one begins or ends.
    ended: whether the mode is not entered, so that it must do nothing. An interrupt also leaves gradients as they were
    when it was: it may have cut short what switches them on again.
    """

    ended = True
    _grad_enabled = True

    def __enter__(self) -> Self:
        try:
            self._grad_enabled = torch.is_grad_enabled()
            self.ended = False
            self._stand(True)
            return self
        except BaseException as error:  # an interrupt, after which `with` does not call `__exit__`
            LeavableMode.__exit__(self, type(error), error, error.__traceback__)
            raise

    def __exit__(self, kind: Any = None, *exc: Any) -> None:
        if not (self.ended or kind is None or issubclass(kind, Exception)):
            torch._C._set_grad_enabled(self._grad_enabled)
        self.ended = True
        self._stand(False)

    def _stand(self, last: bool) -> None:
        """Take this mode, and those that have ended, from the stacks; last: and put it on top."""
        if torch._C._len_torch_dispatch_stack():
            end_dispatch_modes()
        others = [m for m in _get_current_function_mode_stack() if m is not self and not getattr(m, "ended", False)]
        wanted = [*others, self] if last else others
        try:
            _become(wanted)
        except BaseException:  # an interrupt
            _become(wanted)
            raise


class PassWatch(LeavableMode):
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
        if func in BACKWARD and not self.ended:
            return self._on_backward(*backward_arguments(func, args, kwargs), lambda: func(*args, **kwargs))
        out = func(*args, **kwargs)
        if func in SCALER_CALLS:
            self.scaler_calls.note(func, args, out)
        return out


class WithoutScalers(LeavableMode):
    """Leaves out the factors of gradient scalers: inside the context `scaler.scale(loss)` is the loss.

    For runs of a closure of which no gradient reaches `.grad`, so that nobody takes the factor out again.
    """

    def __torch_function__(self, func: Any, types: Iterable[Any], args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if not self.ended and factor_in(func, args) is not None else func(*args, **(kwargs or {}))
