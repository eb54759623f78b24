"""Products with the generalized Gauss-Newton matrix (GGN)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from layerwise.compat.backpack.hessianfree.hvp import hessian_vector_product
from layerwise.compat.backpack.hessianfree.lop import L_op
from layerwise.compat.backpack.hessianfree.rop import R_op

__all__ = ["ggn_vector_product", "ggn_vector_product_from_plist"]


def ggn_vector_product(loss: Tensor, output: Tensor, model: nn.Module, v: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """G v for all trainable parameters of a model; v and the result are lists of their shapes."""
    return ggn_vector_product_from_plist(loss, output, [p for p in model.parameters() if p.requires_grad], v)


def ggn_vector_product_from_plist(
    loss: Tensor, output: Tensor, plist: Sequence[Tensor], v: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """J^T H J v, with J the Jacobian of `output` in the tensors of `plist` and H the Hessian of `loss` in `output`.

    Source: Schraudolph 2002, "Fast curvature matrix-vector products for second-order gradient descent".
    """
    pushed = R_op(output, plist, v)
    return L_op(output, plist, hessian_vector_product(loss, output, pushed))
