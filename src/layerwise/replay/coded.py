"""Run a model with given codes (activations) in place of the outputs of some uses, as a whole or in pieces.

The general way is *substitution*: the closure runs again under a tape that returns the given code at each use. The
fast way is *replay*: of the recorded calls, only those that the wanted outputs depend on run again, so that a block
costs only its own calls. A graph is replayed only after its outputs equalled those of substitution bitwise for random
codes; closures that draw random numbers or read values of tensors always use substitution. Every run starts from the
random state and the buffers of the first run, and leaves them as the first run did; backward passes of the closure are
skipped. A custom autograd Function also takes substitution, since its backward is not among the recorded calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import Undefined
from layerwise.ops import writes_first
from layerwise.replay.autocast import active_autocast, under
from layerwise.replay.program import ENTRY, CodedTape, Ref
from layerwise.replay.rerun import Rerun
from layerwise.replay.state import Buffers, check_loss
from layerwise.tape.gradient_calls import GradientUse
from layerwise.tape.modes import WithoutScalers
from layerwise.tape.uses import Use

__all__ = ["CodedModel", "Outputs", "check_loss"]

_MOST_PROOFS = 256  # the memo is cleared at this many different graphs (in shapes, say)


@dataclass
class Outputs:
    """The result of a run with codes: the loss, each use's own output, and the arguments of its call."""

    loss: Tensor | None = None
    predictions: dict[int, Tensor] = field(default_factory=dict)
    calls: dict[int, Any] = field(default_factory=dict)


