"""Random projections of per-sample gradients by rank-one sign matrices, from the rows, without the gradients.

The coordinate j of a parameter's gradient D, taken as a matrix `[R,C]`, is `sum_rc left[j,r] D[r,c] right[j,c]`.
A rank-one matrix meets a layer's rows position by position, `sum_t (g_t · left_j)(a_t · right_j)`, so that it costs
two thin matrix products.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from layerwise.rows.base import Rows
from layerwise.rows.cost import TRAFFIC
from layerwise.rows.layout import MatrixLayout
from layerwise.rows.pieces import dims, ranges
from layerwise.tensors import without_grad

__all__ = ["in_layout", "project_rows", "project_vectors", "signs"]


def signs(name: str, shape: Sequence[int], count: int, seed: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Independent random signs `[count,R]` and `[count,C]` for a parameter, the same for the same name and seed.

    R is the first axis of `shape` and C all others together; a parameter of one axis has C = 1 with the sign 1.
    Type and device are those of `like`; the draw itself is made on the CPU.
    """
    shape = torch.Size(shape)
    r, c = (shape[0], shape[1:].numel()) if len(shape) > 1 else (shape.numel(), 1)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    left = torch.randint(2, (count, r), generator=generator).mul_(2).sub_(1)
    right = torch.randint(2, (count, c), generator=generator).mul_(2).sub_(1) if c > 1 else torch.ones(count, 1)
    return left.to(like), right.to(like)


def in_layout(left: Tensor, right: Tensor, layout: MatrixLayout) -> tuple[Tensor, Tensor, bool] | None:
    """The same rank-one matrices as factors `[J,K,O]` and `[J,K,I]` of the layout `[K,O,I]` of a parameter's uses.

    With them, whether the first of the two is made of `right`. None where they do not factor in that layout.
    """
    place = layout.places()
    if not place.numel():
        return None
    row, column = place // right.shape[1], place % right.shape[1]
    for out, into, outer, inner, turned in ((row, column, left, right, False), (column, row, right, left, True)):
        if bool((out == out[:, :, :1]).all()) and bool((into == into[:, :1]).all()):
            return outer[:, out[:, :, 0].to(left.device)], inner[:, into[:, 0].to(left.device)], turned
    return None


@without_grad
def project_vectors(g: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`[V,N,J]`: projections of per-sample gradients `[V,N,R·C]` by `left` `[J,R]` and `right` `[J,C]`."""
    if not g.shape[2]:
        return g.new_zeros(*g.shape[:2], len(left))
    d = g.unflatten(2, (left.shape[1], right.shape[1]))
    if right.shape[1] == 1:
        return d[..., 0] @ (left * right).T
    return ((d @ right.T) * left.T).sum(2)


@without_grad
def project_rows(rows: Rows, left: Tensor, right: Tensor) -> Tensor:
    """`[V,N,J]`: projections of the per-sample gradients D of any rows, without D of more than a few samples.

    sum_{k,o,i} left[j,k,o] D[v,n,k,o,i] right[j,k,i], from thin products at each position, or from D chunk by chunk
    where that costs less.
    Shapes: left `[J,K,O]`, right `[J,K,I]`. Raises: `BadInput` where the rows contradict each other.
    """
    v, n, t, k, o, i = dims(rows)
    j = len(left)
    if rows.a is None:
        return rows.g.sum(2).flatten(2) @ (left * right).flatten(1).T
    result = rows.g.new_empty(v, n, j)
    thin = not rows.a.is_floating_point() or _thin_is_cheaper(t, o, i, j)
    project = _by_positions if thin else _by_gradients
    each = k * t * j * 2 if thin else k * (o * i + o * j)
    u, w = left.permute(1, 2, 0), right.permute(1, 2, 0)  # [K,O,J], [K,I,J]
    for low, high in ranges(n, each * rows.g.element_size(), rows.g):
        here = slice(low, high)
        for c in range(v):
            result[c, here] = project(rows.a[here], rows.g[c, here], u, w)
    return result


def _thin_is_cheaper(t: int, o: int, i: int, j: int) -> bool:
    """Whether two products at each position cost less than D and its product with one side."""
    thin = t * j * (o + i + 2 * TRAFFIC)
    return thin < o * i * (t + TRAFFIC) + o * j * (i + TRAFFIC)


def _by_positions(a: Tensor, g: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`[N,J]` = sum_{t,k} (g · left)(a · right); a: `[N,T,K,I]` or an index `[N,T]`."""
    outputs = g.transpose(1, 2) @ left  # n, k, t, j
    inputs = a.transpose(1, 2) @ right if a.is_floating_point() else right[0, a][:, None]
    return (outputs * inputs).sum((1, 2))


def _by_gradients(a: Tensor, g: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`[N,J]` = sum_{k,o} left (D right), with D `[N,K,O,I]`."""
    n, _, k, i = a.shape
    o = g.shape[-1]
    if o == i == 1:
        return (g[..., 0] * a[..., 0]).sum(1) @ (left * right)[:, 0]
    d = g.permute(0, 2, 3, 1) @ a.transpose(1, 2)
    return ((d @ right) * left).sum((1, 2))
