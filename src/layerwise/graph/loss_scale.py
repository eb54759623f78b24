"""The factor of a gradient scaler in a loss, found on autograd's graph."""

from __future__ import annotations

from torch import Tensor

from layerwise.errors import BadInput
from layerwise.graph.walk import nodes
from layerwise.losses.gradient_scalers import ScalerCalls

__all__ = ["loss_scale", "mixed_scales"]


def loss_scale(calls: ScalerCalls, total: Tensor) -> float | None:
    """The factor S of a gradient scaler in a total `S (L_1 + L_2 + ...)`; None where no scaler has multiplied it.

    Every path from the total to a parameter passes the product of a loss and the factor, or none does.
    Raises BadInput for a total of scaled and unscaled parts, or of parts with several factors.
    """
    if not calls.factors or total.grad_fn is None:
        return None
    reached = nodes([(total.grad_fn, 0)], dict.fromkeys(calls.factors, ()))
    found: dict[float, None] = {}
    for node in reached:
        factor = calls.factors.get(node)
        if factor is not None:
            found[float(factor)] = None
        elif hasattr(node, "variable"):  # a parameter, met above any product
            found[1.0] = None
    scaled = any(f != 1.0 for f in found) or any(total.grad_fn is node for node in calls.factors)
    if not scaled:
        return None
    if len(found) > 1:
        raise BadInput(
            f"the loss adds up parts that a gradient scaler multiplied by {', '.join(f'{f:g}' for f in found)}: scale "
            "their sum, scaler.scale(loss)"
        )
    return next(iter(found))


def mixed_scales(one: float | None, other: float | None) -> str:
    """The text of an error: a scaler changed its factor between backward passes of one step."""
    return (
        f"the backward passes of one step were scaled by {one} and by {other} (None: not scaled), which .grad mixes; "
        "call scaler.update() between steps alone"
    )
