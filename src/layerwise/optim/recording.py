"""Passes that somebody else runs, recorded for a step without a closure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor

from layerwise.replay.state import Buffers

__all__ = ["Recorder", "Recording", "Samples", "holds_no_gradient"]


def holds_no_gradient(params: Iterable[Tensor]) -> bool:
    """Whether `.grad` of all parameters is None or zero: what was recorded before belongs to a step that is past."""
    return not any(p.grad is not None and bool((p.grad != 0).any()) for p in params)


Samples = int | Tensor | None  # the number of samples, or that of each loss term; None: as the batch says


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
