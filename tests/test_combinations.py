"""Runs of equal seconds: the pilot's methods learn, a second call runs nothing, and the tables say what was run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import probe, read
from benchmarks.training.locoprop import averaged, classifiers, combinations, out_of_the_box
from benchmarks.training.locoprop.character_gpt import at_tokens, summary
from benchmarks.training.locoprop.combinations import METHODS, RATES, chosen
from benchmarks.training.locoprop.schedule_free import ScheduleFreeAdamW
from benchmarks.training.problem import Split, mean_loss
from benchmarks.training.problems import PROBLEMS
from benchmarks.training.train import Training
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


# A character GPT's runs


def gpt_run(method: str, rate: float, seed: int, losses: Sequence[float], tokens: int = 1000) -> dict[str, Any]:
    """A row as the character GPT's `run` gives, measured after each 8 s and `tokens` tokens."""
    curve = [[8.0 * n, tokens * n, loss] for n, loss in enumerate(losses)]
    return {"method": method, "rate": rate, "seed": seed, "steps": 10 * (seed + 1), "curve": curve}


RUNS = [
    gpt_run("muon", 0.1, 0, (4.0, 3.0, 2.5)),
    gpt_run("muon", 0.3, 0, (4.0, math.nan, math.nan), tokens=1),  # came first to no end
    gpt_run("muon", 0.1, 1, (4.2, 3.4, 2.9)),
    gpt_run("muon", 0.3, 1, (4.0, 1.0, 0.5)),  # the rate is chosen on seed 0 alone
    gpt_run("adamw", 1.0, 0, (4.0, math.nan, math.nan)),
    gpt_run("adamw", 2.0, 0, (4.0, 2.0, 3.0), tokens=800),
    gpt_run("adamw", 3.0, 0, (4.0, 1.0, 3.5)),  # the end counts
]


def end(row: dict[str, Any]) -> float:
    return float(row["curve"][-1][-1])


def test_the_rate_is_that_of_the_least_loss_at_the_end_on_the_first_seed() -> None:
    found = {method: [(row["rate"], row["seed"]) for row in rows] for method, rows in chosen(RUNS, end).items()}
    assert found == {"muon": [(0.1, 0), (0.1, 1)], "adamw": [(2.0, 0)]}
    assert chosen([], end) == {}


def test_a_loss_after_some_tokens_lies_on_the_line_between_measurements() -> None:
    row = {"curve": [[0.0, 0, 4.0], [8.0, 1000, 3.0], [16.0, 3000, 2.0]]}
    given = {0: 4.0, 250: 3.75, 1000: 3.0, 2000: 2.5, 3000: 2.0}
    assert {tokens: at_tokens(row, tokens) for tokens in given} == pytest.approx(given)
    assert math.isnan(at_tokens(row, 3001))


def test_the_summary_has_means_over_seeds_at_the_fewest_tokens_that_a_chosen_run_saw() -> None:
    common, lines = summary(RUNS)
    assert common == 1600  # of AdamW's chosen run; the muon run of two tokens was not chosen
    muon, adamw = lines
    assert (muon["method"], muon["rate"], muon["runs"], muon["steps"]) == ("muon", 0.1, 2, 15)
    assert muon["losses"] == pytest.approx([3.2, 2.7]) and adamw["losses"] == [2.0, 3.0]
    assert muon["end"] == pytest.approx((2.7, 2.5, 2.9))  # two seeds: the interval is their range
    assert muon["at tokens"][0] == pytest.approx((2.7 + 3.1) / 2) and adamw["at tokens"] == (3.0, 3.0, 3.0)


# Image classifiers


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Split:
    """The convnet's pilot on a few images that are told apart by their brightness."""
    y = torch.arange(60) % 3
    x = torch.randn(60, 1, 28, 28, generator=torch.Generator().manual_seed(0)) + y.view(-1, 1, 1, 1)
    monkeypatch.setattr(classifiers, "REPEATS", 1)
    return Split(x, y, x[:30], y[:30], "noise")


@pytest.mark.parametrize("method", classifiers.METHODS)
def test_classifiers_learn(method: str, small: Split) -> None:
    rate = classifiers.PILOTS["fashion-convnet"].rates[method][1]
    row = classifiers.run("fashion-convnet", small, 18, method, rate, 0)
    assert row["steps"] == 18 and len(row["train"]) == 3 and row["train"][-1] < min(0.97 * row["train"][0], 1.0)
    assert 0 <= row["error"] <= 50 and row == classifiers.run("fashion-convnet", small, 18, method, rate, 0)


