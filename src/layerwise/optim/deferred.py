"""A step that is judged after it is computed: read at once, or left on the device, where it decides what is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from layerwise.errors import BadInput, NonFinite
from layerwise.replay.state import Buffers
from layerwise.tensors import Verdict, write_where

__all__ = ["Late", "Overshoot", "Skips", "check_on_nonfinite", "completed"]

_CHOICES = ("skip", "raise", "defer")


def check_on_nonfinite(asked: str) -> None:
    """Raise BadInput for a choice of `on_nonfinite` that there is not."""
    if asked not in _CHOICES:
        raise BadInput(f"on_nonfinite must be one of {', '.join(_CHOICES)}; got {asked!r}")


def completed(commit: Callable[[], None]) -> None:
    """Run what completes a decided step, and once more where it is interrupted; it gives the same when run again."""
    try:
        commit()
    except BaseException:
        commit()
        raise


class Overshoot(str):
    """The reason not to keep a step that is finite: in words, what went too far."""

    __slots__ = ()


class Late:
    """The verdict on a step that is computed before it is judged.

    buffers: of the model, from before the run. deferred: whether the verdict stays on the device. Then `good` `[]`
    says there whether the step is kept, and everything that the step writes is chosen by it, without a wait.
    again: whether the step is computed again, since what it had assumed was not so.
    """

    def __init__(self, buffers: Buffers, deferred: bool, again: bool = False) -> None:
        self.verdict, self.deferred, self.again = Verdict(), deferred, again
        self._buffers = buffers
        self.good: Tensor | None = None
        self.flags: Tensor | None = None
        self.places: list[str] = []

    def reason(self) -> str | None:
        """The reason to skip the step, read from the device; None where there is none, or where it is not read."""
        self._buffers.ask(self.verdict)
        if not self.deferred:
            return self.verdict.reason(NonFinite)
        self.flags, self.places = self.verdict.flags()
        self.good = self.flags.all()
        self.verdict = Verdict()  # its judges hold the batch
        return None

    def anew(self) -> Late:
        """For the same step, computed again; the batch has been judged."""
        return Late(self._buffers, self.deferred, True)

    def write(self, targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Write values to targets where a deferred step is good; gives the same when run again."""
        if self.good is not None:
            write_where(self.good, targets, values)

    def restore(self, targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Write values from before to targets where a deferred step is bad."""
        if self.good is not None:
            write_where(~self.good, targets, values)

    def commit(self) -> None:
        """Restore the model's buffers where a deferred step is bad."""
        if self.good is not None:
            self._buffers.keep_where(self.good)


class Skips:
    """The number of skipped steps: those that the host knows, and a count on the device."""

    def __init__(self) -> None:
        self.known = 0  # without those that are left on the device
        self._bad: Tensor | None = None
        self._last: tuple[Tensor, list[str]] | str | None = None

    def took(self) -> None:
        """A step was taken."""
        self._last = None

    def skipped(self, where: str) -> None:
        """A step was skipped, for a reason."""
        self.known += 1
        self._last = where

    def left(self, late: Late) -> None:
        """A step was computed, and its verdict stays on the device."""
        assert late.good is not None and late.flags is not None
        bad = (~late.good).long()
        self._bad = bad if self._bad is None else self._bad.to(bad.device) + bad
        self._last = late.flags, late.places

    def count(self) -> int:
        """The number of skipped steps; waits for the device where something was left there."""
        if self._bad is not None:
            self.known, self._bad = self.known + int(self._bad), None
        return self.known

    def reason(self) -> str | None:
        """What was not finite in the last step, or None; waits for the device where its verdict is there."""
        if isinstance(self._last, tuple):
            flags, places = self._last
            self._last = next((place for good, place in zip(flags.tolist(), places, strict=True) if not good), None)
        return self._last
