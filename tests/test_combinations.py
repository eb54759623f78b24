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
from benchmarks.training.locoprop.schedule_free import ScheduleFreeAdamW
from book import tables


def canned(method: str, rate: float, seed: int) -> dict[str, Any]:
    """A row as `run` gives; the largest rate is the best."""
    row = {"problem": combinations.PROBLEM, "method": method, "rate": rate, "seed": seed, "steps": 9}
    return {**row, "seconds a step": 0.25, "train": 3 - rate, "test": 4 - rate}


@pytest.mark.parametrize("method", METHODS)
def test_methods_learn(method: str) -> None:
    if "soap" in method:
        pytest.importorskip("pytorch_optimizer")
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)), torch.randn(300, 8)
    y = x[:, :3].argmax(1)
    step = METHODS[method](model, RATES[method][1])
    losses = [float(step(lambda: F.cross_entropy(model(x), y))) for _ in range(12)]
    assert losses[-1] < 0.97 * losses[0]


def test_schedule_free_adamw_is_its_three_sequences() -> None:
    """`x`, `y` and `z` of the paper's algorithm 1, with a linear warm-up; the model holds y, and x at the end."""
    torch.manual_seed(0)
    net, x = nn.Linear(5, 3).double(), torch.randn(20, 5).double()
    labels = torch.arange(20) % 3
    opt = ScheduleFreeAdamW(net.parameters(), 0.1, (0.8, 0.99), 1e-6, weight_decay=0.1, warm_up=3)
    ys = [p.detach().clone() for p in net.parameters()]
    xs, zs, vs, total = list(ys), list(ys), [torch.zeros_like(p) for p in ys], 0.0
    for t in range(1, 8):
        copy = [y.clone().requires_grad_() for y in ys]
        gs = torch.autograd.grad(F.cross_entropy(x @ copy[0].T + copy[1], labels), copy)
        lr = 0.1 * min(1, t / 3)
        total += lr**2
        vs = [0.99 * v + 0.01 * g**2 for v, g in zip(vs, gs, strict=True)]
        moves = [g / ((v / (1 - 0.99**t)).sqrt() + 1e-6) + 0.1 * y for g, v, y in zip(gs, vs, ys, strict=True)]
        zs = [z - lr * u for z, u in zip(zs, moves, strict=True)]
        xs = [a + lr**2 / total * (z - a) for a, z in zip(xs, zs, strict=True)]
        ys = [0.2 * z + 0.8 * a for a, z in zip(xs, zs, strict=True)]
        opt.zero_grad()
        F.cross_entropy(net(x), labels).backward()
        opt.step()
        for p, y in zip(net.parameters(), ys, strict=True):
            torch.testing.assert_close(p.detach(), y, rtol=1e-12, atol=1e-12)
    opt.average()
    for p, a in zip(net.parameters(), xs, strict=True):
        torch.testing.assert_close(p.detach(), a, rtol=1e-12, atol=1e-12)


def test_it_resumes_and_its_table_has_the_best_rate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(combinations, "_has_soap", lambda: True)
    monkeypatch.setattr(combinations, "run", lambda *key: asked.append(key) or canned(*key))
    out = tmp_path / "combinations.json"
    combinations.main(out)
    assert len(asked) == 4 * len(METHODS) == len(probe.read(out)) and RATES.keys() == METHODS.keys()
    combinations.main(out)
    assert len(asked) == 4 * len(METHODS)
    monkeypatch.setattr(read, "result", lambda name: probe.read(out))
    assert "| adam | 0.02 | 9 | 250 | 2.98 | 2.98 | 3.98 | 3.98 |" in tables.combinations(combinations.PROBLEM)
