"""Checks around the user's backward pass: finite loss and gradient, `.grad` of covered parameters only, rollback."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import NonFinite, UncoveredUse, Undefined
from layerwise.gradient.parameter import ParameterGradient
from layerwise.graph.coverage import Graph
from layerwise.losses import Likelihood, LossCall
from layerwise.quantities.base import Quantity
from layerwise.ranks.sums import tensors_of
from layerwise.ranks.trainers import several
from layerwise.tape.tape import Tape
from layerwise.tape.uses import Use
from layerwise.tensors import Verdict, as_real, free_memory, is_finite, largest_entries, together_finite

__all__ = [
    "Fingerprints",
    "Room",
    "ask_finite",
    "check_alone",
    "check_covered",
    "check_finite",
    "check_gradient",
    "check_values",
    "retained_grads_preserved",
    "rollback",
    "snapshot",
    "unread",
]


_NO_GRAD: tuple[Any, int, Tensor | None] = None, -1, None
_THE_LOSS = ""  # no parameter is called so
_GRANTED = 2**27  # bytes of results between two readings of what is free
_UNREAD = 2**24  # bytes of results of one pass before the first: reading costs as much as a small model's layer


class Fingerprints:
    """Two numbers of each cotangent pulled before the user's backward pass, to compare with those of its own."""

    def __init__(self, cotangents: Sequence[tuple[Use, Tensor]] = ()) -> None:
        self._sent = {use.index: _fingerprint(g) for use, g in cotangents}
        self._arrived: dict[int, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._sent)

    def compare(self, use: Use, g: Tensor) -> None:
        """Note the cotangent of the user's own backward pass."""
        if self._sent:
            self._arrived[use.index] = _fingerprint(g)

    def check(self) -> None:
        """Raise Undefined where the user's backward pass had other cotangents."""
        same = self._sent.keys() == self._arrived.keys()
        if same and self._sent:
            sent, arrived = (torch.stack([by[k] for k in self._sent]).cpu() for by in (self._sent, self._arrived))
            scale = float(sent.abs().max())
            same = torch.allclose(sent, arrived, rtol=1e-3, atol=1e-6 * scale)
        if not same:
            raise Undefined(
                "asked for a quantity in two stages (ClippedGrad) of a model with derived weights, but the backward "
                "pass sent other cotangents than the loss does: a hook changes gradients on their way; remove it"
            )


def _fingerprint(g: Tensor) -> Tensor:
    g = as_real(g)
    return torch.stack([g.sum(dtype=torch.float64), g.abs().sum(dtype=torch.float64)])


class Room:
    """Refuses results that do not fit into the memory of the device that they would be on.

    What is free is read whenever as much as the last reading granted was asked for, at most `_GRANTED` bytes at once;
    the first `_UNREAD` bytes are granted without.
    """

    def __init__(self) -> None:
        self._left: dict[torch.device, int] = {}

    def take(self, quantity: Quantity, gradient: ParameterGradient, like: Tensor, dtype: torch.dtype) -> None:
        """Raise Undefined, before anything is allocated, where a quantity's numbers of one parameter do not fit.

        like: the parameter; dtype: of the numbers.
        """
        numbers = quantity.numbers(gradient)
        size = numbers * dtype.itemsize
        if size > self._left.setdefault(like.device, _UNREAD):
            free = free_memory(like.device)
            if free is not None and size > free:
                raise Undefined(
                    f"asked for {quantity!r}, which holds {numbers} numbers of {gradient.name!r} "
                    f"{tuple(gradient.shape)}, {size / 1e9:.3g} GB, but {free / 1e9:.3g} GB of memory are free on "
                    f"{like.device}; leave this parameter out (`parameters=` with the others, or freeze it)"
                    + ("" if numbers <= gradient.shape.numel() else f", {quantity.smaller}")
                )
            self._left[like.device] = max(size, _GRANTED if free is None else min(free, _GRANTED))
        self._left[like.device] -= size


def check_finite(total: Tensor) -> None:
    """Raise NonFinite for a loss of NaN or infinity."""
    if not bool(torch.isfinite(total).all()):
        raise NonFinite(
            f"asked to observe a backward pass from a loss of {total.detach().tolist()}; .grad is as it was. "
            "Check the batch and the parameters for NaN and infinity"
        )


def check_gradient(gradient: Mapping[str, Tensor]) -> None:
    """Raise NonFinite for a gradient of NaN or infinity under a finite loss: an infinite input times zero is NaN."""
    if together_finite(gradient.values()):
        return
    for name, g in gradient.items():
        if not is_finite(g):
            raise NonFinite(_of_gradient(name, ".grad is as it was"))


