"""Selection of samples."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["subsample"]


def subsample(tensor: Tensor, dim: int = 0, subsampling: Sequence[int] | None = None) -> Tensor:
    """The samples `subsampling` of a tensor along `dim`; None: all of them."""
    if subsampling is None:
        return tensor
    return tensor[(slice(None),) * dim + (list(subsampling),)]
