"""From a loss call to its likelihood."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import BadInput, UnknownLoss
from .base import Likelihood
from .call import LossCall
from .per_element import elementwise
from .softmax import softmax

__all__ = ["likelihood", "scale_to_union"]


def likelihood(call: LossCall, logits: Tensor, c: Tensor | float) -> Likelihood:
    """The likelihood of a loss call at `logits`, with `c` the derivative of the total loss by its output.

    logits: values of `call.logits`, same shape; c: shape of the call's output.
    Raises: `UnknownLoss` where an argument besides the prediction requires grad; `BadInput` for shapes
    that do not fit and a mean over nothing.
    """
    if call.learned:
        raise UnknownLoss(
            f"{call}: {' and '.join(call.learned)} requires grad, so the loss is not a function of the "
            "prediction alone and its likelihood is unknown; detach it where it is not trained, or write the loss as a "
            "function of both and mark it: layerwise.as_loss(fn)((prediction, it), ...)."
        )
    if logits.shape != call.logits.shape:
        raise BadInput(f"{call}: got logits of shape {tuple(logits.shape)}.")
    build = elementwise if call.class_axis is None else softmax
    with torch.no_grad():
        return build(call, logits.detach(), c)


def scale_to_union(terms: Sequence[float], mean: bool) -> list[float]:
    """Weights of batches so that their weighted losses sum to the loss of the union of the batches.

    `terms_b / Σ terms` for mean losses, 1 otherwise; `terms` and `mean` are those of each batch's
    likelihood. Anything linear in the loss (gradient, Hessian, GGN) scales by the same number.
    Raises: `BadInput` where no batch has terms.
    """
    if not mean:
        return [1.0] * len(terms)
    total = math.fsum(terms)
    if total == 0:
        raise BadInput(f"the mean over {len(terms)} batches with no loss terms is 0/0.")
    return [t / total for t in terms]