def unread(graph: Graph, known: Sequence[Likelihood]) -> Verdict:
    """What is to be read of the losses; from now on they keep what they would wait for."""
    verdict = Verdict()
    for lik in known:
        lik.unread = graph.unread
    for loss in graph.known:
        if isinstance(loss.call, LossCall) and (asked := loss.call.unread_range()) is not None:
            verdict.ask(*asked)
    return verdict


def ask_finite(verdict: Verdict, graph: Graph, total: Tensor, gradient: Mapping[str, Tensor], deferred: bool) -> None:
    """As `check_finite` and `check_gradient`, when the verdict is read, and what the graph has kept for it.

    deferred: whether that is with a result, when `.grad` is what torch has made of it.
    """
    left = ".grad is what it was without layerwise" if deferred else ".grad is as it was"
    for names, largest in largest_entries({_THE_LOSS: total, **gradient}):
        verdict.ask(largest, partial(_judge, names, left))
    for values, judge in graph.unread or ():
        verdict.ask(values, judge)


def _judge(names: Sequence[str], left: str, found: list[float]) -> None:
    for name, largest in zip(names, found, strict=True):
        if math.isfinite(largest):
            continue
        if name != _THE_LOSS:
            raise NonFinite(_of_gradient(name, left))
        raise NonFinite(
            f"asked to observe a backward pass from a loss of NaN or infinity; {left}. Check the batch and the "
            "parameters for NaN and infinity"
        )


def _of_gradient(name: str, left: str) -> str:
    return (
        f"asked to observe a backward pass whose gradient of {name!r} holds NaN or infinity; {left}. Check the batch "
        "and the parameters, or skip the batch"
    )


def check_values(values: Mapping[str, Iterable[Any]]) -> None:
    """Raise NonFinite for values of NaN or infinity by parameter, where no gradient is made that would show them."""
    for name, value in values.items():
        if not together_finite([t for v in value for t in tensors_of(v)]):
            raise NonFinite(
                f"asked to observe a backward pass whose values of {name!r} hold NaN or infinity. Check the batch and "
                "the parameters, or skip the batch"
            )


@contextmanager
def retained_grads_preserved(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Put back the `.grad` of activations (`retain_grad()`) that vector-Jacobian products inside the context fill."""
    before = [t.grad for t in tensors]
    try:
        yield
    finally:
        for t, grad in zip(tensors, before, strict=True):
            t.grad = grad


def snapshot(p: Tensor) -> tuple[Any, int, Tensor | None]:
    """`.grad`, its version, and a copy, for `rollback`."""
    grad = p.grad
    return _NO_GRAD if grad is None else (grad, grad._version, grad.detach().clone())


def check_alone(strangers: Sequence[str]) -> None:
    """Raise UncoveredUse where another backward pass ran inside the observed one."""
    if strangers:
        raise UncoveredUse(
            f"another backward pass reached {', '.join(strangers[:5])} inside the observed one, in a hook or in a "
            "block under reentrant checkpointing, and no call of it was recorded: run it after the observed one, and "
            "use torch.utils.checkpoint with use_reentrant=False"
        )


def check_covered(tape: Tape, before: Mapping[str, Any], arrived: Collection[str], covered: Collection[str]) -> None:
    """A gradient that arrived, or a `.grad` that changed, where no use was recorded is an error.

    Among several processes `.grad` changes by what the others send, so the arrivals alone count.
    """
    for name, p in tape.owners.items():
        if name in covered:
            continue
        grad, version, _ = before[name]
        same = p.grad is None or (p.grad is grad and p.grad._version == version)
        if name not in arrived and (same or several()):
            continue
        raise UncoveredUse(
            f"the backward pass changed the gradient of {name!r}, but no call with it was recorded: it ran inside "
            "something the tape cannot see (reentrant checkpointing, another thread). Use "
            "torch.utils.checkpoint with use_reentrant=False"
        )


def rollback(tape: Tape, before: Mapping[str, Any]) -> None:
    """Undo what a refused backward pass added to `.grad`, to the version that it had."""
    for name, p in tape.owners.items():
        grad, version, old = before[name]
        p.grad = grad
        if grad is not None and grad._version != version:
            with torch.no_grad():
                grad.copy_(old)
            torch._C._autograd._unsafe_set_version_counter((grad,), (version,))  # its values are those of then
