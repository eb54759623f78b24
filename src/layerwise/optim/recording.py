"""Passes that somebody else runs, recorded for a step without a closure."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from layerwise.errors import BadInput
from layerwise.losses.gradient_scalers import GradientsLeft
from layerwise.replay.state import Buffers
from layerwise.replay.whole_passes import GradVersions, WholePasses
from layerwise.tensors import all_finite, dense, without_grad

__all__ = ["Recorder", "Recording", "Samples", "Turn", "factor_left", "resumed", "withhold"]

Samples = int | Tensor | None  # the number of samples, or that of each loss term; None: as the batch says


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
    """Records the passes inside its context; entered again, it goes on with the same batch. May be left twice."""

    whole: WholePasses

    def say(self, samples: Samples) -> None:
        """What the user says of the samples of the passes to come, each."""

    def __enter__(self) -> Any:
        """Record."""

    def __exit__(self, *exc: Any) -> None:
        """Stop."""

    def forget_passes(self) -> None:
        """Drop the backward passes so far, but not the forward pass of those to come."""

    def mark(self) -> Callable[[], None]:
        """What drops all that is recorded from now on."""


def resumed(owner: str, recording: Recording | None, params: Iterable[Tensor]) -> Recording | None:
    """The recording that a context goes on with; None where it begins a batch.

    Where `.grad` of all parameters is None or zero, what was recorded belongs to a step that is past. Raises BadInput
    in an open context. owner: in its message.
    """
    if recording is not None and recording.open:
        raise BadInput(f"{owner}.watch() is active already; leave it, or call step(), before the next")
    return recording if any(p.grad is not None and bool((p.grad != 0).any()) for p in params) else None


class Recording:
    """A batch that is being recorded, or was, and the buffers from before its first pass.

    What is recorded and what `.grad` of the model holds are of the same passes. An exception in a context drops what
    was recorded in it, where none of that has reached `.grad`; else no step can be made until the gradients are gone.
    open: whether a context is open. buffers: None for a step that restores none.
    """

    def __init__(self, recorder: Any, model: nn.Module | Mapping[str, Tensor], buffers: Buffers | None = None) -> None:
        self.recorder, self.buffers = recorder, buffers
        self.open, self._model = False, model

    def _mark(self) -> None:
        self._before, self._put_back = GradVersions(self._model), self.recorder.mark()

    @contextmanager
    def running(self, samples: Samples = None) -> Iterator[Any]:
        """The recorder's context, for a part of the batch. samples: of each of its passes."""
        try:
            self.recorder.say(samples)
            self._mark()
            self.open = True
            yield self.recorder.__enter__()
            self.stop()
        except BaseException as error:
            self.stop(type(error), error, error.__traceback__)
            raise

    def stop(self, *exc: Any) -> None:
        """Close the context, unless a step has closed it."""
        if self.open:
            self.recorder.__exit__(*(exc or (None, None, None)))
            if exc and self._before.are_as_then():
                self._put_back()
            elif exc:
                self.recorder.whole.torn = True
            self.open = False  # at last, for after an interrupt it is called again

    def forget_passes(self) -> None:
        """Drop the passes so far, whose gradients are gone."""
        self.recorder.forget_passes()
        self.recorder.whole.torn = False
        self._mark()
