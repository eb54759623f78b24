"""The result of a measurement: where the samples lie in every use and every loss of a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from layerwise.graph.coverage import Graph
from layerwise.rows.base import RowNumbers, Samples
from layerwise.tape.uses import Use

__all__ = ["SampleLayout", "Where", "free_axes"]

Where = Samples | RowNumbers


@dataclass(frozen=True)
class SampleLayout:
    """The number of samples N, and where they lie in each use's output and each loss's logits.

    shared: uses that stand in for those whose outputs all samples share, see `constants`. replaced: the numbers of
    these others.
    """

    n: int
    uses: dict[int, Where]
    losses: list[Where]
    shared: Sequence[Use] = ()
    replaced: frozenset[int] = frozenset()

    @property
    def regular(self) -> bool:
        """Whether the samples lie on an axis everywhere, in equal pieces."""
        found = (*self.uses.values(), *self.losses)
        return not self.shared and all(isinstance(where, Samples) for where in found)

    @property
    def axes(self) -> dict[int, Samples]:
        """The samples' axis in each use's output that has one."""
        return {i: where for i, where in self.uses.items() if isinstance(where, Samples)}

    def graph(self, graph: Graph) -> Graph:
        """The graph in which every use's output carries samples."""
        if not self.shared:
            return graph
        return replace(graph, uses=[*(u for u in graph.uses if u.index not in self.replaced), *self.shared])


def free_axes(use: Use) -> list[int]:
    """The axes of a use's output along which the operation allows samples."""
    allowed = [set(slot.axes) for slot in use.slots]
    return sorted(set.intersection(*allowed)) if allowed else []
