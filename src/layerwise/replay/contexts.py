"""Contexts made by generators, which may be kept and entered again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ContextDecorator, contextmanager
from functools import partial, wraps
from typing import Any, Generic, ParamSpec, TypeVar

__all__ = ["EnteredAnew", "entered_anew"]

P = ParamSpec("P")
T = TypeVar("T")


class EnteredAnew(ContextDecorator, Generic[T]):
    """A context that begins anew each time it is entered, as `torch.no_grad()` does.

    make: gives the context of one time.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[T]]) -> None:
        self._make = make
        self._open: list[AbstractContextManager[T]] = []

    def __enter__(self) -> T:
        context = self._make()
        value = context.__enter__()
        self._open.append(context)
        return value

    def __exit__(self, *exc: Any) -> bool | None:
        return self._open.pop().__exit__(*exc)


def entered_anew(function: Callable[P, Iterator[T]]) -> Callable[P, EnteredAnew[T]]:
    """As `contextlib.contextmanager`, whose contexts can be entered once."""
    made = contextmanager(function)

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> EnteredAnew[T]:
        return EnteredAnew(partial(made, *args, **kwargs))

    return called
