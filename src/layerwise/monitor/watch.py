"""Observation of one training step that never makes it fail: refused quantities do not stop its backward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import BadInput, LayerwiseError, UnsupportedCall
from layerwise.observation.engine import Observation
from layerwise.observation.seen import Seen
from layerwise.quantities import Quantity
from layerwise.replay.state import Gradients, RunState
from layerwise.tape.calls import BACKWARD
from layerwise.tape.modes import LeavableMode
from layerwise.tape.pull import OnePass, accumulated, backward_arguments
from layerwise.tape.tape import Tape
from layerwise.tape.uses import named_parameters_of
from layerwise.tensors import dense

__all__ = ["Group", "Watch"]


class _Tape(Tape):
    """A tape that stops recording at an unsupported call, where other tapes raise."""

    refusal: LayerwiseError | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.refusal is None:
            try:
                return super().__torch_function__(func, types, args, kwargs)
            except UnsupportedCall as error:  # raised before the call ran
                self.refusal = error
        return func(*args, **(kwargs or {}))


class Group:
    """Observe quantities together; where they raise a typed error, the backward pass runs without them.

    seen: their results. refusal: the error that they raised, or None.
    """

    def __init__(self, model: nn.Module | Mapping[str, Tensor], quantities: Sequence[Quantity]) -> None:
        self._observation = Observation(model, quantities)
        self._tape = _Tape(model, self._on_backward, own_losses=True)
        self._refusal: LayerwiseError | None = None
        self.seen = Seen(self._observation.restart())

    @property
    def refusal(self) -> LayerwiseError | None:
        """The error because of which there are no results, or None."""
        return self._refusal or self._tape.refusal

    def __enter__(self) -> Seen:
        self.seen = Seen(self._observation.start(self._tape))
        return self.seen

    def __exit__(self, *exc: Any) -> None:
        self._observation.stop(*exc)

    def _on_backward(self, tape: Tape, total: Tensor, weight: Tensor | None, run: Callable[[], Any]) -> Any:
        if self.refusal is not None:
            return run()
        once = _Once(run, tape.parameters.values())
        try:
            return self._observation.run(tape, total, weight, once)
        except LayerwiseError as error:
            self._refusal = error
            return once.finished()


class _Once:
    """A backward pass that runs once; its gradients are restored if a failed observation has rolled them back."""

    def __init__(self, run: Callable[[], Any], parameters: Iterable[Tensor]) -> None:
        self._run, self._parameters = run, list(parameters)
        self._out: Any = None
        self._after: Gradients | None = None

    def __call__(self) -> Any:
        self._out = self._run()
        self._after = Gradients(self._parameters)
        return self._out

    def finished(self) -> Any:
        """Run the backward pass, or restore its gradients if it has run; returns its result."""
        if self._after is None:
            return self()
        self._after.put_back()
        return self._out


class _Passes(LeavableMode):
    """Sums the losses of all backward passes, and what they add to `.grad`, until the parameters change."""

    def __init__(self, parameters: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._parameters, self._before = parameters, before
        self.loss: Tensor | None = None
        self.gradient: dict[str, Tensor] = {}
        self.refusal: LayerwiseError | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.ended or func not in BACKWARD:
            return func(*args, **kwargs)
        try:
            total, weight = backward_arguments(func, args, kwargs)
        except BadInput as error:
            self.refusal = error
            return _unseen(func, args, kwargs)
        if self.loss is not None and self._moved():  # gradient at other parameters (line search, second optimizer)
            return _unseen(func, args, kwargs)
        with OnePass(total) as within, accumulated(self._parameters, within=within) as found:
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
    """Observe one step of training in groups of quantities.

    before: a copy of the trainable parameters at the start. loss (or None), gradient: sums over the backward passes.
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
        """The sum of the losses of all backward passes, or None."""
        return self._passes.loss

    @property
    def gradient(self) -> Mapping[str, Tensor]:
        """What the backward passes added to `.grad`, by parameter."""
        return self._passes.gradient

    @property
    def refusal(self) -> LayerwiseError | None:
        """The error of a backward pass from several tensors, which cannot be observed, or None."""
        return self._passes.refusal

    def after(self) -> dict[str, Tensor]:
        """A copy of the present trainable parameters."""
        return values_of(self._parameters)

    def __enter__(self) -> Watch:
        for group in self.groups:
            self._stack.enter_context(group)
        self._stack.enter_context(self._passes)
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.__exit__(*exc)

    def run(self, closure: Callable[[], Tensor]) -> None:
        """Observe one run of a closure, and restore gradients, buffers and random states."""
        with RunState(self._model, gradients="values"), torch.enable_grad(), self:
            total = closure()
            if self.loss is None and isinstance(total, Tensor) and total.requires_grad:
                total.backward()


def values_of(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached copies of the parameters."""
    return {name: p.detach().clone() for name, p in parameters.items()}
