"""BackPACK's root of the loss Hessian: one column for each class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from layerwise.graph.cotangents import Exact, position_count, positions
from layerwise.losses import Likelihood
from layerwise.rows.base import RowNumbers, Samples

__all__ = ["ByClass"]


@dataclass(frozen=True)
class ByClass(Exact):
    """All columns of the exact root, one for each class and loss term of a sample, `C·P`, classes first."""

    def count(self, loss: Likelihood, rows: Samples | RowNumbers) -> int:
        """The number of columns of one loss."""
        classes = 1 if loss.class_axis is None else loss.logits.shape[loss.class_axis]
        return classes * position_count(loss, rows)

    def columns(self, loss: Likelihood, rows: Samples | RowNumbers, chunk: int) -> Iterator[Tensor]:
        """Stacks `[v, *logits.shape]` of at most `chunk` columns."""
        position = positions(loss, rows)
        masks = [(position == p).to(loss.logits.dtype) for p in range(int(position.max()) + 1)]
        each = (column * mask for column in loss.class_root().split(1) for mask in masks)
        while stack := list(islice(each, chunk)):
            yield torch.cat(stack)
