"""How the values of several batches join: to those of the sum of their losses, or of the mean over all their terms.

Backward passes of one process add their losses up as they are, since their gradients add in `.grad`. Batches that are
pooled (those of `accumulate`, and of ranks) join to one batch: a mean runs over the terms of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import BadInput, NoBackward, Undefined
from layerwise.quantities.base import Quantity, Union
from layerwise.tensors import widened

__all__ = [
    "Batch",
    "UnionValues",
    "Values",
    "check_pooled",
    "check_sum",
    "in_proportion",
    "scaled",
    "union_of",
    "weighed",
]

Values = dict[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Batch:
    """One backward pass, or several: the samples, and the denominators of the losses' means (None for sums).

    A denominator is NaN where there is no one number: a sum beside a mean, passes over different mixes of terms. One
    on an accelerator may be a tensor there; `read` waits for it.
    unknown_reduction: the name of a loss that does not say whether it is a mean.
    """

    samples: int
    terms: tuple[float | Tensor, ...] | None
    unknown_reduction: str | None = None

    def read(self) -> Batch:
        """The same with denominators that are numbers."""
        terms = None if self.terms is None else tuple(map(float, self.terms))
        return replace(self, terms=terms)

    def __add__(self, other: Batch) -> Batch:
        """Both together."""
        mine, its = self.terms, other.terms
        terms = None
        if mine is not None and its is not None and in_proportion(mine, its):
            terms = tuple(a + b for a, b in zip(mine, its, strict=True))
        elif mine is not None or its is not None:
            terms = (float("nan"),) * max(len(mine or ()), len(its or ()))
        return Batch(self.samples + other.samples, terms, self.unknown_reduction or other.unknown_reduction)

    @property
    def weight(self) -> float | Tensor:
        """How much the batch counts among others that it is pooled with: the terms of its mean, or 1 for a sum."""
        return 1.0 if self.terms is None else self.terms[0]

    def union(self, scale: str, pooled: bool = False) -> Union:
        """What quantities are told of it; pooled: whether further batches join to one mean with it."""
        return Union(self.samples, self.terms is not None, scale, self.weight, pooled)


class UnionValues:
    """Values of one quantity over several batches, in memory that does not grow.

    Batch b counts with a weight w_b in the loss of them all, up to one divisor W: a value of power p is joined as
    `sum_b w_b^p value_b / W^p`. In a sum of losses w_b = W = 1; pooled means have w_b = terms_b, W = sum(terms).
    Per-sample values concatenate.
    concatenate: for all tensors of a parameter, or for each.
    """

    def __init__(self, powers: Sequence[float], concatenate: bool | Sequence[bool] = False) -> None:
        self.powers = powers
        each = [concatenate] * len(powers) if isinstance(concatenate, bool) else concatenate
        self.concatenate = tuple(each)
        self._values: dict[str, list[Any]] = {}
        self._weighted = False

    def add(self, values: Values, weight: float, first: bool, samples: tuple[int, int] = (0, 0)) -> None:
        """Take the values of one batch; weight: w_b; samples: those before and its own."""
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
                if not self.concatenate[i]:
                    tensors[i] = _wide(tensors[i])
                if p and factor != 1:
                    old = tensors[i]
                    tensors[i] = [t * factor**p for t in old] if self.concatenate[i] else old * factor**p

    def weighted(self, weight: float = 1.0) -> Values:
        """The values before they are divided by W; weight: of all of them among others that they are added to."""
        if self._values and not self._weighted:
            self._scale(self._weight)
        self._weighted = True
        return {name: weighed(value, self.powers, weight) for name, value in self.finish(1.0).items()}

    def take(self, values: Values) -> None:
        """Hold other weighted values in place of these."""
        self._hold(values)
        self._weighted = True

    def _hold(self, values: Values) -> None:
        self._values = {
            k: [[t] if c else t for t, c in zip(v, self.concatenate, strict=True)] for k, v in values.items()
        }

    def finish(self, total: float) -> Values:
        """The joined values; total: W."""
        done: Values = {}
        for name, tensors in self._values.items():
            out = []
            for t, p, concatenate in zip(tensors, self.powers, self.concatenate, strict=True):
                value = (t[0] if len(t) == 1 else torch.cat(_aligned(t))) if concatenate else t
                out.append(value / total**p if self._weighted and p and total != 1 else value)
            done[name] = tuple(out)
        return done


def weighed(values: Sequence[Any], powers: Sequence[float], weight: float) -> tuple[Any, ...]:
    """Values as they enter a sum over batches in which theirs has a weight: each times `weight^p`."""
    return tuple(_wide(t) * weight**p if p and weight != 1 else t for t, p in zip(values, powers, strict=True))


def _wide(value: Any) -> Any:
    """A gradient in half precision in the type that sums are held in; all other values are in theirs."""
    return widened(value) if isinstance(value, Tensor) else value


def scaled(values: Values, powers: Sequence[float], factor: float) -> Values:
    """The values of a loss times a factor."""
    return {name: weighed(value, powers, factor) for name, value in values.items()}


def in_proportion(one: tuple[float | Tensor, ...] | None, other: tuple[float | Tensor, ...] | None) -> bool:
    """Whether the means of two batches run over the same mix of terms; None: sums."""
    if one is None or other is None:
        return one is other
    return len(one) == len(other) and all(
        abs(a * float(other[0]) - b * float(one[0])) <= 1e-9 * abs(a * float(other[0]))
        for a, b in zip(map(float, one), map(float, other), strict=True)
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


def check_sum(old: Batch, batch: Batch, quantities: Sequence[Quantity], scale: str) -> None:
    """Raise Undefined where a quantity of the sum of the losses of two backward passes does not exist."""
    if scale == "sample" and (old.terms is None) != (batch.terms is None):
        raise Undefined(
            'scale="sample" asks for N g_n under a mean, but the losses of this context are a mean and a sum; use one '
            'reduction in all backward passes, or scale="loss"'
        )
    for quantity in quantities:
        quantity.check_union(old.union(scale), batch.union(scale))


def check_pooled(old: Batch, batch: Batch, quantities: Sequence[Quantity], scale: str) -> None:
    """Raise BadInput where two batches do not join to one, Undefined where a quantity of both does not exist."""
    unknown = old.unknown_reduction or batch.unknown_reduction
    if unknown is not None:
        raise BadInput(
            f"asked to join two batches to one, but whether {unknown} is a mean or a sum is not said; mark it: "
            'lw.as_loss(fn, reduction="mean") or "sum", or observe each batch in a context of its own'
        )
    if not in_proportion(old.terms, batch.terms):
        raise BadInput(
            f"two batches have no loss in common: the means run over {old.terms} terms so far and {batch.terms} now "
            "(None: a sum; nan: no one number); use the same loss, or observe them in two contexts"
        )
    for quantity in quantities:
        quantity.check_union(old.union(scale, pooled=True), batch.union(scale, pooled=True))


def union_of(reports: Sequence[tuple[int, Batch]], quantities: Sequence[Quantity], scale: str) -> Batch:
    """All ranks' batches as one; raises on all of them alike where they are none."""
    idle = [str(rank) for rank, (count, _) in enumerate(reports) if not count]
    if idle:
        raise NoBackward(
            f"asked to join the results of {len(reports)} ranks, but no backward pass has finished inside `observe` on "
            f"rank {', '.join(idle)}; every rank must run at least one"
        )
    union = reports[0][1]
    for rank, (_, batch) in enumerate(reports[1:], 1):
        try:
            check_pooled(union, batch, quantities, scale)
        except (BadInput, Undefined) as error:
            raise type(error)(f"asked to join the results of rank {rank} with those before it: {error}") from None
        union = union + batch
    return union
