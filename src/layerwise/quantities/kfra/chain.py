"""Chains: graphs in which every path from the loss to a use passes through all uses closer to the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch.autograd.graph import GradientEdge

from layerwise.errors import Undefined
from layerwise.graph.coverage import Graph
from layerwise.graph.walk import distinct, next_uses
from layerwise.tape.uses import Use

__all__ = ["Link", "chain", "same_edge"]


class Link(NamedTuple):
    """A use of a chain; below: the edge of the input that leads to the next use, None unless exactly one does."""

    use: Use
    below: GradientEdge | None


def chain(graph: Graph) -> list[Link]:
    """The uses from the loss down, proved on the autograd graph to be one chain.

    Raises Undefined for several losses, a parameter that is used twice, or a path around a use.
    """
    if len(graph.losses) != 1:
        names = ", ".join(str(loss) for loss in graph.losses)
        raise Undefined(
            f"asked for a recursion down a chain, which starts at one loss, but the total is made of "
            f"{len(graph.losses)}: {names}; observe them one at a time, or ask for KFLR"
        )
    _check_once(graph.uses)
    at = {use.edge.node: [use] for use in graph.uses}
    links: list[Link] = []
    above: Any = graph.losses[0]
    following = next_uses([graph.losses[0].logits], at)
    while following:
        if len(following) > 1:
            raise Undefined(_bypassed(above, *sorted(following, key=lambda use: -use.index)[:2]))
        (above,) = following
        leading = [edge for edge in distinct(above.inputs) if next_uses([edge], at)]
        links.append(Link(above, leading[0] if len(leading) == 1 else None))
        following = next_uses(leading, at)
    return links


def same_edge(first: GradientEdge, second: GradientEdge) -> bool:
    """Whether two gradient edges belong to one tensor."""
    return first.node is second.node and first.output_nr == second.output_nr


def _check_once(uses: Sequence[Use]) -> None:
    user: dict[str, Use] = {}
    for use in uses:
        for name in use.names:
            if name in user:
                raise Undefined(
                    f"asked for a recursion down a chain, in which a parameter is used once, but {name!r} is used by "
                    f"{user[name]} and by {use}; ask for KFLR, which joins the uses, or freeze the parameter"
                )
            user[name] = use


def _bypassed(above: Any, first: Use, second: Use) -> str:
    return (
        f"asked for a recursion down a chain of layers, but from {above} one path leads to {first} and another, around "
        f"it, to {second} (a residual sum, branches, attention); ask for KFLR, which is defined on every graph"
    )
