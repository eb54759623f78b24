"""The values of an observation's quantities, joined over the batches that ran in it, and over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import BadInput, NoBackward
from layerwise.observation.over_ranks import Table, placed, sum_tables
from layerwise.observation.union import Batch, UnionValues, Values, check_pooled, check_sum, scaled, union_of
from layerwise.quantities.base import ByParameter, Context, Quantity
from layerwise.ranks.group import Ranks
from layerwise.ranks.trainers import Placements, placements_of
from layerwise.tape.pull import without_autocast
from layerwise.tensors import Verdict

__all__ = ["Results"]


class Results:
    """What an observation has so far.

    quantities: those that are computed; asked: those that the user gave, where second-pass quantities replace some.
    count: the number of backward passes; batch: all of their batches together. pooled: whether they join to one batch,
    of which a mean runs over all terms; else their losses add up as they are, as their gradients do in `.grad`.
    verdict: on what the passes have not waited for.
    """

    def __init__(self, quantities: Sequence[Quantity], scale: str, pooled: bool) -> None:
        self.quantities = self.asked = tuple(quantities)
        self.count, self.batch = 0, Batch(0, None)
        self._scale, self._pooled = scale, pooled
        self._values = [UnionValues(q.powers, q.concatenate) for q in quantities]
        self._gradient = UnionValues((1,))
        self.verdict = Verdict()
        self._made: dict[int, Any] = {}  # results, by the number of their quantity
        self._names: list[str] = []
        self._placements: Placements = {}
        self._kinds: dict[str, Any] = {}
        self._reduced = False

    # -- batches -------------------------------------------------------------------------------------------

    def follow(self, names: Iterable[str], owners: Mapping[str, Tensor]) -> None:
        """Know all parameters, those that were replaced among them, and how they are sharded."""
        self._names = list(names)
        self._placements = placements_of(owners)
        kinds = self._kinds
        if kinds.keys() != owners.keys() or any(kinds[name] != (p.shape, p.dtype) for name, p in owners.items()):
            self._kinds = {name: (p.shape, p.dtype) for name, p in owners.items()}

    def check(self, batch: Batch) -> None:
        """Raise where a further batch does not join those before it."""
        if self._reduced:
            raise BadInput(
                "asked to observe a further backward pass after all_reduce(), which has joined the ranks' results; run "
                "all backward passes first, or observe this one in a context of its own"
            )
        if self.count:
            self.batch, batch = self.batch.read(), batch.read()
            check = check_pooled if self._pooled else check_sum
            check(self.batch, batch, self.quantities, self._scale)

    def add(self, batch: Batch, values: Mapping[int, Values], gradient: Values, scale: float, verdict: Verdict) -> None:
        """Take the results of one backward pass, which `check` has passed.

        scale: of its loss, to be taken out. verdict: on what the pass has not waited for, read before any result is.
        """
        if scale != 1:
            values = {i: scaled(v, self.quantities[i].powers, 1 / scale) for i, v in values.items()}
            gradient = scaled(gradient, (1.0,), 1 / scale)
        first = self.count == 0
        weight = float(batch.weight) if self._pooled else 1.0
        self.verdict.join(verdict)
        for i, v in values.items():
            self._values[i].add(v, weight, first, (self.batch.samples, batch.samples))
        self._gradient.add(gradient, weight, first)
        self.count += 1
        self.batch = batch if first else self.batch + batch
        self._made = {}

    # -- results -------------------------------------------------------------------------------------------

    def require(self, name: str) -> None:
        """Raise NoBackward before the first backward pass, and what the verdict on the passes raises."""
        if not self.count:
            raise NoBackward(
                f"asked for {name!r}, but no backward pass that reaches a parameter of the model has finished inside "
                "`observe`; call loss.backward() there, in the same thread (torch.autograd.grad is no such pass)"
            )
        self.verdict.read()

    def result(self, i: int) -> Any:
        """The result of the i-th quantity, made once."""
        quantity = self.quantities[i]
        self.require(quantity.name)
        if i not in self._made:
            self.batch = self.batch.read()
            union = self.batch.union(self._scale)
            result = quantity.finish(self.values_of(i), union, Context(self._whole_gradient()))
            self._made[i] = result if any(self._values[i].concatenate[:1]) else self._placed(result)
        return self._made[i]

    def grad(self) -> ByParameter:
        """The gradient of the observed loss."""
        self.require("grad")
        held = self._whole_gradient()
        return self._placed(ByParameter({name: g.to(self._kinds[name][1]) for name, g in held.items()}))

    def values_of(self, i: int) -> Values:
        """The joined values of a quantity, from which it makes its result."""
        return self._ordered(self._values[i])

    def _whole_gradient(self) -> ByParameter:
        return ByParameter({name: v[0] for name, v in self._ordered(self._gradient).items()})

    def _ordered(self, held: UnionValues) -> Values:
        values = held.finish(float(self.batch.weight) if self._pooled or self._reduced else 1.0)
        return {name: values[name] for name in self._names if name in values}

    def _placed(self, result: Any) -> Any:
        """A reduced result, as DTensors where the parameters are."""
        return placed(result, self._placements) if self._reduced else result

    # -- ranks ---------------------------------------------------------------------------------------------

    def all_reduce(self, group: Any) -> None:
        """Join the results of all ranks, as those of pooled batches; see `Seen.all_reduce`."""
        if self._reduced:
            raise BadInput("asked for a second all_reduce(): these results are those of all ranks already")
        ranks = Ranks(group)
        if ranks.size > 1:
            with torch._C.DisableTorchFunction(), without_autocast(self._device()):
                self._join(ranks)
            self._made, self._reduced = {}, True

    def _device(self) -> str:
        values = self._gradient.finish(1.0).values() if self.count else ()
        return next((g.device.type for (g,) in values), "cpu")

    def _join(self, ranks: Ranks) -> None:
        """Check that the ranks' results join, and add them up."""
        settings = {f"quantity {i}": q.settings() for i, q in enumerate(self.quantities)}
        kinds = {name: (tuple(shape), str(dtype)) for name, (shape, dtype) in self._kinds.items()}
        ranks.agree({"the observed quantities": list(self.quantities), "scale": self._scale} | kinds | settings)
        ranks.together(self.verdict.read)
        self.batch = self.batch.read()
        reports = ranks.gather((self.count, self.batch))
        union = union_of(reports, self.quantities, self._scale)
        tables = ranks.together(self._tables)
        found = sum_tables(ranks, tables, self.batch.samples)
        quantities = list(self.quantities)
        for i, quantity in enumerate(self.quantities):
            first = quantity.first_pass()
            if first is not None:
                quantities[i], found[i + 1] = self._second_pass(ranks, quantity, first, found[i + 1], union)
        self.quantities = tuple(quantities)
        self._values = [UnionValues(q.powers, q.concatenate) for q in quantities]
        for held, values in zip([self._gradient, *self._values], found, strict=True):
            held.take(values)
        self.count, self.batch = sum(count for count, _ in reports), union

    def _tables(self) -> list[Table]:
        """The gradient and values of the quantities, weighted as those of one of several pooled batches."""
        weight = 1.0 if self._pooled else float(self.batch.weight)  # a pooled one has weighted its own
        found = [Table("the gradient", self._gradient.weighted(weight), (False,))]
        for i, (quantity, held) in enumerate(zip(self.quantities, self._values, strict=True)):
            found.append(Table(f"{quantity!r} ({i})", held.weighted(weight), held.concatenate, quantity.stacks))
        return found

    def _second_pass(
        self, ranks: Ranks, quantity: Quantity, first: Quantity, values: Values, union: Batch
    ) -> tuple[Quantity, Values]:
        """Second pass of a quantity (EKFAC): fix the basis from all ranks, then recompute the values in it."""

        def local() -> Quantity:
            return quantity.second_pass(first.finish(values, union.union(self._scale), Context({})))

        second = ranks.together(local)
        second.broadcast(ranks)
        recomputed = ranks.together(lambda: quantity.second_values(values, second))
        (summed,) = sum_tables(ranks, [Table(repr(second), recomputed, (False,))], self.batch.samples)
        return second, summed
