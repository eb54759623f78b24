"""Derivatives of the model inside the loss (`torch.autograd.grad(..., create_graph=True)`), as uses of parameters.

Their graph reads the parameters again: the derivative of a layer by its input is its weight. A loss with such a
derivative g in it (a gradient penalty, the residual of a differential equation, forces) reaches a parameter by paths
through the calls of the model, which are uses already, and by paths through g alone, which are those of this one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from layerwise.errors import Undefined
from layerwise.ops.base import Call, DenseSlot, RowNumbers, Samples
from layerwise.tape.binding import Leaves
from layerwise.tape.pull import pull_stack, stopped
from layerwise.tape.uses import Derived, Use

__all__ = ["GradientUse", "gradient_uses"]

_CHUNK = 64  # cotangents that go back at once


class GradientSlot(DenseSlot):
    """A parameter that a derivative of the model reads; only `dense` is defined, through the recorded graph.

    dense[v,n] = (dg / d used)^T (g[v] at the indices of sample n, 0 elsewhere), by paths that pass no other use
    """

    through_graph = True

    def __init__(self, use: GradientUse, used: Tensor) -> None:
        self.used, self.axes = used, range(len(use.call.out_shape))
        self._use = use

    def dense(self, g: Tensor, samples: Samples | RowNumbers) -> Tensor:
        """Per-sample gradients `[V,N,*used.shape]`."""
        return self._use.apart(g, samples)[id(self.used)]

    def no_rows(self) -> Undefined:
        """The refusal of rows."""
        return Undefined(
            f"asked for the input and output rows of a tensor of shape {tuple(self.used.shape)}, but the loss holds "
            "derivatives of the model (torch.autograd.grad with create_graph=True), which read it otherwise than a "
            "layer does; ask for quantities of the gradient, diagonals or operators"
        )


class GradientUse(Use):
    """One result of `torch.autograd.grad(..., create_graph=True)` that depends on parameters past all other uses.

    inputs: the edges of the uses that its graph reaches.
    """

    __slots__ = ("_last", "_stops")

    def __init__(self, index: int, used: list[Derived], inputs: list[GradientEdge], out: Tensor, batch: Tensor) -> None:
        super().__init__(index, Call(torch.autograd.grad, (), {}, out.shape), used, inputs, out, batch, keep=False)
        self._stops = {edge.node for edge in inputs}
        self._last: tuple[Tensor, dict[int, Tensor]] | None = None
        self._slots = [GradientSlot(self, d.tensor) for d in used]

    def apart(self, g: Tensor, samples: Samples | RowNumbers) -> dict[int, Tensor]:
        """The gradients `[V,N,*shape]` of all parameters, by the id of each, from cotangents `[V, *out_shape]`."""
        if self._last is None or self._last[0] is not g:
            owner = samples.owners(g.shape[1:], g.device)
            ids = torch.arange(samples.n, device=g.device).reshape(1, -1, *(1,) * (g.dim() - 1))
            apart = torch.where(owner == ids, g[:, None], g.new_zeros(())).flatten(0, 1)
            leaves = [d.tensor for d in self.used]
            with stopped(self._stops):
                chunks = [pull_stack([self.edge], [some], leaves) for some in apart.split(_CHUNK)]
            found = {
                id(p): torch.cat([p.new_zeros(len(some), *p.shape) if x is None else x for some, x in parts])
                for p, parts in zip(leaves, _by_leaf(apart.split(_CHUNK), chunks), strict=True)
            }
            self._last = g, {key: x.unflatten(0, (len(g), samples.n)) for key, x in found.items()}
        return self._last[1]

    def release(self) -> None:
        """Forget the last cotangents."""
        self._last = None


def gradient_uses(out: Sequence[Tensor | None], uses: Sequence[Use], first: int, leaves: Leaves) -> list[GradientUse]:
    """The uses of those results of `torch.autograd.grad` that depend on parameters past all uses recorded before.

    first: the number of the first result's use.
    """
    stops = {use.edge.node for use in uses}
    batch = uses[0].batch if uses else torch.empty(0)
    found = []
    for index, x in enumerate(out, first):
        if x is None or not x.requires_grad or (edge := get_gradient_edge(x)).node in stops:
            continue
        inputs: dict[tuple[Node, int], GradientEdge] = {}
        used: dict[str, Derived] = {}
        for node, output in _reached(edge, stops):
            if node in stops:
                inputs[node, output] = GradientEdge(node, output)
            elif (name := leaves.name(node)) is not None:
                used[name] = Derived(node.variable, frozenset((name,)))  # type: ignore[attr-defined]
        if used:
            found.append(GradientUse(index, list(used.values()), list(inputs.values()), x, batch))
            stops.add(edge.node)
    return found


def _by_leaf(stacks: Sequence[Tensor], chunks: Sequence[Sequence[Any]]) -> Iterator[list[tuple[Tensor, Any]]]:
    for column in zip(*chunks, strict=True):
        yield list(zip(stacks, column, strict=True))


def _reached(edge: GradientEdge, stops: Collection[Node]) -> Iterator[tuple[Node, int]]:
    """The edges below an edge, each node once but for those where the walk ends."""
    seen: set[Any] = set()
    stack: list[tuple[Any, int]] = [(edge.node, edge.output_nr)]
    while stack:
        node, output = stack.pop()
        key = (node, output) if node in stops else node
        if node is None or key in seen:
            continue
        seen.add(key)
        yield node, output
        if node not in stops:
            stack += node.next_functions