class CodedModel:
    """A model and a closure, run with codes in place of the outputs of some uses.

    uses: the uses of the first run, in call order; loss: its value, with its graph.
    `piece` computes the outputs of some uses, and the loss, for given codes, from only the calls they depend on.
    proofs: a memo of the graphs for which replay equals substitution, kept by the caller from step to step.
    entry: the input tensor where the model is a part of a larger one (a pipeline stage); the closure is then called
    with it, and it may have a code at the index `ENTRY`.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        closure: Callable[..., Tensor],
        proofs: dict[Any, bool] | None = None,
        entry: Tensor | None = None,
    ) -> None:
        self._model, self._entry = model, entry
        self._proofs = proofs if proofs is not None else {}
        given: tuple[Tensor, ...] = () if entry is None else (entry.clone(),)  # the closure may overwrite it
        tape = CodedTape(model, {}, entry=given[0] if given else None)
        self._rerun = Rerun(model, closure, gradients=False)
        with torch.enable_grad(), tape, WithoutScalers():
            self.loss = closure(*given)
        check_loss(self.loss)
        if derivative := next((use for use in tape.uses if isinstance(use, GradientUse)), None):
            raise Undefined(
                f"asked for codes, but the closure takes derivatives of the model ({derivative}, by torch.autograd.grad"
                " with create_graph=True), which read the weights past the layers' outputs and are no function of "
                "codes in their place; use codes='jacobi', LocoProp, or leave that term out"
            )
        self.tape = tape
        self.uses: list[Use] = tape.uses
        self._program = tape.program
        self._slot_of_use = {s.use: s.outputs[0] for s in tape.program if s.use is not None}
        if entry is not None:
            self._slot_of_use[ENTRY], tape.predictions[ENTRY] = tape.slot_of(given[0]), entry
        self._loss_slot = tape.slot_of(self.loss)
        self._slices: dict[Any, list[int]] = {}

    @property
    def samples(self) -> int:
        """The batch size, dim 0."""
        first = self.tape.first
        return first.shape[0] if first is not None and first.dim() else 1

    def use_behind(self, t: Tensor) -> int | None:
        """The index of the use whose output is this tensor of the first run."""
        slot = self.tape.slot_of(t)
        return next((i for i, s in self._slot_of_use.items() if s == slot and s is not None and i != ENTRY), None)

    # -- substitution -----------------------------------------------------------------------------------

    def substitute(self, codes: Mapping[int, Tensor], gradients: bool = True) -> Outputs:
        """Run the closure again with codes at the given uses, from the first run's random state.

        gradients: whether the outputs will be differentiated. Raises Undefined where control flow depends on the
        codes, or where a block is activation-checkpointed: its recomputation would not use the codes.
        """
        tape = CodedTape(self._model, codes, self.tape.statistics)
        given = () if self._entry is None else (codes.get(ENTRY, self._entry).clone(),)
        with self._rerun:
            self._rerun.rewind()
            with torch.enable_grad(), tape, _no_saved_tensor_hooks() if gradients else nullcontext():
                loss = self._rerun.run(*given)
        seen, want = ([(u.call.func, u.call.out_shape) for u in t.uses] for t in (tape, self.tape))
        if seen != want:
            raise Undefined(
                f"the closure made {len(seen)} uses of parameters with codes and {len(want)} without, or of other "
                "shapes: its path depends on the codes, so they have no common meaning; use codes='jacobi'"
            )
        return Outputs(loss, dict(tape.predictions), {u.index: (u.call.args, u.call.kwargs) for u in tape.uses})

    # -- replay -----------------------------------------------------------------------------------------

    def replays(self, coded: Iterable[int]) -> bool:
        """Whether replay is proved to equal substitution, with codes at these uses."""
        if self.tape.random or self.tape.reads_values or self.tape.hidden_backward or self._loss_slot is None:
            return False
        coded = frozenset(coded)
        key = (coded, tuple(self.tape.calls))
        if key not in self._proofs:
            if len(self._proofs) >= _MOST_PROOFS:
                self._proofs.clear()
            self._proofs[key] = self._agrees(coded)
        return self._proofs[key]

    def _agrees(self, coded: frozenset[int]) -> bool:
        """Whether replay equals substitution bitwise for random codes, as a whole and in pieces."""
        generator = torch.Generator().manual_seed(0)
        codes = {}
        for i in coded:
            like = self.tape.predictions[i]
            codes[i] = torch.randn(like.shape, generator=generator).to(like).requires_grad_()
        slopes = None
        try:
            want = self.substitute(codes)
            slopes = self._slopes(codes, want)
        except Undefined:  # checkpointed: only values can be compared
            try:
                want = self.substitute(codes, gradients=False)
            except Undefined:
                return False
        uses = [u.index for u in self.uses]
        pieces: list[tuple[list[int], bool]] = [(uses, True), ([], True), *(([i], False) for i in uses)]
        kept = Buffers(self._model)
        try:
            for wanted, loss in pieces:
                run = self._replay(codes, wanted, loss)
                if loss and not _same(run.loss, want.loss):
                    return False
                if not all(_same(p, want.predictions[i]) for i, p in run.predictions.items()):
                    return False
            if slopes is not None:
                found = self._slopes(codes, self._replay(codes, uses, True))
                return all(map(_near, found, slopes))
        finally:
            kept.put_back()
        return True

    def _slopes(self, codes: Mapping[int, Tensor], run: Outputs) -> list[Tensor]:
        """The gradient of a random linear combination of all outputs in each code."""
        generator = torch.Generator().manual_seed(1)
        outputs = [t for t in (run.loss, *run.predictions.values()) if t is not None and t.requires_grad]
        weights = [torch.randn(t.shape, generator=generator).to(t) for t in outputs]
        if not codes:
            return []
        found = torch.autograd.grad(outputs, list(codes.values()), weights, allow_unused=True)
        return [torch.zeros_like(c) if g is None else g for c, g in zip(codes.values(), found, strict=True)]

    def piece(self, codes: Mapping[int, Tensor], uses: Iterable[int], loss: bool) -> Outputs:
        """The outputs of some uses, and the loss if asked for, given the codes of all coded uses.

        Codes of a wider type than the outputs in whose place they are run in the type of those.
        """
        codes = {i: code.to(self.tape.predictions[i].dtype) for i, code in codes.items()}
        if self.replays(codes):
            return self._replay(codes, uses, loss)
        return self.substitute(codes)

    def _replay(self, codes: Mapping[int, Tensor], uses: Iterable[int], loss: bool) -> Outputs:
        wanted = frozenset(uses)
        values: dict[int, Any] = {}
        outputs, now = Outputs(), active_autocast()
        with torch.enable_grad():
            if self._entry is not None:
                values[self._slot_of_use[ENTRY]] = codes.get(ENTRY, self._entry).clone()  # type: ignore[index]
            for k in self._slice(frozenset(codes), wanted, loss):
                step = self._program[k]
                if step.use not in codes or step.use in wanted:
                    args = tuple(_fill(a, values) for a in step.args)
                    kwargs = {name: _fill(a, values) for name, a in step.kwargs.items()}
                    if step.use in wanted:
                        before = (args[0].clone(), *args[1:]) if writes_first(step.func) else args
                        outputs.calls[step.use] = (before, kwargs)
                    func = step.func if step.autocast == now else under(step.autocast, step.func)
                    with nullcontext() if step.grad else torch.no_grad():
                        out = func(*args, **kwargs)
                    result = args[0] if out is None else out
                    for slot, t in zip(step.outputs, (result,) if step.single else result, strict=True):
                        if slot is not None:
                            values[slot] = t
                    if step.use in wanted:
                        outputs.predictions[step.use] = result
                if step.use in codes:
                    values[self._slot_of_use[step.use]] = codes[step.use].clone()  # type: ignore[index]
                elif step.use in wanted:
                    values[self._slot_of_use[step.use]] = result.clone()  # type: ignore[index]
        if loss:
            outputs.loss = values[self._loss_slot]  # type: ignore[index]
        return outputs

    def _slice(self, coded: frozenset[int], wanted: frozenset[int], loss: bool) -> list[int]:
        """Indices of the recorded steps that the wanted outputs depend on, in order; a code ends the dependence."""
        key = (coded, wanted, loss)
        if key not in self._slices:
            need: set[int] = {self._loss_slot} if loss and self._loss_slot is not None else set()
            kept: list[int] = []
            for k in range(len(self._program) - 1, -1, -1):
                step = self._program[k]
                needed = any(slot in need for slot in step.outputs)
                if step.use in wanted or (step.use not in coded and (needed or step.writes in need)):
                    need |= step.reads
                    kept.append(k)
                elif needed:
                    kept.append(k)  # a coded use: its code is used, not its inputs
            self._slices[key] = kept[::-1]
        return self._slices[key]

    def consumers(self, coded: Iterable[int]) -> dict[int, tuple[list[int], bool]]:
        """For each coded use: the uses that depend on its code through no other code, and whether the loss does."""
        coded = frozenset(coded)
        if not self.replays(coded):
            later = [u.index for u in self.uses]
            return {i: ([j for j in later if j > i], True) for i in coded}
        feeds: dict[int | None, set[int]] = {self._slot_of_use[ENTRY]: {ENTRY}} if ENTRY in coded else {}
        readers: dict[int, list[int]] = {i: [] for i in coded}
        for step in self._program:
            origin: set[int] = set().union(*(feeds.get(r, set()) for r in step.reads))
            if step.use is not None:
                for i in origin:
                    readers[i].append(step.use)
            for slot in step.outputs:
                if slot is not None:
                    feeds[slot] = {step.use} if step.use in coded else set(origin)
            if step.writes is not None:
                feeds[step.writes] = feeds.get(step.writes, set()) | origin
        at_loss = feeds.get(self._loss_slot, set()) if self._loss_slot is not None else set()
        return {i: (readers[i], i in at_loss) for i in coded}

    def reads_directly(self, use: int, code: int, func: Any) -> bool:
        """Whether a use is a call of `func` whose only data is its first argument, the code at another use.

        Proved on the recorded calls: False where the model does not replay.
        """
        if self._loss_slot is None or self.tape.random or self.tape.reads_values or self.tape.hidden_backward:
            return False
        slot = self._slot_of_use[code]
        if any(step.writes == slot for step in self._program):
            return False
        step = next(step for step in self._program if step.use == use)
        first = step.args[0] if step.args else step.kwargs.get("input")
        direct = isinstance(first, Ref) and first.slot == slot
        return direct and step.func is func and step.reads == {slot}


@contextmanager
def _no_saved_tensor_hooks() -> Iterator[None]:
    asked = "saved-tensor hooks were entered"
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(asked):
            yield
    except RuntimeError as error:
        if str(error) != asked:
            raise
        raise Undefined(
            "codes were asked for in a model that checkpoints a block or hooks saved tensors, and that cannot be "
            "replayed (it draws random numbers, or reads values of tensors); leave that out, or use codes='jacobi'"
        ) from error


def _same(x: Tensor | None, y: Tensor | None) -> bool:
    """Whether two tensors agree bitwise, NaN with NaN."""
    if x is None or y is None or x.shape != y.shape or x.dtype != y.dtype:
        return False
    return torch.equal(x, y) or bool(((x == y) | (x.isnan() & y.isnan())).all())


def _near(x: Tensor, y: Tensor) -> bool:
    """Whether two gradients are equal up to the rounding of a different summation order."""
    most = float(y.nan_to_num().abs().max()) if y.numel() else 0.0
    return bool((((x - y).abs() <= 1e-2 * most) | (x.isnan() & y.isnan()) | (x == y)).all())


def _fill(value: Any, values: Mapping[int, Any]) -> Any:
    if isinstance(value, Ref):
        return values[value.slot]
    if type(value) in (list, tuple):
        return type(value)(_fill(v, values) for v in value)
    return value
