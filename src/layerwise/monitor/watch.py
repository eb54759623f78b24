"""One watched step: backward passes observed in groups of quantities, none of which can stand in their way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from layerwise.errors import BadInput, LayerwiseError, UnsupportedCall
from layerwise.observation.observe import observe
from layerwise.observation.seen import Seen
from layerwise.quantities import Quantity
from layerwise.replay.state import Gradients, RunState
from layerwise.tape.calls import BACKWARD
from layerwise.tape.pull import accumulated, backward_arguments
from layerwise.tape.tape import Tape
from layerwise.tape.uses import named_parameters_of
from layerwise.tensors import dense

__all__ = ["Group", "Watch"]


class _Tape(Tape):
    """A tape that stops recording at a call it does not decompose, where others refuse it."""

    refusal: LayerwiseError | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.refusal is None:
            try:
                return super().__torch_function__(func, types, args, kwargs)
            except UnsupportedCall as error:  # nothing has run yet
                self.refusal = error
        return func(*args, **(kwargs or {}))


class Group(observe):
    """Observe quantities together; where they are refused, the backward pass runs as it would without.

    seen: their results. refusal: the error that refused them all, or None.
    """

    def __init__(self, model: nn.Module | Mapping[str, Tensor], quantities: Sequence[Quantity]) -> None:
        super().__init__(model, *quantities)
        self.seen: Seen | None = None
        self._refusal: LayerwiseError | None = None
        self._own: _Tape | None = None

    @property
    def refusal(self) -> LayerwiseError | None:
        """Why there are no results."""
        return self._refusal or (self._own.refusal if self._own is not None else None)

    def __enter__(self) -> Seen:
        self.seen = super().__enter__()
        return self.seen

    def _new_tape(self) -> Tape:
        self._own = _Tape(self._model, self._on_backward, own_losses=True)
        return self._own

    def _on_backward(self, tape: Tape, total: Tensor, weight: Tensor | None, run: Callable[[], Any]) -> Any:
        if self.refusal is not None:
            return run()
        once = _Once(run, tape.parameters.values())
        try:
            return super()._on_backward(tape, total, weight, once)
        except LayerwiseError as error:
            self._refusal = error
            return once.finished()


class _Once:
    """A backward pass that runs once, and whose gradients come back after an observation has taken them out."""

    def __init__(self, run: Callable[[], Any], parameters: Iterable[Tensor]) -> None:
        self._run, self._parameters = run, list(parameters)
        self._out: Any = None
        self._after: Gradients | None = None

    def __call__(self) -> Any:
        self._out = self._run()
        self._after = Gradients(self._parameters)
        return self._out

    def finished(self) -> Any:
        """Run it, or put back what it gave."""
        if self._after is None:
            return self()
        self._after.put_back()
        return self._out


class _Passes(TorchFunctionMode):
    """Add up the losses of the backward passes from the parameters as they are, and what these add to `.grad`."""

    def __init__(self, parameters: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._parameters, self._before = parameters, before
        self.loss: Tensor | None = None
        self.gradient: dict[str, Tensor] = {}
        self.refusal: LayerwiseError | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in BACKWARD:
            return func(*args, **kwargs)
        try:
            total, weight = backward_arguments(func, args, kwargs)
        except BadInput as error:
            self.refusal = error
            return _unseen(func, args, kwargs)
        if self.loss is not None and self._moved():  # a line search, a second optimizer: another step's gradient
            return _unseen(func, args, kwargs)
        with accumulated(self._parameters) as found:
            out = func(*args, **kwargs)
        with torch.no_grad():
            value = total.detach() if weight is None else (total.detach() * weight).sum()
            self.loss = value.clone() if self.loss is None else self.loss + value
            for name, g in found.items():
                added = dense(g)
                self.gradient[name] = self.gradient[name] + added if name in self.gradient else added.clone()
        return out

    def _moved(self) -> bool:
        return any(not torch.equal(p.detach(), self._before[name]) for name, p in self._parameters.items())


def _unseen(func: Any, args: Any, kwargs: Any) -> Any:
    with torch._C.DisableTorchFunction():
        return func(*args, **kwargs)


class Watch:
    """Observe one step in groups of quantities.

    before: the trainable parameters at the start. Then, from the passes: loss (None without one), gradient.
    """

    def __init__(self, model: nn.Module | Mapping[str, Tensor], groups: Sequence[Sequence[Quantity]]) -> None:
        self._model = model
        self._parameters = {name: p for name, p in named_parameters_of(model).items() if p.requires_grad}
        self.before = values_of(self._parameters)
        self.groups = [Group(model, quantities) for quantities in groups]
        self._passes = _Passes(self._parameters, self.before)
        self._stack = ExitStack()

    @property
    def loss(self) -> Tensor | None:
        """Of all passes together."""
        return self._passes.loss

    @property
    def gradient(self) -> Mapping[str, Tensor]:
        """What the passes added to `.grad`."""
        return self._passes.gradient

    @property
    def refusal(self) -> LayerwiseError | None:
        """Of a backward pass of several tensors."""
        return self._passes.refusal

    def after(self) -> dict[str, Tensor]:
        """The parameters now."""
        return values_of(self._parameters)

    def __enter__(self) -> Watch:
        for group in self.groups:
            self._stack.enter_context(group)
        self._stack.enter_context(self._passes)
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.__exit__(*exc)

    def run(self, closure: Callable[[], Tensor]) -> None:
        """Observe one run of a closure, and leave gradients, buffers and random numbers as they were."""
        with RunState(self._model, gradients="values"), torch.enable_grad(), self:
            total = closure()
            if self.loss is None and isinstance(total, Tensor) and total.requires_grad:
                total.backward()


def values_of(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies, detached."""
    return {name: p.detach().clone() for name, p in parameters.items()}
