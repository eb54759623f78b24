"""Rows of several uses joined, cut by samples, and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import wraps

import torch
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.rows.base import Rows, Windows
from layerwise.rows.numbered import Scattered, as_scattered

__all__ = [
    "CHUNK_BYTES",
    "PIECE_BYTES",
    "chosen",
    "chunks",
    "concat",
    "counts_of",
    "dims",
    "fill",
    "flatten_samples",
    "in_pieces",
    "keys",
    "merged_index",
    "narrow",
    "numbered",
    "product",
    "product_of",
    "ranges",
    "summed",
]

PIECE_BYTES = 2**21  # of windows laid out at once: they are read again while they are in the cache


def concat(parts: Sequence[Rows]) -> Rows:
    """Join several uses of one tensor into one, along the positions: their gradients add before any square.

    Shapes: equal V, N, K, O and I, and inputs of one kind (constant, float or index); T adds up.
    Raises: `BadInput` that says which of these differs; then add the uses' `per_sample` chunk by chunk.
    """
    if not parts:
        raise BadInput("concat: no rows were given; pass the rows of at least one use.")
    if len(parts) == 1:
        return parts[0]
    first = _signature(parts[0])
    for part in parts[1:]:
        for name, seen in _signature(part).items():
            if seen != first[name]:
                raise BadInput(
                    f"concat: {name} is {first[name]} in one use and {seen} in another; only rows that "
                    "agree can be joined. Add the uses' per-sample gradients instead."
                )
    if any(isinstance(part, Scattered) for part in parts):  # gathered once, all together
        each = [as_scattered(part) for part in parts]
        return each[0].joined(each[1:])
    g = torch.cat([part.g for part in parts], dim=2)
    inputs = [part.a for part in parts if part.a is not None]
    return Rows(torch.cat(inputs, dim=1) if inputs else None, g, parts[0].size_in)


def narrow(rows: Rows, start: int, length: int) -> Rows:
    """The rows of the samples `start` to `start + length`, without a copy."""
    start, stop, _ = slice(start, start + length).indices(rows.g.shape[1])
    if isinstance(rows, Windows) and not rows.laid_out:
        return rows.narrow(start, stop - start)
    a = None if rows.a is None else rows.a[start:stop]
    return Rows(a, rows.g[:, start:stop], rows.size_in)


def chosen(rows: Rows, mask: Tensor) -> Rows:
    """Rows for sums over the inputs of those that a mask `[N,T]` chooses: the others are zero (index -1), or left out.

    They are left out on the CPU alone: how many remain, an accelerator would have to be waited for.
    """
    others = ~mask[:, :, None, None]
    if isinstance(rows, Windows) and not rows.laid_out:
        make = rows.make
        return Windows(lambda low, high: make(low, high).masked_fill(others[low:high], 0), rows.g, rows.size_in)
    if rows.g.device.type != "cpu":
        if rows.a is None:
            return Rows((~others).to(rows.g.dtype).expand(-1, -1, rows.g.shape[3], 1), rows.g, 1)
        kept = rows.a.masked_fill(others, 0) if rows.a.is_floating_point() else rows.a.masked_fill(~mask, -1)
        return Rows(kept, rows.g, rows.size_in)
    a = None if rows.a is None else rows.a[mask][None]
    return Rows(a, rows.g[0][mask][None, None], rows.size_in)


def counts_of(index: Tensor, size: int) -> Tensor:
    """How often each number below `size` is in an index, where -1 is none of them; on an accelerator without a wait."""
    if index.device.type == "cpu":
        return torch.bincount(index, minlength=size)
    counts = index.new_zeros(size + 1)
    return counts.index_add_(0, index % (size + 1), torch.ones_like(index))[:size]


def in_pieces(rows: Rows, times: int = 1) -> Iterator[Rows]:
    """The rows as they are; where the input is not laid out, as many samples at a time as fit `PIECE_BYTES`."""
    v, n, t, k, o, i = dims(rows)
    step = max(1, times * PIECE_BYTES // max(1, t * k * i * rows.g.element_size()))
    if rows.laid_out or n <= step:
        yield rows
        return
    for start in range(0, n, step):
        yield narrow(rows, start, step)


def summed(function: Callable[[Rows], Tensor], times: int = 1) -> Callable[[Rows], Tensor]:
    """Decorate a sum over samples: an input that is not laid out is read in pieces."""

    @wraps(function)
    def over_pieces(rows: Rows) -> Tensor:
        total: Tensor | None = None
        for piece in in_pieces(rows, times):
            value = function(piece)
            total = value if total is None else total.add_(value)
        assert total is not None
        return total

    return over_pieces


def flatten_samples(rows: Rows) -> Rows:
    """The same rows with every sample a position of a single one, N = 1, for sums that need no samples."""
    v, n, t, k, o, i = dims(rows)
    a = None if rows.a is None else rows.a.reshape(1, n * t, *rows.a.shape[2:])
    return Rows(a, rows.g.reshape(v, 1, n * t, k, o), i)


def _signature(rows: Rows) -> dict[str, object]:
    if isinstance(rows, Scattered):
        return _signature(rows.calls[0]) | {"N": rows.order.n}
    v, n, _, k, o, i = dims(rows)
    return {"kind": rows.kind, "V": v, "N": n, "K": k, "O": o, "size_in": i}


def dims(rows: Rows) -> tuple[int, int, int, int, int, int]:
    """V, N, T, K, O, I, after a check that the input and the cotangents agree on them."""
    if not rows.laid_out:
        return *rows.g.shape, rows.size_in
    a, g, i = rows.a, rows.g, rows.size_in
    if g.ndim == 5:
        v, n, t, k, o = g.shape
        if a is None:
            fits = i == 1
        elif a.is_floating_point():
            fits = a.shape == (n, t, k, i)
        else:
            fits = k == 1 and a.shape == (n, t)
        if fits:
            return v, n, t, k, o, i
    seen = "None" if a is None else f"{a.dtype} {tuple(a.shape)}"
    raise BadInput(
        f"rows: input {seen} with size_in {i} does not fit cotangents {tuple(g.shape)}; expected g "
        "[V,N,T,K,O] with a float [N,T,K,I], int64 [N,T] (K = 1) or None (I = 1)."
    )


def keys(index: Tensor, size_in: int) -> Tensor:
    """`n·I + index`: one number for each sample and input, `[N·T]`."""
    return (index + torch.arange(len(index), device=index.device)[:, None] * size_in).flatten()


def numbered(index: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers that occur, each once, and the place of each element's among them.

    On an accelerator as many as there are elements, to wait for no size: zeros stand behind those that occur.
    """
    if index.device.type == "cpu":
        return torch.unique(index, return_inverse=True)
    flat, order = index.flatten().sort()
    places = torch.cat([torch.zeros_like(flat[:1]), flat.diff().ne_(0)]).cumsum_(0)
    place = torch.empty_like(flat).scatter_(0, order, places)
    return torch.zeros_like(flat).scatter_(0, places, flat), place.view(index.shape)


