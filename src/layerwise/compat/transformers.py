"""A callback for transformers' Trainer around the steps of `lw.optim`'s optimizers.

Importing this module imports transformers; nothing else in the library does.
"""

from __future__ import annotations

from typing import Any

from layerwise.compat.trainer_contexts import TrainerContexts

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        f"layerwise.compat.transformers needs transformers, which cannot be imported ({error}): "
        "pip install 'transformers[torch]'"
    ) from error

__all__ = ["StepCallback"]


class StepCallback(TrainerCallback):
    """Record the passes of each step of a `transformers.Trainer`, for K-FAC, DiagNewton and LocoProp.

        opt = lw.optim.KFAC(model)
        trainer = Trainer(model, args, optimizers=(opt, None), callbacks=[StepCallback()])

    A step has all batches of `gradient_accumulation_steps`. Trainer tells callbacks of no error: after one, `close()`
    ends the record (the next `train()` does, too). Raises BadInput for a trainer without an optimizer of `lw.optim`,
    and for one that runs the model again (AltMin).
    """

    def __init__(self) -> None:
        self._contexts = TrainerContexts()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End a record that an error left open."""
        self.close()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start recording."""
        self._contexts.open([kwargs["optimizer"]])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop recording."""
        self._contexts.close()

    def close(self) -> None:
        """Drop what was recorded of a step that failed."""
        self._contexts.close(_Unfinished())


class _Unfinished(Exception):
    """The training ended inside a step."""
