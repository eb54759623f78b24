"""Inner products of per-sample gradients with given matrices, and their projections from both sides, from the rows."""

from __future__ import annotations

import torch
from torch import Tensor

from layerwise.rows.base import Rows
from layerwise.rows.contract import per_sample
from layerwise.rows.cost import TRAFFIC
from layerwise.rows.pieces import chunks, dims, in_pieces, ranges
from layerwise.tensors import without_grad

__all__ = ["inner", "inner_by_position", "two_sided"]


@without_grad
def inner(rows: Rows, matrices: Tensor) -> Tensor:
    """Inner products of each per-sample gradient D with Q matrices.

    sum_{k,o,i} D[v,n,k,o,i] M[q,k,o,i], from D chunk by chunk, or position by position where that costs less.

    Shapes: matrices `[Q,K,O,I]`; returns `[V,N,Q]`. Raises: `BadInput` where the rows contradict each other.
    """
    v, n, t, k, o, i = dims(rows)
    q = len(matrices)
    if rows.a is None:
        return rows.g.sum(2).flatten(2) @ matrices.flatten(1).T
    if not rows.a.is_floating_point() or (rows.laid_out and t * q < t + q + TRAFFIC):
        return inner_by_position(rows, matrices).sum(2)
    result = rows.g.new_empty(v, n, q)
    flat = matrices.flatten(1).T
    for w, low, high, d in chunks(rows):
        torch.mm(d.flatten(1), flat, out=result[w, low:high])
    return result


@without_grad
def inner_by_position(rows: Rows, matrices: Tensor) -> Tensor:
    """What each position adds to `inner`: sum_{k,o} g[v,n,t,k,o] (M[q] a)[n,t,k,o].

    Shapes: matrices `[Q,K,O,I]`; returns `[V,N,T,Q]`. Raises: `BadInput` where the rows contradict each other.
    """
    v, n, t, k, o, i = dims(rows)
    if rows.a is None:
        return rows.g.flatten(3) @ matrices.flatten(1).T
    if o == i == 1 and rows.a.is_floating_point():
        return (rows.g * rows.a)[..., 0] @ matrices.flatten(1).T
    result = rows.g.new_empty(v, n, t, len(matrices))
    for low, high in ranges(n, t * k * (o + i) * rows.g.element_size(), rows.g):
        a, g = rows.a[low:high], rows.g[:, low:high]
        for q, matrix in enumerate(matrices):
            out = _times(a, matrix.mT) if a.is_floating_point() else matrix[0].T[a][:, :, None]
            result[:, low:high, :, q] = (g * out).sum((3, 4))
    return result


@without_grad
def two_sided(rows: Rows, left: Tensor, right: Tensor) -> Tensor:
    """Each per-sample gradient D multiplied from both sides, inputs and cotangents apart.

    sum_{k,o,i} left[p,k,o] D[v,n,k,o,i] right[q,k,i] = sum_{t,k} (left g)[p] (right a)[q].

    Shapes: left `[P,K,O]`, right `[Q,K,I]`; returns `[V,N,P,Q]`. Raises: `BadInput` where the rows contradict each
    other. Source: Choe et al. (2024), "What is your data worth to GPT?", section 3.
    """
    v, n, t, k, o, i = dims(rows)
    if o == i == 1 and rows.kind != "index":
        return (per_sample(rows)[:, :, None, :, 0, 0] * left[..., 0]) @ right[..., 0].T
    outputs, inputs = left.permute(1, 2, 0), right.permute(1, 2, 0)  # [K,O,P], [K,I,Q]
    result = rows.g.new_empty(v, n, len(left), len(right))
    start = 0
    for piece in in_pieces(rows):
        stop = start + piece.g.shape[1]
        if piece.a is None:
            a = inputs[:, 0].expand(stop - start, t, -1, -1)
        else:
            a = _times(piece.a, inputs) if piece.a.is_floating_point() else inputs[0][piece.a][:, :, None]
        result[:, start:stop] = _times(piece.g, outputs).flatten(2, 3).mT @ a.flatten(1, 2)
        start = stop
    return result


def _times(x: Tensor, w: Tensor) -> Tensor:
    """`[..., K,P]`: rows `[..., K,F]` times a matrix for each group, `[K,F,P]`."""
    if len(w) == 1:
        return (x.squeeze(-2) @ w[0])[..., None, :]
    return torch.einsum("...kf,kfp->...kp", x, w)
