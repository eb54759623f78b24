"""The rows of small calls of one layout, gathered so that what is computed of many parameters is computed at once.

A call of torch costs microseconds whatever its size, and a parameter of a few numbers takes a dozen of them. Where the
rows of many calls have one layout, they are as well the rows of one call with more samples, or with more groups: a
quantity of each sample alone reads the first, one of each element of the parameter alone the second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from layerwise.gradient.parts import RowsPart, planned_parts
from layerwise.rows.base import RowNumbers, Rows, Samples
from layerwise.tape.tape import Tape
from layerwise.tape.uses import Use

__all__ = ["RowStack", "RowStacks"]

_FEWEST = 8  # calls alike that are worth a copy of their rows
_SMALL = 2**15  # bytes of the rows of one parameter, whose copy costs less than the calls that it spares
_MOST = 256  # calls in a stack


@dataclass(frozen=True)
class _GroupsPart(RowsPart):
    """Rows of several parameters as groups of one; count: of the parameters."""

    count: int = 1

    def fold(self, w: Tensor) -> Tensor:
        """Reshape `[..., C·K,O,I]` to the parameters, `[..., C, *shape]`."""
        return super().fold(w.unflatten(-3, (self.count, -1)))


class RowStack:
    """Copies of the rows of calls of one layout, each the only call of its parameters.

    names: those of the parameters, for each place that one has among the call's.
    """

    def __init__(self, first: Sequence[tuple[str, RowsPart]], most: int) -> None:
        self._parts = [part for _, part in first]
        self.names: list[list[str]] = [[] for _ in first]
        self._inputs = [None if part.rows.a is None else _room(part.rows.a, most) for part in self._parts]
        self._cotangents = [_room(part.rows.g, most) for part in self._parts]
        self._most = most

    def add(self, parts: Sequence[tuple[str, RowsPart]]) -> bool:
        """Copy the rows of another call; whether no room is left for a further one."""
        at = len(self.names[0])
        for (name, part), names, inputs, cotangents in zip(
            parts, self.names, self._inputs, self._cotangents, strict=True
        ):
            names.append(name)
            cotangents[at].copy_(part.rows.g)
            if inputs is not None and part.rows.a is not None:
                inputs[at].copy_(part.rows.a)
        return at + 1 == self._most

    def part(self, place: int, groups: bool) -> RowsPart:
        """The rows of all calls at a place as those of one, with as many groups (or samples) more."""
        one, c = self._parts[place], len(self.names[place])
        inputs, g = self._inputs[place], self._cotangents[place][:c]
        a = None if inputs is None else inputs[:c]
        if not groups:
            rows = Rows(None if a is None else a.flatten(0, 1), g.transpose(0, 1).flatten(1, 2), one.rows.size_in)
            return RowsPart(one.use, one.place, rows, one.view, one.laid)
        a = None if a is None else a.permute(1, 2, 0, 3, 4).flatten(2, 3)
        rows = Rows(a, g.permute(1, 2, 3, 0, 4, 5).flatten(3, 4), one.rows.size_in)
        return _GroupsPart(one.use, one.place, rows, one.view, one.laid, count=c)


def _room(x: Tensor, count: int) -> Tensor:
    return x.new_empty((count, *x.shape))


class RowStacks:
    """The stacks of one backward pass.

    contract: called with each stack that is full. uses: all whose cotangents will arrive. asked: the names of the
    parameters whose gradients are wanted; None: all. alone: of those that are left to others.
    """

    def __init__(
        self,
        tape: Tape,
        uses: Sequence[Use],
        asked: Collection[str] | None,
        alone: Collection[str],
        contract: Callable[[RowStack], None],
    ) -> None:
        self._tape, self._asked, self._alone, self._contract = tape, asked, alone, contract
        self._alike = Counter((use.call.func, use.call.out_shape) for use in uses)
        self._reads = Counter(name for use in uses for name in use.names) if self else Counter()
        self._open: dict[object, RowStack] = {}

    def __bool__(self) -> bool:
        """Whether any calls are alike."""
        return max(self._alike.values(), default=0) >= _FEWEST

    def take(self, use: Use, g: Tensor, samples: Samples | RowNumbers | None) -> bool:
        """Copy the rows of a use with cotangents `[V, *out_shape]`; False where it is none of many small ones."""
        count = self._alike[use.call.func, use.call.out_shape]
        if count < _FEWEST or g.numel() * g.element_size() > _SMALL:
            return False
        if any(self._reads[name] > 1 or name in self._alone for name in use.names):
            return False
        found = planned_parts(self._tape, use, g, samples, self._asked)
        if found is None:
            return False
        key, parts = found
        stack = self._open.get(key)
        if stack is None:
            if not parts or not all(_is_small(part.rows) for _, part in parts):
                return False
            stack = self._open[key] = RowStack(parts, min(count, _MOST))
        if stack.add(parts):
            self._contract(self._open.pop(key))
        return True

    def rest(self) -> None:
        """Contract the stacks that are not full."""
        while self._open:
            self._contract(self._open.popitem()[1])


def _is_small(rows: Rows) -> bool:
    """Whether rows of floats are so few that a copy of them costs less than a call."""
    tensors = [rows.g] if rows.a is None else [rows.g, rows.a]
    return rows.kind != "index" and all(x.numel() and x.numel() * x.element_size() <= _SMALL for x in tensors)
