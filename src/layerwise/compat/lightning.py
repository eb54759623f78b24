"""Lightning callbacks: around the steps of `lw.optim`'s optimizers, and around `lw.monitor.Monitor`.

Importing this module imports lightning, or pytorch_lightning where only that is installed; nothing else in the library
does. A Trainer of either name takes the callbacks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from layerwise.compat.trainer_contexts import TrainerContexts
from layerwise.errors import BadInput
from layerwise.monitor import Measure, Monitor
from layerwise.monitor.records import Record

try:
    from lightning import Callback
except ImportError as error:
    try:
        from pytorch_lightning import Callback
    except ImportError:
        raise ImportError(
            f"layerwise.compat.lightning needs lightning, which cannot be imported ({error}): "
            "pip install 'layerwise[lightning]'"
        ) from error

__all__ = ["MonitorCallback", "StepCallback"]


class StepCallback(Callback):
    """Record the passes of each step of a `lightning.Trainer`, for K-FAC, DiagNewton and LocoProp.

        trainer = lightning.Trainer(callbacks=[StepCallback()])

    `configure_optimizers` returns the optimizer as any other. A step has all batches of `accumulate_grad_batches`;
    under manual optimization, all that ran before `opt.step()`. Without the callback a step sees its last batch alone,
    and none in 16-bit precision. Raises BadInput for a trainer without an optimizer of `lw.optim`, and for one that
    runs the model again (AltMin).
    """

    def __init__(self) -> None:
        self._contexts = TrainerContexts()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start recording, or go on with the batches of a step."""
        self._contexts.open(trainer.optimizers)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop recording, until the next batch."""
        self._contexts.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Discard a step that failed."""
        self._contexts.close(exception)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop recording where the fit ended inside a batch."""
        self._contexts.close(_Unfinished())


class MonitorCallback(Callback):
    """Measure every k-th optimizer step of a `lightning.Trainer`, and log it.

        trainer = lightning.Trainer(callbacks=[MonitorCallback(every=50)])

    A step runs from its first batch to the optimizer's step, with all batches of `accumulate_grad_batches`.
    Steps count from the start of the fit, and the count is saved in checkpoints. log: as for `Monitor`; by default the
    trainer's loggers' `log_metrics`. measures, every, seed: as for `Monitor`. Parameter names are those of the
    LightningModule. Raises BadInput where the trainer has neither a logger nor `log`.
    """

    def __init__(
        self,
        log: Callable[[int, Record], Any] | None = None,
        *,
        measures: Sequence[Measure] | None = None,
        every: int = 50,
        seed: int = 0,
    ) -> None:
        self._log, self._measures, self._every, self._seed = log, measures, every, seed
        self._monitor: Monitor | None = None
        self._open: AbstractContextManager[None] | None = None
        self._started = 0
        self._saved: dict[str, Any] | None = None

    @property
    def monitor(self) -> Monitor | None:
        """The monitor of the present fit, or None."""
        return self._monitor

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Create the monitor."""
        loggers = list(trainer.loggers)
        if self._log is None and not loggers:
            raise BadInput("asked to monitor a fit whose trainer has no logger; give MonitorCallback(log=...)")
        log = self._log if self._log is not None else lambda step, record: _to(loggers, step, record)
        self._monitor = Monitor(pl_module, log, measures=self._measures, every=self._every, seed=self._seed)
        if self._saved is not None:
            self._monitor.load_state_dict(self._saved)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start observing at the first batch of a step."""
        if self._open is None and self._monitor is not None:
            self._started = trainer.global_step
            self._open = self._monitor.step()
            self._open.__enter__()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop observing once the optimizer has stepped."""
        if self._open is not None and trainer.global_step > self._started:
            opened, self._open = self._open, None
            opened.__exit__(None, None, None)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Discard a step that failed."""
        self._forget(exception)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Discard an unfinished step."""
        self._forget(_Unfinished())

    def _forget(self, exception: BaseException) -> None:
        if self._open is None:
            return
        opened, self._open = self._open, None
        try:
            opened.__exit__(type(exception), exception, exception.__traceback__)
        except BaseException as raised:
            if raised is not exception:
                raise

    def state_dict(self) -> dict[str, Any]:
        """The state of the monitor."""
        return self._monitor.state_dict() if self._monitor is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a saved state for the next fit."""
        self._saved = dict(state_dict) or None


class _Unfinished(Exception):
    """The fit ended inside a step."""


def _to(loggers: Sequence[Any], step: int, record: Record) -> None:
    numbers = {name: value for name, value in record.items() if name != "step" and not isinstance(value, str)}
    for logger in loggers:
        logger.log_metrics(numbers, step=step)
