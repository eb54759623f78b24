"""Random and signed probes of a linear map, and stacks of columns cut by samples."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from layerwise.rows.base import Samples

__all__ = ["draws", "join", "largest", "near", "split"]


def split(x: Tensor, samples: Samples) -> Tensor:
    """`[V, *shape]` as `[V,N,D]`, each sample's values in their order."""
    if samples.axis < 0:
        return x.reshape(len(x), 1, -1)
    axis = samples.axis + 1
    return samples.split(x, axis).movedim(axis, 1).flatten(2)


def join(x: Tensor, samples: Samples, shape: torch.Size) -> Tensor:
    """`[V,N,D]` as `[V, *shape]`; the inverse of `split`."""
    axis = samples.axis
    if axis < 0:
        return x.reshape(len(x), *shape)
    x = x.unflatten(2, (*shape[:axis], shape[axis] // samples.n, *shape[axis + 1 :])).movedim(1, axis + 1)
    if not samples.n_major:
        x = x.transpose(axis + 1, axis + 2)
    return x.reshape(len(x), *shape)


def draws(count: int, size: int, like: Tensor) -> Tensor:
    """Normal numbers `[count, size]`, the same in every run."""
    return _normal(count, size).to(like)


@lru_cache(maxsize=64)
def _normal(count: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, size, generator=generator, dtype=torch.float64, device="cpu")


def near(x: Tensor, y: Tensor, epsilon: float) -> bool:
    """Whether two tensors are equal up to rounding of their largest element."""
    return largest(x - y) <= epsilon**0.7 * largest(y)


def largest(x: Tensor) -> float:
    """The largest absolute value; NaN where there is one."""
    if not x.numel():
        return 0.0
    low, high = torch.aminmax(x)
    return float(torch.maximum(-low, high))
