"""Heads: where curvature enters a graph, each the Hessian of one loss at the tensors that it receives.

A known loss is one head. A loss of the user's own is one head for each tensor of its boundary, or a single one over
all of them where it couples them; the axis that carries its blocks is measured, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import UnknownLoss
from layerwise.graph.coverage import Graph
from layerwise.graph.own_loss import Inside, not_linear, scales
from layerwise.graph.probes import draws, join, near, split
from layerwise.graph.samples import Layout
from layerwise.losses import Likelihood, LossCall, Own, likelihood
from layerwise.rows.base import Samples
from layerwise.tape.uses import LossUse, OwnUse

__all__ = ["Head", "NotLinear", "bypassed", "heads", "likelihoods", "loss_hessian", "resolved"]

Parts = list[tuple[Samples, torch.Size]]


@dataclass(frozen=True)
class Head:
    """A loss Hessian, and where its cotangents start.

    edges: where they do. rows: where the samples lie in `likelihood.logits`; None where that is not asked for.
    parts: where the likelihood's outputs are several tensors side by side, `[N,D]`: the samples in each, and its shape.
    """

    likelihood: Likelihood
    edges: list[Any]
    rows: Any
    parts: Parts | None = None

    def cotangents(self, stack: Tensor) -> list[Tensor]:
        """A stack `[V, *logits]` as one for each edge."""
        return [stack] if self.parts is None else _apart(stack, self.parts)


def resolved(prove: Callable[[Sequence[LossUse]], Graph], own_losses: bool = True) -> tuple[Graph, list[Likelihood]]:
    """A graph and the likelihoods of its known losses; those that the total is not linear in are not taken as known.

    prove: the graph without some of the losses. own_losses: whether the tape told what the model returned; where it
    did not, such losses raise UnknownLoss.
    """
    without: list[LossUse] = []
    while True:
        graph = prove(without)
        try:
            return graph, likelihoods(graph)
        except NotLinear as error:
            if not own_losses:
                raise
            without.append(error.loss)


def bypassed(own: OwnUse) -> str:
    """The text of the error for curvature of a loss whose boundary nobody chose."""
    return (
        f"a path from the loss to {own.bypassed} passes through no loss that is known, nor through what the observed "
        "module returned, so it is not said where the model ends and the loss begins; mark the loss, "
        "lw.as_loss(fn)(outputs, ...), with the model's outputs as the first argument, or make it with "
        "torch.nn.functional's cross_entropy, mse_loss, ... . Quantities of the gradient need no such mark"
    )


def heads(graph: Graph, known: Sequence[Likelihood], layout: Layout | None) -> list[Head]:
    """All heads of a graph. Raises UnknownLoss where a loss has no boundary, and what differentiating twice raises."""
    rows: Sequence[Samples | None] = [None] * len(graph.losses) if layout is None else layout.losses
    found = [
        Head(lik, [loss.logits], where) for loss, lik, where in zip(graph.known, known, rows[: len(known)], strict=True)
    ]
    at = len(known)
    for own in graph.own:
        if own.bypassed is not None:
            raise UnknownLoss(bypassed(own))
        mine = [s for s in rows[at : at + len(own.boundary)] if s is not None]
        at += len(own.boundary)
        found += _own_heads(Inside(graph, own), mine)
    return found


def loss_hessian(graph: Graph, known: Sequence[Likelihood]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Products with the Hessian of the total in all that its losses receive, in the order of `graph.losses`.

    Nothing is asked of samples or of convexity. Raises UnknownLoss where a loss has no boundary.
    """
    for own in graph.own:
        if own.bypassed is not None:
            raise UnknownLoss(bypassed(own))
    insides = [Inside(graph, own) for own in graph.own]

    def product(stacks: Sequence[Tensor]) -> list[Tensor]:
        found = [lik.hessian_product(x) for lik, x in zip(known, stacks[: len(known)], strict=True)]
        for inside in insides:
            found += inside.product(stacks[len(found) : len(found) + len(inside.edges)])
        return found

    return product


