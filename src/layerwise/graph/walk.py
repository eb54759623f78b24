"""Walks over autograd's graph, and the uses of parameters that they meet."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch.autograd.graph import GradientEdge, Node

from layerwise.tape.uses import Use

__all__ = [
    "SELECTIONS",
    "Edge",
    "Node",
    "by_node",
    "call_of",
    "children",
    "distinct",
    "edges",
    "finished",
    "inputs",
    "moves",
    "next_uses",
    "nodes",
]

SELECTIONS = frozenset(  # nodes of calls that pick elements by an index or a mask, and pass the others nothing
    ["IndexBackward0", "IndexSelectBackward0", "MaskedSelectBackward0", "GatherBackward0"]
)
_MOVES = frozenset(
    f"{kind}Backward{i}"
    for kind in """View UnsafeView ReshapeAlias Squeeze Unsqueeze Expand Select Slice Transpose Permute T Clone ToCopy
        Alias Unbind Split SplitWithSizes""".split()
    for i in range(3)
)
Edge = tuple[Node, int]
Below = Mapping[Node, Sequence[Any]]


def nodes(roots: Iterable[Any], below: Below | None = None) -> Iterator[Node]:
    """The nodes below some edges (node, output number), depth first, each once.

    below: for some nodes, the edges to follow in place of `next_functions`; none: the walk ends there. It may grow
    while the walk runs.
    """
    seen: set[Node | None] = {None}
    stack = list(roots)
    while stack:
        node = stack.pop()[0]
        if node in seen:
            continue
        seen.add(node)
        yield node
        other = None if below is None else below.get(node)
        stack += node.next_functions if other is None else other


def edges(roots: Iterable[Any], below: Below, ends: Container[Any], by_output: bool = False) -> Iterator[Edge]:
    """The edges (node, output number) below some edges, depth first: the first to each node, or to each output.

    below: as for `nodes`. ends: edges that are not followed, each met once, whatever other edges lead to the node.
    """
    seen: set[Any] = set()
    stack = list(roots)
    while stack:
        node, output, *_ = stack.pop()
        end = (node, output) in ends
        key = (node, output) if end or by_output else node
        if node is None or key in seen:
            continue
        seen.add(key)
        yield node, output
        if not end:
            stack += children(node, below)


def moves(node: Node) -> bool:
    """Whether a node is that of a call that moves elements, or picks some, and computes nothing."""
    return node.name() in SELECTIONS or node.name() in _MOVES


def children(node: Node, below: Below) -> Sequence[Any]:
    """The edges that a walk follows from a node."""
    other = below.get(node)
    return node.next_functions if other is None else other


def finished(roots: Iterable[Node | None], below: Below, ends: Container[Any] = ()) -> Iterator[Node]:
    """The nodes below some nodes, each after all those below it."""
    opened: set[Node] = set()
    stack = [(root, False) for root in roots]
    while stack:
        node, done = stack.pop()
        if node is None or (node in opened and not done):
            continue
        if done:
            yield node
            continue
        opened.add(node)
        stack.append((node, True))
        stack += [(edge[0], False) for edge in children(node, below) if tuple(edge[:2]) not in ends]


def call_of(node: Node) -> str:
    """The call that a node is the backward of, as autograd names it."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", re.sub(r"Backward\d*$", "", node.name())).lower()
    return f"the call {name!r} (autograd's {node.name()})"


# -- uses ---------------------------------------------------------------------------------------------------


def by_node(uses: Iterable[Use]) -> dict[Node, list[Use]]:
    """The uses by the node of their output."""
    table: dict[Node, list[Use]] = {}
    for use in uses:
        table.setdefault(use.edge.node, []).append(use)
    return table


def inputs(use_at: Mapping[Node, Sequence[Use]]) -> dict[Node, Sequence[GradientEdge]]:
    """The data edges of the uses at each node: `below` for a walk that leaves out their parameters."""
    return {
        node: uses[0].inputs if len(uses) == 1 else [edge for use in uses for edge in use.inputs]
        for node, uses in use_at.items()
    }


def next_uses(roots: Iterable[GradientEdge], use_at: Mapping[Node, Sequence[Use]]) -> list[Use]:
    """The uses nearest to some edges: those that are reached without passing through another one."""
    return [use for node in nodes(roots, dict.fromkeys(use_at, ())) for use in use_at.get(node, ())]


def distinct(found: Iterable[GradientEdge | None]) -> list[GradientEdge]:
    """Edges without those that are None or of one tensor with an earlier one."""
    return list({(e.node, e.output_nr): e for e in found if e is not None}.values())
