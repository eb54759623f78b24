"""The second-order study: DeepOBS's nets, the choice of trials, quartiles over seeds, its report."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

import layerwise as lw
from benchmarks import data
from benchmarks.training import plan, report, rows, step_time, trials
from benchmarks.training.curvature.nets import all_cnn_c
from benchmarks.training.curvature.report import quartiles
from benchmarks.training.methods import METHODS
from benchmarks.training.plan import Run
from benchmarks.training.problem import Split
from benchmarks.training.problems import PROBLEMS
from benchmarks.training.rows import Rows, row_of
from benchmarks.training.study import STUDIES
from benchmarks.training.train import Training

STUDY = STUDIES["second-order"]
SHAPES = {"mnist-logistic": (1, 28, 28), "fashion-2c2d": (1, 28, 28), "cifar10-3c3d": (3, 32, 32),
          "cifar10-all-cnn-c": (3, 32, 32)}  # fmt: skip
LONG = ("cifar10-3c3d", "cifar10-all-cnn-c")  # a step takes seconds; their family steps on smaller nets
PAIRS = [(problem, method) for problem in STUDY.methods if problem not in LONG for method in STUDY.methods[problem]]


@pytest.mark.parametrize(
    ("problem", "published"),
    [("mnist-logistic", 7_850), ("fashion-2c2d", 3_274_634), ("cifar10-3c3d", 895_210)],
)
def test_nets_have_the_published_number_of_parameters(problem: str, published: int) -> None:
    assert sum(p.numel() for p in PROBLEMS[problem].model(0, {}).parameters()) == published


def test_all_cnn_c_has_the_published_number_of_parameters() -> None:
    assert sum(p.numel() for p in all_cnn_c(classes=100)(0, {}).parameters()) == 1_387_108


@pytest.mark.parametrize("problem", STUDY.methods)
def test_data_of_the_declared_size(problem: str) -> None:
    known = PROBLEMS[problem]
    if known.missing() or not data.available(known.data or {"m": "mnist", "t": "tinyshakespeare"}[problem[0]]):
        pytest.skip(known.missing() or "no data")
    found = known.split(50, validation=known.validation > 0)
    held_out = known.validation or known.test_rows
    assert len(found.x) == 50 and len(found.x_test) == held_out
    if problem in SHAPES:
        assert found.x.shape[1:] == SHAPES[problem] and abs(float(known.split(500).x.mean())) < 0.2


@pytest.mark.parametrize(("problem", "method"), PAIRS)
def test_every_method_steps_on_every_family(problem: str, method: str) -> None:
    known = PROBLEMS[problem]
    if METHODS[method].missing(known.family):
        pytest.skip(METHODS[method].missing(known.family))
    torch.manual_seed(0)
    if known.classes:
        x, y = torch.randn(16, *SHAPES[problem]), torch.arange(16) % 10
    elif known.family == "pixels":
        x, y = torch.rand(16, 784), torch.zeros(16)
    else:
        x, y = torch.randint(65, (4, 64)), torch.randint(65, (4, 64))
    hyper = trials.hyperparameters(method, known.family, step_time.gentle(method, problem))
    training = Training(problem, Split(x, y, x, y, "random"), method, hyper, 0, len(x))
    before = [p.detach().clone() for p in training.model.parameters()]
    assert torch.isfinite(training.step(slice(None)))
    moved = [not torch.equal(p, q) for p, q in zip(training.model.parameters(), before, strict=True)]
    assert any(moved) and all(torch.isfinite(p).all() for p in training.model.parameters())


def test_trials_are_chosen_by_accuracy_where_there_are_classes() -> None:
    for problem, wanted in (("mnist-logistic", 3), ("mnist-autoencoder-256", 5)):
        runs = plan.tuning(problem, "adam")
        held = {}
        for run in runs:
            row = row_of(run, [(9.0, 9.0), (8.0 - (run.trial == 5), 8.0)])
            if PROBLEMS[problem].classes:
                row["test_accuracy"] = 0.5 + 0.1 * (run.trial == 3)
            held[run.key()] = row
        assert plan.best(runs, held) == wanted


def test_what_is_timed_spans_all_that_a_method_amortises() -> None:
    """A lower quartile over single steps would not see an inverse that is due at every tenth."""
    for name, method in METHODS.items():
        for family, space in method.spaces.items():
            assert space.period % space.fixed.get("update_inverses_every", 1) == 0, (name, family)
    assert METHODS["kfac"].spaces["pixels"].period == METHODS["kflr"].spaces["pixels"].period == 10
    assert METHODS["am-mem"].spaces["dense"].period == lw.local.Memory().every


def test_a_time_by_another_rule_does_not_count(tmp_path: Path) -> None:
    """Neither one of an earlier revision nor one over a shorter period, with however many repeats."""
    file, problem = tmp_path / "times.jsonl", "mnist-logistic"

    def keep(repeats: int, kfac: float, **changed: dict[str, int]) -> dict[str, float]:
        relative = {"adam": 1.0, "kfac": kfac}
        rules = step_time.rules(problem, relative)
        row = {"problem": problem, "seconds": {"adam": 2.0}, "relative": relative, "losses_seconds": 1.0,
               "repeats": repeats}  # fmt: skip
        rows.append(file, row | {rule: rules[rule] | changed.get(rule, {}) for rule in rules})
        return step_time.measured(problem, file)[0]

    assert keep(15, 3.0, periods={"kfac": 1}) == {"adam": 2.0}
    assert keep(15, 4.0, revisions={"kfac": 1}) == {"adam": 2.0}
    assert keep(7, 6.0) == {"adam": 2.0, "kfac": 12.0}
    assert keep(3, 7.0) == {"adam": 2.0, "kfac": 12.0}
    assert keep(7, 5.0) == {"adam": 2.0, "kfac": 10.0}
    assert keep(15, 5.5, periods={"kfac": 1}) == {"adam": 2.0, "kfac": 10.0}


@pytest.mark.parametrize("n", [1, 2, 5])
def test_quartiles(n: int) -> None:
    values = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).tolist()
    assert quartiles(values) == pytest.approx(np.quantile(values, [0.25, 0.5, 0.75]).tolist())
    assert all(np.isnan(quartiles([])))


def test_quartiles_count_a_failure_as_infinite() -> None:
    """One seed of five that fails does not hide the other four."""
    inf = float("inf")
    assert quartiles([3.0, inf, 1.0, 2.0, 4.0]) == (2.0, 3.0, 4.0)
    assert quartiles([3.0, -inf, 1.0, 2.0, 4.0]) == (1.0, 2.0, 3.0)
    assert quartiles([inf, 1.0, inf, 2.0, 3.0]) == (2.0, 3.0, inf)
    assert quartiles([1.0, inf]) == (inf, inf, inf) and quartiles([inf, inf, 1.0]) == (inf, inf, inf)


def test_report_of_canned_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "kfra", dataclasses.replace(METHODS["kfra"], unavailable=lambda: "no KFRA"))
    held, problems = Rows(tmp_path), ["mnist-logistic", "mnist-autoencoder-256"]
    for problem, (m, method) in itertools.product(problems, enumerate(("adam", "kfac"))):
        for run in (*plan.tuning(problem, method), *plan.finals(problem, method, 7)):
            losses = [3.0, 2.0 - m - 0.1 * run.seed * (run.phase == "final")]
            held.add(_canned(run, losses, "Diverged" if (method, run.seed, run.phase) == ("adam", 4, "final") else ""))
        relative = {"adam": 1.0, "kfac": 1.5}
        row = {"problem": problem, "seconds": relative, "relative": relative, "losses_seconds": 1.0, "repeats": 15,
               **step_time.rules(problem, relative)}  # fmt: skip
        rows.append(tmp_path / step_time.FILE.name, row)
    text = report.write(held, problems, tmp_path / step_time.FILE.name, tmp_path / "out")
    head, first, second = text.split("## ")
    # K-FAC passes Adam's 1.9 half-way through the epoch (median), with steps of one and a half of Adam's
    assert "| adam | 1.9 (1) | 1.9 (1) |\n| kfac | 0.8 (0.75) | 0.8 (0.75) |" in head
    assert "| adam | 10 | 2.9 |\n| kfac | 10 | 1.8 |" in head
    table = first.split("Trials:")[0]
    cells = {c[1]: c for line in table.splitlines() if (c := [p.strip() for p in line.split("|")])[7:]}
    # method, trial, seeds, train loss, test loss, accuracy, step, memory: seeds 0 to 4 lower the loss by a tenth each
    assert cells["kfac"][2:5] == ["7", "5", "0.8 [0.7, 0.9]"] and cells["kfac"][6:9] == ["90 [90, 90]", "1.5", "10"]
    assert cells["adam"][3:6] == ["5 (1 failed)", "1.9 [1.8, 2]", "2.9 [2.8, 3]"], "the fifth seed counts as infinite"
    assert cells["adam"][6] == "90 [90, 90]"
    assert "Not run: kfra: no KFRA" in first and "accuracy on held-out" in first and "Trials: train loss" in second
    for problem in problems:
        assert (tmp_path / "out" / f"{problem}.png").stat().st_size > 10_000


def _canned(run: Run, losses: list[float], failure: str = "") -> dict[str, object]:
    accuracies = [0.1, 0.9] if PROBLEMS[run.problem].classes else []
    curve = [(v, v + 1) for v in losses[: 1 if failure else None]]
    return row_of(run, curve, failure, {"memory_mb": 10.0}, accuracies)
