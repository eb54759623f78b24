"""Union of batches: how values of several batches join to those of the loss over all their samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import BadInput, NoBackward, Undefined
from layerwise.quantities.base import Quantity, Union

__all__ = ["Batch", "UnionValues", "Values", "check_join", "in_proportion", "union_of", "weighed"]

Values = dict[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Batch:
    """One backward pass: its samples, and the denominators of its losses' means (None for sums).

    unknown_reduction: the name of a loss that does not say whether it is a mean.
    """

    samples: int
    terms: tuple[float, ...] | None
    unknown_reduction: str | None = None

    def __add__(self, other: Batch) -> Batch:
        """Union of two compatible batches (see `check_join`)."""
        both = self.terms is not None and other.terms is not None
        terms = tuple(a + b for a, b in zip(self.terms or (), other.terms or (), strict=True)) if both else None
        return Batch(self.samples + other.samples, terms, self.unknown_reduction or other.unknown_reduction)

    def union(self, scale: str) -> Union:
        """The batch as a union of one."""
        return Union(self.samples, self.terms is not None, scale, 1.0 if self.terms is None else self.terms[0])


class UnionValues:
    """Values of one quantity over several batches, as those of the union's loss, in memory that does not grow.

    The union of mean losses weighs batch b by terms_b / sum(terms), so a value of power p is joined as
    `sum_b terms_b^p value_b / (sum terms)^p`. Sum losses just add. Per-sample values concatenate.
    concatenate: for all tensors of a parameter, or for each.
    """

    def __init__(self, powers: Sequence[float], concatenate: bool | Sequence[bool] = False) -> None:
        self.powers = powers
        each = [concatenate] * len(powers) if isinstance(concatenate, bool) else concatenate
        self.concatenate = tuple(each)
        self._values: dict[str, list[Any]] = {}
        self._weighted = False

    def add(self, values: Values, weight: float, first: bool, samples: tuple[int, int] = (0, 0)) -> None:
        """Take the values of one batch; weight: the terms of its mean, or 1; samples: those before and its own."""
        if first:
            self._hold(values)
            self._weight = weight
            return
        if not self._weighted:
            self._scale(self._weight)
            self._weighted = True
        for name, tensors in values.items():
            weighted = weighed(tensors, self.powers, weight)
            old = self._values.get(name)
            if old is None:  # the samples before this batch had gradient zero
                self._values[name] = [
                    [t.new_zeros(samples[0], *t.shape[1:]), t] if c else t
                    for t, c in zip(weighted, self.concatenate, strict=True)
                ]
                continue
            for i, new in enumerate(weighted):
                if self.concatenate[i]:
                    old[i].append(new)
                else:
                    old[i] = old[i] + new
        for name in self._values.keys() - values.keys():  # this batch did not use it: its samples' gradient is zero
            for o, concatenate in zip(self._values[name], self.concatenate, strict=True):
                if concatenate:
                    o.append(o[0].new_zeros(samples[1], *o[0].shape[1:]))

    def _scale(self, factor: float) -> None:
        for tensors in self._values.values():
            for i, p in enumerate(self.powers):
                if p and factor != 1:
                    old = tensors[i]
                    tensors[i] = [t * factor**p for t in old] if self.concatenate[i] else old * factor**p

    def weighted(self) -> Values:
        """The values as they enter the sum over the union, before it is divided."""
        if self._values and not self._weighted:
            self._scale(self._weight)
        self._weighted = True
        return self.finish(1.0)

    def take(self, values: Values) -> None:
        """Hold other weighted values in place of these."""
        self._hold(values)
        self._weighted = True

    def _hold(self, values: Values) -> None:
        self._values = {
            k: [[t] if c else t for t, c in zip(v, self.concatenate, strict=True)] for k, v in values.items()
        }

    def finish(self, total: float) -> Values:
        """The values of the union; total: the sum of the weights."""
        done: Values = {}
        for name, tensors in self._values.items():
            out = []
            for t, p, concatenate in zip(tensors, self.powers, self.concatenate, strict=True):
                value = (t[0] if len(t) == 1 else torch.cat(_aligned(t))) if concatenate else t
                out.append(value / total**p if self._weighted and p and total != 1 else value)
            done[name] = tuple(out)
        return done


def weighed(values: Sequence[Any], powers: Sequence[float], weight: float) -> tuple[Any, ...]:
    """Values as they enter the sum over a union in which their batch has a weight: each times `weight^p`."""
    return tuple(t * weight**p if p and weight != 1 else t for t, p in zip(values, powers, strict=True))


def in_proportion(one: tuple[float, ...] | None, other: tuple[float, ...] | None) -> bool:
    """Whether the means of two batches run over the same mix of terms; None: sums."""
    if one is None or other is None:
        return one is other
    return len(one) == len(other) and all(
        abs(a * other[0] - b * one[0]) <= 1e-9 * abs(a * other[0]) for a, b in zip(one, other, strict=True)
    )


def _aligned(parts: list[Tensor]) -> list[Tensor]:
    """The batches' values with as many columns each (dim 1): missing ones are zero.

    Only the columns of roots differ between batches, with the number of loss terms a sample.
    """
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) == 1:
        return parts
    most = max(part.shape[1] for part in parts)
    return [torch.cat([p, p.new_zeros(len(p), most - p.shape[1], *p.shape[2:])], 1) for p in parts]


def check_join(old: Batch, batch: Batch, quantities: Sequence[Quantity], scale: str) -> None:
    """Raise BadInput where two batches have no loss in common, Undefined where a quantity of both does not exist."""
    unknown = old.unknown_reduction or batch.unknown_reduction
    if unknown is not None:
        raise BadInput(
            f"asked to join two backward passes, but whether {unknown} is a mean or a sum is not said; mark it: "
            'lw.as_loss(fn, reduction="mean") or "sum", or observe each batch in a context of its own'
        )
    if not in_proportion(old.terms, batch.terms):
        raise BadInput(
            f"two observed backward passes have no loss in common: the means run over {old.terms} terms so far and "
            f"{batch.terms} now (None: a sum); use the same loss, or observe them in two contexts"
        )
    for quantity in quantities:
        quantity.check_union(old.union(scale), batch.union(scale))


def union_of(reports: Sequence[tuple[int, Batch]], quantities: Sequence[Quantity], scale: str) -> Batch:
    """The union of all ranks' batches; raises on all of them alike where there is none."""
    idle = [str(rank) for rank, (count, _) in enumerate(reports) if not count]
    if idle:
        raise NoBackward(
            f"asked to join the results of {len(reports)} ranks, but no backward pass has finished inside `observe` on "
            f"rank {', '.join(idle)}; every rank must run at least one"
        )
    union = reports[0][1]
    for rank, (_, batch) in enumerate(reports[1:], 1):
        try:
            check_join(union, batch, quantities, scale)
        except (BadInput, Undefined) as error:
            raise type(error)(f"asked to join the results of rank {rank} with those before it: {error}") from None
        union = union + batch
    return union
