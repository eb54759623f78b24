"""The results of an observation, joined over the batches that ran in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import BadInput, NoBackward
from layerwise.quantities.base import ByParameter, Context, Quantity, Union

__all__ = ["Batch", "Joined", "Seen"]

Values = dict[str, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Batch:
    """One backward pass: its samples, and the denominators of its losses' means (None for sums).

    untold: the name of a loss that does not say whether it is a mean.
    """

    samples: int
    terms: tuple[float, ...] | None
    untold: str | None = None

    def union(self, scale: str) -> Union:
        """The batch as a union of one."""
        return Union(self.samples, self.terms is not None, scale, 1.0 if self.terms is None else self.terms[0])


class Joined:
    """Values of several batches as those of the union's loss, in memory that does not grow with them.

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
            self._values = {
                k: [[t] if c else t for t, c in zip(v, self.concatenate, strict=True)] for k, v in values.items()
            }
            self._weight = weight
            return
        if not self._weighted:
            self._scale(self._weight)
            self._weighted = True
        for name, tensors in values.items():
            weighted = [t * weight**p if p and weight != 1 else t for t, p in zip(tensors, self.powers, strict=True)]
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


def _aligned(parts: list[Tensor]) -> list[Tensor]:
    """The batches' values with as many columns each (dim 1): missing ones are zero.

    Only the columns of roots differ between batches, with the number of loss terms a sample.
    """
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) == 1:
        return parts
    most = max(part.shape[1] for part in parts)
    return [torch.cat([p, p.new_zeros(len(p), most - p.shape[1], *p.shape[2:])], 1) for p in parts]


class Seen:
    """The results of an observation, as attributes (`seen.variance`) and by quantity (`seen[q]`).

    `seen.grad` holds the gradient of the observed loss. Asking before a backward pass raises NoBackward;
    two quantities of one class make the attribute an error that says so.
    """

    def __init__(self, quantities: Sequence[Quantity], scale: str, names: Sequence[str]) -> None:
        self._names_in_order = list(names)
        self._quantities = list(quantities)
        self._asked = self._quantities  # what results are asked for by, where others stand in for them
        self._scale = scale
        self._count = 0
        self._samples = 0
        self._terms: tuple[float, ...] | None = None
        self._untold: str | None = None
        self._joined = [Joined(q.powers, q.concatenate) for q in self._quantities]
        self._gradient = Joined((1,))
        self._results: dict[int, Any] = {}

    def __getitem__(self, quantity: Quantity) -> Any:
        for i, q in enumerate(self._asked):
            if q is quantity:
                return self._result(i)
        raise KeyError(f"{quantity!r} is not observed here; observed: {self._names()}")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name == "grad":  # the property below raised
            self._require(name)
        found = [i for i, q in enumerate(self._quantities) if q.name == name]
        if len(found) == 1:
            return self._result(found[0])
        if found:
            raise AttributeError(
                f"{len(found)} observed quantities are called {name!r}; index with the instance: seen[quantity]"
            )
        raise AttributeError(f"no quantity {name!r} is observed here; observed: {self._names()}, grad")

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *(q.name for q in self._quantities)]

    @property
    def grad(self) -> ByParameter:
        """The gradient of the observed loss, by parameter, `[*shape]` each."""
        self._require("grad")
        values = self._ordered(self._gradient.finish(self._total()))
        return ByParameter({name: v[0] for name, v in values.items()})

    def _names(self) -> str:
        return ", ".join(q.name for q in self._quantities) or "nothing"

    def _require(self, name: str) -> None:
        if not self._count:
            raise NoBackward(
                f"asked for {name!r}, but no backward pass has finished inside `observe`; call loss.backward() there"
            )

    def _ordered(self, values: Values) -> Values:
        return {name: values[name] for name in self._names_in_order if name in values}

    def _total(self) -> float:
        return self._terms[0] if self._terms is not None else 1.0

    def _result(self, i: int) -> Any:
        quantity = self._quantities[i]
        self._require(quantity.name)
        if i not in self._results:
            union = Batch(self._samples, self._terms).union(self._scale)
            values = self._ordered(self._joined[i].finish(self._total()))
            self._results[i] = quantity.finish(values, union, Context(self.grad))
        return self._results[i]

    def _add(self, batch: Batch, values: Mapping[int, Values], gradient: Values) -> None:
        """Take the results of one backward pass, which `_check` has passed."""
        first = self._count == 0
        weight = batch.terms[0] if batch.terms is not None else 1.0
        for i, v in values.items():
            self._joined[i].add(v, weight, first, (self._samples, batch.samples))
        self._gradient.add(gradient, weight, first)
        self._count += 1
        self._samples += batch.samples
        if batch.terms is not None:
            self._terms = batch.terms if first else tuple(a + b for a, b in zip(self._terms, batch.terms, strict=True))  # type: ignore[arg-type]
        self._results = {}

    def _check(self, batch: Batch) -> None:
        """Batches join only where their losses are means over the same mix of terms, or all sums."""
        if not self._count:
            self._untold = batch.untold
            return
        untold = self._untold or batch.untold
        if untold is not None:
            raise BadInput(
                f"asked to join two backward passes, but whether {untold} is a mean or a sum is not said; mark it: "
                'lw.as_loss(fn, reduction="mean") or "sum", or observe each batch in a context of its own'
            )
        old, new = self._terms, batch.terms
        ok = (old is None) == (new is None)
        if old is not None and new is not None:
            ok = len(old) == len(new) and all(
                abs(a * new[0] - b * old[0]) <= 1e-9 * abs(a * new[0]) for a, b in zip(old, new, strict=True)
            )
        if not ok:
            raise BadInput(
                f"two observed backward passes have no loss in common: the means run over {old} terms so far and "
                f"{new} now (None: a sum); use the same loss, or observe them in two contexts"
            )
        for quantity in self._quantities:
            quantity.check_union(Batch(self._samples, old).union(self._scale), batch.union(self._scale))
