"""Gram matrices of per-sample gradients, for parameters whose uses have no common rows."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from layerwise.rows.base import Rows
from layerwise.rows.layout import LONG_SIDE, dense_sides
from layerwise.tensors import without_grad

__all__ = ["as_matrices", "dense_grams", "written_out"]


@without_grad
def dense_grams(chunks: Iterable[Tensor], shape: torch.Size, like: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of D D^T and D^T D over gradients `[..., *shape]` that come in chunks, D as `layout.dense_layout`.

    Shapes: returns `[1,O,O]`, and `[1,I,I]` or, for I over `layout.LONG_SIDE`, its diagonal `[1,I]`.
    """
    o, i, _ = dense_sides(shape)
    output = like.new_zeros(o, o)
    inner = like.new_zeros(i) if i > LONG_SIDE else like.new_zeros(i, i)
    for chunk in chunks:
        d = as_matrices(chunk, shape)
        across = d.transpose(0, 1).flatten(1)
        output.addmm_(across, across.T)
        if i > LONG_SIDE:
            inner += d.square().sum((0, 1))
        else:
            down = d.flatten(0, 1)
            inner.addmm_(down.T, down)
    return output[None], inner[None]


def as_matrices(gradients: Tensor, shape: torch.Size) -> Tensor:
    """Gradients `[..., *shape]` as matrices `[M,O,I]`."""
    o, i, turned = dense_sides(shape)
    count = gradients.numel() // shape.numel() if shape.numel() else 0
    return gradients.reshape(count, i, o).mT if turned else gradients.reshape(count, o, i)


def written_out(rows: Rows) -> Rows:
    """The same rows with an index or constant input as a float `[N,T,K,I]`."""
    a, g = rows.a, rows.g
    if a is None:
        return Rows(g.new_ones(*g.shape[1:4], 1), g, 1)
    if rows.kind == "float":
        return rows
    one_hot = g.new_zeros(*a.shape, rows.size_in).scatter_(2, a[:, :, None], 1)
    return Rows(one_hot[:, :, None], g, rows.size_in)
