"""The study's runs spread over a pool of workers, one of which is killed in the middle."""

from __future__ import annotations

import importlib.util
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from benchmarks.training import pool, runner
from benchmarks.training.plan import Run
from benchmarks.training.rows import Rows, read

CURVES = "curves-autoencoder"
RUNS = [Run("tune", CURVES, method, trial, 100, 3, 60) for method in ("adam", "rmsprop") for trial in range(3)]

needs = [
    pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed: make benchmarks")
    for name in ("benchopt", "distributed")
]
pytestmark = [*needs, pytest.mark.slow, pytest.mark.timeout(600)]


def without_clock(folder: Path) -> list[dict[str, Any]]:
    found = [{**row, "clock": {}} for row in read(Rows(folder).path(CURVES))]
    return sorted(found, key=lambda row: (row["method"], row["trial"]))


def test_a_killed_worker_takes_no_row_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner.perform(RUNS, Rows(tmp_path / "one"))
    spread, killed = pool.spread, []

    def with_a_kill(*arguments: Any) -> Any:
        for item in spread(*arguments):
            if not killed:  # the first row has come: the other worker is in the middle of its run
                worker = next(child for child in multiprocessing.active_children() if "Dask" in child.name)
                worker.kill()
                killed.append(worker.name)
            yield item

    monkeypatch.setattr(pool, "spread", with_a_kill)
    runner.perform(RUNS, Rows(tmp_path / "two"), parallel=Path(pool.__file__).with_name("pool.yml"))
    assert killed
    assert len(without_clock(tmp_path / "two")) == len(RUNS)
    assert without_clock(tmp_path / "two") == without_clock(tmp_path / "one")
