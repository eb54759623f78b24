"""One watched batch: measures its curvature, and records a non-finite loss instead of raising.

Where a gradient scaler multiplies the loss, curvature and gradient are those of the loss without its factor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerwise.errors import AmbiguousSamples, BadInput, LayerwiseError, NonFinite, SamplesMixed, Undefined
from layerwise.graph.coverage import prove
from layerwise.graph.loss_scale import loss_scale, mixed_scales
from layerwise.graph.samples import said_count
from layerwise.losses.gradient_scalers import GradientsLeft
from layerwise.observation.backward_pass import PassSettings
from layerwise.observation.engine import Observation
from layerwise.observation.results import Results
from layerwise.observation.union import Batch, weighed
from layerwise.optim.base import refuse_unreached
from layerwise.optim.second_order.averages import Measured
from layerwise.quantities.base import Context, Quantity, Union
from layerwise.quantities.kronecker.factor_sums import Factors
from layerwise.ranks.group import Ranks
from layerwise.ranks.sums import all_reduced, describe
from layerwise.replay.whole_passes import WholePasses
from layerwise.tape.modes import PassWatch
from layerwise.tape.pull import differentiated, without_autocast
from layerwise.tape.tape import Tape
from layerwise.tape.uses import Use, first_bad_call, named_parameters_of
from layerwise.tensors import Verdict, WrongAssumption, dense, is_finite

__all__ = [
    "NO_BATCH", "CurvatureWatch", "MeasuredSums", "Watched", "WatchedBatch", "gradients_in_grad", "gradients_of",
]  # fmt: skip

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
    the gradients are known. asked: the parameters to measure, with their types. passes: the backward passes.
    scale: by which a gradient scaler multiplied the loss of all passes, or None; left_in_grad: what they then left in
    `.grad`. loss: their sum, without the scale. whole: whether each pass is. unread: what an accelerator was not waited
    for in the passes, their loss aside.
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
    passes: int = 0
    scale: float | None = None
    left_in_grad: GradientsLeft | None = None
    loss: Tensor | None = None
    whole: WholePasses = field(default_factory=WholePasses)
    unread: Verdict = field(default_factory=Verdict)

    def passed(self, total: Tensor, scale: float | None) -> None:
        """Count a backward pass of a detached loss. Raises BadInput where a scaler has changed its factor since."""
        if self.passes and scale != self.scale:
            raise BadInput(mixed_scales(self.scale, scale))
        value = total if scale is None else total / scale
        self.loss = value if self.loss is None else self.loss + value
        self.passes, self.scale = self.passes + 1, scale

    def finish(self) -> None:
        """Compute the blocks from their sums."""
        for kind, quantity, values, union in self.found:
            blocks = quantity.finish(values, union, Context({}))
            self.blocks |= blocks
            self.kinds |= dict.fromkeys(blocks, kind)
        self.found = []

    def assume_rows(self, verdict: Verdict) -> None:
        """Ask whether all blocks are means over some row; WrongAssumption where one is not."""
        if counts := [measured.rows for measured in self.blocks.values() if measured.rows is not None]:
            verdict.ask(counts, _judge_rows)

    def drop_empty(self) -> bool:
        """Drop the blocks that are means over no row; whether there was one. The host waits where it does not know."""
        counts = {name: measured.rows for name, measured in self.blocks.items() if measured.rows is not None}
        found = torch.stack(list(counts.values())).tolist() if counts else []
        empty = {name for name, count in zip(counts, found, strict=True) if not count}
        self.blocks = {name: its._replace(rows=None) for name, its in self.blocks.items() if name not in empty}
        return bool(empty)


def _judge_rows(found: list[float]) -> None:
    if not all(found):
        raise WrongAssumption


class CurvatureWatch:
    """Observe backward passes; one from a non-finite loss runs unobserved. Entered again, it goes on with its batch.

    ask: gives the quantities by kind; its argument says whether the samples are mixed, which is tried where a batch
    cannot be measured sample by sample. None: passes are counted only. keep: hold inputs and outputs of the calls, to
    name the first non-finite one. On an accelerator a loss is not waited for, and a non-finite one observed.
    """

    def __init__(
        self, model: Any, ask: Callable[[bool], Mapping[str, Quantity]] | None, watched: Watched, keep: bool
    ) -> None:
        self.watched = watched
        self._asked = {} if ask is None else ask(False)
        self._model, self._ask, self._keep = model, ask, keep
        # read afterwards, to name the call whose gradient overflowed
        self._observation: Any = None if ask is None else Observation(
            model, tuple(self._asked.values()), PassSettings(unscaled=True, keeps_non_finite=True, defer=None),
            keeps_inputs=True,
        )  # fmt: skip
        self._results: Results | None = None
        self._mode: Tape | PassWatch | None = None

    def __enter__(self) -> Watched:
        if self._ask is None:
            self._mode = PassWatch(self._run_counted)
            self._mode.__enter__()
            self.watched.backward = self.backward
            return self.watched
        self._mode = tape = Tape(self._model, self._on_backward, self._keep, own_losses=True)
        tape.whole = True
        self._results = self._observation.start(tape, self._results)
        self.watched.backward = self.backward
        return self.watched

    def __exit__(self, *exc: Any) -> None:
        mode = self._mode
        if mode is not None and self.watched.scale is not None:
            params = [p for p in named_parameters_of(self._model).values() if p.requires_grad]
            self.watched.left_in_grad = GradientsLeft(params, self.watched.scale, mode.scaler_calls)
        if isinstance(mode, PassWatch):
            mode.__exit__(*exc)
        elif mode is not None:
            self._observation.stop(*exc)
        self._mode = self.watched.backward = None  # at last, for after an interrupt it is called again

    def say(self, samples: int | Tensor | None) -> None:
        """What the user says of the samples of the passes to come, each."""
        if self._observation is not None:
            self._observation.say(samples)

    def forget_passes(self) -> None:
        """Drop the passes so far, but not what was recorded for those to come."""
        self.watched.passes, self.watched.loss, self.watched.scale, self.watched.left_in_grad = 0, None, None, None
        self.watched.bad = self.watched.suspect = None
        self.watched.found, self.watched.blocks, self.watched.kinds, self.watched.batch = [], {}, {}, NO_BATCH
        self.watched.unread = Verdict()
        if self._results is not None:
            self._results = self._observation.restart()

    def mark(self) -> Callable[[], None]:
        """What drops all passes from now on, none of which has reached `.grad`."""
        watched, now = self.watched, {**vars(self.watched), "uses": [*self.watched.uses]}
        return lambda: vars(watched).update(now)

    def collect(self) -> None:
        """Give the sums and the batch to `watched`. Raises BadInput where no pass reached a parameter."""
        results = self._results
        if results is None:
            return
        if not results.count:
            if self.watched.passes:
                refuse_unreached(())
            raise BadInput(
                "this batch was watched to measure factors, but no backward pass ran; call loss.backward() "
                "inside `with pre.watch()`"
            )
        union = results.batch.union("loss")
        self.watched.found = [
            MeasuredSums(kind, quantity, results.values_of(i), union)
            for i, (kind, quantity) in enumerate(self._asked.items())
        ]
        self.watched.batch, self.watched.unread = results.batch, results.verdict

    def unscaled(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What backward passes left in `.grad`, without the scaler's factor, unless the scaler has taken it out.

        grads: the tensors in `.grad` themselves.
        """
        if self.watched.scale is None:
            return {name: dense(g.detach()) for name, g in grads.items()}
        assert self._mode is not None
        taken_out = self._mode.scaler_calls.taken_out
        return {name: dense(g.detach()) / (self.watched.scale * taken_out(g)) for name, g in grads.items()}

    def _count(self, total: Tensor, weight: Tensor | None = None) -> None:
        assert self._mode is not None
        self.watched.passed(differentiated(total, weight), loss_scale(self._mode.scaler_calls, total))

    def _run_counted(self, total: Tensor, weight: Tensor | None, run: Callable[[], Any]) -> Any:
        with self._whole():
            self._count(total, weight)
            return run()

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Around a backward pass, which counts where it ends."""
        watched = self.watched
        before = watched.passes, watched.scale, watched.loss
        try:
            with watched.whole.running(self._mode.owners if isinstance(self._mode, Tape) else self._model):
                yield
        except BaseException:
            watched.passes, watched.scale, watched.loss = before
            raise

    def _on_backward(self, tape: Tape, total: Tensor, weight: Tensor | None, run: Callable[[], Any]) -> Any:
        with self._whole():
            return self._measured(tape, total, weight, run)

    def _measured(self, tape: Tape, total: Tensor, weight: Tensor | None, run: Callable[[], Any]) -> Any:
        watched = self.watched
        with torch._C.DisableTorchFunction(), without_autocast(total.device.type):
            self._count(total, weight)
            late = total.device.type != "cpu"
            finite = late or is_finite(total)
            watched.by_hand |= weight is not None or not _is_loss(tape, total)
            if self._keep or not finite:
                watched.uses += prove(tape, total, weight).uses
            if not finite:
                watched.bad = first_bad_call(tape.uses) or "the loss"
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
            watched.bad = first_bad_call(watched.uses or uses)
            if self._ran:
                watched.bad = watched.bad or "a gradient"
                return None
            watched.suspect = "the curvature"
            return run()
        except (LayerwiseError, RuntimeError):  # perhaps because of NaN
            if self._ran or not late or is_finite(total):
                raise
            watched.bad = first_bad_call(watched.uses or uses) or "the loss"
            return run()

    def _observed(self, tape: Tape, total: Tensor, weight: Tensor | None, run: Callable[[], Any]) -> Any:
        assert self._ask is not None and self._results is not None
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
        """The gradients of a loss of this watch, without writing `.grad` and without a scaler's factor."""
        found: list[Tensor | None] = [None for _ in inputs]

        def run() -> None:
            found[:] = torch.autograd.grad(loss, inputs, allow_unused=True)

        if isinstance(self._mode, Tape):
            self._on_backward(self._mode, loss, None, run)
        else:
            self._count(loss)
            run()
        scale = self.watched.scale
        return found if scale is None else [None if g is None else g / scale for g in found]


