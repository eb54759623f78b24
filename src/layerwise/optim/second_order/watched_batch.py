"""One watched batch: measures its curvature, and records a non-finite loss instead of raising."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerwise.errors import AmbiguousSamples, BadInput, NonFinite, SamplesMixed, Undefined
from layerwise.graph.coverage import prove
from layerwise.observation.engine import Observation
from layerwise.observation.union import Batch, weighed
from layerwise.optim.second_order.averages import Measured
from layerwise.quantities.base import Context, Quantity, Union
from layerwise.quantities.kronecker.factor_sums import Factors
from layerwise.ranks.group import Ranks
from layerwise.ranks.sums import all_reduced, describe, tensors_of
from layerwise.tape.pull import alone
from layerwise.tape.tape import Tape
from layerwise.tape.uses import Use, first_bad_call
from layerwise.tensors import is_finite

__all__ = ["NO_BATCH", "CurvatureWatch", "MeasuredSums", "Watched", "bad_curvature", "bad_gradient"]

_NO_SAMPLES = (SamplesMixed, AmbiguousSamples, BadInput, Undefined)  # the samples are mixed, or cannot be found


NO_BATCH = Batch(0, None)


class MeasuredSums(NamedTuple):
    """Sums by parameter for the blocks of one kind, the quantity that finishes them, and the batches they cover."""

    kind: str
    quantity: Quantity
    values: dict[str, tuple[Any, ...]]
    union: Union

    def parts(self, name: str) -> list[Tensor | Factors]:
        """A parameter's sums to all-reduce now; second moments follow when all ranks have one eigenbasis."""
        return [part for part in self.values[name] if isinstance(part, Tensor | Factors)]

    def described(self) -> dict[str, str]:
        """The shapes and places of each parameter's sums, which must be equal on all ranks."""
        return {name: ", ".join(repr(describe(part)) for part in self.parts(name)) for name in self.values}

    def all_reduced(self, ranks: Ranks, weight: float) -> MeasuredSums:
        """The sums over all ranks. weight: of this rank's loss in that of the whole batch.

        As for several batches of one process (`layerwise.observation.union`): a value of power p scales by `weight^p`.
        Gradients that wait for an eigenbasis are scaled alone.
        """
        powers = self.quantity.powers
        scaled = self._replace(values={name: weighed(value, powers, weight) for name, value in self.values.items()})
        totals = iter(all_reduced(ranks, [part for name in self.values for part in scaled.parts(name)]))
        values = {
            name: tuple(next(totals) if isinstance(part, Tensor | Factors) else part for part in value)
            for name, value in scaled.values.items()
        }
        return self._replace(values=values, union=replace(self.union, samples=0, terms=1.0))  # not read here


@dataclass
class Watched:
    """The result of a watched batch: measured blocks, where they are due, and the first non-finite place.

    found: the sums of the blocks. batch: its samples and terms. weight: of its loss in that of the whole batch over
    ranks. in_grad: its gradients were read from `.grad`. by_hand: the differentiated value is not that of a loss call.
    left: the parameters without Kronecker factors. kinds: of each block. suspect: names the non-finite tensor, once
    the gradients are known. asked: the parameters to measure, with their types.
    """

    blocks: dict[str, Measured] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    left: set[str] | None = None
    bad: str | None = None
    suspect: str | None = None
    due: bool = False
    found: list[MeasuredSums] = field(default_factory=list)
    batch: Batch = NO_BATCH
    weight: float = 1.0
    in_grad: bool = True
    by_hand: bool = False
    backward: Callable[[Tensor, Sequence[Tensor]], list[Tensor | None]] | None = None
    uses: list[Use] = field(default_factory=list)
    asked: frozenset[tuple[str, torch.dtype]] = frozenset()

    def finish(self) -> None:
        """Compute the blocks from their sums."""
        for kind, quantity, values, union in self.found:
            blocks = quantity.finish(values, union, Context({}))
            self.blocks |= blocks
            self.kinds |= dict.fromkeys(blocks, kind)
        self.found = []


