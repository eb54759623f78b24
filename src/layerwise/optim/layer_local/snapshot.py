"""Snapshot of parameters and optimizer state before a step: restores them, or writes old − new into `.grad`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import NonFinite
from layerwise.local.layers.overshoot import StepTaken, overshot, sizes_of
from layerwise.local.problem import LocalProblem
from layerwise.optim.base import NamedOptimizer
from layerwise.optim.deferred import Late, Overshoot
from layerwise.optim.layer_local.executors import Executor, GradientJob, LayerJob
from layerwise.tensors import Verdict, all_finite, largest_entries, without_grad

__all__ = ["Backups", "Snapshot", "solved"]


class Backups:
    """Memory of copies, kept from step to step."""

    def __init__(self) -> None:
        self._forms: list[Any] = []
        self._copies: list[Tensor] = []

    @without_grad
    def of(self, tensors: list[Tensor]) -> list[Tensor]:
        """Copies of tensors, valid until the next call."""
        forms = [(t.shape, t.dtype, t.device) for t in tensors]
        if forms != self._forms:
            self._copies = [torch.empty_like(t) for t in tensors]
            self._forms = forms  # after them, for an interrupt may come between
        if tensors:
            torch._foreach_copy_(self._copies, tensors)
        return self._copies

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies are empty."""
        return Backups, ()


# Means of gradients, which the parameter has just been moved by: one that is not finite shows there, too.
_IN_PARAMETER = frozenset(("exp_avg", "momentum_buffer", "momentum"))
_NUMBERS = (int, float, type(None))
_NOTHING: dict[str, Any] = {}
_NO_AVERAGES: Mapping[str, Tensor] = {}


class Snapshot:
    """Copies of named parameters and of their optimizer state.

    replaced: parameters whose state is never written in place; it is not copied. backups: memory to copy into.
    averages: running averages of parameters that the step makes, if any.
    """

    def __init__(
        self,
        params: Iterable[tuple[str, Tensor]],
        state: dict[Any, Any],
        replaced: Collection[str] = (),
        backups: Backups | None = None,
        averages: Mapping[str, Tensor] = _NO_AVERAGES,
    ) -> None:
        self._params, self._state, self._averages, self._replaced = list(params), state, averages, replaced
        self._before: list[dict[str, Any] | None] = []
        self.too_far: set[str] = set()  # whose state is not restored: momentum would carry them there again
        self._live = live = [p for _, p in self._params]
        for name, p in self._params:
            own = state.get(p)
            self._before.append(own := None if own is None else dict(own))
            if own and name not in replaced:
                for key, value in own.items():
                    if isinstance(value, Tensor):
                        live.append(value)
                    elif not isinstance(value, _NUMBERS):
                        own[key] = copy.deepcopy(value)
        self._copies = (Backups() if backups is None else backups).of(self._live)

    def moved_by(self, jobs: Iterable[LayerJob | GradientJob]) -> list[StepTaken]:
        """What jobs have moved, with the values before."""
        before = {name: copy for (name, _), copy in zip(self._params, self._copies, strict=False)}
        return [StepTaken(job.params, [before[name] for name in job.params], *_judged_by(job)) for job in jobs]

    def overshot(self, moved: Sequence[StepTaken], sizes: Sequence[float]) -> Overshoot | None:
        """The words for the first that went too far; the local optimizers of all that did start anew."""
        found: Overshoot | None = None
        for each, words in overshot(moved, sizes):
            found = found or Overshoot(words)
            self.too_far |= each.params.keys()
        return found

    def spoiled(self) -> str | None:
        """The first parameter with NaN or infinity in its value or state, or None."""
        bad = self.spoiled_names()
        return f"the solution of {bad[0]}'s local problem" if bad else None

    def spoiled_names(self) -> list[str]:
        """The parameters with NaN or infinity in their values or state."""
        every = [(name, self._checked(n)) for n, (name, _) in enumerate(self._params)]
        if all_finite([t for _, tensors in every for t in tensors]):
            return []
        return [name for name, tensors in every if not all_finite(tensors)]

    def ask(self, verdict: Verdict) -> None:
        """As `spoiled`, when the verdict is read; NonFinite then holds the words."""
        named = {f"{name} {i}": t for n, (name, _) in enumerate(self._params) for i, t in enumerate(self._checked(n))}

        def judge(names: list[str], largest: list[float]) -> None:
            for name, most in zip(names, largest, strict=True):
                if not math.isfinite(most):
                    raise NonFinite(f"the solution of {name.rpartition(' ')[0]}'s local problem")

        for names, largest in largest_entries(named):
            places = [f"the solution of {name.rpartition(' ')[0]}'s local problem" for name in names]
            verdict.ask(largest, partial(judge, names), places)

    def is_on_device(self) -> bool:
        """Whether all that has changed are tensors beside their parameters, which a device can restore."""
        if self._averages:
            return False
        for (_, p), before in zip(self._params, self._before, strict=True):
            now = self._state.get(p, _NOTHING)
            if now.keys() != (before or _NOTHING).keys():
                return False
            for key, value in now.items():
                held = (before or _NOTHING)[key]
                kept = value is held and value.device == p.device if isinstance(value, Tensor) else value == held
                if not kept:
                    return False
        return True

    def restore(self, late: Late) -> None:
        """Restore what a bad step has written, where its verdict is left on the device."""
        late.restore(self._live, self._copies)

    def _checked(self, number: int) -> list[Tensor]:
        """A parameter and the tensors of its state, but for counters, what shows in it, and what no step wrote."""
        name, p = self._params[number]
        before = (self._before[number] or _NOTHING) if name in self._replaced else _NOTHING
        found = [p]
        for key, value in self._state.get(p, _NOTHING).items():
            if key not in _IN_PARAMETER and isinstance(value, Tensor) and value.dim() and value is not before.get(key):
                found.append(value)
        return found

    @without_grad
    def put_back(self) -> None:
        """Restore parameters and state."""
        for t, value in zip(self._live, self._copies, strict=True):
            t.copy_(value)
        for (name, p), before in zip(self._params, self._before, strict=True):
            self._state.pop(p, None)
            if before is not None and name not in self.too_far:
                self._state[p] = before

    @without_grad
    def as_gradients(self, factor: float = 1.0, moved: Mapping[str, Tensor] = _NOTHING) -> Callable[[], None]:
        """What restores the parameters and writes their movement `old − new`, times a factor, into `.grad`.

        moved: the new values by name, where they have more digits than the parameters.
        """
        params = [p.detach() for _, p in self._params]
        values = self._copies[: len(params)]
        news = [moved.get(name, p) for (name, _), p in zip(self._params, params, strict=True)]
        moves = [value - new for value, new in zip(values, news, strict=True)]
        moves = moves if factor == 1 else [g * factor for g in moves]
        grads = [g.to(p.dtype) for g, p in zip(moves, params, strict=True)]

        def write() -> None:
            if params:
                torch._foreach_copy_(params, values)
            for (_, p), grad in zip(self._params, grads, strict=True):
                p.grad = grad

        return write


