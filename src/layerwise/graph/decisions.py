"""Decisions by numbers that an accelerator holds: as at the last run of the same layout, and compared once at the end.

What is measured of a graph (whether a map is elementwise, whether second derivatives are symmetric) decides how it goes
on, and to read each flag would wait for the device. Of a layout that was seen before, the answers are known but for
batches that are different in kind; so they are assumed, all flags are read together, and where one is another than
was assumed, everything is run again with each flag read. Nothing remembered changes a result. Where nothing at all is
to be waited for, the flags are read with the first result, which is refused where one is another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["decided", "with_assumed_decisions"]

R = TypeVar("R")


class _Answers:
    """The answers of one run, in the order of the questions. assumed: those of the run before, which are not read."""

    def __init__(self, assumed: tuple[bool, ...] = ()) -> None:
        self._assumed = assumed
        self.unread: list[Tensor] = []
        self.read: list[bool] = []

    def of(self, flag: Tensor) -> bool:
        number = len(self.unread)
        if number < len(self._assumed) and not self.read:
            self.unread.append(flag.detach().reshape(()))
            return self._assumed[number]
        self.read.append(bool(flag))
        return self.read[-1]

    def hold(self) -> bool:
        """Whether what was assumed is so, in one wait for each device."""
        devices: dict[torch.device, list[int]] = {}
        for number, flag in enumerate(self.unread):
            devices.setdefault(flag.device, []).append(number)
        for numbers in devices.values():
            found = torch.stack([self.unread[i] for i in numbers]).tolist()
            if found != [self._assumed[i] for i in numbers]:
                return False
        return True

    @property
    def all(self) -> tuple[bool, ...]:
        return (*self._assumed[: len(self.unread)], *self.read)


_NOW: ContextVar[_Answers | None] = ContextVar("answers", default=None)


def decided(flag: Tensor) -> bool:
    """Whether a flag `[]` holds: read, or on an accelerator under `with_assumed_decisions` as it did before."""
    answers = _NOW.get()
    return bool(flag) if answers is None or flag.device.type == "cpu" else answers.of(flag)


def with_assumed_decisions(
    assumed: tuple[bool, ...] | None, run: Callable[[], R], later: Callable[[Sequence[Tensor], list[bool]], None] | None
) -> tuple[R, tuple[bool, ...]]:
    """The result of a function without side effects, and the answers by which it was made, to be assumed the next time.

    assumed: the answers of its last run with the same layout, if any. The host waits once for all of them; where one is
    another now, the function is run again, and waits for each. later: takes the flags, and what was assumed of them, to
    compare them later; then the host waits only where some was not assumed. None: they are compared now.
    """
    if assumed:
        answers = _Answers(assumed)
        try:
            found = _answered(run, answers)
        except Exception:  # perhaps of a wrong assumption
            if answers.hold():
                raise
        else:
            if later is not None and not answers.read:
                later(answers.unread, list(answers.all))
                return found, answers.all
            if answers.hold():
                return found, answers.all
            del found
    answers = _Answers()
    return _answered(run, answers), answers.all


def _answered(run: Callable[[], R], answers: _Answers) -> R:
    token = _NOW.set(answers)
    try:
        return run()
    finally:
        _NOW.reset(token)
