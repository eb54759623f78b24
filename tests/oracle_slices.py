"""Kronecker factors of parameters without a matrix of their own: from gradients, and of slices used by `F.linear`.

A part of the oracle: plain torch, loops, no import of the library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import _flat, _pull
from torch import Tensor

__all__ = ["gradient_factors", "slice_factors"]


def gradient_factors(columns: Tensor) -> tuple[Tensor, Tensor]:
    """(A, B) `[1,I,I], [1,O,O]` from gradients `[M, *shape]`: B = sum of D D^T, A = sum of D^T D over tr B.

    D is the first axis by all others; a vector is a column.
    """
    rows = columns.shape[1] if columns.dim() > 1 else 1
    a, b = torch.zeros(()), torch.zeros(rows, rows)
    for column in columns:
        d = column.reshape(rows, -1)
        a, b = a + d.T @ d, b + d @ d.T
    return (a / b.trace() if b.any() else a)[None], b[None]


def slice_factors(
    params: Mapping[str, Tensor],
    logits: Callable[[], Any],
    hessian: Tensor,
    *,
    sharing: str,
    axis: int,
) -> dict[str, tuple[Tensor | None, Tensor]]:
    """(A, B) of every third of the first axis of a parameter that `F.linear` reads by views, as `name[0]` and so on.

    hessian: of the loss in the flat logits. axis: that of the samples in the layers' inputs. A is None for biases.
    """
    calls: dict[str, list[tuple[Tensor | None, Tensor, int]]] = {}
    plain = F.linear

    def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        z = plain(x, w, b)
        for used, a in ((w, x.detach().clone()), (b, None)):
            for name, p in params.items():
                if used is not None and used._base is p:
                    width, row = len(p) // 3, p.stride(0)
                    for start in range(0, len(used), width):
                        key = f"{name}[{(used.storage_offset() // row + start) // width}]"
                        calls.setdefault(key, []).append((a, z, start))
        return z.clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", linear)
        z = _flat(logits())
    found = {}
    for key, kept in sorted(calls.items()):
        width = len(params[key.partition("[")[0]]) // 3
        grads = [_pull(element, {str(i): out for i, (_, out, _) in enumerate(kept)}) for element in z]
        rows = [
            torch.cat([_by_sample(g, axis)[..., c[2] : c[2] + width] for g, c in zip(gs, kept, strict=True)], 1)
            for gs in grads
        ]
        j = torch.stack(rows)  # [D,N,T,O]
        inputs = [_by_sample(a, axis) for a, _, _ in kept if a is not None]
        a = torch.cat(inputs, 1) if inputs else None
        if sharing == "reduce":
            j, a = j.sum(2, keepdim=True), None if a is None else a.mean(1, keepdim=True)
        cells = [(n, t) for n in range(j.shape[1]) for t in range(j.shape[2])]
        b = sum(j[:, n, t].T @ hessian @ j[:, n, t] for n, t in cells)
        if a is not None:
            a = (sum(torch.outer(a[n, t], a[n, t]) for n, t in cells) / len(cells))[None]
        found[key] = a, b[None]
    return found


def _by_sample(x: Tensor, axis: int) -> Tensor:
    """`[N,T,features]`."""
    x = x.movedim(axis, 0)
    return x.reshape(len(x), -1, x.shape[-1])