def solved(
    solve: Callable[[], None],
    snapshot: Snapshot,
    executor: Executor,
    after: Callable[[], Callable[[], None]],
    optimizer: NamedOptimizer,
    late: Late | None = None,
    jobs: Sequence[LayerJob | GradientJob] = (),
) -> str | Late | None:
    """Solve, and return None; or restore the snapshot, and return why: what is not finite, or went too far.

    after: prepares what else is part of the step, where the solution is finite; what it gives is run when the step is
    decided, in all processes. Whatever raises before, all is as it was. late: judges the batch too, where that has not
    been read before; returned where it stays on the device. jobs: what is solved; where a step may be of any size, and
    the host may wait, it is judged by its own loss.
    """
    try:
        solve()
        moved = snapshot.moved_by(job for job in jobs if job.free)
        where = _judged(late, snapshot, moved)
        commit = after() if where is None else _nothing
        where = executor.anywhere(where)
        if where is None:
            optimizer.complete(partial(_complete, commit, late, snapshot))
            return late if late is not None and late.deferred else None
    except NonFinite as error:
        where = str(error).removesuffix(" holds NaN or infinity")
    except BaseException:
        if not optimizer.was_made:
            snapshot.put_back()
        raise
    if where is not None:
        snapshot.put_back()
    return where


def _judged_by(job: LayerJob | GradientJob) -> tuple[Callable[[], LocalProblem] | None, tuple[Tensor, Tensor] | None]:
    """What a step is judged by: the local problem, or the slope of the loss."""
    return ((lambda: job.task().problem), None) if isinstance(job, LayerJob) else (None, job.slope)


def _judged(late: Late | None, snapshot: Snapshot, moved: Sequence[StepTaken]) -> str | None:
    """The first bad tensor of a batch and of its solution, or the first step too far; or None, left on the device.

    One wait, and more only for what has grown.
    """
    if late is None:
        return snapshot.spoiled() or (snapshot.overshot(moved, sizes_of(moved).tolist()) if moved else None)
    snapshot.ask(late.verdict)
    late.deferred = late.deferred and snapshot.is_on_device()
    sizes: list[float] = []
    if moved and not late.deferred:
        late.verdict.ask(sizes_of(moved), sizes.extend)
    return late.reason() or (snapshot.overshot(moved, sizes) if sizes else None)


def _complete(commit: Callable[[], None], late: Late | None, snapshot: Snapshot) -> None:
    commit()
    if late is not None:
        snapshot.restore(late)
        late.commit()


def _nothing() -> None:
    """What completes a step that is taken back."""
