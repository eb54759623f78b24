"""Losses that hold the last layer in themselves, as the layer and the loss that they are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

__all__ = ["PROJECTED"]


def _linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = None,
    options: Any = None,
    **others: Any,
) -> Tensor:
    """`linear`, then `cross_entropy`; `options`, how torch splits the batch, change no value."""
    classes, *rest, _ = linear_weight.shape
    weight, bias = linear_weight, linear_bias
    if rest:
        weight = weight.reshape(classes * math.prod(rest), weight.shape[-1])
        bias = None if bias is None else bias.reshape(-1)
    logits = F.linear(input, weight, bias)
    if rest:
        logits = logits.reshape(*input.shape[:-1], classes, *rest)
    return F.cross_entropy(logits, target, ignore_index=-100 if ignore_index is None else ignore_index, **others)


# torch has had the function since 2.13
PROJECTED: dict[Any, Callable[..., Tensor]] = {F.linear_cross_entropy: _linear_cross_entropy}
