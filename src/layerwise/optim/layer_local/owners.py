"""Layers shared out over the ranks of a process group: each rank solves its own and broadcasts the new weights."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerwise import errors
from layerwise.errors import BadInput, LayerwiseError, RankFailed
from layerwise.optim.layer_local.executors import (
    Executor,
    Facts,
    GradientJob,
    LayerJob,
    State,
    Workers,
    executor_of,
)
from layerwise.ranks.group import Ranks, values_digest
from layerwise.ranks.ownership import assigned

__all__ = ["Execution", "Parallel", "RankExecutor", "all_or_none", "described", "digest", "executor_over"]

Parallel = Any  # None, True, a process group, or Ranks
_SMALL = 16  # elements up to which a CPU tensor is pickled, not broadcast
_APART = 1e-4  # relative difference of losses that other summation orders may make


@dataclass(frozen=True)
class Execution:
    """Who solves the layers of a step of `LocoProp` or `AltMin`; the bits are the same.

    workers: None, n threads, or ("process", n): how many layers are solved at once.
    parallel: True or a process group: ranks with the same batch share the layers.
    """

    workers: Workers = None
    parallel: Parallel = None


def executor_over(execution: Execution) -> Executor:
    """The executor for an `Execution`. Raises BadInput as `executor_of` and `Ranks`."""
    parallel, here = execution.parallel, executor_of(execution.workers)
    if parallel is None or parallel is False:
        return here
    if isinstance(parallel, str | int | float) and parallel is not True:
        raise BadInput(f"parallel is None, True (all ranks), or a process group; got {parallel!r}")
    ranks = parallel if isinstance(parallel, Ranks) else Ranks(None if parallel is True else parallel)
    return RankExecutor(ranks, here)


class RankExecutor(Executor):
    """Each rank solves the layers that it owns, by its own local executor; the bits are those of one process.

    All ranks run the same closure on the same batch. New layers are assigned longest first, to the rank with the least
    work, and stay there with the state of their local optimizers. Owners broadcast the new weights. Ranks with other
    models, settings, batches or losses are refused by name.
    """

    def __init__(self, ranks: Ranks, home: Executor) -> None:
        self._ranks, self._home = ranks, home
        self._owner: dict[str, int] = {}
        self._steps = 0
        self._met = False

    # -- what must be alike ------------------------------------------------------------------------------------

    def meet(self, facts: Facts) -> None:
        """Raise BadInput, by name, for settings that differ between ranks."""
        self._ranks.agree(facts)

    def agreed(
        self, where: str | None, loss: Tensor, facts: Callable[[], Facts], tensors: Callable[[], Mapping[str, Tensor]]
    ) -> str | None:
        """The first reason on any rank to skip the step, or None. Raises BadInput where ranks differ.

        One short message holds whether to skip, the loss, and a digest of the facts; at the first step and after a load
        also of parameters and buffers.
        """
        self._steps += 1
        self._ranks.doing = f"step {self._steps} of this run"
        bad, value = where is not None, 0.0 if where is not None else float(loss)
        marks = [0, 0] if bad else [_checksum(facts()), 0 if self._met else _checksum(digest(tensors()))]
        said = [value, *map(float, marks)]
        most = self._ranks.most([float(bad), *said, *(-x for x in said)])
        if most[0] > 0:
            return self._ranks.first(where)
        high, low = most[1:4], [-x for x in most[4:]]
        if high[1] != low[1]:
            self._ranks.agree(facts())
        if high[2] != low[2]:
            self._ranks.agree(digest(tensors()))
        self._met = True
        if high[0] - low[0] > _APART * max(abs(high[0]), abs(low[0])):
            losses = "; ".join(f"rank {r}: {x!r}" for r, x in enumerate(self._ranks.gather(value)))
            raise BadInput(
                f"the ranks have different losses at {self._ranks.doing} ({losses}). Layers are shared out, not "
                "samples: give every rank the same batch, and the same random numbers if the model draws any"
            )
        return None

    def anywhere(self, where: str | None) -> str | None:
        """The first non-finite tensor after the step, of the lowest rank that has one."""
        return self._ranks.first(where)

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks; this rank's parameters may differ from theirs afterwards."""
        self._met = False
        self._ranks.tell(error)

    # -- solving -----------------------------------------------------------------------------------------------

    def run(self, jobs: Sequence[LayerJob], rest: Sequence[GradientJob], state: State) -> None:
        """Solve the layers of this rank, and receive those of the others. An error of one rank is raised on all."""
        every: list[LayerJob | GradientJob] = [*jobs, *rest]
        owners = self._assign(every, state)
        me = self._ranks.rank
        mine = [job for job, owner in zip(jobs, owners, strict=False) if owner == me]
        ours = [job for job, owner in zip(rest, owners[len(jobs) :], strict=True) if owner == me]
        try:
            all_or_none(self._ranks, lambda: self._home.run(mine, ours, state))
        except Exception:
            self._met = False  # ranks may now differ
            raise
        moved = [(owner, list(job.params.values())) for job, owner in zip(every, owners, strict=True)]
        self._ranks.broadcast_owned(moved)

    def _assign(self, jobs: Sequence[LayerJob | GradientJob], state: State) -> list[int]:
        """The owner of each job; drops the optimizer state of parameters that other ranks own."""
        known = {n: owner for n, job in enumerate(jobs) if (owner := self._owner_of(job)) is not None}
        costs = {n: job.cost() for n, job in enumerate(jobs)} if len(known) < len(jobs) else dict.fromkeys(known, 0.0)
        moved: dict[str, tuple[Tensor, int]] = {}
        for n, new_owner in assigned(costs, self._ranks.size, known).items():
            owner = self._owner_of(jobs[n])
            owner = new_owner if owner is None else owner
            for name, p in jobs[n].params.items():
                if self._owner.setdefault(name, owner) != owner:  # now fitted together with parameters of another owner
                    moved[name] = p, owner
        if moved:
            full = self.whole(state, {name: p for name, (p, _) in moved.items()})
            for name, (p, owner) in moved.items():
                self._owner[name] = owner
                if p in full:
                    state[p] = full[p]
        for job in jobs:
            for name, p in job.params.items():
                if self._owner[name] != self._ranks.rank:
                    state.pop(p, None)
        return [self._owner[next(iter(job.params))] for job in jobs]

    def _owner_of(self, job: LayerJob | GradientJob) -> int | None:
        """The rank that owns one of the job's parameters already, or None."""
        return next((self._owner[name] for name in job.params if name in self._owner), None)

    # -- state -------------------------------------------------------------------------------------------------

    def whole(self, state: State, params: Mapping[str, Tensor]) -> State:
        """The optimizer state of all parameters, fetched from their owners; unowned ones have it on every rank."""
        asked = {id(p) for p in params.values()}
        full = {p: own for p, own in state.items() if id(p) not in asked}
        me = self._ranks.rank
        mine = {name: _packed(state[p]) for name, p in params.items() if self._owner.get(name) == me and p in state}
        kept = self._ranks.gather(mine)
        for name, p in params.items():
            owner = self._owner.get(name)
            if owner is None:
                if p in state:
                    full[p] = state[p]
            elif name in kept[owner]:
                full[p] = dict(state[p]) if owner == me else _unpacked(kept[owner][name], p.device)
        self._ranks.broadcast_owned(
            [
                (rank, [full[params[name]][key] for key, value in found.items() if isinstance(value, _TensorStub)])
                for rank, states in enumerate(kept)
                for name, found in states.items()
            ]
        )
        return full

    def loaded(self) -> None:
        """Compare the values of parameters again at the next step."""
        self._met = False


