"""Uses whose outputs all samples share: positions or prompts looked up once and broadcast to the batch.

No row of such an output belongs to one sample, so that the cotangent that arrives there is a sum over samples. It is a
function of cotangents further up, at the call that combines it with the batch, where the samples are still apart: from
there the vector-Jacobian products are taken again, one for each sample.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from layerwise.graph.coverage import Graph
from layerwise.graph.samples.numbers import MIXED, NONE, Root, element_numbers
from layerwise.graph.samples.readings import outside
from layerwise.graph.samples.sample_axes import free_axes
from layerwise.graph.samples.sample_layout import SampleLayout, Where
from layerwise.graph.walk import Node, by_node, edges, finished, inputs, nodes
from layerwise.ops.base import Call, Slot
from layerwise.rows.base import RowNumbers, Samples, gradients
from layerwise.tape.origins import sources
from layerwise.tape.pull import pull, stopped
from layerwise.tape.uses import Use

__all__ = ["KeptLayout", "shared_uses"]


class SharedPlace(NamedTuple):
    """A `SharedUse` without its graph: numbers of nodes in a walk from the losses, and of uses."""

    use: int
    node: int
    output: int
    members: tuple[int, ...]
    stops: frozenset[int]


class SharedSlot(Slot):
    """One slot of a use that all samples share, from the cotangent of the call that combines it with the batch."""

    factored = False
    linear = False
    through_graph = True

    def __init__(self, shared: SharedUse, use: Use, slot: Slot) -> None:
        self.used, self.axes = slot.used, range(len(shared.call.out_shape))
        self._shared, self._use, self._slot = shared, use, slot

    def dense(self, g: Tensor, samples: Samples | RowNumbers) -> Tensor:
        """Per-sample gradients `[V,N,*used.shape]`."""
        found = self._shared.apart(g, samples)[self._use.index]
        if found is None:
            return self.used.new_zeros(len(g), samples.n, *self.used.shape)
        if self._slot.factored:
            each = self._slot.fold(gradients(self._slot.rows(found, None)).sum(1))
        else:
            each = self._slot.dense(found, Samples(1, -1))[:, 0]
        return each.unflatten(0, (len(g), samples.n))


class SharedUse(Use):
    """The place where uses that all samples share reach the batch; it stands in for them.

    stops: nodes below at which the samples are apart again, which have cotangents of their own.
    """

    __slots__ = ("_last", "_members", "_stops")

    def __init__(self, index: int, edge: GradientEdge, members: Sequence[Use], stops: Collection[Node]) -> None:
        shape = edge.node._input_metadata[edge.output_nr].shape
        self.index, self.at, self.edge, self.inputs = index, members[0].at, edge, []
        self.call = Call(members[0].call.func, (), {}, torch.Size(shape))
        self.used = [d for use in members for d in use.used]
        self.names = sorted(set().union(*(use.names for use in members)))
        self.batch, self.origin, self.output = members[0].batch, None, members[0].output
        self.readers = ()
        self._kept = None
        self._released = False
        self._members, self._stops = list(members), set(stops)
        self._last: tuple[Tensor, dict[int, Tensor | None]] | None = None
        self._slots = [SharedSlot(self, use, slot) for use in members for slot in use.slots]

    def within(self, nodes: Collection[Node]) -> bool:
        """Whether all nodes that it hangs on are among some."""
        return self.edge.node in nodes and all(node in nodes for node in self._stops)

    def place(self, number: Mapping[Node, int]) -> SharedPlace:
        """Where it is in any graph of the same calls; number: of each node in a walk."""
        members = tuple(use.index for use in self._members)
        stops = frozenset(number[node] for node in self._stops)
        return SharedPlace(self.index, number[self.edge.node], self.edge.output_nr, members, stops)

    def apart(self, g: Tensor, samples: Samples | RowNumbers) -> dict[int, Tensor | None]:
        """The cotangents `[V·N, *out_shape]` at each member, from `[V, *out_shape]` here, one for each sample."""
        if self._last is None or self._last[0] is not g:
            owner = samples.owners(g.shape[1:], g.device)
            ids = torch.arange(samples.n, device=g.device).reshape(1, -1, *(1,) * (g.dim() - 1))
            apart = torch.where(owner == ids, g[:, None], g.new_zeros(())).flatten(0, 1)
            with stopped(self._stops):
                found = pull([self.edge], [apart], [use.edge for use in self._members], batched=True)
            self._last = g, {use.index: x for use, x in zip(self._members, found, strict=True)}
        return self._last[1]

    def release(self) -> None:
        """Forget the last cotangents."""
        self._last = None


@dataclass(frozen=True)
class KeptLayout:
    """A layout without the graph that it was measured on."""

    layout: SampleLayout
    shared: Sequence[SharedPlace] = ()

    @classmethod
    def of(cls, graph: Graph, layout: SampleLayout) -> KeptLayout | None:
        """What holds for every graph of the same calls and wiring; None where it hangs on nodes below other uses."""
        shared = [use for use in layout.shared if isinstance(use, SharedUse)]
        number = {node: i for i, node in enumerate(_walk(graph))} if shared else {}
        if any(not use.within(number) for use in shared):
            return None
        return cls(replace(layout, shared=()), [use.place(number) for use in shared])

    def on(self, graph: Graph) -> SampleLayout:
        """The layout of such a graph."""
        if not self.shared:
            return self.layout
        found, uses = list(_walk(graph)), {use.index: use for use in graph.uses}
        shared = [
            SharedUse(
                place.use,
                GradientEdge(found[place.node], place.output),
                [uses[i] for i in place.members],
                [found[i] for i in place.stops],
            )
            for place in self.shared
        ]
        return replace(self.layout, shared=shared)


def _walk(graph: Graph) -> Iterator[Node]:
    """The nodes from the losses down through the uses, in the same order for the same wiring."""
    return nodes([loss.logits for loss in graph.losses], inputs(by_node(graph.uses)))


class _Region(NamedTuple):
    """The part of the graph between the losses and the uses that all samples share.

    at: the elements' numbers at each edge. mixed: nodes with an element of several samples. met: all of its nodes.
    """

    at: dict[tuple[Node, int], Tensor]
    mixed: set[Node]
    met: set[Node]


def shared_uses(
    graph: Graph, roots: Sequence[Root], n: int, mixed: Mapping[int, Use], partly: Collection[int]
) -> tuple[list[SharedUse], dict[int, Where]] | None:
    """What stands in for the uses whose outputs answer for several samples; None where some of them mix samples.

    A use that read none of the tensors that the model was called with, nor what was computed from one, mixes none where
    one of these has n rows.
    roots: the losses' numbered terms. partly: the numbers of those with rows that answer for a single sample.
    """
    apart = [use for use in graph.uses if use.index not in mixed]
    called = [source for origin in graph.entered for source in sources(origin)]
    in_batch = any(source.shape[:1] == (n,) for source in called)
    beside = _beside(graph, mixed) if in_batch else set()
    others = [use for i, use in mixed.items() if i not in beside]
    if not _other_sources(others, apart, n) or not _fed_by(mixed, apart):
        return None
    region = _region(roots, n, mixed)
    fronts = list(_fronts(region, mixed))
    holds_none = dict.fromkeys(mixed, True)
    for edge, numbers, members, stops in fronts:
        for use in members:
            holds_none[use.index] &= (
                use.index in beside
                or (use.index not in partly and not _may_hold(use, n))
                or _position_of(edge, numbers, use, n, _meets(use, n, stops, region))
            )
    if not all(holds_none[use.index] or _alike(use, mixed.values(), holds_none) for use in mixed.values()):
        return None
    first = max(use.index for use in graph.uses) + 1
    found = [SharedUse(first + i, edge, members, stops) for i, (edge, _, members, stops) in enumerate(fronts)]
    places: dict[int, Where] = {first + i: RowNumbers(n, front[1]) for i, front in enumerate(fronts)}
    reached = {member.index for _, _, members, _ in fronts for member in members}
    return (found, places) if reached == set(mixed) else None


def _fronts(region: _Region, mixed: Mapping[int, Use]) -> Iterator[tuple[GradientEdge, Tensor, list[Use], set[Node]]]:
    """The edges where the samples are apart above uses that all share: edge, numbers, these uses, and where to stop."""
    for (node, output), numbers in region.at.items():
        below = [child for child, _ in node.next_functions if child is not None]
        if node in region.mixed or not any(child in region.mixed for child in below):
            continue
        stops = _stops(node, region)
        members = [use for use in mixed.values() if _reaches(node, use, stops)]
        if members:
            yield GradientEdge(node, output), numbers, members, stops


def _other_sources(mixed: Iterable[Use], apart: Sequence[Use], n: int) -> bool:
    """Whether what the shared uses read was made of other tensors than what is known to carry the samples."""
    carrying = {s for use in apart if use.origin is not None for s in sources(use.origin[0])}
    own = {s for use in mixed if use.origin is not None for s in sources(use.origin[0])}
    rival = any(source.shape[:1] == (n,) for source in own)  # N may have been read off it
    return not carrying & own and (not rival or any(source.shape[:1] == (n,) for source in carrying))


def _beside(graph: Graph, mixed: Mapping[int, Use]) -> set[int]:
    """The shared uses that read tensors beside what the model was called with, or what such uses made."""
    stops = dict.fromkeys({use.edge.node for use in mixed.values()}, ())
    found: set[int] = set()
    seen: dict[Node, bool] = {}
    for i, use in sorted(mixed.items()):
        if use.origin is not None:
            alone = outside(graph, use.origin[0])
        else:
            below = [node for node, _ in edges([(e.node, e.output_nr) for e in use.inputs], stops, ())]
            read = [seen.get(node, False) for node in below if node in stops]
            alone = bool(read) and all(read)
        found |= {i} if alone else set()
        seen[use.edge.node] = seen.get(use.edge.node, True) and alone
    return found


def _fed_by(mixed: Mapping[int, Use], apart: Sequence[Use]) -> bool:
    """Whether nothing that the shared uses read was computed from a use that carries samples."""
    stops = dict.fromkeys({use.edge.node for use in mixed.values()}, ())
    carrying = {use.edge.node for use in apart}
    for use in mixed.values():
        for node, _ in edges([(e.node, e.output_nr) for e in use.inputs], stops, ()):
            if node in carrying:
                return False
    return True


def _region(roots: Sequence[Root], n: int, mixed: Mapping[int, Use]) -> _Region:
    ends = {use.edge.node for use in mixed.values()}
    stops = dict.fromkeys(ends, ())
    above: dict[Node, bool] = {}
    tops = [(root.edge.node, root.edge.output_nr) for root in roots if not isinstance(root.edge, Tensor)]
    order = list(finished([node for node, _ in tops], stops))
    for node in order:
        above[node] = node in ends or any(c is not None and above.get(c, False) for c, _ in node.next_functions)
    places: set[tuple[Node, int]] = set(tops)
    for node in order:
        if node not in ends:
            places |= {(child, nr) for child, nr in node.next_functions if child is not None}
    inner = [place for place in places if above.get(place[0], False) and place[0] not in ends]
    numbers = element_numbers(roots, n, [GradientEdge(*place) for place in inner])
    at = {place: number for place, number in zip(inner, numbers, strict=True) if number is not None}
    found = set(ends)
    for (node, _), number in at.items():
        if bool((number == MIXED).any()):
            found.add(node)
    return _Region(at, found, set(order))


def _stops(start: Node, region: _Region) -> set[Node]:
    """The nodes below `start`, first on each path, at which the samples are apart."""
    found: set[Node] = set()
    stack, seen = [start], {start}
    while stack:
        for child, _ in stack.pop().next_functions:
            if child is None or child in seen:
                continue
            seen.add(child)
            if child in region.met and child not in region.mixed:
                found.add(child)
            else:
                stack.append(child)
    return found


def _reaches(start: Node, use: Use, stops: Collection[Node]) -> bool:
    below = dict.fromkeys(stops, ())
    return any(node is use.edge.node for node in finished([start], below))


def _may_hold(use: Use, n: int) -> bool:
    """Whether an axis of a use's output, or of what its input was made of, has room for n samples."""
    sizes = [use.call.out_shape[a] for a in free_axes(use)]
    sizes += [] if use.origin is None else [s.shape[0] for s in sources(use.origin[0]) if s.shape]
    return any(size % n == 0 for size in sizes)


