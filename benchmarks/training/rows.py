"""The rows: a line of JSON for every finished run, a file a problem, added to under a lock and never rewritten."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .plan import Key, Run
from .problems import PROBLEMS

__all__ = ["FOLDER", "Rows", "append", "key_of", "read", "row_of"]

FOLDER = Path(__file__).with_name("rows")
KEY = ("problem", "method", "trial", "seed", "config", "code")


def row_of(
    run: Run, curve: Iterable[tuple[float, float]], failure: str = "", clock: dict[str, Any] | None = None,
    accuracies: Sequence[float] = (), early: Sequence[float] = (),
) -> dict[str, Any]:  # fmt: skip
    """The row of a run: its key, configuration, losses by epoch (0 is the start), and what the clock said.

    curve: (train loss, test loss) by epoch. A failed run has the losses up to its failure, and infinite final ones.
    accuracies, early: where there are classes, accuracy on the rows held out by epoch, and at the start and after
    each first minibatch. A failed run's final accuracy is minus infinity.
    Everything but `clock` is the same whenever and wherever the run is repeated.
    """
    losses = list(curve)
    train, test = losses[-1] if losses and not failure else (math.inf, math.inf)
    row = {
        **dict(zip(KEY, run.key(), strict=True)),
        "phase": run.phase,
        "status": "failed" if failure else "done",
        "failure": failure,
        "train_loss": train,
        "test_loss": test,
        "configuration": run.configuration(),
        "train_curve": [a for a, _ in losses],
        "test_curve": [b for _, b in losses],
        "clock": clock or {},
    }
    if PROBLEMS[run.problem].classes:
        row["test_accuracy"] = accuracies[-1] if accuracies and not failure else -math.inf
        row["accuracy_curve"], row["early_curve"] = list(accuracies), list(early)
    return row


def key_of(row: dict[str, Any]) -> Key:
    """The key that `Run.key` gives."""
    return tuple(row[part] for part in KEY)


def _to_json(value: Any) -> Any:
    """Losses to 7 digits, and "inf" or "nan" where a loss is not a number: JSON has none."""
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {k: _to_json(v) for k, v in value.items()}
    return [_to_json(v) for v in value] if isinstance(value, list | tuple) else value


def _losses(row: dict[str, Any]) -> dict[str, Any]:
    for name in ("train_loss", "test_loss", "test_accuracy"):
        if name in row:
            row[name] = float(row[name])
    for name in ("train_curve", "test_curve", "accuracy_curve", "early_curve"):
        if name in row:
            row[name] = [float(v) for v in row[name]]
    return row


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file. A last line that was cut short is left out, any other damage raises ValueError."""
    if not path.is_file():
        return
    *lines, rest = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}, is no row: {error}. Take the line out to run it again.") from None


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row at the end, on the disk when this returns; several processes may do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(_to_json(row), allow_nan=False) + "\n"
    with path.open("a+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.seek(0)
        held = stream.read()
        if not held.endswith(b"\n"):  # the writer before was killed in the middle of a line
            stream.truncate(held.rfind(b"\n") + 1)
        stream.write(line.encode())
        stream.flush()
        os.fsync(stream.fileno())


class Rows:
    """All rows of a folder by key; where two have one key, the first counts."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self.folder = folder

    def path(self, problem: str) -> Path:
        """The file of a problem."""
        return self.folder / f"{problem}.jsonl"

    def load(self, problem: str) -> dict[Key, dict[str, Any]]:
        """The rows of a problem, read anew: another process may have added some."""
        found: dict[Key, dict[str, Any]] = {}
        for row in read(self.path(problem)):
            found.setdefault(key_of(row), _losses(row))
        return found

    def add(self, row: dict[str, Any]) -> None:
        """Append a run's row to its problem's file."""
        append(self.path(row["problem"]), row)
