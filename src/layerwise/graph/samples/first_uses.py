"""The uses before the first choice of rows, whose samples lie where they lay although the choice is another one.

An index or a mask that picks elements of activations (`logits[keep]`) may differ from batch to batch. What ran before
the first such call is not changed by it: the samples' axes in the outputs of these uses, once proved for all values,
hold for any choice. Only what comes after is measured again, from the losses down to these outputs: no pass through the
model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from layerwise.graph.coverage import Graph
from layerwise.graph.samples import readings
from layerwise.graph.samples.constants import KeptLayout
from layerwise.graph.samples.loss_rows import by_known_rows, by_target
from layerwise.graph.samples.memo import Memo, key_below, recalled, remember
from layerwise.graph.samples.numbers import MIXED, NONE, Root, numbers_of_both, row_numbers
from layerwise.graph.samples.rows import one_sample_a_row, owners_of_rows
from layerwise.graph.samples.sample_axes import on_axis, structural_below
from layerwise.graph.samples.sample_layout import SampleLayout, Where
from layerwise.graph.walk import by_node, next_uses
from layerwise.rows.base import RowNumbers, Samples
from layerwise.tape.tape import Tape
from layerwise.tape.uses import Use

__all__ = ["FirstUses"]


class FirstUses(NamedTuple):
    """The uses before the first choice; front: those of them that are nearest to the losses; rest: all other uses."""

    graph: Graph
    uses: Sequence[Use]
    front: Sequence[Use]
    rest: Sequence[Use]
    key: Any

    @classmethod
    def of(cls, tape: Tape, graph: Graph, model: Any, samples: Any) -> FirstUses | None:
        """None where there is no choice, or nothing before it."""
        if tape.choice is None:
            return None
        uses = [use for use in graph.uses if use.index < tape.choice.uses]
        rest = [use for use in graph.uses if use.index >= tape.choice.uses]
        if not uses or any(use.origin is not None for use in rest):
            return None
        front = next_uses([loss.logits for loss in graph.losses], by_node(uses))
        places = readings.places(graph.entered, [use.origin[0] for use in uses if use.origin is not None], uses)
        return cls(graph, uses, front, rest, (key_below(tape, model, samples, uses, front), places))

    def remember(self, memo: Memo, layout: SampleLayout) -> None:
        """Keep the axes of these uses, if all of them have one and no values could change it."""
        if self.key in memo or not one_sample_a_row(self.graph, layout, owners_of_rows(self.graph, layout)):
            return
        axes = {use.index: layout.uses.get(use.index) for use in self.uses}
        found = {i: where for i, where in axes.items() if isinstance(where, Samples)}
        if len(found) == len(axes):
            proved = structural_below(self.front, self.uses, layout.n, found)
            remember(memo, self.key, KeptLayout(SampleLayout(layout.n, dict(found), [])) if proved else None)

    def recall(self, memo: Memo) -> SampleLayout | None:
        """The layout of the whole graph, from what is remembered of these uses and a measurement of what comes after.

        None where nothing is remembered, or the measurement does not confirm it.
        """
        known = recalled(memo, self.key)
        return self._measured(known.layout.n, known.layout.uses) if isinstance(known, KeptLayout) else None

    def _measured(self, n: int, axes: Mapping[int, Where]) -> SampleLayout | None:
        losses: list[Where] = []
        for loss in self.graph.losses:
            where = by_target(self.graph, loss, n)
            if where is None:
                known = [(use, axes[use.index].owners(use.call.out_shape)) for use in self.front]
                where = by_known_rows(loss, n, known)
            if where is None:
                return None
            losses.append(where)
        ends = [*self.front, *self.rest]
        numbers: list[Tensor | None] = [None] * len(ends)
        for loss, where in zip(self.graph.losses, losses, strict=True):
            logits = loss.call.logits
            root = Root(loss.logits, logits, where.owners(logits.shape, logits.device))
            numbers = [numbers_of_both(a, b) for a, b in zip(numbers, row_numbers([root], n, ends), strict=True)]
        for use, number in zip(self.front, numbers, strict=False):
            if number is None:  # there is no loss
                return None
            owner = axes[use.index].owners(use.call.out_shape, number.device)
            if not bool(((number == NONE) | number.eq(owner)).all()):
                return None
        uses = dict(axes)
        for use, rows in zip(self.rest, numbers[len(self.front) :], strict=True):
            if rows is None or bool((rows == MIXED).any()):
                return None
            uses[use.index] = on_axis(use, RowNumbers(n, rows))
        return SampleLayout(n, uses, losses)
