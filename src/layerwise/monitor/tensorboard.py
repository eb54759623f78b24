"""Logging of records to TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerwise.errors import BadInput

__all__ = ["TensorBoard"]


class TensorBoard:
    """A callable that passes each number to a writer's `add_scalar(name, value, step)`, and reasons to `add_text`.

    writer: a `torch.utils.tensorboard.SummaryWriter`, an object with its methods, or a folder for a new one.
    Raises BadInput for a folder where tensorboard is not installed.
    """

    def __init__(self, writer: Any) -> None:
        self.writer = _made(writer) if isinstance(writer, str | Path) else writer

    def __call__(self, step: int, record: Mapping[str, Any]) -> None:
        """Write a record."""
        for name, value in record.items():
            if isinstance(value, str):
                self.writer.add_text(name, value, step)
            elif name != "step":
                self.writer.add_scalar(name, value, step)


def _made(folder: str | Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise BadInput(
            f"asked to write to {folder} for TensorBoard, which is not installed: pip install 'layerwise[monitor]'"
        ) from None
    return SummaryWriter(str(folder))