class _Met(NamedTuple):
    """What a shared use meets. stops: nodes at which the samples are apart again. edges: where they are reached.

    compared: whether what the use read has a multiple of N rows, which may be the samples themselves.
    """

    stops: Collection[Node]
    edges: list[GradientEdge]
    compared: bool


def _meets(use: Use, n: int, stops: Collection[Node], region: _Region) -> _Met:
    compared = use.origin is not None and any(s.shape and s.shape[0] % n == 0 for s in sources(use.origin[0]))
    below = (edge for node in region.met for edge in node.next_functions) if compared else ()
    places = dict.fromkeys((c, nr) for c, nr in below if c is not None and c in stops)
    return _Met(stops, [GradientEdge(*place) for place in places], compared)


def _position_of(edge: GradientEdge, numbers: Tensor, use: Use, n: int, met: _Met) -> bool:
    """Whether each row of a shared use's output reaches, in every sample, one index of axes other than the samples'.

    An output with an axis of N·r rows could else be one of N samples that are mixed further up (batch statistics).
    Where what the use read has room for N samples, each row of the samples' own must have one such index, too, as a
    token has one position: a row that all N are compared with (in-batch negatives) has none.
    """
    axes = free_axes(use)
    open_axes = {a for a in axes if use.call.out_shape[a] % n == 0 or len(axes) == 1}
    some = bool(open_axes)
    like = torch.zeros((), dtype=edge.node._input_metadata[edge.output_nr].dtype, device=numbers.device)
    like = like.expand(numbers.shape)
    for axis in range(numbers.dim()):
        size = numbers.shape[axis]
        lead = numbers.narrow(axis, 0, 1)
        same = bool(((numbers == lead) | (numbers == NONE) | (lead == NONE)).all())
        if not same or size == 1:
            continue  # the samples lie along this axis
        owners = torch.arange(size, device=numbers.device).reshape(
            [-1 if a == axis else 1 for a in range(numbers.dim())]
        )
        with stopped(met.stops):
            found, *others = element_numbers([Root(edge, like, owners)], size, [use.edge, *met.edges])
        reached = [number for number in others if number is not None]
        if met.compared and (not reached or any(bool((number == MIXED).any()) for number in reached)):
            continue
        if found is not None and not bool((found == MIXED).any()):
            open_axes = {a for a in open_axes if not _varies(found, a)}
        if some and not open_axes:
            return True
    return False


def _alike(use: Use, others: Iterable[Use], proved: Mapping[int, bool]) -> bool:
    """Whether the rows of a use are those of another one, of the same tensor, whose rows hold no samples."""
    if use.origin is None or not use.call.out_shape:
        return False
    mine = set(sources(use.origin[0]))
    rows = use.call.out_shape[0]
    return any(
        proved[other.index] and set(sources(other.origin[0])) == mine and other.call.out_shape[:1] == (rows,)
        for other in others
        if other.origin is not None
    )


def _varies(numbers: Tensor, axis: int) -> bool:
    """Whether any two indices of an axis have numbers of their own."""
    others = [a for a in range(numbers.dim()) if a != axis]
    high = numbers.amax(others) if others else numbers
    return len(high.unique()) == len(high)
