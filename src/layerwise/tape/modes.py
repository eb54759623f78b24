"""Modes of torch functions that may be left in another order than they were entered in."""

from __future__ import annotations

from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

__all__ = ["active", "end_after", "leave"]


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
