"""The likelihoods of a total loss: each recorded loss call with the weight that the total gives it."""

from __future__ import annotations

import torch

from layerwise.coverage import Graph
from layerwise.errors import UnknownLoss
from layerwise.losses import Likelihood, likelihood
from layerwise.pull import pull

__all__ = ["likelihoods"]


def likelihoods(graph: Graph) -> list[Likelihood]:
    """The losses with the weight c = dL/dl that the total L gives their values l, in the order of the graph.

    Raises UnknownLoss where there is no known loss, or where L is not linear in one.
    """
    if not graph.losses:
        raise UnknownLoss("the loss depends on the parameters through no call that is known as a loss")
    values = [loss.value for loss in graph.losses]
    weight = graph.weight if graph.weight is not None else torch.ones_like(graph.total)
    with torch.enable_grad():
        scales = pull([graph.total], [weight], values, create_graph=True)
    found = []
    for loss, c in zip(graph.losses, scales, strict=True):
        if c is None:
            raise UnknownLoss(f"the total does not depend on its {loss.call.name}")
        if c.requires_grad:
            raise UnknownLoss(
                f"the total is not linear in its {loss.call.name} (a power, a product of losses, or a learned "
                "weight), so it is no sum over samples; observe the loss itself, times constants"
            )
        found.append(likelihood(loss.call, loss.call.logits, c.detach()))
    return found
