"""Pairs of Kronecker factors, damped and inverted together: factors of one shape as one batch, whatever the pair."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from layerwise.operators.ridge import by_cholesky

__all__ = ["bound_of_entries", "inverted_inputs", "inverted_pairs", "split_damping", "trace"]

Pair = tuple[Tensor, Tensor]


def trace(x: Tensor) -> Tensor:
    """The trace for each group, of matrices `[K,I,I]` or diagonals `[K,I]`."""
    return x.sum(-1) if x.ndim == 2 else x.diagonal(dim1=-2, dim2=-1).sum(-1)


def split_damping(mean_a: Tensor, mean_b: Tensor, damping: float, balanced: bool) -> Pair:
    """What is added to A and to B, `[K]`, of their mean eigenvalues: π√λ and √λ/π with π² their ratio, or π = 1.

    Source: Martens and Grosse (2015), section 6.3.
    """
    usable = (mean_a > 0) & (mean_b > 0)
    limits = torch.finfo(mean_a.dtype)
    ratio = torch.where(usable, mean_a / mean_b.where(usable, 1), 1)
    pi = ratio.clamp(limits.tiny, limits.max).sqrt() if balanced else torch.ones_like(ratio)
    return pi * math.sqrt(damping), math.sqrt(damping) / pi


def bound_of_entries(x: Tensor) -> Tensor:
    """For each group the largest diagonal entry, which no entry of a positive semidefinite matrix exceeds; or NaN.

    NaN where an entry is not finite, or the diagonal has a negative one. Matrices `[K,I,I]` or diagonals `[K,I]`.
    """
    diagonal = x if x.ndim == 2 else x.diagonal(dim1=-2, dim2=-1)
    low, high = x.flatten(1).aminmax(dim=1)
    spoiled = ~(torch.isfinite(low) & torch.isfinite(high)) | (diagonal.amin(-1) < 0)
    return diagonal.amax(-1).masked_fill(spoiled, float("nan"))


@torch.no_grad()
def inverted_pairs(pairs: Sequence[Pair], damping: float, balanced: bool) -> tuple[list[Pair], list[Tensor]]:
    """The inverses of damped factors A `[K,I,I]` and B `[K,O,O]`, or diagonals, by Cholesky; and a bound of each.

    The launches are those of each shape, not of each pair, and nothing is waited for. bounds: `[K]` for each pair, of
    the entries of the inverse's Kronecker product; NaN where Cholesky, or its result, fails. All factors are of one
    type on one device.
    """
    factors = [a for a, _ in pairs] + [b for _, b in pairs]
    batches, groups, in_order = _by_shape(factors)
    means = torch.cat(in_order([trace(batch) / batch.shape[-1] for _, batch in batches])).view(2, -1)
    extra = torch.cat(split_damping(means[0], means[1], damping, balanced)).split(groups)
    made = [_inverted(batch, torch.cat([extra[i] for i in chosen])) for chosen, batch in batches]
    bounds = torch.cat(in_order([bound_of_entries(x) for x in made])).view(2, -1).double()
    inverses, n = in_order(made), len(pairs)
    return list(zip(inverses[:n], inverses[n:], strict=True)), list((bounds[0] * bounds[1]).split(groups[:n]))


@torch.no_grad()
def inverted_inputs(factors: Sequence[Tensor], damping: float) -> tuple[list[Tensor], list[Tensor]]:
    """The inverses of factors A + λI, `[K,I,I]` or diagonals, and a bound of their entries, as of `inverted_pairs`."""
    batches, _, in_order = _by_shape(factors)
    made = [_inverted(batch, batch.new_full((len(batch),), damping)) for _, batch in batches]
    return in_order(made), in_order([bound_of_entries(x).double() for x in made])


_Batches = list[tuple[list[int], Tensor]]
_InOrder = Callable[[Sequence[Tensor]], list[Tensor]]


def _by_shape(factors: Sequence[Tensor]) -> tuple[_Batches, list[int], _InOrder]:
    """Factors of one shape as a batch, with their numbers; the groups of each; what takes values of batches apart."""
    shapes: dict[Any, list[int]] = {}
    for i, x in enumerate(factors):
        shapes.setdefault(x.shape[1:], []).append(i)
    batches = [(chosen, torch.cat([factors[i] for i in chosen])) for chosen in shapes.values()]
    groups = [len(x) for x in factors]

    def in_order(values: Sequence[Tensor]) -> list[Tensor]:
        """Values of the batches' groups, as those of each factor."""
        found: dict[int, Tensor] = {}
        for (chosen, _), value in zip(batches, values, strict=True):
            found |= zip(chosen, value.split([groups[i] for i in chosen]), strict=True)
        return [found[i] for i in range(len(factors))]

    return batches, groups, in_order


def _inverted(x: Tensor, extra: Tensor) -> Tensor:
    if x.ndim == 2:
        return 1 / (x + extra[:, None])
    found, sound = by_cholesky(x, None, extra)
    return found.masked_fill(~sound[:, None, None], torch.nan)