class WatchedBatch:
    """A context around the passes of one batch, or several such contexts; then `watched` holds what was measured.

    alone: whether no other rank has a part of the batch. fail: tells others of an error. needs_pass: whether a context
    that measures, without a backward pass, is an error.
    """

    def __init__(
        self, watch: CurvatureWatch, alone: bool, fail: Callable[[BaseException], None], needs_pass: bool
    ) -> None:
        self.watched, self.whole, self._needs_pass = watch.watched, watch.watched.whole, needs_pass
        self._watch, self._alone, self._fail = watch, alone, fail

    def __enter__(self) -> Watched:
        return self._watch.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self._watch.__exit__(kind, error, trace)
            good = error is None and self.watched.bad is None and self.watched.suspect is None
            if good and (self.watched.passes or self._needs_pass):
                self._watch.collect()
                if self._alone:
                    self.watched.finish()
        except BaseException as raised:
            self._fail(raised)
            raise
        if error is not None:
            self._fail(error)

    def say(self, samples: int | Tensor | None) -> None:
        """What the user says of the samples of the passes to come, each. Raises BadInput where it is no number."""
        said_count(samples, "samples of a step, or of watch(),")
        self._watch.say(samples)

    def forget_passes(self) -> None:
        """Drop the passes so far, but not what was recorded for those to come."""
        self._watch.forget_passes()

    def mark(self) -> Callable[[], None]:
        """What drops all that is recorded from now on."""
        return self._watch.mark()

    def unscaled(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What backward passes left in `.grad`, without a scaler's factor; inside the context."""
        return self._watch.unscaled(grads)


def _is_loss(tape: Tape, total: Tensor) -> bool:
    """Whether the differentiated value is that of one loss call."""
    edges = [loss.value for loss in tape.losses] + [own.value for own in tape.own if own.value is not None]
    return any(edge.node is total.grad_fn for edge in edges)


def gradients_in_grad(named: Mapping[str, Tensor], before: Mapping[str, Any]) -> dict[str, Tensor]:
    """The gradients in `.grad`, where the closure ran a backward pass (some of them changed); else none."""
    found = {name: p.grad for name, p in named.items() if p.grad is not None}
    changed = any(g is not before[name][0] or g._version != before[name][1] for name, g in found.items())
    return found if changed else {}


def gradients_of(loss: Tensor, named: Mapping[str, Tensor], watched: Watched) -> dict[str, Tensor]:
    """The gradients of the loss that the closure returned, without writing `.grad`."""
    named = {name: p for name, p in named.items() if p.requires_grad}  # the closure may have frozen some
    refuse_unreached(named if loss.requires_grad else ())
    assert watched.backward is not None
    found = watched.backward(loss, list(named.values()))
    return {name: dense(g) for name, g in zip(named, found, strict=True) if g is not None}
