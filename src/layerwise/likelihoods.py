"""The likelihoods of a total loss: each recorded loss call with the weight that the total gives it."""

from __future__ import annotations

from layerwise.boundary import not_linear, scales
from layerwise.coverage import Graph
from layerwise.errors import UnknownLoss
from layerwise.losses import Likelihood, LossCall, likelihood
from layerwise.uses import LossUse

__all__ = ["NotLinear", "likelihoods"]


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
