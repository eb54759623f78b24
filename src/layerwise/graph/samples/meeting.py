"""Where samples that a model mixes meet: named in the refusal, and looked for in no other case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from torch import Size
from torch.autograd.graph import GradientEdge

from layerwise.graph.samples.numbers import MIXED, Root, element_numbers
from layerwise.graph.walk import Edge, Node, call_of, edges, finished
from layerwise.rows.base import RowNumbers, Samples
from layerwise.tape.uses import LossUse, Use

__all__ = ["meeting"]


def meeting(loss: LossUse, rows: Samples | RowNumbers, use: Use) -> str:
    """The call between a loss and a use at which samples meet, in words; nothing where it is not found."""
    end = use.edge.node
    above = {end: True}  # whether the use's output has a part in what a node made
    for node in finished([loss.logits.node], {end: ()}):
        above[node] = above.get(node, False) or any(above[c] for c, _ in node.next_functions if c in above)
    order = [node for node, _ in edges([loss.logits], {end: ()}, ()) if above[node] and node is not end]
    places = list(dict.fromkeys((c, nr) for node in order for c, nr in node.next_functions if c and above[c]))
    found = []
    with suppress(RuntimeError, NotImplementedError):
        root = Root(loss.logits, loss.call.logits, rows.owners(loss.call.logits.shape, loss.call.logits.device))
        found = element_numbers([root], rows.n, [GradientEdge(*place) for place in places])
    numbers = {p: number for p, number in zip(places, found, strict=False) if number is not None}
    mixed = {p for p, number in numbers.items() if bool((number == MIXED).any())}
    below = {node for node, _ in mixed}
    readers: dict[Edge, list[Node]] = {p: [] for p in mixed}
    for node in order:
        for p in node.next_functions:
            if p in readers:
                readers[p].append(node)
    for p, above_it in readers.items():  # of calls that are mixed themselves the samples meet further up
        if not below.intersection(above_it):
            shapes = {place: number.shape for place, number in numbers.items()}
            shapes[loss.logits.node, loss.logits.output_nr] = loss.call.logits.shape
            return _named(p, above_it, shapes)
    return ""


def _named(place: Edge, readers: Sequence[Node], shapes: Mapping[Edge, Size]) -> str:
    """The calls that read a tensor; where one gives it to all samples alike, also the call that made it of them all."""
    names = ", ".join(dict.fromkeys(map(call_of, readers)))
    if len(readers) > 1:
        return f": they meet by way of {names} above it"
    made = next((shape for (node, _), shape in shapes.items() if node is readers[0]), shapes[place])
    node, under = place[0], [place]
    while len(under) == 1 and shapes[under[0]].numel() == shapes[place].numel():
        node = under[0][0]
        under = [(c, nr) for c, nr in node.next_functions if c is not None and (c, nr) in shapes]
    if len(under) == 1 and shapes[under[0]].numel() > shapes[place].numel() and _broadcast(shapes[place], made):
        return f": they meet in {call_of(node)} above it, whose result {names} reads for every sample"
    return f": they meet in {names} above it"


def _broadcast(shape: Size, made: Size) -> bool:
    """Whether a tensor of a shape is repeated to make one of another shape by elementwise calls."""
    sizes = (*(1,) * (len(made) - len(shape)), *shape)
    return sizes != tuple(made) and all(a in (1, b) for a, b in zip(sizes, made, strict=False))
