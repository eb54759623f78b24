"""Products with the Hessian."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from layerwise.compat.backpack.hessianfree.rop import R_op

__all__ = ["hessian_vector_product"]


def hessian_vector_product(
    f: Tensor, params: Any, v: Any, grad_params: Any = None, detach: bool = True
) -> tuple[Tensor, ...]:
    """H v for the Hessian H of a scalar `f`, as a tuple shaped like `params`.

    grad_params: the gradient of `f`, if it was computed before with `create_graph=True`.
    Source: Pearlmutter 1994, "Fast exact multiplication by the Hessian".
    """
    if grad_params is None:
        grad_params = torch.autograd.grad(f, params, create_graph=True, materialize_grads=True)
    return R_op(tuple(grad_params), params, v, detach=detach)
