"""Results on disk, one entry for each cell, written after each: what was measured is not measured again."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import layerwise
from benchmarks import probe

from .contenders import CONTENDERS, OURS, version_of

__all__ = ["Store"]

UNUSED = {"local", "optim", "nn", "compat", "monitor", "demo", "cli.py", "__main__.py", "__init__.py"}  # not timed

STATISTIC = "(gradient + quantity) / gradient, lower quartiles of CPU time, interleaved in alternating order"


class Store:
    """The file of results. A cell counts as done where code, versions and machine are those of now."""

    def __init__(self, path: Path, fresh: bool = False) -> None:
        self.path = path
        self.versions = {name: version_of(name) for name in CONTENDERS if name not in OURS[1:]}
        self.versions["torch"] = torch.__version__
        self.stamp = _stamp(self.versions)
        found = probe.read(path) if path.exists() and not fresh else {}
        self.header: dict[str, Any] = found.get("header", {})
        self.cells: dict[str, dict[str, Any]] = found.get("cells", {})

    def done(self, net: str, quantity: str, contenders: Iterable[str], repeats: int) -> bool:
        """Whether the cell holds all of these contenders, measured now and with as many repeats."""
        cell = self.cells.get(f"{net}/{quantity}")
        if cell is None or cell["stamp"] != self.stamp or cell["asked repeats"] < repeats:
            return False
        return set(contenders) <= cell["contenders"].keys()

    def add(self, net: str, quantity: str, cell: dict[str, Any], repeats: int) -> None:
        """Keep a cell; the file is replaced in one step."""
        self.header = {
            "machine": _machine(),
            "versions": self.versions,
            "threads": 1,
            "statistic": STATISTIC,
            "stamp": self.stamp,
        }
        self.replace(net, quantity, cell | {"stamp": self.stamp, "asked repeats": repeats})

    def replace(self, net: str, quantity: str, cell: dict[str, Any]) -> None:
        """Put a cell in the place of the one before, and leave the header, which is of the times, as it was."""
        self.cells[f"{net}/{quantity}"] = cell
        probe.write(self.path, {"header": self.header, "cells": self.cells})

    def stale(self) -> list[str]:
        """Cells that were measured with other code or versions."""
        return [key for key, cell in self.cells.items() if cell["stamp"] != self.stamp]


def _stamp(versions: dict[str, str | None]) -> str:
    """A short hash of what a figure depends on."""
    digest = hashlib.sha256(json.dumps([versions, _machine()], sort_keys=True).encode())
    root = Path(layerwise.__file__).parent
    for path in sorted(root.rglob("*.py")):
        if path.relative_to(root).parts[0] not in UNUSED:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
