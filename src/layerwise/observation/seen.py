"""The results of an observation, as its user asks for them."""

from __future__ import annotations

from typing import Any

from layerwise.observation.results import Results
from layerwise.quantities.base import ByParameter, Quantity

__all__ = ["Seen"]


class Seen:
    """The results of an observation, as attributes (`seen.variance`) and by quantity (`seen[q]`).

    `seen.grad` holds the gradient of the observed loss. Asking before a backward pass raises NoBackward;
    two quantities of one class make the attribute an error that says so.
    """

    def __init__(self, results: Results) -> None:
        self._results = results

    def all_reduce(self, group: Any = None) -> Seen:
        """Join the results of all ranks, pooled as the batches of `accumulate`: call it once, after the last pass.

        Ranks are batches, each of the sum of its own backward passes: with means over n_r terms on rank r, a value of
        power p becomes sum_r n_r^p value_r / (sum_r n_r)^p, and a sum loss adds up. So every reduced quantity, and
        `seen.grad`, is that of one process on all ranks' samples as one batch, whatever their numbers on each rank.
        Results of single samples (`PerSampleGrad`, `SquaredNorm`, `Sketch`, ...) stay on their rank, in the scale of
        the union. One flat message for each type, and some short ones; two rounds for `EKFAC` without a basis, whose
        basis is then that of the union. Results by parameter that have its shape are DTensors where the parameter is
        one, placed like it.

        group: a process group; None: all processes, or this one alone where torch.distributed was not started. A
        collective: all ranks call it. Returns itself.
        Raises, on all ranks: BadInput (ranks that disagree on parameters, quantities or the loss, by name; a second
        call), NoBackward (a rank without a backward pass), Undefined (`PairwiseDot`, `KFRA`, and whatever else does not
        exist for several batches). Nothing is changed then.
        """
        self._results.all_reduce(group)
        return self

    def __getitem__(self, quantity: Quantity) -> Any:
        for i, q in enumerate(self._results.asked):
            if q is quantity:
                return self._results.result(i)
        raise KeyError(f"{quantity!r} is not observed here; observed: {self._names()}")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name == "grad":  # the property below raised
            self._results.require(name)
        found = [i for i, q in enumerate(self._results.quantities) if q.name == name]
        if len(found) == 1:
            return self._results.result(found[0])
        if found:
            raise AttributeError(
                f"{len(found)} observed quantities are called {name!r}; index with the instance: seen[quantity]"
            )
        raise AttributeError(f"no quantity {name!r} is observed here; observed: {self._names()}, grad")

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *(q.name for q in self._results.quantities)]

    @property
    def grad(self) -> ByParameter:
        """The gradient of the observed loss, by parameter, `[*shape]` each."""
        return self._results.grad()

    def _names(self) -> str:
        return ", ".join(q.name for q in self._results.quantities) or "nothing"