def _own_heads(inside: Inside, rows: list[Samples]) -> Iterator[Head]:
    """One head for each tensor of a boundary, or one over all of them."""
    name = str(inside.own.call)
    gradient = [g.detach() for g in inside.gradient()]
    axes = [_axis(inside, k, s) for k, s in enumerate(rows)]
    if all(axis is not _WHOLE for axis in axes):
        for k, (edge, axis, s) in enumerate(zip(inside.edges, axes, rows, strict=True)):
            yield Head(Own(name, gradient[k], axis, gradient[k], _partial(inside, k)), [edge], s)
        return
    parts = [(s, g.shape) for s, g in zip(rows, gradient, strict=True)]

    def product(stack: Tensor) -> Tensor:
        return _together(inside.product(_apart(stack, parts)), rows)

    packed = _together([g[None] for g in gradient], rows)[0]
    yield Head(Own(name, packed, 1, packed, product), inside.edges, Samples(rows[0].n, 0), parts)


def _apart(stack: Tensor, parts: Parts) -> list[Tensor]:
    sizes = [shape.numel() // s.n for s, shape in parts]
    return [join(x, s, shape) for x, (s, shape) in zip(stack.split(sizes, 2), parts, strict=True)]


def _together(stacks: Sequence[Tensor], rows: Sequence[Samples]) -> Tensor:
    return torch.cat([split(x, s) for x, s in zip(stacks, rows, strict=True)], 2)


def _partial(inside: Inside, k: int) -> Callable[[Tensor], Tensor]:
    """Products with the diagonal block of one boundary tensor."""

    def product(stack: Tensor) -> Tensor:
        zeros = [g.new_zeros(()).expand(len(stack), *g.shape) for g in inside.gradient()]
        return inside.product([*zeros[:k], stack, *zeros[k + 1 :]])[k]

    return product


_WHOLE = -1


def _axis(inside: Inside, k: int, samples: Samples) -> int | None:
    """The axis of a boundary tensor along which its Hessian has blocks; None: it is diagonal; _WHOLE: no axis.

    H has blocks along an axis where H (m v) = m H v for m that varies along all the other ones.
    """
    gradients = [g.detach() for g in inside.gradient()]
    like = gradients[k]
    zeros = [g.new_zeros(()).expand(1, *g.shape) for g in gradients]

    def product(v: Tensor) -> list[Tensor]:
        return [h[0] for h in inside.product([*zeros[:k], v[None], *zeros[k + 1 :]])]

    eps = torch.finfo(like.dtype).eps
    v = draws(1, like.numel(), like).view(like.shape)
    plain = product(v)
    if any(bool((h != 0).any()) for j, h in enumerate(plain) if j != k):
        return _WHOLE
    for axis in [None, *(a for a in range(like.dim()) if a != samples.axis)]:
        shape = [1 if a == axis else size for a, size in enumerate(like.shape)]
        m = draws(1, torch.Size(shape).numel(), like).view(shape)
        if near(product(m * v)[k], m * plain[k], eps):
            return axis
    return _WHOLE


class NotLinear(UnknownLoss):
    """The total is not linear in a known loss, which may then be taken as one of the user's own."""

    def __init__(self, loss: LossUse) -> None:
        super().__init__(not_linear(loss.call.name))
        self.loss = loss


def likelihoods(graph: Graph) -> list[Likelihood]:
    """The known losses with the weight c = dL/dl that the total L gives their values l, in the order of the graph.

    Raises UnknownLoss where there is no loss at all, or NotLinear where L is not linear in one.
    """
    if not graph.losses:
        raise UnknownLoss("the loss depends on the parameters through no call that is known as a loss")
    if not graph.known:
        return []
    found = []
    for loss, c in zip(graph.known, scales(graph, [loss.value for loss in graph.known]), strict=True):
        if c is None:
            raise UnknownLoss(f"the total does not depend on its {loss.call.name}")
        if c.requires_grad:
            raise NotLinear(loss)
        assert isinstance(loss.call, LossCall)
        found.append(likelihood(loss.call, loss.call.logits, c.detach()))
    return found
