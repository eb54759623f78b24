"""The demo's results as a table on the terminal and as `results.json`."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from .methods import TRIALS, Settings
from .train import BATCH, Row

__all__ = ["final_rows", "header", "table", "write_json"]


def header(
    settings: Mapping[str, Settings],
    ratios: Mapping[str, float],
    *,
    seed: int,
    epochs: int,
    stopped_early: bool,
) -> dict[str, Any]:
    """The settings behind the rows: versions, machine, seed, settings and how they were tuned."""
    packages = ("torch", "numpy", "scikit-learn")
    return {
        "versions": {
            "layerwise": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        "machine": {
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "processor": platform.machine(),
        },
        "seed": seed,
        "epochs": epochs,
        "stopped_early": stopped_early,
        "batch": BATCH,
        "loss": "sigmoid cross entropy, sum over pixels, mean over images (nats)",
        "schedule": "learning rate constant for half of the epochs, then linear to 0; all methods alike",
        "settings": {name: dict(chosen) for name, chosen in settings.items()},
        "trials": {name: TRIALS[name] for name in settings},
        "step_time_relative_to_adam": {name: ratios.get(name) for name in settings},
    }


def write_json(path: Path, head: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write `{"header": ..., "rows": [...]}`; the file is complete or absent."""
    lines = [{k: v for k, v in asdict(row).items() if k != "error" or v} for row in rows]
    body = json.dumps(head, indent=1, ensure_ascii=False, allow_nan=False)
    text = ",\n".join("  " + json.dumps(line, ensure_ascii=False, allow_nan=False) for line in lines)
    draft = path.with_name(path.name + ".part")
    draft.write_text(f'{{"header": {body},\n "rows": [\n{text}\n]}}\n', encoding="utf-8")
    draft.replace(path)


def final_rows(rows: Sequence[Row]) -> list[Row]:
    """The last row of each method, the lowest train loss first, failed methods at the end."""
    last = {row.method: row for row in rows}
    return sorted(last.values(), key=lambda row: float("inf") if row.train_loss is None else row.train_loss)


def table(rows: Sequence[Row], ratios: Mapping[str, float]) -> list[tuple[str, ...]]:
    """The cells of the final table: a header, then one row for each method."""
    lines: list[tuple[str, ...]] = [("method", "epochs", "train loss", "test loss", "seconds", "step / Adam")]
    for row in final_rows(rows):
        ratio = f"{ratios[row.method]:.2f}" if row.method in ratios else "-"
        if row.train_loss is None or row.test_loss is None:
            lines.append((row.method, str(row.epoch), "failed", "-", f"{row.seconds:.1f}", ratio))
        else:
            losses = (f"{row.train_loss:.3f}", f"{row.test_loss:.3f}")
            lines.append((row.method, str(row.epoch), *losses, f"{row.seconds:.1f}", ratio))
    return lines
