"""Snapshots of what a run of a closure changes: buffers, gradients and random generators."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from layerwise.errors import BadInput, NonFinite
from layerwise.tape.uses import named_buffers_of, named_parameters_of
from layerwise.tensors import Verdict, largest_entries, random_states_of, set_random_states, without_grad, write_where

__all__ = [
    "Buffers", "Gradients", "RandomState", "RunState", "check_loss", "put_random_states", "random_states", "seed_of",
]  # fmt: skip

_GENERATORS: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "python": (random.getstate, random.setstate),
    # numpy imports its generators at their first use
    "numpy": (lambda: np.random.get_state(), lambda state: np.random.set_state(state)),
    "torch": (torch.get_rng_state, torch.set_rng_state),
    "device": (
        lambda: torch.get_device_module().get_rng_state(),
        lambda state: torch.get_device_module().set_rng_state(state),
    ),
}


class Buffers:
    """Snapshot of a model's buffers: floating-point ones, and scalars (counters)."""

    def __init__(self, model: nn.Module | Mapping[str, Tensor]) -> None:
        buffers = named_buffers_of(model).items()
        self._values = [(name, b, b.clone()) for name, b in buffers if b.is_floating_point() or not b.dim()]

    @without_grad
    def spoiled(self) -> str | None:
        """The name of the first buffer that holds NaN or infinity now and did not in the snapshot, or None."""
        if not self._values:
            return None
        verdict = Verdict()
        self.ask(verdict)
        return verdict.reason(NonFinite)

    @without_grad
    def ask(self, verdict: Verdict) -> None:
        """As `spoiled`, when the verdict is read; NonFinite then holds the name."""
        floats = {name: (b, value) for name, b, value in self._values if b.is_floating_point()}

        def judge(names: list[str], largest: list[float]) -> None:
            for name, most in zip(names, largest, strict=True):
                if not math.isfinite(most) and bool(torch.isfinite(floats[name][1]).all()):
                    raise NonFinite(name)

        def good(names: list[str], largest: Tensor) -> Tensor:
            before = torch.stack([x for _, its in largest_entries({n: floats[n][1] for n in names}) for x in its])
            return torch.isfinite(largest) | ~torch.isfinite(before)

        for names, largest in largest_entries({name: b for name, (b, _) in floats.items()}):
            verdict.ask(largest, partial(judge, names), names, partial(good, names))

    @without_grad
    def keep_where(self, flag: Tensor) -> None:
        """Leave the buffers as they are where a flag `[]` on a device holds, else restore them; without a wait."""
        if self._values:
            write_where(~flag, [buffer for _, buffer, _ in self._values], [value for *_, value in self._values])

    @without_grad
    def put_back(self) -> None:
        """Restore the buffers that have changed."""
        for _, buffer, value in self._values:
            # batch norm does not increase `_version` of its buffers, so values are compared
            if not torch.equal(buffer, value):
                buffer.copy_(value)


class Gradients:
    """Snapshot of the `.grad` of parameters; values: copy their contents too, since a backward pass adds to them."""

    def __init__(self, parameters: Iterable[Tensor], values: bool = True) -> None:
        self._grads = [
            (p, p.grad, None if p.grad is None or not values else p.grad.detach().clone()) for p in parameters
        ]

    @without_grad
    def put_back(self) -> None:
        """Restore the same `.grad` tensors, and their contents where copied."""
        for p, grad, value in self._grads:
            p.grad = grad
            if grad is not None and value is not None:
                grad.copy_(value)


def seed_of(seed: int, step: int) -> int:
    """A seed for the draws of one step; hashed, since CPU generators use only the lower 32 bits."""
    return random.Random(f"{seed} {step}").getrandbits(63)


def random_states(kinds: Iterable[str]) -> dict[str, Any]:
    """The states of the process's generators, by kind: "python", "numpy", "torch", and "device" of the accelerator."""
    return {kind: _GENERATORS[kind][0]() for kind in kinds}


def put_random_states(states: Mapping[str, Any]) -> None:
    """Set the process's generators to the given states, by kind."""
    for kind, state in states.items():
        _GENERATORS[kind][1](state)


class RandomState:
    """Snapshot of generator states: the process's by kind, those of devices, and the given generators."""

    def __init__(
        self, devices: Iterable[torch.device] = (), kinds: Iterable[str] = ("python", "torch"),
        generators: Iterable[torch.Generator] = (),
    ) -> None:  # fmt: skip
        self._process = random_states(kinds)
        self._devices = random_states_of(devices)
        self._further = [(generator, generator.get_state()) for generator in generators]

    def moved(self) -> bool:
        """Whether one of torch's generators in the snapshot has given numbers since."""
        held = [*self._process.values(), *self._devices.values()]
        now = [*random_states(self._process).values(), *random_states_of(self._devices).values()]
        return any(isinstance(s, Tensor) and not torch.equal(s, t) for s, t in zip(held, now, strict=True))

    def put_back(self) -> None:
        """Restore the generators."""
        put_random_states(self._process)
        set_random_states(self._devices)
        for generator, state in self._further:
            generator.set_state(state)


class RunState:
    """Snapshot of all that a run of a closure changes: generators, buffers and, if asked, the parameters' `.grad`.

    gradients: False; True for the tensors in `.grad`; "values" for their contents too. As a context: restores at exit.
    """

    def __init__(self, model: nn.Module | Mapping[str, Tensor], gradients: bool | str = False) -> None:
        parameters = list(named_parameters_of(model).values())
        self._random, self._buffers = RandomState({p.device for p in parameters}), Buffers(model)
        self._gradients = Gradients(parameters, values=gradients == "values") if gradients else None

    def put_back(self) -> None:
        """Restore everything."""
        self._random.put_back()
        self._buffers.put_back()
        if self._gradients is not None:
            self._gradients.put_back()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.put_back()


def check_loss(loss: object) -> None:
    """Raise BadInput unless a closure returned a loss, a tensor of one element."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        seen = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise BadInput(f"the closure must return the loss, a tensor of one element; got {seen}")
