"""Square blocks over one sample's values, averaged through maps that differ from sample to sample.

For a matrix B over the outputs of a map and the samples' Jacobians J_n of it, `through` gives

    (1/N) sum_n J_n^T B J_n

from vector-Jacobian products alone. Probe vectors decide which of three kinds the map is:
*gathered*, J_n^T c = d_n * c[index] (activations, dropout, reshapes, pooling without overlap), so that the result is
B[index, index] * (1/N) sum_n d_n d_n^T; *uniform*, the same J for all samples, so that one VJP serves N
columns; *other*: a root's columns of B are backpropagated for every sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from layerwise.errors import NonFinite
from layerwise.graph.decisions import decided
from layerwise.graph.probes import draws, largest, near, same
from layerwise.rows import contract

__all__ = ["Probe", "Send", "congruence", "draws", "near", "probe", "through", "uniform"]

Send = Callable[[Tensor], Tensor]
"""A vector-Jacobian product, sample by sample: `[V,N,D] -> [V,N,E]`."""

_ELEMENTS = 2**22  # elements of columns that are backpropagated together
_PANEL = 256  # columns of a symmetric product that are computed at once


class Probe(NamedTuple):
    """The kind of a map's vector-Jacobian product `[N,D] -> [N,E]`, as probe vectors show it.

    kind: "gathered", "uniform" or "other". factor: d `[N,E]` of a gathered map, its VJP of ones; None where all are 1.
    sources: the index `[E]` of a gathered map; None for the identity, arange(E).
    """

    kind: str
    factor: Tensor | None = None
    sources: Tensor | None = None


# -- one sample's values as a vector ------------------------------------------------------------------------


# -- probes -------------------------------------------------------------------------------------------------


def probe(send: Send, n: int, size: int, like: Tensor) -> Probe:
    """Find a map's kind from the VJP of a random vector, then of ones, then of the numbers 0 to D - 1, D = `size`.

    Different maps agree on a normal draw with probability zero.
    """
    epsilon = torch.finfo(like.dtype).eps
    random = draws(1, size, like)[0]
    found = send(random.expand(1, n, -1))[0]
    if found.shape[1] == size and same(found, random.expand(n, -1)):
        return Probe("gathered")
    if not decided(largest(found) < math.inf):
        raise NonFinite(
            "asked for blocks of the loss Hessian, but a derivative between two layers is NaN or infinite; look at the "
            "batch and the parameters"
        )
    factor = send(like.new_ones(1, 1, 1).expand(1, n, size))[0]
    if factor.shape[1] == size and near(factor * random, found, epsilon):
        return Probe("gathered", factor)
    index = _sources(send, factor, size, epsilon)
    if near(factor * random[index], found, epsilon):
        return Probe("gathered", factor, index)
    return Probe("uniform" if near(found[:1], found, epsilon) else "other")


def _sources(send: Send, factor: Tensor, size: int, epsilon: float) -> Tensor:
    """The index `[E]` of the one cotangent element that each element of the VJP is a multiple of."""
    base = max(2, int(0.02 / epsilon))  # indices are sent in digits that survive rounding
    digits = _digits(size, base).to(factor)
    back = send(digits[:, None].expand(-1, len(factor), -1))
    best = factor.abs().argmax(0, keepdim=True)  # the sample with the largest derivative
    ratio = (back.gather(1, best.expand(len(back), 1, -1)) / factor.gather(0, best))[:, 0]
    ratio = ratio.nan_to_num(0, 0, 0).round().clamp(0, base - 1).long()
    index = sum((digit * base**j for j, digit in enumerate(ratio)), ratio.new_zeros(ratio.shape[1]))
    return index.clamp(0, size - 1)


def _digits(size: int, base: int) -> Tensor:
    """The numbers 0 to `size - 1` digit by digit, `[digits, size]`."""
    left = torch.arange(size)
    rows: list[Tensor] = []
    while not rows or bool(left.any()):
        rows.append(left % base)
        left = left // base
    return torch.stack(rows)


# -- averages -----------------------------------------------------------------------------------------------


def through(block: Tensor, send: Send, n: int, own: bool = False) -> Tensor:
    """(1/N) sum_n J_n^T B J_n, `[E,E]`, of a block B `[D,D]`; may return B itself. own: B may be overwritten."""
    seen = probe(send, n, len(block), block)
    if seen.kind == "uniform":
        return uniform(block, send, n)
    if seen.kind == "other":
        return _by_roots(block, send, n)
    if seen.sources is not None:
        block, own = block.index_select(0, seen.sources).index_select(1, seen.sources), True
    if seen.factor is None:
        return block
    return _scale(block if own else block.clone(), seen.factor * n**-0.5)


def uniform(block: Tensor, send: Send, n: int) -> Tensor:
    """J^T B J where all samples have the same J: one VJP takes N columns, one in place of each sample."""
    half = _columns(block, send, n)
    result = _columns(half.T, send, n)
    return (result + result.T).div_(2)


def _columns(rows: Tensor, send: Send, n: int) -> Tensor:
    """J^T r of every row r of `[M,D]`: `[M,E]`."""
    count = -(-len(rows) // n)
    padded = torch.cat([rows, rows.new_zeros(count * n - len(rows), rows.shape[1])]).unflatten(0, (count, n))
    each = max(1, _ELEMENTS // max(1, n * rows.shape[1]))
    return torch.cat([send(stack) for stack in padded.split(each)]).flatten(0, 1)[: len(rows)]


def _by_roots(block: Tensor, send: Send, n: int) -> Tensor:
    values, vectors = torch.linalg.eigh(block)
    kept = values > values.amax() * len(values) * torch.finfo(values.dtype).eps
    roots = (vectors[:, kept] * values[kept].sqrt()).T
    if not len(roots):
        roots = block.new_zeros(1, len(block))
    total: Tensor | None = None
    for stack in roots.split(max(1, _ELEMENTS // max(1, n * len(block)))):
        back = send(stack[:, None].expand(-1, n, -1))
        gram = contract.output_gram(back[:, :, None, None])[0]
        total = gram if total is None else total.add_(gram)
    assert total is not None
    return total.div_(n)


def _scale(block: Tensor, d: Tensor) -> Tensor:
    """B * d^T d of a symmetric B in place, d `[N,D]`: one triangle is computed, then mirrored."""
    for low, high in _panels(len(block)):
        upper = block[low:high, low:]
        upper.mul_(d[:, low:high].T @ d[:, low:])
        block[high:, low:high] = upper[:, high - low :].T
    return block


def congruence(block: Tensor, w: Tensor) -> Tensor:
    """W^T B W of a symmetric B: one triangle is computed, then mirrored."""
    half = block @ w
    result = w.new_empty(w.shape[1], w.shape[1])
    for low, high in _panels(w.shape[1]):
        upper = result[low:high, low:]
        torch.mm(w[:, low:high].T, half[:, low:], out=upper)
        result[high:, low:high] = upper[:, high - low :].T
    return result


def _panels(size: int) -> Iterator[tuple[int, int]]:
    return ((low, min(size, low + _PANEL)) for low in range(0, size, _PANEL))
