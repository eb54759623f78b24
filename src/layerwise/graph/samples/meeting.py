"""Where samples that a model mixes meet: named in the refusal, and looked for in no other case."""

from __future__ import annotations

from contextlib import suppress

from torch.autograd.graph import GradientEdge

from layerwise.graph.samples.numbers import MIXED, Root, element_numbers
from layerwise.graph.walk import call_of, edges, finished
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
    mixed = {
        p for p, number in zip(places, found, strict=False) if number is not None and bool((number == MIXED).any())
    }
    below = {node for node, _ in mixed}
    for node in order:
        if node not in below and any(tuple(edge) in mixed for edge in node.next_functions):
            return f": they meet in {call_of(node)} above it"
    return ""
