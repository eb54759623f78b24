"""Run a model with given codes in place of the outputs of some uses, wholly or piece by piece.

The general way is *substitution*: the closure runs again under a tape that returns the given code at each
use. The fast way is *replay*: the calls recorded between the uses run again, and of those only the ones
that the wanted outputs depend on, so that one block costs one block. Replay serves a graph only after its
outputs equalled those of substitution bitwise for codes drawn at random; closures that draw random numbers
or read values of tensors always take substitution. Every run starts from the random state and the buffers of
the first one, and leaves them as the first one did; a backward pass that the closure starts is left out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.errors import BadInput, Undefined
from layerwise.tape import RANDOM, Tape
from layerwise.uses import Use

__all__ = ["Buffers", "CodedModel", "Outputs", "check_loss"]

_MOST_PROOFS = 256  # of graphs that differ, in shapes say; then the memo starts again

_RANDOM_METHODS = {"normal_", "uniform_", "bernoulli_", "exponential_", "random_", "bernoulli"}
_READS_VALUES = {
    "item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy", "equal", "allclose", "is_nonzero",
}  # fmt: skip


class Buffers:
    """The values of a model's buffers, to be put back: floating-point ones, and counters."""

    def __init__(self, model: nn.Module | Mapping[str, Tensor]) -> None:
        buffers = model.buffers() if isinstance(model, nn.Module) else ()
        self._values = [(b, b.clone()) for b in buffers if b.is_floating_point() or not b.dim()]

    @torch.no_grad()
    def put_back(self) -> None:
        """Write the values into the buffers that have changed."""
        for buffer, value in self._values:
            # batch norm does not count up its buffers' versions, so values are compared
            if not torch.equal(buffer, value):
                buffer.copy_(value)


class _RandomState:
    """The states of the generators that a closure may draw from."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._python, self._cpu = random.getstate(), torch.get_rng_state()
        self._devices = {d: torch.get_device_module(d).get_rng_state(d) for d in devices if d.type != "cpu"}

    def put_back(self) -> None:
        random.setstate(self._python)
        torch.set_rng_state(self._cpu)
        for device, state in self._devices.items():
            torch.get_device_module(device).set_rng_state(state, device)


class _Ref(NamedTuple):
    """Stands for a tensor that the recorded calls made."""

    slot: int


@dataclass
class _Step:
    """One recorded call: arguments with `_Ref`s, where its results go, and the use it is, if any."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[int | None]
    single: bool
    reads: set[int]
    writes: int | None = None  # the slot that an in-place call overwrites
    use: int | None = None


@dataclass
class Outputs:
    """What a run with codes gives: the loss, each use's own output and its data arguments (detached)."""

    loss: Tensor | None = None
    predictions: dict[int, Tensor] = field(default_factory=dict)
    calls: dict[int, Any] = field(default_factory=dict)


