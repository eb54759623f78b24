"""Per-sample gradients of a derived tensor (a weight norm, LoRA's sum), carried back to its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from layerwise import contract
from layerwise.ops.base import Rows, Slot
from layerwise.pull import pull

__all__ = ["Later", "carry"]


def carry(used: Tensor, dense: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Gradients `[V,N,*used.shape]` of `used` as those of the leaves it came from, `[V,N,*leaf.shape]` each."""
    flat = dense.flatten(0, 1)
    carried: Sequence[Tensor | None]
    try:
        carried = pull([used], [flat], leaves, batched=True) if len(flat) else [None for _ in leaves]
    except RuntimeError:  # an operation without a batching rule
        each = [pull([used], [row], leaves) for row in flat]
        columns = zip(*each, strict=True)
        carried = [
            torch.stack([torch.zeros_like(p) if g is None else g for g in column])
            for p, column in zip(leaves, columns, strict=True)
        ]
    found = []
    for leaf, value in zip(leaves, carried, strict=True):
        value = flat.new_zeros(len(flat), *leaf.shape) if value is None else value
        found.append(value.to(leaf.dtype).unflatten(0, dense.shape[:2]))
    return found


@dataclass(frozen=True)
class Later:
    """The gradients of one leaf, carried a few samples at a time as they are read, while the graph lives.

    rows: of the derived tensor `slot.used`; dtype: of what is read, by default the leaf's.
    """

    slot: Slot
    rows: Rows
    leaf: Tensor
    dtype: torch.dtype | None = None

    @property
    def shape(self) -> torch.Size:
        """`[V,N,*leaf.shape]`."""
        return torch.Size((*self.rows.g.shape[:2], *self.leaf.shape))

    def __getitem__(self, where: tuple[slice, slice]) -> Tensor:
        """Those of the columns `where[0]` and the samples `where[1]`."""
        columns, samples = where
        start, stop, _ = samples.indices(self.shape[1])
        rows = self.rows.sent(self.rows.g[columns])
        some = self.slot.fold(contract.per_sample(contract.narrow(rows, start, stop - start)))
        (value,) = carry(self.slot.used, some, [self.leaf])
        return value.to(self.dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def to(self, dtype: torch.dtype) -> Later:
        """The same in another type."""
        return replace(self, dtype=dtype)

    def new_zeros(self, shape: Sequence[int]) -> Tensor:
        """Zeros of the type that is read."""
        return torch.zeros(tuple(shape), dtype=self.dtype or self.leaf.dtype, device=self.leaf.device)
