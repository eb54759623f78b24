"""Second moments of per-sample gradients, with one weight of either sign for each cotangent and sample."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from layerwise.rows import contract
from layerwise.rows.base import Rows
from layerwise.tensors import without_grad

__all__ = ["add_squares", "second_moment", "squares"]


@without_grad
def second_moment(rows: Rows, weights: Tensor | None, holds: Callable[[Tensor], bool] = bool) -> Tensor:
    """sum_{v,n} w[v,n] D[v,n,k,o,i]², `[K,O,I]`; weights `[V,N]`, None: all 1. holds: reads a flag `[]`."""
    if weights is None:
        return contract.second_moment(rows)
    if rows.g.shape[2] == 1:
        total = rows.g.new_zeros(rows.g.shape[1:])
        add_squares(total, rows.g, weights[:, :, None, None, None])
        a = rows.a if rows.a is None or not rows.a.is_floating_point() else rows.a.square()
        return contract.total(Rows(a, total[None], rows.size_in))[0]
    result = rows.g.new_zeros(())
    for sign in (1, -1):  # the cheap forms of the second moment have no weights, so these enter the cotangents
        root = (sign * weights).clamp(min=0).sqrt()
        if holds(root.any()):
            g = rows.g * root[:, :, None, None, None]
            result = result + sign * contract.second_moment(Rows(rows.a, g, rows.size_in))
    return result if result.dim() else rows.g.new_zeros(rows.g.shape[3], rows.g.shape[4], rows.size_in)


@without_grad
def squares(rows: Rows, weights: Tensor | None) -> Tensor:
    """sum_v w[v,n] D[v,n,k,o,i]², `[N,K,O,I]`, one cotangent at a time; weights `[V,N]`, None: all 1."""
    _, n, _, k, o = rows.g.shape
    total = rows.g.new_zeros(n, k, o, rows.size_in)
    for v in range(len(rows.g)):
        d = contract.per_sample(Rows(rows.a, rows.g[v : v + 1], rows.size_in))
        add_squares(total, d, None if weights is None else weights[v : v + 1, :, None, None, None])
    return total


def add_squares(total: Tensor, g: Tensor, weights: Tensor | None) -> None:
    """Add sum_v w[v] g[v]² to a total of the shape of g[v], in its memory; weights are broadcast to g."""
    for v, column in enumerate(g):
        total.addcmul_(column if weights is None else column * weights[v], column)
