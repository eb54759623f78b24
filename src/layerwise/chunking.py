"""Per-sample gradients of rows a chunk of samples at a time, in memory that is used again."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from layerwise.ops.base import Rows, Windows
from layerwise.rows import dims, pieces

__all__ = ["CHUNK_BYTES", "chunks", "fill", "product", "product_of", "ranges"]

CHUNK_BYTES = 2**21  # scratch of one chunk: between one MiB and four all shapes were within 5 % of their best
CHUNK_BYTES_DEVICE = 2**27  # on an accelerator launches cost more than memory


def product(g: Tensor, a: Tensor, out: Tensor) -> Tensor:
    """D `[N,K,O,I]` of one cotangent, into contiguous memory."""
    n, t, k, i = a.shape
    o = g.shape[-1]
    if t == 1:
        return torch.mul(g[:, 0, :, :, None], a[:, 0, :, None, :], out=out)
    if o == i == 1:
        torch.sum(g[..., 0] * a[..., 0], 1, out=out[..., 0, 0])
        return out
    left, right = g.permute(0, 2, 3, 1).reshape(n * k, o, t), a.transpose(1, 2).reshape(n * k, t, i)
    torch.bmm(left, right, out=out.view(n * k, o, i))
    return out


def _laid_out(a: Tensor, g: Tensor) -> Iterator[tuple[int, int, int, Tensor]]:
    v, n, t, k, o = g.shape
    i = a.shape[-1]
    each = k * (t + 1 if o == i == 1 else o * i) * g.element_size()
    parts = list(ranges(n, each, g))
    scratch = g.new_empty(max((high - low for low, high in parts), default=0), k, o, i)
    for low, high in parts:
        for w in range(v):
            yield w, low, high, product(g[w, low:high], a[low:high], out=scratch[: high - low])


def product_of(rows: Rows) -> Callable[[Tensor, int, int], Tensor] | None:
    """The rows' own way to D, where they are not laid out and have one."""
    return rows.product if isinstance(rows, Windows) and not rows.laid_out else None


def chunks(rows: Rows) -> Iterator[tuple[int, int, int, Tensor]]:
    """(v, first sample, end, D `[n,K,O,I]`) for all of D, by the rows' own product where they have one.

    Each chunk may be written to, and lies in the memory of the last.
    """
    own = product_of(rows)
    if own is None:
        assert rows.a is not None
        yield from _laid_out(rows.a, rows.g)
        return
    v, n, t, k, o, i = dims(rows)
    for low, high in ranges(n, k * o * i * rows.g.element_size(), rows.g):
        for w in range(v):
            yield w, low, high, own(rows.g[w, low:high], low, high)


def fill(d: Tensor, rows: Rows) -> None:
    """Write D into `[V,N,K,O,I]`, by the rows' own product or from their input a piece at a time."""
    if product_of(rows) is not None:
        for w, low, high, part in chunks(rows):
            d[w, low:high] = part
        return
    start = 0
    for piece in pieces(rows):
        stop = start + piece.g.shape[1]
        assert piece.a is not None
        for w in range(len(d)):
            product(piece.g[w], piece.a, out=d[w, start:stop])
        start = stop


def ranges(n: int, each: int, like: Tensor) -> Iterator[tuple[int, int]]:
    """Cut n things of `each` bytes into ranges that fit the chunk."""
    budget = CHUNK_BYTES if like.device.type == "cpu" else CHUNK_BYTES_DEVICE
    step = max(1, budget // max(1, each))
    for low in range(0, n, step):
        yield low, min(n, low + step)
