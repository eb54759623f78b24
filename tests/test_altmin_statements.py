"""The demonstrations of benchmarks/papers/altmin: each small, and what they measure against what is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import data
from benchmarks.papers.altmin import common, continual, depth, initialization, theory
from benchmarks.papers.altmin.__main__ import DEMONSTRATIONS, main
from benchmarks.training.problem import Split

IMAGES = ("mnist", "fashion_mnist")
needs_images = pytest.mark.skipif(not all(map(data.available, IMAGES)), reason="no data")


def few(n: int = 60, seed: int = 0) -> Split:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 784, generator=generator), torch.arange(n) % 10
    return Split(x, y, x[:20], y[:20], "noise")


@needs_images
@pytest.mark.parametrize("name", DEMONSTRATIONS)
def test_each_writes_figures_and_a_picture_and_says_what_was_seen(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main([name, "--small", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    if code:
        assert f"{name}: not shown: layerwise does not take" in said and not list(tmp_path.iterdir())
        return
    kept = json.loads((tmp_path / f"{name}.json").read_text("utf-8"))
    assert said == f"{name}: {kept['seen']}\n"
    drawn = (tmp_path / f"{name}.png").read_bytes()
    assert len(drawn) > 10_000
    (tmp_path / f"{name}.png").unlink()
    assert main([name, "--draw", "--out", str(tmp_path)]) == 0
    assert (tmp_path / f"{name}.png").read_bytes() == drawn, "the same picture from the figures alone"


def test_slopes() -> None:
    steps = [1, 10, 100, 300, 1000]
    assert theory.slope(steps, [1 / t for t in steps]) == pytest.approx(-1)
    assert theory.slope(steps, [t**-1.5 for t in steps]) == pytest.approx(-1.5)
    assert theory.slope(steps, [9.0, 8.0, 1.0, 1.0, 1.0]) == pytest.approx(0), "the last decade alone"


def test_the_rate_of_the_theorem() -> None:
    assert theory.slope(*theory.blocks(4000, 60)) <= -0.9


def test_altmins_own_minimum_is_the_nets() -> None:
    """W gets close to the W* that makes the data, with Jacobi and with swept codes, and the two differ."""
    ends = {codes: theory.of_altmin(codes, 300, 1)[1] for codes in ("jacobi", "sweep")}
    assert all(errors[-1] < 0.02 * errors[0] for errors in ends.values())
    assert ends["jacobi"] != ends["sweep"]


def test_updates_of_sgd_are_those_of_the_gradient() -> None:
    rows = few(400)
    found = depth.updates("SGD", {"lr": 0.5}, 3, rows, 1)
    model = common.net(0, (depth.WIDTH,) * 3, nn.Sigmoid).double()
    first = common.batches(400, depth.BATCH, 0)[0]
    nn.functional.cross_entropy(model(rows.x[first].double()), rows.y[first]).backward()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    expected = [0.5 * float(m.weight.grad.norm() / m.weight.detach().norm()) for m in layers]
    assert found == pytest.approx(expected, rel=1e-6)
    assert len(found) == 4 and depth._fall([1.0, 5.0, 4.0, 9.0]) == 0.25
    assert depth.moving([0.0, 1e-9, 1e-3]) == 1


def test_tasks_are_permutations() -> None:
    assert torch.equal(continual._pixels(0, 3), torch.arange(784))
    first, again, other = (continual._pixels(*a) for a in ((1, 0), (1, 0), (2, 0)))
    assert (
        torch.equal(first, again) and not torch.equal(first, other) and torch.equal(first.sort()[0], torch.arange(784))
    )
    found = continual.run("Adam", {"lr": 1e-3}, 0, few(), 3)
    assert [len(after) for after in found] == [1, 2, 3]


def test_after_the_switch_it_is_adam(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    made = common.make

    def make(method: str, model: nn.Module, settings: Any) -> Any:
        step = made(method, model, settings)
        return lambda batch: (used.append(method), step(batch))[1]

    monkeypatch.setattr(initialization, "make", make)
    curve = initialization.run(2, (1e-3, 4e-3), 0, few(1000), 5)
    assert used == ["AM-Adam"] * 2 + ["Adam"] * 3 and len(curve) == 2


def test_settings_are_chosen_on_training_rows() -> None:
    rows = few()
    held = common.held_out(rows)
    assert len(held.x) == 54 and torch.equal(held.x_test, rows.x[54:]) and torch.equal(held.y_test, rows.y[54:])


def test_what_the_library_lacks_is_said() -> None:
    assert common.why_not("AM-Adam", {"lr": 1e-3}) == ""
    assert "telepathy" in common.why_not("AM-SGD", {"telepathy": 1})
