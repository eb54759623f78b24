"""One run of a closure as a program: the calls it made, with codes in place of the outputs of some uses.

A program can run again piece by piece. What a run may have changed besides is kept here, to be put back: the
generators that it drew from, the model's buffers; a backward pass that the closure starts is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.nn.hard import crossed, hard
from layerwise.tape.calls import RANDOM
from layerwise.tape.tape import Tape

__all__ = ["ENTRY", "CodedTape", "Ref", "Step"]

ENTRY = -1  # the index of what enters a program from outside, among those of its uses
_RANDOM_METHODS = {"normal_", "uniform_", "bernoulli_", "exponential_", "random_", "bernoulli"}
_READS_VALUES = {
    "item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy", "equal", "allclose", "is_nonzero",
}  # fmt: skip


def _draws(name: str, args: Any, kwargs: Any) -> bool:
    """Whether a random call draws: dropout that is switched off does not."""
    if "dropout" not in name:
        return True
    return bool(kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True)))


class Ref(NamedTuple):
    """Stands for a tensor that the recorded calls made."""

    slot: int


@dataclass
class Step:
    """One recorded call: arguments with `Ref`s, where its results go, and the use it is, if any."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[int | None]
    single: bool
    reads: set[int]
    writes: int | None = None  # the slot that an in-place call overwrites
    use: int | None = None
    grad: bool = True  # whether gradients were recorded


class CodedTape(Tape):
    """A tape that returns codes at chosen uses, records a program, and freezes batch-norm statistics.

    entry: a tensor from outside that may have a code as well, at the index `ENTRY`.
    """

    def __init__(
        self, model: Any, codes: Mapping[int, Tensor], statistics: list[Any] | None = None, entry: Tensor | None = None
    ) -> None:
        self.codes = codes
        self.predictions: dict[int, Tensor] = {}
        self.program: list[Step] = []
        self.random = False
        self.reads_values = False
        self.hidden_backward = False
        self._slots: dict[int, tuple[Tensor, int, bool]] = {}  # by id: the tensor, its slot, whether it needed grad
        self._given = statistics
        self.statistics: list[Any] = [] if statistics is None else statistics
        self._norms = 0
        self._next = -1
        self._use_index: int | None = None
        self._parts_noted = False
        if entry is not None:
            self._slots[id(entry)] = (entry, self._new_slot(), False)
        super().__init__(model, on_backward=lambda tape, total, weight, run: None, keep_outputs=True, crosses=True)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        func = crossed if func is hard else func
        again = (args, kwargs)
        if func is F.batch_norm or func is F.instance_norm:
            again = self._frozen(func, args, kwargs)
            if self._given is not None:
                args, kwargs = again
        name = getattr(func, "__name__", "")
        self.random |= (func in RANDOM and _draws(name, args, kwargs)) or name in _RANDOM_METHODS
        self.reads_values |= name in _READS_VALUES
        self._use_index = None
        self._parts_noted = False
        out = super().__torch_function__(func, types, args, kwargs)
        if self._parts_noted:
            self._parts_noted, self._use_index = False, None
            return out
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

    def _decompose(self, func: Any, args: Any, kwargs: Any, used: Any, data: Any) -> Any:
        if self.codes:  # other values than the call's, which nobody differentiates inside a checkpoint
            out = self._parts(func, args, kwargs)
        else:
            out = super()._decompose(func, args, kwargs, used, data)
        self._parts_noted = True  # by the calls inside, which are steps of their own
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

    def slot_of(self, t: Tensor) -> int | None:
        """The slot of a tensor that the recorded calls made."""
        entry = self._slots.get(id(t))
        return None if entry is None or entry[0] is not t else entry[1]

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
        writes = None
        if args and result is args[0] and id(result) in self._slots:
            writes = self._slots[id(result)][1]
            self._slots[id(result)] = (result, writes, result.requires_grad)
        step_args, step_kwargs = self._template(args, reads), {k: self._template(v, reads) for k, v in kwargs.items()}
        outputs: list[int | None] = []
        for t in (result,) if single else result:
            if isinstance(t, Tensor):
                slot = self._new_slot()
                self._slots[id(t)] = (t, slot, t.requires_grad)
                outputs.append(slot)
            else:
                outputs.append(None)
        grad = torch.is_grad_enabled()
        self.program.append(Step(func, step_args, step_kwargs, outputs, single, reads, writes, self._use_index, grad))

    def _template(self, value: Any, reads: set[int]) -> Any:
        if isinstance(value, Tensor):
            entry = self._slots.get(id(value))
            if entry is None or entry[0] is not value:
                return value
            # made by calls inside a custom Function, under no_grad, and then given that Function's backward
            self.hidden_backward |= value.requires_grad and not entry[2]
            reads.add(entry[1])
            return Ref(entry[1])
        if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
            return type(value)(self._template(v, reads) for v in value)
        return value
