"""Products with the Jacobian."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from layerwise.compat.backpack.hessianfree.lop import L_op

__all__ = ["R_op", "jacobian_vector_product"]


def R_op(ys: Any, xs: Any, vs: Any, retain_graph: bool = True, detach: bool = True) -> tuple[Tensor, ...]:
    """J v for J = dy/dx, as a tuple shaped like `ys`, by two reverse passes: the derivative in w of v · J^T w.

    detach: whether to detach the result from the graph.
    """
    outputs = ys if isinstance(ys, (tuple, list)) else (ys,)
    ws = [torch.zeros_like(y, requires_grad=True) for y in outputs]
    pulled = L_op(outputs, xs, ws, retain_graph=retain_graph, detach=False)
    return L_op(pulled, ws, vs, detach=detach)


def jacobian_vector_product(
    f: Any, x: Any, v: Any, retain_graph: bool = True, detach: bool = True
) -> tuple[Tensor, ...]:
    """The same as `R_op`."""
    return R_op(f, x, v, retain_graph=retain_graph, detach=detach)