def test_classifiers_take_the_steps_of_their_seconds_and_resume(
    small: Split, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    each, asked = {"adam": 0.1, "muon": 0.2, "locoprop-m": 0.5, "locoprop-m > muon": 0.4}, []

    def run(problem: str, split: Split, steps: int, method: str, rate: float, seed: int) -> dict[str, Any]:
        asked.append((problem, steps, method))
        row = {"problem": problem, "method": method, "rate": rate, "seed": seed, "steps": steps}
        return {**row, "train": [2.0, 1.0, 1 - rate], "test": 2.5 + seed, "error": 10.0 * seed}

    monkeypatch.setattr(classifiers, "prices", lambda problem, split: each)
    monkeypatch.setattr(classifiers, "run", run)
    monkeypatch.setattr(type(classifiers.PROBLEMS["fashion-convnet"]), "split", lambda self, rows: small)
    out = tmp_path / "classifiers.json"
    classifiers.main(out)
    said = capsys.readouterr().out
    assert said.count("0 of 20 runs are there") == 2 and "20 of 20" not in said
    wanted = {
        (problem, round(pilot.seconds / each[m]), m) for problem, pilot in classifiers.PILOTS.items() for m in each
    }
    assert set(asked) == wanted and len(asked) == 2 * 4 * 5
    monkeypatch.setattr(classifiers, "prices", lambda problem, split: {})
    classifiers.main(out)
    assert len(asked) == 2 * 4 * 5, "neither timed nor run again"
    monkeypatch.setattr(read, "result", lambda name: probe.read(tmp_path / f"{name}.json"))
    ends = "0.990 [0.990, 0.990] | 3.500 [2.500, 4.500] | 10.0 [0.0, 20.0]"
    assert f"| adam | 0.01 | 3 | 100 | 300 | 2.000 | 1.000 | {ends} |" in tables.classifiers("fashion-convnet")


# LocoProp as it comes


def test_the_share_of_seconds_until_the_best_first_order_level() -> None:
    def rows(method: str, *curves: Sequence[float]) -> list[dict[str, Any]]:
        kept = {"configuration": {"rows": 1000, "batch": 100 if method.endswith("-100") else 1000}, "status": "done"}
        return [
            {"method": method, "seed": seed, "train_curve": curve, "test_curve": curve, "train_loss": curve[-1],
             "test_loss": curve[-1] + 1, **kept} for seed, curve in enumerate(curves)
        ]  # fmt: skip

    final = {"adam": rows("adam", [9.0, 8.0, 7.0]), "adam-100": rows("adam-100", [9.0, 6.0, 4.0], [9.0, 6.0, 4.0])}
    ours = rows("locoprop-m", [9.0, 5.0, 3.0], [9.0, 5.0, 3.0]) + rows("locoprop-m-250", [9.0, 8.0, 7.0])
    said = out_of_the_box.sentence(
        ours, final, {"adam": 1.0, "adam-100": 0.5, "locoprop-m": 2.0, "locoprop-m-250": 1.0}
    )
    # 2 epochs of 10 steps of 0.5 s to 4.0; ours after 1.5 epochs of one step of 2 s
    assert said.startswith("adam-100 ends lowest of the first-order methods: train 4.0, test 5.0, 10.0 s")
    assert "batches of 1000: there in 0.30 of these seconds" in said and "batches of 250: never there" in said


def test_weights_are_averaged_over_an_epoch() -> None:
    """Against the recursion by hand, and the losses are the average's."""
    problem = PROBLEMS[averaged.PROBLEM]
    x = torch.rand(60, 784)
    settings = {"batch": 20, "hyperparameters": {"lr": 1e-4}}
    one = averaged.Averaged(Split(x, x, x, x, ""), averaged.THEIRS, settings, 1e-3, seed=0)
    twin = Training(averaged.PROBLEM, Split(x, x, x, x, ""), averaged.THEIRS, {"lr": 1e-4, "weight_decay": 1e-3}, 0, 20)
    mean: list[torch.Tensor] = []
    for rows in torch.arange(60).split(20):
        one.step(rows)
        twin.step(rows)
        params = [p.detach().double() for p in twin.model.parameters()]
        mean = [m + 20 / problem.rows * (p - m) for m, p in zip(mean, params, strict=True)] if mean else params
    for got, p in zip(one.average.parameters(), mean, strict=True):
        torch.testing.assert_close(got.double(), p, rtol=1e-5, atol=1e-7)
    assert one.loss(x, x) == pytest.approx(mean_loss(problem, one.average, x, x), abs=1e-3)


def test_the_held_out_images_are_not_among_those_of_the_study() -> None:
    try:
        held = averaged.held_out()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert len(held.x_test) == averaged.HELD_OUT
    assert not {tuple(row) for row in held.x[:, 300:500].tolist()} & {
        tuple(r) for r in held.x_test[:, 300:500].tolist()
    }


def test_the_share_of_seconds_with_averages_is_by_hand() -> None:
    def row(method: str, rate: float, seed: int, train: list[float]) -> dict[str, Any]:
        return {"method": method, "rate": rate, "seed": seed, "train": train, "test": train, "held_out": train}

    found = [row(averaged.THEIRS, 0.0, 0, [9.0, 5.0]), row(averaged.THEIRS, 1e-3, 0, [9.0, 4.0]),
             row(averaged.THEIRS, 1e-3, 1, [9.0, 4.0]), row(averaged.OURS, 0.0, 0, [4.0, 3.0])]  # fmt: skip
    said = averaged.sentence(
        found, {averaged.THEIRS: 0.5, averaged.OURS: 1.0}, {averaged.THEIRS: 100, averaged.OURS: 250}
    )
    # 2 epochs of 100 steps of 0.5 s, and one of 40 steps of 1 s
    assert said.startswith(f"{averaged.THEIRS} with decay 0.001: train 4.0 [4.0, 4.0]")
    assert said.endswith("train 4.0 after 40.0 s: 0.40 of the seconds.")