class _CodedTape(Tape):
    """A tape that returns codes at chosen uses, records a program, and freezes batch-norm statistics."""

    def __init__(self, model: Any, codes: Mapping[int, Tensor], statistics: list[Any] | None = None) -> None:
        self.codes = codes
        self.predictions: dict[int, Tensor] = {}
        self.program: list[_Step] = []
        self.random = False
        self.reads_values = False
        self._slots: dict[int, tuple[Tensor, int]] = {}
        self._given = statistics
        self.statistics: list[Any] = [] if statistics is None else statistics
        self._norms = 0
        self._next = -1
        self._use_index: int | None = None
        super().__init__(model, on_backward=lambda tape, total, weight, run: None, keep_outputs=True)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        again = (args, kwargs)
        if func is F.batch_norm or func is F.instance_norm:
            again = self._frozen(func, args, kwargs)
            if self._given is not None:
                args, kwargs = again
        name = getattr(func, "__name__", "")
        self.random |= func in RANDOM or name in _RANDOM_METHODS
        self.reads_values |= name in _READS_VALUES
        self._use_index = None
        out = super().__torch_function__(func, types, args, kwargs)
        if self._given is None:
            self._note_step(func, *again, out)
        elif self._use_index is not None:
            return self._substituted(self._use_index, args, out)
        return out

    def _use(self, func: Any, args: Any, kwargs: Any, used: Any, data: Any) -> Any:
        count = len(self.uses)
        out = super()._use(func, args, kwargs, used, data)
        if len(self.uses) > count:
            self._use_index = count
            self.predictions[count] = out
        return out

    def _substituted(self, use: int, args: Any, out: Any) -> Any:
        """What the closure goes on with after a use: its code, or its output; the prediction is kept from it."""
        code = self.codes.get(use)
        if args and out is args[0]:  # in place: the closure may go on with the tensor that it gave
            self.predictions[use] = out.clone()
            return out if code is None else out.copy_(code)
        return (out if code is None else code).clone()

    def _frozen(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """A norm's arguments for further runs: the batch statistics of the first one, which they do not advance."""
        flag = "training" if func is F.batch_norm else "use_input_stats"
        names = ("input", "running_mean", "running_var", "weight", "bias", flag, "momentum", "eps")
        bound = {**dict(zip(names, args, strict=False)), **kwargs}
        if not bound.get(flag, func is F.instance_norm):
            return args, kwargs
        if func is F.instance_norm:  # statistics of each sample alone: only the running ones stand still
            return (bound.pop("input"),), {**bound, "running_mean": None, "running_var": None}
        if self._given is None:
            x = bound["input"].detach()
            axes = [a for a in range(x.dim()) if a != 1]
            with torch.no_grad():
                self.statistics.append((x.mean(axes), x.var(axes, unbiased=False)))
        mean, var = self.statistics[self._norms]
        self._norms += 1
        return (bound.pop("input"),), {**bound, "running_mean": mean, "running_var": var, "training": False}

    # -- the program ------------------------------------------------------------------------------------

    def _new_slot(self) -> int:
        self._next += 1
        return self._next

    def _note_step(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Record the call if it makes tensors, or writes on one."""
        reads: set[int] = set()
        in_place = out is None and getattr(func, "__name__", "") == "__setitem__"
        result = args[0] if in_place else out
        single = isinstance(result, Tensor)
        if not single and not (isinstance(result, (list, tuple)) and any(isinstance(t, Tensor) for t in result)):
            return
        writes = self._slots.get(id(args[0]), (None, None))[1] if args and result is args[0] else None
        step_args, step_kwargs = self._template(args, reads), {k: self._template(v, reads) for k, v in kwargs.items()}
        outputs: list[int | None] = []
        for t in (result,) if single else result:
            if isinstance(t, Tensor):
                slot = self._new_slot()
                self._slots[id(t)] = (t, slot)
                outputs.append(slot)
            else:
                outputs.append(None)
        self.program.append(_Step(func, step_args, step_kwargs, outputs, single, reads, writes, self._use_index))

    def _template(self, value: Any, reads: set[int]) -> Any:
        if isinstance(value, Tensor):
            entry = self._slots.get(id(value))
            if entry is None or entry[0] is not value:
                return value
            reads.add(entry[1])
            return _Ref(entry[1])
        if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
            return type(value)(self._template(v, reads) for v in value)
        return value


class CodedModel:
    """A model and a closure, run with codes in place of the outputs of some uses.

    uses: the uses of the first run, in call order; loss: its value, with its graph.
    `piece` gives the outputs of some uses, and the loss, for given codes, at the cost of the calls between.
    proofs: a memo of which graphs replay as substitution does, kept by the caller from step to step.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        closure: Callable[[], Tensor],
        proofs: dict[Any, bool] | None = None,
    ) -> None:
        self._model, self._closure = model, closure
        self._proofs = proofs if proofs is not None else {}
        tape = _CodedTape(model, {})
        self._devices = {p.device for p in tape.parameters.values()}
        self._before = _RandomState(self._devices), Buffers(model)
        with tape, torch.enable_grad():
            self.loss = closure()
        check_loss(self.loss)
        self.tape = tape
        self.uses: list[Use] = tape.uses
        self._program = tape.program
        self._slot_of_use = {s.use: s.outputs[0] for s in tape.program if s.use is not None}
        entry = tape._slots.get(id(self.loss))
        self._loss_slot = None if entry is None else entry[1]
        self._slices: dict[Any, list[int]] = {}

    # -- substitution -----------------------------------------------------------------------------------

    def substitute(self, codes: Mapping[int, Tensor]) -> Outputs:
        """Run the closure again with codes at the given uses, from the first run's random state."""
        tape = _CodedTape(self._model, codes, self.tape.statistics)
        here = _RandomState(self._devices), Buffers(self._model)
        try:
            for state in self._before:
                state.put_back()
            with tape, torch.enable_grad():
                loss = self._closure()
        finally:
            for state in here:
                state.put_back()
        seen, want = ([(u.call.func, u.call.out_shape) for u in t.uses] for t in (tape, self.tape))
        if seen != want:
            raise Undefined(
                f"the closure made {len(seen)} uses of parameters with codes and {len(want)} without, or of other "
                "shapes: its path depends on the codes, so they have no common meaning; use codes='jacobi'"
            )
        return Outputs(loss, dict(tape.predictions), {u.index: (u.call.args, u.call.kwargs) for u in tape.uses})

    # -- replay -----------------------------------------------------------------------------------------

    def replays(self, coded: Iterable[int]) -> bool:
        """Whether the recorded calls are proved to give what substitution gives, with codes at these uses."""
        if self.tape.random or self.tape.reads_values or self._loss_slot is None:
            return False
        coded = frozenset(coded)
        key = (coded, tuple(self.tape.calls))
        if key not in self._proofs:
            if len(self._proofs) >= _MOST_PROOFS:
                self._proofs.clear()
            self._proofs[key] = self._agrees(coded)
        return self._proofs[key]

    def _agrees(self, coded: frozenset[int]) -> bool:
        """Whether replay gives bitwise what substitution gives, whole and in pieces, for random codes."""
        generator = torch.Generator().manual_seed(0)
        codes = {}
        for i in coded:
            like = self.tape.predictions[i]
            codes[i] = torch.randn(like.shape, generator=generator).to(like)
        try:
            want = self.substitute(codes)
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
        finally:
            kept.put_back()
        return True

    def piece(self, codes: Mapping[int, Tensor], uses: Iterable[int], loss: bool) -> Outputs:
        """The outputs of some uses, and the loss if asked for, given the codes of all coded uses."""
        if self.replays(codes):
            return self._replay(codes, uses, loss)
        return self.substitute(codes)

    def _replay(self, codes: Mapping[int, Tensor], uses: Iterable[int], loss: bool) -> Outputs:
        wanted = frozenset(uses)
        values: dict[int, Any] = {}
        outputs = Outputs()
        with torch.enable_grad():
            for k in self._slice(frozenset(codes), wanted, loss):
                step = self._program[k]
                if step.use not in codes or step.use in wanted:
                    args = tuple(_fill(a, values) for a in step.args)
                    kwargs = {name: _fill(a, values) for name, a in step.kwargs.items()}
                    out = step.func(*args, **kwargs)
                    result = args[0] if out is None else out
                    for slot, t in zip(step.outputs, (result,) if step.single else result, strict=True):
                        if slot is not None:
                            values[slot] = t
                    if step.use in wanted:
                        outputs.predictions[step.use] = result  # type: ignore[index]
                        outputs.calls[step.use] = (args, kwargs)  # type: ignore[index]
                if step.use in codes:
                    values[self._slot_of_use[step.use]] = codes[step.use].clone()  # type: ignore[index]
                elif step.use in wanted:
                    values[self._slot_of_use[step.use]] = result.clone()  # type: ignore[index]
        if loss:
            outputs.loss = values[self._loss_slot]  # type: ignore[index]
        return outputs

    def _slice(self, coded: frozenset[int], wanted: frozenset[int], loss: bool) -> list[int]:
        """The steps that the wanted outputs depend on, in order; codes cut the dependence."""
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
                    kept.append(k)  # of a coded use only the code is needed
            self._slices[key] = kept[::-1]
        return self._slices[key]

    def consumers(self, coded: Iterable[int]) -> dict[int, tuple[list[int], bool]]:
        """For each coded use: the uses that read its code through no other code, and whether the loss does."""
        coded = frozenset(coded)
        if not self.replays(coded):
            later = [u.index for u in self.uses]
            return {i: ([j for j in later if j > i], True) for i in coded}
        feeds: dict[int, set[int]] = {}
        found: dict[int, list[int]] = {i: [] for i in coded}
        for step in self._program:
            origin: set[int] = set().union(*(feeds.get(r, set()) for r in step.reads))
            if step.use is not None:
                for i in origin:
                    found[i].append(step.use)
            for slot in step.outputs:
                if slot is not None:
                    feeds[slot] = {step.use} if step.use in coded else set(origin)  # type: ignore[arg-type]
            if step.writes is not None:
                feeds[step.writes] = feeds.get(step.writes, set()) | origin
        at_loss = feeds.get(self._loss_slot, set()) if self._loss_slot is not None else set()
        return {i: (found[i], i in at_loss) for i in coded}


def check_loss(loss: object) -> None:
    """Raise BadInput where a closure returned something else than a loss, a tensor of one element."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        seen = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise BadInput(f"the closure must return the loss, a tensor of one element; got {seen}")


def _same(x: Tensor | None, y: Tensor | None) -> bool:
    """Whether two tensors agree bitwise, NaN with NaN."""
    if x is None or y is None or x.shape != y.shape or x.dtype != y.dtype:
        return False
    return torch.equal(x, y) or bool(((x == y) | (x.isnan() & y.isnan())).all())


def _fill(value: Any, values: Mapping[int, Any]) -> Any:
    if isinstance(value, _Ref):
        return values[value.slot]
    if type(value) in (list, tuple):
        return type(value)(_fill(v, values) for v in value)
    return value
