"""The partial derivatives of a loss of the user's own in its boundary tensors: gradients and Hessian products.

Cotangents travel from the total (or a marked call's value) to the boundary and stop at known losses, at other marked
calls and at the boundary itself. So the results are partial derivatives of this loss alone, also where one boundary
tensor was made from another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from layerwise.errors import UnknownLoss
from layerwise.graph.coverage import Graph
from layerwise.graph.decisions import decided
from layerwise.graph.products import twice
from layerwise.graph.second.custom_functions import check_functions
from layerwise.graph.walk import Node
from layerwise.tape.pull import pull, pull_stack, stopped
from layerwise.tape.uses import OwnUse

__all__ = ["OwnLossGraph", "gradients", "not_linear", "scales", "unconnected"]


def scales(graph: Graph, values: Sequence[GradientEdge]) -> list[Tensor | None]:
    """The weights `dL/dl` of loss values l in the total L; a weight requires grad where L is not linear in l."""
    if not values:
        return []
    with torch.enable_grad():
        return pull([graph.total], [graph.seed], values, create_graph=True)


def not_linear(name: str) -> str:
    """The error text for a total that is not linear in a loss."""
    return (
        f"the total is not linear in its {name} (a power, a product of losses, or a learned weight), so it is no sum "
        "over samples; observe the loss itself, times constants"
    )


def unconnected(name: str) -> str:
    """The error text for a loss that no gradient of the total reaches."""
    return (
        f"the total does not depend on its {name}: what lies between them passes no gradient on. Leave that loss out "
        "of the total, or write what follows it with calls that have a derivative"
    )


def gradients(graph: Graph) -> list[Tensor | None]:
    """The gradient of each loss in the tensor that it receives, differentiable, in the order of `graph.losses`."""
    found: list[Tensor | None] = []
    for loss, c in zip(graph.known, scales(graph, [loss.value for loss in graph.known]), strict=True):
        with twice():
            found += [None] if c is None else pull([loss.value], [c], [loss.logits], create_graph=True)
    for own in graph.own:
        found += OwnLossGraph(graph, own).gradient()
    return found


class OwnLossGraph:
    """The part of the graph that computes a loss of the user's own from its boundary tensors.

    edges: of the boundary. start: the edge that cotangents are sent from. others: the nodes where other losses begin.
    """

    def __init__(self, graph: Graph, own: OwnUse) -> None:
        self.own = own
        self.edges = [part.logits for part in own.boundary]
        self.others: set[Node] = {loss.value.node for loss in graph.known}
        self.others |= {other.value.node for other in graph.own if other.value is not None and other is not own}
        if own.value is None:
            self.start = get_gradient_edge(graph.total)
            self._c = graph.seed
        else:
            self.start = own.value
            (c,) = scales(graph, [own.value])
            if c is None:
                raise UnknownLoss(unconnected(str(own)))
            if c.requires_grad:
                raise UnknownLoss(not_linear(str(own)))
            self._c = c.detach()
        self._gradient: list[Tensor] | None = None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Vector-Jacobian products inside the context are of this loss only."""
        with stopped(self.others | {edge.node for edge in self.edges}):
            yield

    def gradient(self) -> list[Tensor]:
        """The loss's gradient in every boundary tensor, differentiable.

        Raises Undefined where a second derivative is missing.
        """
        if self._gradient is None:
            check_functions([self.start], self.others | {edge.node for edge in self.edges})
            with twice(), self.alone():
                found = pull([self.start], [self._c], self.edges, create_graph=True)
            shapes = [part.call.logits for part in self.own.boundary]
            self._gradient = [x.new_zeros(x.shape) if g is None else g for g, x in zip(found, shapes, strict=True)]
        return self._gradient

    def product(self, stacks: Sequence[Tensor]) -> list[Tensor]:
        """The loss's Hessian times a stack of directions, `[V, *shape]` for each boundary tensor."""
        pairs = [(g, v) for g, v in zip(self.gradient(), stacks, strict=True) if g.requires_grad]
        found: list[Tensor | None] = [None] * len(stacks)
        if pairs:
            with twice(), self.alone():
                found = pull_stack([g for g, _ in pairs], [v for _, v in pairs], self.edges, decided)
        return [torch.zeros_like(v) if h is None else h.detach() for h, v in zip(found, stacks, strict=True)]
