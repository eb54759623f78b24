"""Checks around the user's backward pass: finite loss and gradient, `.grad` of covered parameters only, rollback."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import NonFinite, UncoveredUse, Undefined
from layerwise.ranks.sums import tensors_of
from layerwise.ranks.trainers import several
from layerwise.tape.tape import Tape
from layerwise.tape.uses import Use
from layerwise.tensors import as_real, is_finite, together_finite

__all__ = [
    "Fingerprints",
    "check_alone",
    "check_covered",
    "check_finite",
    "check_gradient",
    "check_values",
    "retained_grads_preserved",
    "rollback",
    "snapshot",
]


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


def check_finite(total: Tensor) -> None:
    """Raise NonFinite for a loss of NaN or infinity."""
    if not bool(torch.isfinite(total).all()):
        raise NonFinite(
            f"asked to observe a backward pass from a loss of {total.detach().tolist()}; .grad is as it was. "
            "Check the batch and the parameters for NaN and infinity"
        )


def check_gradient(gradient: Mapping[str, Tensor], total: Tensor | None = None) -> None:
    """Raise NonFinite for a gradient of NaN or infinity under a finite loss: an infinite input times zero is NaN.

    total: a loss to check too, where it was not before the backward pass; all are read at once.
    """
    further = () if total is None else (total,)
    if together_finite([*further, *gradient.values()]):
        return
    for loss in further:
        check_finite(loss)
    for name, g in gradient.items():
        if not is_finite(g):
            raise NonFinite(
                f"asked to observe a backward pass whose gradient of {name!r} holds NaN or infinity; .grad is as it "
                "was. Check the batch and the parameters, or skip the batch"
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
    return grad, -1 if grad is None else grad._version, None if grad is None else grad.detach().clone()


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
    """Undo what a refused backward pass added to `.grad`."""
    for name, p in tape.owners.items():
        grad, version, old = before[name]
        p.grad = grad
        if grad is not None and grad._version != version:
            with torch.no_grad():
                grad.copy_(old)
