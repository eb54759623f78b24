"""The results of an observation, joined over the batches that ran in it, and over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from layerwise.errors import BadInput, NoBackward
from layerwise.observation.over_ranks import Table, placed, sum_tables
from layerwise.observation.union import Batch, Joined, Values, check_join, union_of
from layerwise.quantities.base import ByParameter, Context, Quantity
from layerwise.ranks.group import Ranks
from layerwise.ranks.trainers import Placements, placements_of
from layerwise.tape.pull import alone

__all__ = ["Seen"]


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
        self._placements: Placements = {}
        self._kinds: dict[str, Any] = {}
        self._reduced = False

    def all_reduce(self, group: Any = None) -> Seen:
        """Join the results of all ranks, as those of several backward passes: call it once, after the last one.

        Ranks are batches: with a mean loss over n_r terms on rank r, a value of power p becomes
        sum_r n_r^p value_r / (sum_r n_r)^p, and a sum loss adds up. So every reduced quantity, and `seen.grad`, is that
        of one process on all ranks' samples as one batch, whatever their numbers on each rank. Results of single
        samples (`PerSampleGrad`, `SquaredNorm`, `Sketch`, ...) stay on their rank, in the scale of the union. One flat
        message for each type, and some short ones; two rounds for `EKFAC` without a basis, whose basis is then that of
        the union. Results by parameter that have its shape are DTensors where the parameter is one, placed like it.

        group: a process group; None: all processes, or this one alone where torch.distributed was not started. A
        collective: all ranks call it. Returns itself.
        Raises, on all ranks: BadInput (ranks that disagree on parameters, quantities or the loss, by name; a second
        call), NoBackward (a rank without a backward pass), Undefined (`PairwiseDot`, `KFRA`, and whatever else does not
        exist for several batches). Nothing is changed then.
        """
        if self._reduced:
            raise BadInput("asked for a second all_reduce(): these results are those of all ranks already")
        ranks = Ranks(group)
        if ranks.size > 1:
            with alone(self._device()):
                self._join(ranks)
            self._results, self._reduced = {}, True
        return self

    def _device(self) -> str:
        values = self._gradient.finish(1.0).values() if self._count else ()
        return next((g.device.type for (g,) in values), "cpu")

    def _join(self, ranks: Ranks) -> None:
        """Check that the ranks' results join, and add them up."""
        settings = {f"quantity {i}": q.settings() for i, q in enumerate(self._quantities)}
        ranks.agree({"the observed quantities": self._quantities, "scale": self._scale} | self._kinds | settings)
        told = ranks.gather((self._count, self._batch()))
        union = union_of(told, self._quantities, self._scale)
        tables = ranks.together(self._tables)
        found = sum_tables(ranks, tables, self._samples)
        stands = list(self._quantities)
        for i, quantity in enumerate(self._quantities):
            first = quantity.first()
            if first is not None:
                stands[i], found[i + 1] = self._settled(ranks, quantity, first, found[i + 1], union)
        for i, quantity in enumerate(stands):
            self._joined[i] = Joined(quantity.powers, quantity.concatenate)
        self._quantities = stands
        for j, values in zip([self._gradient, *self._joined], found, strict=True):
            j.take(values)
        self._count, self._samples, self._terms = sum(count for count, _ in told), union.samples, union.terms

    def _tables(self) -> list[Table]:
        """The weighted gradient and values of the quantities."""
        found = [Table("the gradient", self._gradient.weighted(), (False,))]
        for i, (quantity, joined) in enumerate(zip(self._quantities, self._joined, strict=True)):
            found.append(Table(f"{quantity!r} ({i})", joined.weighted(), joined.concatenate, quantity.stacks))
        return found

    def _settled(
        self, ranks: Ranks, quantity: Quantity, first: Quantity, values: Values, union: Batch
    ) -> tuple[Quantity, Values]:
        """What stands in for a quantity that needs a result of the whole union first, and its values."""

        def local() -> Quantity:
            return quantity.after(first.finish(values, union.union(self._scale), Context({})))

        after = ranks.together(local)
        after.share(ranks)
        settled = ranks.together(lambda: quantity.settle(values, after))
        (summed,) = sum_tables(ranks, [Table(repr(after), settled, (False,))], self._samples)
        return after, summed

    def _follow(self, names: Iterable[str], owners: Mapping[str, Tensor]) -> None:
        """Know all parameters, those that were replaced among them, and how they are sharded."""
        self._names_in_order = list(names)
        self._placements = placements_of(owners)
        self._kinds = {name: (tuple(p.shape), str(p.dtype)) for name, p in owners.items()}

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
        return self._placed(self._whole_gradient())

    def _whole_gradient(self) -> ByParameter:
        values = self._ordered(self._gradient.finish(self._total()))
        return ByParameter({name: v[0] for name, v in values.items()})

    def _placed(self, result: Any) -> Any:
        """A reduced result, as DTensors where the parameters are."""
        return placed(result, self._placements) if self._reduced else result

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
            union = self._batch().union(self._scale)
            result = quantity.finish(self._values_of(i), union, Context(self._whole_gradient()))
            self._results[i] = result if any(self._joined[i].concatenate[:1]) else self._placed(result)
        return self._results[i]

    def _values_of(self, i: int) -> Values:
        """The joined values of a quantity, from which it makes its result."""
        return self._ordered(self._joined[i].finish(self._total()))

    def _add(self, batch: Batch, values: Mapping[int, Values], gradient: Values) -> None:
        """Take the results of one backward pass, which `_check` has passed."""
        first = self._count == 0
        weight = batch.terms[0] if batch.terms is not None else 1.0
        for i, v in values.items():
            self._joined[i].add(v, weight, first, (self._samples, batch.samples))
        self._gradient.add(gradient, weight, first)
        self._count += 1
        both = batch if first else self._batch() + batch
        self._samples, self._terms = both.samples, both.terms
        self._results = {}

    def _check(self, batch: Batch) -> None:
        """Batches join only where their losses are means over the same mix of terms, or all sums."""
        if self._reduced:
            raise BadInput(
                "asked to observe a further backward pass after all_reduce(), which has joined the ranks' results; run "
                "all backward passes first, or observe this one in a context of its own"
            )
        if not self._count:
            self._untold = batch.untold
            return
        check_join(self._batch(), batch, self._quantities, self._scale)

    def _batch(self) -> Batch:
        return Batch(self._samples, self._terms, self._untold)
