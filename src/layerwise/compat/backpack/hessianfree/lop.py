"""Products with the transposed Jacobian."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["L_op", "transposed_jacobian_vector_product"]


def L_op(ys: Any, xs: Any, ws: Any, retain_graph: bool = True, detach: bool = True) -> tuple[Tensor, ...]:
    """J^T w for J = dy/dx, as a tuple shaped like `xs`; zeros where y does not depend on an x.

    detach: whether to detach the result from the graph.
    """
    found = torch.autograd.grad(
        ys, xs, grad_outputs=ws, create_graph=True, retain_graph=retain_graph, allow_unused=True, materialize_grads=True
    )
    return tuple(g.detach() for g in found) if detach else found


def transposed_jacobian_vector_product(
    f: Any, x: Any, v: Any, retain_graph: bool = True, detach: bool = True
) -> tuple[Tensor, ...]:
    """The same as `L_op`."""
    return L_op(f, x, v, retain_graph=retain_graph, detach=detach)
