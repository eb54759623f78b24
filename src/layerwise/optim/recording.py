"""Passes that somebody else runs, recorded for a step without a closure."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.losses.gradient_scalers import GradientsLeft
from layerwise.replay.state import Buffers
from layerwise.tensors import all_finite, dense, without_grad

__all__ = ["Recorder", "Recording", "Samples", "Turn", "factor_left", "holds_no_gradient", "withhold"]

Samples = int | Tensor | None  # the number of samples, or that of each loss term; None: as the batch says


def holds_no_gradient(params: Iterable[Tensor]) -> bool:
    """Whether `.grad` of all parameters is None or zero: what was recorded before belongs to a step that is past."""
    return not any(p.grad is not None and bool((p.grad != 0).any()) for p in params)


@without_grad
def withhold(params: Iterable[Tensor], left: GradientsLeft | None) -> None:
    """Leave an outer optimizer no gradient of a batch that is skipped: None in `.grad`.

    left: of a gradient scaler's passes. Where the scaler has still to look for NaN, it finds it, and skips the step.
    """
    params = list(params)
    if left is not None and not all_finite([dense(p.grad) for p in params if p.grad is not None]):
        return
    awaits = left is not None and left.awaits()
    for p in params:
        p.grad = torch.full_like(p, float("nan")) if awaits else None


def factor_left(left: GradientsLeft | None) -> float:
    """The factor of a gradient scaler in `.grad`, which it has still to take out; 1 without a scaler.

    Raises BadInput where the gradients do not tell.
    """
    found = 1.0 if left is None else left.factor()
    if found is None:
        raise BadInput(
            "step() replaces the gradients, and those of the watched passes were written to before it, by clipping or "
            "the like: clip after opt.step() and scaler.unscale_(outer)"
        )
    return found


class Turn:
    """A lock by which threads take turns, and one thread may enter again; a copy is a lock of its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exc: Any) -> None:
        self._lock.release()

    def __reduce__(self) -> Any:
        return Turn, ()


class Recorder(Protocol):
    """Records the passes inside its context; entered again, it goes on with the same batch."""

    def say(self, samples: Samples) -> None:
        """What the user says of the samples of the passes to come, each."""

    def __enter__(self) -> Any:
        """Record."""

    def __exit__(self, *exc: Any) -> None:
        """Stop."""

    def forget_passes(self) -> None:
        """Drop the backward passes so far, but not the forward pass of those to come."""


class Recording:
    """A batch that is being recorded, or was, and the buffers from before its first pass.

    open: whether a context is open.
    """

    def __init__(self, recorder: Recorder, buffers: Buffers) -> None:
        self.recorder, self.buffers = recorder, buffers
        self.open = False

    def start(self, samples: Samples = None) -> None:
        """Open the recorder's context. samples: of each of its passes."""
        self.recorder.say(samples)
        self.open = True
        self.recorder.__enter__()

    def stop(self, *exc: Any) -> None:
        """Close the context, unless a step has closed it."""
        if self.open:
            self.open = False
            self.recorder.__exit__(*(exc or (None, None, None)))
