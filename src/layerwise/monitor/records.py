"""Destinations for records: a list in memory, or a JSON-lines file that stays readable after a crash."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from layerwise.errors import BadInput
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
        """Append a record."""
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
        """Write all records to a new JSON-lines file, for `read`."""
        Path(path).write_text("".join(_line(record) for record in self.records), encoding="utf-8")

    def html(self, path: str | Path, title: str = "Training run") -> None:
        """Write a self-contained HTML report of the run."""
        Path(path).write_text(page(self.records, title), encoding="utf-8")


class JSONLines:
    """A callable that appends each record to a file as one line of JSON, at once.

    An existing file is continued, as after a crash: an incomplete last line is removed, and `read` drops the records
    that a resumed run logs again. NaN and infinities, which JSON does not have, are the strings "nan", "inf", "-inf".
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            with self.path.open("rb+") as file:
                file.truncate(_whole_lines(file.read()))

    def __call__(self, step: int, record: Mapping[str, Any]) -> None:
        """Append a record."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line({**record, "step": step}))


def read(path: str | Path) -> History:
    """Read the records of a JSON-lines file; an incomplete last line is ignored.

    Raises BadInput for any other line that is not a record.
    """
    content = Path(path).read_bytes()
    records = []
    for number, line in enumerate(content[: _whole_lines(content)].splitlines(), 1):
        try:
            record = {key: _number(key, value) for key, value in json.loads(line).items()}
            record["step"] = int(record["step"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"line {number} of {path} is no record of a monitor: {error!r}") from None
        records.append(record)
    return History(records)


def _whole_lines(content: bytes) -> int:
    """The length of the complete lines, in bytes."""
    return content.rfind(b"\n") + 1


def _line(record: Mapping[str, Any]) -> str:
    finite = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _number(key: str, value: Any) -> Any:
    return value if key.startswith(LEFT_OUT) or not isinstance(value, str) else float(value)