class CurvatureWatch:
    """Observe backward passes; a backward pass from a non-finite loss runs unobserved.

    ask: gives the quantities by kind; its argument says whether the samples are mixed, which is tried where a batch
    cannot be measured sample by sample. keep: hold inputs and outputs of the calls, to name the first non-finite one.
    """

    def __init__(self, model: Any, ask: Callable[[bool], Mapping[str, Quantity]], watched: Watched, keep: bool) -> None:
        self._asked = ask(False)
        self._model, self._ask, self._watched, self._keep = model, ask, watched, keep
        # read afterwards, to name the call whose gradient overflowed
        self._observation = Observation(model, tuple(self._asked.values()), keeps_inputs=True)

    def __enter__(self) -> None:
        self._tape = Tape(self._model, self._on_backward, self._keep, own_losses=True)
        self._tape.whole = True
        self._results = self._observation.start(self._tape)

    def __exit__(self, *exc: Any) -> None:
        self._observation.stop(*exc)

    def result(self) -> tuple[list[MeasuredSums], Batch]:
        """The sums by kind, and the batch. Raises BadInput where no backward pass ran."""
        results = self._results
        if not results.count:
            raise BadInput(
                "this batch was watched to measure factors, but no backward pass ran; call loss.backward() "
                "inside `with pre.watch()`"
            )
        union = results.batch.union("loss")
        found = [
            MeasuredSums(kind, quantity, results.values_of(i), union)
            for i, (kind, quantity) in enumerate(self._asked.items())
        ]
        return found, results.batch

    def _on_backward(self, tape: Tape, total: Tensor, weight: Tensor | None, run: Callable[[], Any]) -> Any:
        with alone(total.device.type):
            finite = is_finite(total)
            self._watched.by_hand |= weight is not None or not _is_loss(tape, total)
            if self._keep or not finite:
                self._watched.uses += prove(tape, total, weight).uses
            if not finite:
                self._watched.bad = first_bad_call(tape.uses) or "the loss"
        if not finite:
            return run()
        uses = list(tape.uses)
        self._ran = False

        def once() -> Any:
            self._ran = True
            return run()

        try:
            return self._observed(tape, total, weight, once)
        except NonFinite:
            self._watched.bad = first_bad_call(self._watched.uses or uses)
            if self._ran:  # a gradient; the observation has taken it out of `.grad`
                self._watched.bad = self._watched.bad or "a gradient"
                return None
            self._watched.suspect = "the curvature"
            return run()

    def _observed(self, tape: Tape, total: Tensor, weight: Tensor | None, run: Callable[[], Any]) -> Any:
        try:
            return self._observation.run(tape, total, weight, run)
        except _NO_SAMPLES:
            whole = self._ask(True)
            if self._ran or self._results.count or not whole:
                raise
            self._asked = whole
            self._results = self._observation.restart(tuple(whole.values()))
            return self._observation.run(tape, total, weight, run)

    def backward(self, loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients of a loss of this watch, without writing `.grad`."""
        found: list[Tensor | None] = [None for _ in inputs]

        def run() -> None:
            found[:] = torch.autograd.grad(loss, inputs, allow_unused=True)

        self._on_backward(self._tape, loss, None, run)
        return found


def _is_loss(tape: Tape, total: Tensor) -> bool:
    """Whether the differentiated value is that of one loss call."""
    edges = [loss.value for loss in tape.losses] + [own.value for own in tape.own if own.value is not None]
    return any(edge.node is total.grad_fn for edge in edges)


def bad_gradient(grads: Mapping[str, Tensor], damping: Callable[[str], float]) -> str | None:
    """The first gradient for which `|g|² / λ`, a bound of the preconditioned product, overflows or is NaN."""
    if not grads:
        return None
    tensors = [g if g.dtype is torch.float64 else g.float() for g in grads.values()]
    device = tensors[0].device
    norms = torch.stack([n.to(device, torch.float64) for n in torch._foreach_norm(tensors)]).tolist()
    for name, g, norm in zip(grads, tensors, norms, strict=True):
        if not norm * norm / damping(name) < torch.finfo(g.dtype).max:
            return f"the gradient of {name}"
    return None


def bad_curvature(watched: Watched) -> str | None:
    """The first block (or sum, before `finish`) that holds NaN or infinity."""
    places = [
        ("the curvature" if measured.block.form == "diagonal" else "a Kronecker factor", name, x)
        for name, measured in watched.blocks.items() for x in measured.tensors()
    ]  # fmt: skip
    for found in watched.found:
        for name, value in found.values.items():
            what = "a Kronecker factor" if isinstance(value[0], Factors) else "the curvature"
            places += [(what, name, t) for part in found.parts(name) for t in tensors_of(part)]
    # a norm may overflow where no entry does, but takes a tenth of the time
    norms = torch._foreach_norm([x for *_, x in places]) if places else []
    for (what, name, x), norm in zip(places, norms, strict=True):
        if not math.isfinite(norm) and not is_finite(x):
            return first_bad_call(watched.uses) or f"{what} of {name}"
    return None
