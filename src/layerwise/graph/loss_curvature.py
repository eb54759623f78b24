"""Loss Hessians, where curvature enters a graph: each is the Hessian of one loss in the tensors that it receives.

A known loss has one. A loss of the user's own has one for each tensor of its boundary, or a single one over all of
them where it couples them; the axis of its diagonal blocks is measured, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from layerwise.errors import Undefined, UnknownLoss
from layerwise.graph.coverage import Graph
from layerwise.graph.own_loss import OwnLossGraph, not_linear, scales, unconnected
from layerwise.graph.probes import draws, join, near, split, width
from layerwise.graph.samples import SampleLayout
from layerwise.losses import Likelihood, LossCall, OwnLikelihood, likelihood
from layerwise.rows.base import RowNumbers, Samples
from layerwise.tape.gradient_calls import GradientUse
from layerwise.tape.uses import LossUse, OwnUse

__all__ = ["LossCurvature", "NotLinear", "likelihoods", "loss_curvatures", "loss_hessian", "resolved"]

Parts = list[tuple[Samples | RowNumbers, torch.Size]]


@dataclass(frozen=True)
class LossCurvature:
    """The Hessian of one loss, and the edges where cotangents with it start.

    rows: the samples' axis of `likelihood.logits`; None where the samples were not measured.
    parts: None for one tensor. For several tensors side by side as `[N,D]`: each one's samples' axis and shape.
    """

    likelihood: Likelihood
    edges: list[GradientEdge]
    rows: Any
    parts: Parts | None = None

    def cotangents(self, stack: Tensor) -> list[Tensor]:
        """Columns `[V, *logits]` as one stack of cotangents for each edge."""
        return [stack] if self.parts is None else _split_parts(stack, self.parts)


def resolved(prove: Callable[[Sequence[LossUse]], Graph], own_losses: bool = True) -> tuple[Graph, list[Likelihood]]:
    """A graph and the likelihoods of its known losses; a loss that the total is not linear in counts as the user's own.

    prove: makes the graph, with some losses taken as unknown. own_losses: whether the tape recorded what the model
    returned; where it did not, a loss that the total is not linear in raises UnknownLoss.
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


def _check_boundary(own: OwnUse) -> None:
    """Refuse curvature of a loss that some use reaches past the model's output."""
    if isinstance(own.bypassed, GradientUse):
        raise Undefined(
            f"the loss holds derivatives of the model ({own.bypassed}, by torch.autograd.grad with create_graph=True), "
            "so it is no function of the model's outputs, and has no Gauss-Newton matrix or Kronecker factors. "
            "Quantities of the gradient, DiagHessian and Hessian are exact; so is all else where such derivatives "
            "enter a known loss by themselves, as forces do: F.mse_loss(forces, y)"
        )
    if own.bypassed is not None:
        raise UnknownLoss(
            f"a path from the loss to {own.bypassed} passes through no loss that is known, nor through what the model "
            "returned (or its modules, where methods such as `encode` made the loss), so it is not said where the "
            "model ends and the loss begins; mark the loss, lw.as_loss(fn)(outputs, ...), with the model's outputs as "
            "the first argument, or make it with torch.nn.functional's cross_entropy, mse_loss, ... . Quantities of "
            "the gradient, DiagHessian and Hessian need no such mark"
        )


def loss_curvatures(graph: Graph, known: Sequence[Likelihood], layout: SampleLayout | None) -> list[LossCurvature]:
    """The loss Hessians of a graph. Raises UnknownLoss (no boundary) or Undefined (not twice differentiable)."""
    rows: Sequence[Samples | RowNumbers | None] = [None] * len(graph.losses) if layout is None else layout.losses
    found = [
        LossCurvature(lik, [loss.logits], where)
        for loss, lik, where in zip(graph.known, known, rows[: len(known)], strict=True)
    ]
    at = len(known)
    for own in graph.own:
        _check_boundary(own)
        mine = [s for s in rows[at : at + len(own.boundary)] if s is not None]
        at += len(own.boundary)
        found += _own_curvatures(OwnLossGraph(graph, own), mine)
    parts = [curvature.likelihood for curvature in found]
    for lik in parts:
        if isinstance(lik, OwnLikelihood):
            lik.beside = [other for other in parts if other is not lik]
    return found


