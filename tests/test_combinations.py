"""The pilot of new combinations: its methods learn, a second call runs nothing, and its table says what was run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import probe, read
from benchmarks.training.locoprop import combinations
from benchmarks.training.locoprop.combinations import METHODS, RATES
from book import tables


def canned(method: str, rate: float, seed: int) -> dict[str, Any]:
    """A row as `run` gives; the largest rate is the best."""
    row = {"problem": combinations.PROBLEM, "method": method, "rate": rate, "seed": seed, "steps": 9}
    return {**row, "seconds a step": 0.25, "train": 3 - rate, "test": 4 - rate}


@pytest.mark.parametrize("method", METHODS)
def test_methods_learn(method: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)), torch.randn(300, 8)
    y = x[:, :3].argmax(1)
    step = METHODS[method](model, RATES[method][1])
    losses = [float(step(lambda: F.cross_entropy(model(x), y))) for _ in range(12)]
    assert losses[-1] < 0.97 * losses[0]


def test_it_resumes_and_its_table_has_the_best_rate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(combinations, "run", lambda *key: asked.append(key) or canned(*key))
    out = tmp_path / "combinations.json"
    combinations.main(out)
    assert len(asked) == 4 * len(METHODS) == len(probe.read(out)) and RATES.keys() == METHODS.keys()
    combinations.main(out)
    assert len(asked) == 4 * len(METHODS)
    monkeypatch.setattr(read, "result", lambda name: probe.read(out))
    assert "| adam | 0.01 | 9 | 250 | 2.99 | 2.99 | 3.99 | 3.99 |" in tables.combinations(combinations.PROBLEM)
