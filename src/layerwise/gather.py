"""The parts of every parameter's gradient, collected while the cotangents of its uses arrive."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from layerwise.gradients import ParameterGradient, Part
from layerwise.tape import Tape
from layerwise.uses import Use

__all__ = ["Gather"]


class Gather:
    """Collect the parts of every parameter's gradient, and give it out once all its uses have arrived."""

    def __init__(self, tape: Tape, uses: Iterable[Use]) -> None:
        self._tape = tape
        self._expected: dict[str, set[int]] = {}
        self._waiting: dict[str, list[Part]] = {}
        for use in uses:
            for name in use.names:
                self._expected.setdefault(name, set()).add(use.index)

    def add(self, use: Use, parts: Iterable[tuple[str, Part]]) -> Iterator[ParameterGradient]:
        """Take the parts of one use; the gradients that it completes."""
        for name, part in parts:
            self._waiting.setdefault(name, []).append(part)
        for name in use.names:
            self._expected[name].discard(use.index)
            if not self._expected[name]:
                yield self._take(name)

    def complete(self, use: Use) -> bool:
        """Whether the gradients of all parameters of a use were given out."""
        return not any(self._expected[name] for name in use.names)

    def rest(self) -> Iterator[ParameterGradient]:
        """The gradients of which some use never arrived."""
        for name in list(self._waiting):
            yield self._take(name)

    def _take(self, name: str) -> ParameterGradient:
        return ParameterGradient(name, self._tape.parameters[name].shape, self._waiting.pop(name))
