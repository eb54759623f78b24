"""Destinations for records: a list in memory, or a JSON-lines file that stays readable after a crash."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from layerwise.errors import BadInput, LogDamaged
from layerwise.monitor.page import page
from layerwise.monitor.series import LEFT_OUT

__all__ = ["History", "JSONLines", "Record", "read"]

Record = dict[str, Any]  # numbers by name, and reasons for missing measures


class History:
    """A callable that keeps records in memory, in the order of their steps.

    A record whose step is not after the last one drops all records from that step on, as when a run resumes from a
    checkpoint. records: `[{"step": 0, "loss": 2.3, "noise_scale/0.weight": 31.0, ...}, ...]`.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()) -> None:
        self.records: list[Record] = []
        for record in records:
            self(int(record["step"]), record)

    def __call__(self, step: int, record: Mapping[str, Any]) -> None:
        """Append a record. Raises BadInput for a value that is no number, nor the reason of a missing one."""
        for key, value in record.items():
            if not (key.startswith(LEFT_OUT) or _is_number(value)):
                raise BadInput(f"the record of step {step} holds {key}: {value!r}; a history holds numbers by name")
        while self.records and self.records[-1]["step"] >= step:
            self.records.pop()
        self.records.append({**record, "step": step})

    def __len__(self) -> int:
        return len(self.records)

    @property
    def names(self) -> list[str]:
        """The names of all numbers, in order of first appearance."""
        names = dict.fromkeys(key for record in self.records for key in record)
        return [name for name in names if name != "step" and not name.startswith(LEFT_OUT)]

    @property
    def left_out(self) -> dict[str, str]:
        """The reasons for missing measures, by name."""
        found = {k: str(v) for record in self.records for k, v in record.items() if k.startswith(LEFT_OUT)}
        return {key.removeprefix(LEFT_OUT): why for key, why in found.items()}

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """The steps and values of one number. Raises BadInput for a name that was never logged."""
        if name not in self.names:
            raise BadInput(f"asked for {name!r}, which was not logged; there are: {', '.join(self.names) or 'none'}")
        found = [(record["step"], record[name]) for record in self.records if name in record]
        return [step for step, _ in found], [value for _, value in found]

    def rows(self) -> list[dict[str, Any]]:
        """All numbers as rows (step, measure, parameter or "", value), as for a data frame."""
        rows, names = [], self.names
        for record in self.records:
            for name in names:
                if name in record:
                    measure, _, parameter = name.partition("/")
                    found = {"measure": measure, "parameter": parameter, "value": record[name]}
                    rows.append({"step": record["step"], **found})
        return rows

    def table(self, names: Sequence[str] | None = None) -> str:
        """Numbers by step as text; by default those of the whole model."""
        names = [name for name in self.names if "/" not in name] if names is None else list(names)
        lines = [["step", *names]]
        lines += [[str(r["step"]), *(f"{r[n]:.4g}" if n in r else "" for n in names)] for r in self.records]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines)

    def write(self, path: str | Path) -> None:
        """Write all records to a new JSON-lines file, for `read`; whole, or not at all."""
        _write_whole(_file(path), "".join(_line(record) for record in self.records))

    def html(self, path: str | Path, title: str = "Training run") -> None:
        """Write a self-contained HTML report of the run; whole, or not at all."""
        _write_whole(_file(path), page(self.records, title))


