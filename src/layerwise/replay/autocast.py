"""Which autocast is on, and how to run something under another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch

__all__ = ["NO_AUTOCAST", "Autocast", "active_autocast", "autocast_as", "only_inside", "under"]

P = ParamSpec("P")
R = TypeVar("R")
Autocast = tuple[tuple[str, torch.dtype], ...]
NO_AUTOCAST: Autocast = ()


@cache
def _kinds() -> tuple[str, ...]:
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


def active_autocast() -> Autocast:
    """The kinds of devices whose autocast is on, with its type."""
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in _kinds() if torch.is_autocast_enabled(kind))


@contextmanager
def autocast_as(wanted: Autocast) -> Iterator[None]:
    """Autocast on for these kinds of devices alone, as `active_autocast` gave them."""
    now = dict(active_autocast())
    with ExitStack() as stack:
        for kind, dtype in wanted:
            if now.pop(kind, None) != dtype:
                stack.enter_context(torch.autocast(kind, dtype))
        for kind in now:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def under(autocast: Autocast, function: Callable[P, R]) -> Callable[P, R]:
    """A function that runs under the given autocast, whatever is on where it is called."""

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        with autocast_as(autocast):
            return function(*args, **kwargs)

    return called


def only_inside(function: Any, run: Callable[[Any], R]) -> R:
    """`run(function)` without autocast, where the function, if it is one, has that of the caller."""
    if not (autocast := active_autocast()):
        return run(function)
    with autocast_as(NO_AUTOCAST):
        return run(under(autocast, function) if callable(function) else function)
