"""The contractions of input rows with cotangent rows, and the rules that choose the cheapest form.

Every quantity of a layer is a function of the per-sample gradients of its matrix,

    D[v,n,k,o,i] = sum_t g[v,n,t,k,o] a[n,t,k,i]

with `v` cotangent, `n` sample, `t` position, `k` group, `o` out and `i` in. The functions here are
pure: they take `Rows`, write to no input and keep nothing. None but `per_sample` ever holds all of D.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from layerwise import tensors
from layerwise.errors import BadInput
from layerwise.rows import pieces
from layerwise.rows.base import Rows, Windows
from layerwise.rows.cost import ghost_is_cheaper, pairs_are_cheaper
from layerwise.rows.pieces import chosen, chunks, concat, dims, fill, flatten_samples, in_pieces, narrow, summed
from layerwise.tensors import without_grad

__all__ = [
    "chosen", "concat", "flatten_samples", "ghost_is_cheaper", "input_gram", "narrow", "output_gram",
    "pairs_are_cheaper", "pairwise_dot", "per_sample", "second_moment", "squared_norm", "sum_of_squares",
    "total", "weighted_sum",
]  # fmt: skip

DOT_CHUNKS = 8  # pairwise dots need all samples at once: wider chunks keep the products efficient
PANELS = 4  # a symmetric matrix product in this many row panels does 5/8 of the work
PANELS_FROM = 256  # below this size the panels cost more than they save
PANELS_ROWS = 64  # with fewer rows to sum, mirroring a panel costs more than its product


# --- the per-sample gradient ----------------------------------------------------------------------


@without_grad
def per_sample(rows: Rows, out: Tensor | None = None, sums: Tensor | None = None) -> Tensor:
    """Per-sample gradients of the layer's matrix, one for each cotangent.

    D[v,n,k,o,i] = sum_t g[v,n,t,k,o] a[n,t,k,i].

    Shapes: returns `[V,N,K,O,I]`, in the memory of `out` where that is given (fresh memory is what
    this costs most); their sum over v and n is added to `sums` `[K,O,I]`. Units: those of `g` times those of `a`.
    Raises: `BadInput` where the rows contradict each other or `out` has another shape.
    """
    v, n, t, k, o, i = dims(rows)
    if out is not None and (out.shape != (v, n, k, o, i) or out.dtype != rows.g.dtype):
        raise BadInput(
            f"per_sample: out is {out.dtype} {tuple(out.shape)}, the result is {rows.g.dtype} "
            f"{(v, n, k, o, i)}; pass memory of this shape and type."
        )
    if rows.kind == "constant":
        d = _over_positions(rows.g)[..., None]
    elif rows.kind == "index":
        assert rows.a is not None
        d = out if out is not None and out[:, :, 0].mT.is_contiguous() else rows.g.new_empty(v, n, 1, i, o).mT
        d[:, :, 0].mT.view(v, n * i, o).zero_().index_add_(1, pieces.keys(rows.a, i), rows.g.reshape(v, n * t, o))
    else:
        d = tensors.empty((v, n, k, o, i), rows.g) if out is None or not out.is_contiguous() else out
        fill(d, rows, sums)
        sums = None
    if sums is not None:
        sums += d.sum((0, 1))
    return d if out is None or d is out else out.copy_(d)


@without_grad
@summed
def total(rows: Rows) -> Tensor:
    """Gradients summed over the samples, one for each cotangent.

    sum_n D[v,n,k,o,i]. Shapes: returns `[V,K,O,I]`.
    Raises: `BadInput` where the rows contradict each other.
    """
    v, n, t, k, o, i = dims(rows)
    if rows.a is None:
        return rows.g.sum((1, 2))[..., None]
    if not rows.a.is_floating_point():
        d = rows.g.new_zeros(v, i, o)
        for w in range(v):
            d[w].index_add_(0, rows.a.flatten(), rows.g[w].reshape(n * t, o))
        return d.mT[:, None]
    d = rows.g.new_empty(v, k, o, i)
    for w in range(v):
        d[w] = _sum_product(rows.g[w], rows.a)
    return d


@without_grad
def weighted_sum(rows: Rows, weights: Tensor) -> Tensor:
    """Per-sample gradients summed with one weight for each cotangent and sample.

    sum_{v,n} w[v,n] D[v,n,k,o,i]. The weights enter the cotangents, so the cost is that of one gradient.

    Shapes: weights `[V,N]`; returns `[K,O,I]`.
    Raises: `BadInput` where the rows contradict each other or the weights have another shape.
    """
    v, n, *_ = dims(rows)
    if weights.shape != (v, n):
        raise BadInput(f"weighted_sum: weights are {tuple(weights.shape)}, the rows need {(v, n)}, [V,N].")
    w = weights.to(rows.g.dtype)[:, :, None, None, None]
    g = rows.g.new_zeros(rows.g.shape[1:]) if v == 0 else rows.g[0] * w[0]
    for c in range(1, v):
        g.addcmul_(rows.g[c], w[c])
    return total(rows.sent(g[None]))[0]


# --- squares --------------------------------------------------------------------------------------


@without_grad
def squared_norm(rows: Rows, sums: Tensor | None = None) -> Tensor:
    """Squared Euclidean norm of each per-sample gradient.

    sum_{k,o,i} D[v,n,k,o,i]². With one position it is |g|²|a|²; with more it is the inner product of the Gram matrices
    of `a` and `g` over positions, or the square of D chunk by chunk, whichever `ghost_is_cheaper` predicts. For a
    float input, `sums` `[K,O,I]` asks for D itself, whose sum over v and n is added to it.

    Shapes: returns `[V,N]`. Raises: `BadInput` where the rows contradict each other.
    Source: Goodfellow 2015, "Efficient per-example gradient computations", for one position.
    """
    v, n, t, k, o, i = dims(rows)
    if isinstance(rows, Windows) and not rows.laid_out:
        if rows.product is not None:
            return _norms(rows, sums)
        return torch.cat([squared_norm(Rows(p.a, p.g, p.size_in), sums) for p in in_pieces(rows)], 1)
    if sums is not None:
        return _norms(rows, sums)
    if rows.a is None:
        return _squares(_over_positions(rows.g), (2, 3))
    if t == 1 and rows.a.is_floating_point() and o * i > 1:
        squares = _squares(rows.g[:, :, 0]) * _squares(rows.a[:, 0])
        return squares.squeeze(2) if k == 1 else squares.sum(2)
    if not rows.a.is_floating_point() and rows.g.device.type != "cpu":
        return _ghost_norm(rows.a, rows.g)  # a quarter of the launches
    result = rows.g.new_zeros(v, n)
    if not rows.a.is_floating_point():
        keys, merged = pieces.merged_index(rows.a, rows.g, i)
        for w, d in enumerate(merged):
            result[w].index_add_(0, keys // i, d.square_().sum(1))
        return result
    if o == i == 1 and v * n * t * k * rows.g.element_size() <= pieces.CHUNK_BYTES:
        return _squares((rows.g * rows.a).sum(2), (2, 3))
    return _ghost_norm(rows.a, rows.g) if o * i > 1 and ghost_is_cheaper(v, t, o, i) else _norms(rows)


def _norms(rows: Rows, sums: Tensor | None = None) -> Tensor:
    """The norms from D; the sum of the per-sample gradients is added to `sums`."""
    result = rows.g.new_zeros(rows.g.shape[:2])
    for w, low, high, d in chunks(rows):
        if sums is not None:
            sums += d[0] if high - low == 1 else d.sum(0)
        torch.linalg.vector_norm(d.flatten(1), dim=1, out=result[w, low:high])
    return result.square_()


def _ghost_norm(a: Tensor, g: Tensor) -> Tensor:
    v, n, t, k, _ = g.shape
    result = g.new_empty(v, n)
    for low, high in pieces.ranges(n, 2 * k * t * t * g.element_size(), g):
        inputs = _position_grams(a[low:high])
        for w in range(v):
            torch.sum(_position_grams(g[w, low:high]).mul_(inputs), (1, 2), out=result[w, low:high])
    return result


def _position_grams(x: Tensor) -> Tensor:
    """The Gram matrices `[N,K·T,T]` over positions of rows `[N,T,K,C]`, or of the one-hot rows of an index `[N,T]`."""
    if not x.is_floating_point():
        return x[:, :, None] == x[:, None]
    n, t, k, c = x.shape
    y = x.squeeze(2) if k == 1 else x.transpose(1, 2).reshape(n * k, t, c)
    return torch.bmm(y, y.mT).view(n, k * t, t)


@without_grad
def second_moment(rows: Rows, sums: Tensor | None = None) -> Tensor:
    """Elementwise squares of the per-sample gradients, summed over samples and cotangents.

    sum_{v,n} D[v,n,k,o,i]². With one position it is one matrix product of squares; with many
    cotangents it is one over pairs of positions; else D is squared chunk by chunk in reused memory. For a float input,
    `sums` `[K,O,I]` asks for D itself, whose sum over v and n is added to it.

    Shapes: returns `[K,O,I]`. Raises: `BadInput` where the rows contradict each other.
    """
    v, n, t, k, o, i = dims(rows)
    if pieces.product_of(rows) is not None and not pairs_are_cheaper(v, t, o, i):
        return _moment(rows, sums)
    return _second_moment(rows) if sums is None else summed(partial(_moment, sums=sums))(rows)


@summed
def _second_moment(rows: Rows) -> Tensor:
    v, n, t, k, o, i = dims(rows)
    if rows.a is None:
        return _sum_of_squares(_over_positions(rows.g)).sum(0)[..., None]
    if not rows.a.is_floating_point():
        keys, sums = pieces.merged_index(rows.a, rows.g, i)
        result = rows.g.new_zeros(i, o)
        for d in sums:
            result.index_add_(0, keys % i, d.square_())
        return result.mT[None]
    if t == 1:
        return _sum_product(_sum_of_squares(rows.g), rows.a.square())
    if not o == i == 1 and pairs_are_cheaper(v, t, o, i):
        return _second_moment_of_pairs(rows.a, rows.g)
    return _moment(rows)


def _moment(rows: Rows, sums: Tensor | None = None) -> Tensor:
    """The second moment; the sum of the per-sample gradients is added to `sums`."""
    _, _, _, k, o, i = dims(rows)
    result = rows.g.new_zeros(k, o, i)
    for _, low, high, d in chunks(rows):
        if sums is not None:
            sums += d[0] if high - low == 1 else d.sum(0)
        if high - low == 1:
            result.addcmul_(d[0], d[0])
        else:
            result.add_(d.square_().sum(0))
    return result


def _second_moment_of_pairs(a: Tensor, g: Tensor) -> Tensor:
    """sum_{t,s} (sum_v g[t,o] g[s,o]) a[t,i] a[s,i], each unordered pair of positions once."""
    v, n, t, k, o = g.shape
    i = a.shape[-1]
    p, q = torch.triu_indices(t, t, device=g.device)
    twice = torch.where(p == q, 1, 2).to(g.dtype)
    result = g.new_zeros(k, o, i)
    cost = k * (len(p) * (2 * i + o) + t * t * o) * g.element_size()
    for low, high in pieces.ranges(n, cost, g):
        x = a[low:high]
        y = g[:, low:high].permute(1, 3, 4, 0, 2)  # n, k, o, v, t
        yy = (y.mT @ y)[..., p, q] * twice
        result += _sum_product(yy.permute(0, 3, 1, 2), x[:, p] * x[:, q])
    return result


@without_grad
def sum_of_squares(d: Tensor) -> Tensor:
    """Elementwise squares summed over the first axis, without a copy of it all."""
    result = torch.zeros_like(d[0]) if len(d) else d.new_zeros(d.shape[1:])
    for low, high in pieces.ranges(len(d), result.numel() * d.element_size(), d):
        result.add_(d[low:high].square().sum(0))
    return result


@without_grad
def pairwise_dot(rows: Rows) -> Tensor:
    """Inner products of the per-sample gradients, for each cotangent.

    sum_{k,o,i} D[v,n,k,o,i] D[v,m,k,o,i].

    Shapes: returns `[V,N,N]`. Raises: `BadInput` where the rows contradict each other.
    """
    v, n, t, k, o, i = dims(rows)
    if not rows.laid_out and v * n * k * o * i * rows.g.element_size() <= DOT_CHUNKS * pieces.CHUNK_BYTES:
        d = per_sample(rows).flatten(2)
        return d @ d.mT
    a = rows.a
    if a is not None and not a.is_floating_point():
        used, a = pieces.numbered(a)
        i = len(used)
    elif a is not None and n * t * t * (o + i) < (t + n) * o * i:
        return _ghost_dot(a, rows.g)
    result = rows.g.new_zeros(v, n, n)
    each = n * i * rows.g.element_size() // DOT_CHUNKS
    for k0, k1 in pieces.ranges(k, each * o, rows.g):
        for o0, o1 in pieces.ranges(o, each * (k1 - k0), rows.g):
            part = a[:, :, k0:k1] if a is not None and a.is_floating_point() else a
            for w in range(v):
                g = rows.g[w : w + 1, ..., k0:k1, o0:o1]
                d = per_sample(Rows(part, g, i))[0].flatten(1)
                result[w].addmm_(d, d.T)
    return result


def _ghost_dot(a: Tensor, g: Tensor) -> Tensor:
    v, n, t, k, _ = g.shape
    result = g.new_zeros(v, n, n)
    flat_a, flat_g = a.flatten(0, 1), g.flatten(1, 2)
    for low, high in pieces.ranges(n, 2 * n * t * t * g.element_size(), g):
        here = slice(low * t, high * t)
        for c in range(k):
            inputs = flat_a[here, c] @ flat_a[:, c].T
            for w in range(v):
                dot = (flat_g[w, here, c] @ flat_g[w, :, c].T).mul_(inputs)
                result[w, low:high] += dot.view(high - low, t, n, t).sum((1, 3))
    return result


# --- Gram matrices --------------------------------------------------------------------------------


@without_grad
def input_gram(rows: Rows | Tensor) -> Tensor:
    """Sum of the outer products of the input rows, over samples and positions.

    sum_{n,t} a[n,t,k,i] a[n,t,k,j].

    Shapes: takes `Rows`, or the input `[N,T,K,I]` alone where it is a float tensor. Returns `[K,I,I]`.
    The matrix of an index input is diagonal and comes as its diagonal, the counts `[1,I]`: two axes
    mean a diagonal factor. A constant input gives `[1,1,1]` times the number of rows, for each group.
    Raises: `BadInput` where the rows contradict each other, or for an index without its `Rows`.
    """
    if isinstance(rows, Tensor):
        if not rows.is_floating_point() or rows.ndim != 4:
            raise BadInput(
                f"input_gram: got {rows.dtype} {tuple(rows.shape)} alone; a float [N,T,K,I] is understood "
                "so, an index or a constant input needs its Rows."
            )
        return _gram(rows)
    return _input_gram(rows)


@partial(summed, times=4)  # the matrix is read and written for each piece
def _input_gram(rows: Rows) -> Tensor:
    _, n, t, k, _, i = dims(rows)
    if rows.a is None:
        return rows.g.new_full((k, 1, 1), n * t)
    if rows.a.is_floating_point():
        return _gram(rows.a)
    return pieces.counts_of(rows.a.flatten(), i).to(rows.g.dtype)[None]


@without_grad
def output_gram(g: Tensor) -> Tensor:
    """Sum of the outer products of the cotangent rows, over cotangents, samples and positions.

    sum_{v,n,t} g[v,n,t,k,o] g[v,n,t,k,p]. For the "reduce" convention pass `g.sum(2, keepdim=True)`.

    Shapes: g `[V,N,T,K,O]`; returns `[K,O,O]`.
    """
    return _gram(g.flatten(0, 1))


# --- shared forms ---------------------------------------------------------------------------------


def _sum_product(g: Tensor, a: Tensor, out: Tensor | None = None) -> Tensor:
    """sum_{n,t} g[n,t,k,o] a[n,t,k,i], as `[K,O,I]`, without a transposed copy where there is a way; out: of K = 1."""
    n, t, k, i = a.shape
    o = g.shape[-1]
    if o == i == 1:
        return (g * a).sum((0, 1))[..., None]
    if k > 1 and t * (o + i) > o * i:  # reading D chunk by chunk costs less than transposed copies
        result = g.new_zeros(k, o, i)
        for _, _, _, d in chunks(Rows(a, g[None], i)):
            result += d.sum(0)
        return result
    if k > 1:
        return g.flatten(0, 1).permute(1, 2, 0) @ a.flatten(0, 1).transpose(0, 1)
    g, a, into = g[:, :, 0], a[:, :, 0], None if out is None else out[0]
    if t >= 16 and g.device.type == "cpu" and not (_merges(g) and _merges(a)):
        return (g.new_zeros(o, i) if into is None else into.zero_()).addbmm_(g.mT, a)[None]
    return torch.mm(g.flatten(0, 1).T, a.flatten(0, 1), out=into)[None]


def _merges(x: Tensor) -> bool:
    """Whether the first two axes are one axis in memory."""
    return x.shape[0] == 1 or x.shape[1] == 1 or x.stride(0) == x.shape[1] * x.stride(1)


def _gram(x: Tensor) -> Tensor:
    """sum_{n,t} x[n,t,k,i] x[n,t,k,j] as `[K,I,I]`: above and on the diagonal panels, then mirrored."""
    n, t, k, i = x.shape
    if k > 1 or i < PANELS_FROM or n * t < PANELS_ROWS:
        return _sum_product(x, x)
    result = x.new_empty(1, i, i)
    step = -(-i // PANELS)
    for low in range(0, i, step):
        high = min(i, low + step)
        _sum_product(x[..., low:high], x[..., low:], result[:, low:high, low:])
        result[:, high:, low:high] = result[:, low:high, high:].mT
    return result


def _over_positions(g: Tensor) -> Tensor:
    """Cotangents `[V,N,K,O]` of the samples: the sum over their positions, or a view where there is one."""
    return g.squeeze(2) if g.shape[2] == 1 else g.sum(2)


def _squares(x: Tensor, axes: tuple[int, ...] = (-1,)) -> Tensor:
    """Sum of squares along some axes, one pass over the memory."""
    return torch.linalg.vector_norm(x, dim=axes).square_()


def _sum_of_squares(x: Tensor) -> Tensor:
    """Sum over the first axis of the squares, one pass over the memory."""
    result = x[0].square() if len(x) else x.new_zeros(x.shape[1:])
    for part in x[1:]:
        result.addcmul_(part, part)
    return result