def merged_index(index: Tensor, g: Tensor, size_in: int) -> tuple[Tensor, Iterator[Tensor]]:
    """The keys that occur, each once, and for every cotangent its rows summed by key, `[key, O]`.

    On an accelerator further rows are zero, as are their keys.
    """
    found, place = numbered(keys(index, size_in))
    shape = (len(found), g.shape[-1])
    return found, (x.new_zeros(shape).index_add_(0, place, x.reshape(-1, shape[1])) for x in g.unbind(0))


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
    """The `product` of windows that are not laid out; None for other rows."""
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


def fill(d: Tensor, rows: Rows, sums: Tensor | None = None) -> None:
    """Write D into `[V,N,K,O,I]`, by the rows' own product or from their input a piece at a time.

    Its sum over v and n is added to `sums` `[K,O,I]`, of each piece while it is in the cache.
    """
    if product_of(rows) is not None:
        for w, low, high, part in chunks(rows):
            d[w, low:high] = part
            if sums is not None:
                sums += part.sum(0)
        return
    start = 0
    for piece in _in_chunks(rows) if sums is not None and rows.laid_out else in_pieces(rows):
        stop = start + piece.g.shape[1]
        assert piece.a is not None
        for w in range(len(d)):
            product(piece.g[w], piece.a, out=d[w, start:stop])
            if sums is not None:
                sums += d[w, start:stop].sum(0)
        start = stop


def _in_chunks(rows: Rows) -> Iterator[Rows]:
    """As many samples at a time as have their D in one chunk."""
    _, n, _, k, o, i = dims(rows)
    for low, high in ranges(n, k * o * i * rows.g.element_size(), rows.g):
        yield narrow(rows, low, high - low)


def ranges(n: int, each: int, like: Tensor) -> Iterator[tuple[int, int]]:
    """Cut n things of `each` bytes into ranges that fit the chunk."""
    budget = CHUNK_BYTES if like.device.type == "cpu" else CHUNK_BYTES_DEVICE
    step = max(1, budget // max(1, each))
    for low in range(0, n, step):
        yield low, min(n, low + step)