def loss_hessian(graph: Graph, known: Sequence[Likelihood]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Products with the Hessian of the total in all tensors that its losses receive, in the order of `graph.losses`.

    Neither separate samples nor convexity is needed. Raises UnknownLoss where a loss has no boundary, Undefined where
    it holds derivatives of the model.
    """
    for own in graph.own:
        _check_boundary(own)
    own_losses = [OwnLossGraph(graph, own) for own in graph.own]

    def product(stacks: Sequence[Tensor]) -> list[Tensor]:
        found = [lik.hessian_product(x) for lik, x in zip(known, stacks[: len(known)], strict=True)]
        for own in own_losses:
            found += own.product(stacks[len(found) : len(found) + len(own.edges)])
        return found

    return product


def _own_curvatures(own_loss: OwnLossGraph, rows: Sequence[Samples | RowNumbers]) -> Iterator[LossCurvature]:
    """One Hessian for each tensor of a boundary, or one over all of them where they are coupled."""
    name = str(own_loss.own.call)
    gradient = [g.detach() for g in own_loss.gradient()]
    axes = [_axis(own_loss, k, s) for k, s in enumerate(rows)]
    if all(axis is not _WHOLE for axis in axes):
        for k, (edge, axis, s) in enumerate(zip(own_loss.edges, axes, rows, strict=True)):
            yield LossCurvature(OwnLikelihood(name, gradient[k], axis, gradient[k], _partial(own_loss, k)), [edge], s)
        return
    parts = [(s, g.shape) for s, g in zip(rows, gradient, strict=True)]

    def product(stack: Tensor) -> Tensor:
        return _join_parts(own_loss.product(_split_parts(stack, parts)), rows)

    packed = _join_parts([g[None] for g in gradient], rows)[0]
    yield LossCurvature(OwnLikelihood(name, packed, 1, packed, product), own_loss.edges, Samples(rows[0].n, 0), parts)


def _split_parts(stack: Tensor, parts: Parts) -> list[Tensor]:
    """`[V,N,D]` as the stacks of the tensors side by side in it."""
    sizes = [width(s, shape) for s, shape in parts]
    return [join(x, s, shape) for x, (s, shape) in zip(stack.split(sizes, 2), parts, strict=True)]


def _join_parts(stacks: Sequence[Tensor], rows: Sequence[Samples | RowNumbers]) -> Tensor:
    return torch.cat([split(x, s) for x, s in zip(stacks, rows, strict=True)], 2)


def _partial(own_loss: OwnLossGraph, k: int) -> Callable[[Tensor], Tensor]:
    """Products with the diagonal block of one boundary tensor."""

    def product(stack: Tensor) -> Tensor:
        zeros = [g.new_zeros(()).expand(len(stack), *g.shape) for g in own_loss.gradient()]
        return own_loss.product([*zeros[:k], stack, *zeros[k + 1 :]])[k]

    return product


_WHOLE = -1


def _axis(own_loss: OwnLossGraph, k: int, samples: Samples | RowNumbers) -> int | None:
    """The axis of a boundary tensor along which its Hessian is block-diagonal; None: it is diagonal; _WHOLE: no axis.

    H has blocks along an axis where H (m v) = m H v for m that varies along all the other ones.
    """
    gradients = [g.detach() for g in own_loss.gradient()]
    like = gradients[k]
    zeros = [g.new_zeros(()).expand(1, *g.shape) for g in gradients]

    def product(v: Tensor) -> list[Tensor]:
        return [h[0] for h in own_loss.product([*zeros[:k], v[None], *zeros[k + 1 :]])]

    eps = torch.finfo(like.dtype).eps
    v = draws(1, like.numel(), like).view(like.shape)
    plain = product(v)
    if any(bool((h != 0).any()) for j, h in enumerate(plain) if j != k):
        return _WHOLE
    sizes = samples.owners(like.shape).shape
    for axis in [None, *(a for a in range(like.dim()) if sizes[a] == 1)]:
        shape = [1 if a == axis else size for a, size in enumerate(like.shape)]
        m = draws(1, torch.Size(shape).numel(), like).view(shape)
        if near(product(m * v)[k], m * plain[k], eps):
            return axis
    return _WHOLE


class NotLinear(UnknownLoss):
    """The total is not linear in a known loss, so it counts as one of the user's own, where those are allowed."""

    def __init__(self, loss: LossUse) -> None:
        super().__init__(not_linear(str(loss)))
        self.loss = loss


def likelihoods(graph: Graph) -> list[Likelihood]:
    """The likelihoods of the known losses, each weighted with c = dL/dl, L the total and l the loss's value.

    Raises UnknownLoss where there is no loss at all, or NotLinear where L is not linear in one.
    """
    if not graph.losses:
        raise UnknownLoss(
            "the loss depends on the parameters through no call that is known as a loss; make it with "
            "torch.nn.functional's cross_entropy, mse_loss, ..., or mark it: layerwise.as_loss(fn)(outputs, ...)"
        )
    if not graph.known:
        return []
    found = []
    for loss, c in zip(graph.known, scales(graph, [loss.value for loss in graph.known]), strict=True):
        if c is None:
            raise UnknownLoss(unconnected(str(loss)))
        if c.requires_grad:
            raise NotLinear(loss)
        assert isinstance(loss.call, LossCall)
        found.append(likelihood(loss.call, loss.call.logits, c.detach()))
        found[-1].unread = graph.unread
    return found