class JSONLines:
    """A callable that appends each record to a file as one line of JSON, at once.

    An existing file is continued, as after a crash: an incomplete last line is removed, and so is the part of a line
    that could not be written (a full disk, which raises OSError; a `Monitor` warns instead). Each line carries the
    number of its run, one more than the runs in the file before its first line; `read` tells runs apart, and drops what
    a resumed run logs again. NaN and infinities, which JSON does not have, are the strings "nan", "inf", "-inf".
    Raises BadInput for a path that is none, such as an open file, or leads to a device, a pipe or a folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = _file(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.run: int | None = None
        self._cut = False  # whether a line may be cut short
        self._trim()

    def __call__(self, step: int, record: Mapping[str, Any]) -> None:
        """Append a record. Raises OSError where it cannot be written."""
        if self._cut:
            self._trim()
        if self.run is None:
            known = _lines(self.path.read_bytes())[0] if self.path.exists() else []
            self.run = 1 + max((run for run, _ in known), default=0)
        line = _line({"run": self.run, **record, "step": step}).encode()
        self._cut = True
        with self.path.open("ab", buffering=0) as file:
            if (written := file.write(line)) != len(line):
                raise OSError(
                    f"{written} of {len(line)} bytes of a record were written to {self.path}: is the disk full?"
                )
        self._cut = False

    def _trim(self) -> None:
        """Remove an incomplete last line."""
        if self.path.exists():
            with self.path.open("rb+") as file:
                file.truncate(_whole_lines(file.read()))
        self._cut = False  # whether a line may be cut short


def read(path: str | Path, run: int | None = None) -> History:
    """Read the records of one run in a JSON-lines file, with those of the runs that it resumed.

    run: its number; default the last one. A run whose first step is after that of the run before it has resumed that.
    An incomplete last line is ignored. Warns (`LogDamaged`) of lines that are no records, which are skipped, and of
    further runs, where no number is given. Raises BadInput for a run, or a file, without records, and for a path
    that is none or leads to a device, a pipe or a folder.
    """
    found, bad = _lines(_file(path).read_bytes())
    if bad:
        warnings.warn(f"skipped {len(bad)} lines of {path} that are no records: {bad[0]}", LogDamaged, stacklevel=2)
    if not found:
        raise BadInput(f"no line of {path} is a record of a monitor: {bad[0] if bad else 'it has no complete line'}")
    chains: dict[int, list[Record]] = {}
    for number, record in found:
        chains.setdefault(number, []).append(record)
    numbers = sorted(chains)
    if run is not None and run not in chains:
        raise BadInput(f"asked for run {run} of {path}, which holds the runs {', '.join(map(str, numbers))}")
    resumed = {new: chains[new][0]["step"] > chains[old][0]["step"] for old, new in pairwise(numbers)}
    heads = [n for n, after in zip(numbers, [*numbers[1:], None], strict=True) if not resumed.get(after or -1)]
    if run is None and len(heads) > 1:
        runs = ", ".join(map(str, heads))
        warnings.warn(
            f"{path} holds {len(heads)} runs ({runs}); this is the last, read(path, run=n) gives another",
            LogDamaged, stacklevel=2,
        )  # fmt: skip
    wanted = [numbers[-1] if run is None else run]
    while resumed.get(wanted[0]):
        wanted.insert(0, numbers[numbers.index(wanted[0]) - 1])
    return History(record for number in wanted for record in chains[number])


def _lines(content: bytes) -> tuple[list[tuple[int, Record]], list[str]]:
    """The records of complete lines with the numbers of their runs, and what is wrong with other lines."""
    found: list[tuple[int, Record]] = []
    bad: list[str] = []
    for number, line in enumerate(content[: _whole_lines(content)].split(b"\n")[:-1], 1):
        try:
            record = {key: _number(key, value) for key, value in json.loads(line).items()}
            record["step"] = int(record["step"])
            found.append((int(record.pop("run", 0)), record))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            bad.append(f"line {number}: {error!r}")
    return found, bad


def _file(path: Any) -> Path:
    """The path of a regular file, or of one to be made. Raises BadInput for others: a device may have no end."""
    if not isinstance(path, str | os.PathLike):
        raise BadInput(f"a log has the path of a file, which it opens for each line; got {type(path).__name__}")
    found = Path(path)
    if found.exists() and not found.is_file():
        raise BadInput(f"{found} is no regular file (a device, a pipe or a folder): give the path of a file")
    return found


def _write_whole(path: Path, text: str) -> None:
    """Write a file through a temporary one, so that it has its old content or the new one, never a part."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _whole_lines(content: bytes) -> int:
    """The length of the complete lines, in bytes."""
    return content.rfind(b"\n") + 1


def _line(record: Mapping[str, Any]) -> str:
    finite = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError, RuntimeError):
        return False
    return not isinstance(value, str)


def _number(key: str, value: Any) -> Any:
    """A value of a line. Raises TypeError and ValueError for one that is no number, nor the reason of a missing one."""
    if key.startswith(LEFT_OUT) and isinstance(value, str):
        return value
    return value if isinstance(value, int | float) else float(value)