def all_or_none(ranks: Ranks, act: Callable[[], None]) -> None:
    """Act on every rank; an error of one is raised on all: its own as it is, another rank's by type and text."""
    _, failure, said = ranks.attempt(act)
    rank = next((r for r, error in enumerate(said) if error is not None), None)
    if rank is None:
        return
    if failure is not None and rank == ranks.rank:
        raise failure
    name, text = said[rank] or ("", "")
    kind = getattr(errors, name, LayerwiseError)
    raise kind(text) if kind is not LayerwiseError else RankFailed(f"rank {rank} failed with {name}: {text}")


class _TensorStub:
    """Stands in a gathered state for a tensor that its owner broadcasts."""

    def __init__(self, t: Tensor) -> None:
        self.shape, self.dtype = tuple(t.shape), t.dtype
        self.strides = torch.empty_like(t, device="meta").stride()  # a product's bits depend on the layout


def _packed(state: Mapping[str, Any]) -> dict[str, Any]:
    def packed(value: Any) -> Any:
        big = isinstance(value, Tensor) and (value.device.type != "cpu" or value.numel() > _SMALL)
        return _TensorStub(value) if big else value

    return {key: packed(value) for key, value in state.items()}


def _unpacked(state: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        key: torch.empty_strided(v.shape, v.strides, dtype=v.dtype, device=device) if isinstance(v, _TensorStub) else v
        for key, v in state.items()
    }


def described(value: Any) -> str:
    """A setting as text without memory addresses, equal in all processes that have it."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def digest(params: Mapping[str, Tensor]) -> dict[str, str]:
    """A checksum of each tensor's values, by name."""
    return {name: f"values with checksum {values_digest(p)[:12]}" for name, p in params.items()}


def _checksum(facts: Facts) -> int:
    return zlib.crc32(repr(sorted(facts.items())).encode())
