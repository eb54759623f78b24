"""Probes of a linear map by random vectors, and stacks of columns cut by samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from layerwise.graph.decisions import decided
from layerwise.rows.base import RowNumbers, Samples
from layerwise.rows.numbered import Order

__all__ = [
    "away_from_zero", "draws", "join", "largest", "matrix_among", "near", "same", "sample_axes", "split",
    "width",
]  # fmt: skip


def split(x: Tensor, samples: Samples | RowNumbers) -> Tensor:
    """`[V, *shape]` as `[V,N,D]`, each sample's values in their order; zeros behind those of a shorter sample."""
    if isinstance(samples, RowNumbers):
        return _elements(samples, x.shape[1:]).place([x.flatten(1)], 1)
    if samples.axis < 0:
        return x.reshape(len(x), 1, -1)
    axis = samples.axis + 1
    return samples.split(x, axis).movedim(axis, 1).flatten(2)


def join(x: Tensor, samples: Samples | RowNumbers, shape: torch.Size) -> Tensor:
    """`[V,N,D]` as `[V, *shape]`; the inverse of `split`."""
    if isinstance(samples, RowNumbers):
        return _elements(samples, shape).take(x.flatten(1), 1).reshape(len(x), *shape)
    axis = samples.axis
    if axis < 0:
        return x.reshape(len(x), *shape)
    x = x.unflatten(2, (*shape[:axis], shape[axis] // samples.n, *shape[axis + 1 :])).movedim(1, axis + 1)
    if not samples.n_major:
        x = x.transpose(axis + 1, axis + 2)
    return x.reshape(len(x), *shape)


def away_from_zero(shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers of either sign and of magnitude 0.5 to 1.5, so that none is near zero."""
    x = torch.rand(tuple(shape), generator=generator, dtype=dtype) + 0.5
    return x * (torch.randint(2, tuple(shape), generator=generator) * 2 - 1)


def width(samples: Samples | RowNumbers, shape: torch.Size) -> int:
    """D of `split`."""
    return _elements(samples, shape).length if isinstance(samples, RowNumbers) else shape.numel() // samples.n


def _elements(samples: RowNumbers, shape: torch.Size) -> Order:
    """The order of all elements of a tensor by samples."""
    if shape not in samples.orders:
        samples.orders[shape] = Order(samples.n, samples.numbers.expand(shape).flatten())
    return samples.orders[shape]


def sample_axes(shape: Sequence[int], n: int) -> Iterator[Samples]:
    """Every way in which n samples may lie on an axis of a tensor."""
    for axis, size in enumerate(shape):
        if size and size % n == 0:
            yield from (Samples(n, axis), Samples(n, axis, False))


def matrix_among(tensors: Iterable[Tensor], r: Tensor, back: Tensor) -> Tensor | None:
    """The matrix W `[O,I]`, one of the tensors or its transpose, with `r W = back` up to rounding: `[R,O]`, `[R,I]`."""
    for w in tensors:
        w = w.detach().to(r.dtype)
        for matrix in (w, w.mT) if w.dim() == 2 else ():
            if matrix.shape == (r.shape[1], back.shape[1]):
                bound = r.norm(dim=1)[:, None] * matrix.norm(dim=0)  # Cauchy and Schwarz: rounding is far below
                if decided(((back - r @ matrix).abs() <= 16 * torch.finfo(r.dtype).eps * bound).all()):
                    return matrix
    return None


def draws(count: int, size: int, like: Tensor) -> Tensor:
    """Normal numbers `[count, size]`, the same in every run."""
    return _normal(count, size).to(like)


@lru_cache(maxsize=64)
def _normal(count: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, size, generator=generator, dtype=torch.float64, device="cpu")


def near(x: Tensor, y: Tensor, epsilon: float) -> bool:
    """Whether two tensors are equal up to rounding of their largest element."""
    return decided(largest(x - y) <= epsilon**0.7 * largest(y))


def same(x: Tensor, y: Tensor) -> bool:
    """`torch.equal`, whose answer may be assumed."""
    return x.shape == y.shape and decided((x == y).all())


def largest(x: Tensor) -> Tensor:
    """The largest absolute value `[]`; NaN where there is one."""
    if not x.numel():
        return x.new_zeros(()).abs()
    if x.is_complex():
        return x.abs().max()
    low, high = torch.aminmax(x)
    return torch.maximum(-low, high)
