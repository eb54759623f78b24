"""One run of a closure recorded as a program: a list of its calls, which can run again piece by piece.

The tape of this module records the program, and returns codes in place of the outputs of chosen uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise import ops
from layerwise.nn.hard import crossed, hard
from layerwise.replay.autocast import NO_AUTOCAST, Autocast, active_autocast
from layerwise.tape.calls import RANDOM
from layerwise.tape.tape import Tape

__all__ = ["ENTRY", "CodedTape", "Ref", "Step"]

ENTRY = -1  # the index of the input of a partial model, among the indices of its uses
_RANDOM_METHODS = {"normal_", "uniform_", "bernoulli_", "exponential_", "random_", "bernoulli"}
_READS_VALUES = {
    "item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy", "equal", "allclose", "is_nonzero",
}  # fmt: skip


def _draws(name: str, args: Any, kwargs: Any) -> bool:
    """Whether a call of a random function draws numbers: dropout in eval mode does not."""
    if "dropout" not in name:
        return True
    return bool(kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True)))


class Ref(NamedTuple):
    """A placeholder in recorded arguments for a tensor that an earlier recorded call made."""

    slot: int


@dataclass
class Step:
    """One recorded call: its arguments with `Ref`s, the slots of its results, and its use, if it is one."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[int | None]
    single: bool
    reads: set[int]
    writes: int | None = None  # the slot that an in-place call overwrites
    use: int | None = None
    grad: bool = True  # whether grad mode was enabled
    autocast: Autocast = NO_AUTOCAST


class CodedTape(Tape):
    """A tape that returns codes at chosen uses, records a program, and freezes batch-norm statistics.

    entry: the input tensor of a partial model, which may have a code at the index `ENTRY`.
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
        self._slots: dict[int, tuple[Tensor, int, bool]] = {}  # by id: the tensor, its slot, whether it required grad
        self._given = statistics
        self.statistics: list[Any] = [] if statistics is None else statistics
        self._norms = 0
        self._next = -1
        self._use_index: int | None = None
        self._parts_noted = False
        if entry is not None:
            self._slots[id(entry)] = (entry, self._new_slot(), False)
        super().__init__(model, lambda tape, total, weight, run: None, keep_outputs=True, own_losses=True, crosses=True)

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
        if self.codes:  # codes replace values, and a checkpoint is not differentiated here
            return self._parts(ops.decomposition(func), args, kwargs)
        return super()._decompose(func, args, kwargs, used, data)

    def _parts(self, parts: Any, args: Any, kwargs: Any) -> Any:
        out = super()._parts(parts, args, kwargs)
        self._parts_noted = True  # the calls inside are recorded as steps of their own
        return out

    def _substituted(self, use: int, args: Any, out: Any) -> Any:
        """The result of a use for the closure: a copy of its code or output, so that the prediction cannot change."""
        code = self.codes.get(use)
        if args and out is args[0]:  # in place: the closure may continue with its own tensor
            self.predictions[use] = out.clone()
            return out if code is None else out.copy_(code)
        return (out if code is None else code).clone()

    def _frozen(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """A norm's arguments for later runs: the first run's batch statistics, and no update of the running ones."""
        flag = "training" if func is F.batch_norm else "use_input_stats"
        names = ("input", "running_mean", "running_var", "weight", "bias", flag, "momentum", "eps")
        bound = {**dict(zip(names, args, strict=False)), **kwargs}
        if not bound.get(flag, func is F.instance_norm):
            return args, kwargs
        if func is F.instance_norm:  # normalizes each sample alone: only the running statistics must not change
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
        """Record the call if it returns tensors or writes into one."""
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
        autocast = active_autocast()
        self.program.append(
            Step(func, step_args, step_kwargs, outputs, single, reads, writes, self._use_index, grad, autocast)
        )

    def _template(self, value: Any, reads: set[int]) -> Any:
        if isinstance(value, Tensor):
            entry = self._slots.get(id(value))
            if entry is None or entry[0] is not value:
                return value
            # made inside a custom Function, under no_grad, and then attached to that Function's backward
            self.hidden_backward |= value.requires_grad and not entry[2]
            reads.add(entry[1])
            return Ref(entry[1])
        if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
            return type(value)(self._template(v, reads) for v in value)
        return value
