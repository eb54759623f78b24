"""The training benchmark: declared trials, rows that survive interruptions, estimates, reports, runs by Benchopt."""

from __future__ import annotations

import dataclasses
import fcntl
import importlib.util
import json
import math
import multiprocessing
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.training import __main__ as command
from benchmarks.training import budget, plan, report, rows, runner, step_time, summaries, trials
from benchmarks.training.locoprop.curves import MARGIN, curves
from benchmarks.training.method import Range
from benchmarks.training.methods import METHODS
from benchmarks.training.plan import Run
from benchmarks.training.problem import Split
from benchmarks.training.problems import PROBLEMS
from benchmarks.training.rows import Rows, row_of
from benchmarks.training.study import STUDIES, study_of
from benchmarks.training.train import Diverged, Training

CURVES = "curves-autoencoder"
needs_benchopt = pytest.mark.skipif(
    importlib.util.find_spec("benchopt") is None, reason="Benchopt is not installed: make benchmarks"
)


def tiny(method: str = "adam", trial: int = 0, **changes: Any) -> Run:
    return dataclasses.replace(Run("tune", CURVES, method, trial, seed=0, epochs=2, rows=60), **changes)


def canned(run: Run, losses: list[float], failure: str = "", memory: float = 10.0) -> dict[str, Any]:
    return row_of(run, [(loss, loss + 1) for loss in losses], failure, {"memory_mb": memory})


# Trials


@pytest.mark.parametrize("study", STUDIES)
def test_trials_are_the_declared_ones(study: str) -> None:
    assert STUDIES[study].trials.read_text(encoding="utf-8") == trials.text(study)


def test_a_family_is_of_one_study_and_a_problem_too() -> None:
    families = [family for s in STUDIES.values() for family in s.families]
    assert len(families) == len(set(families))
    assert sorted(p for s in STUDIES.values() for p in s.methods) == sorted(PROBLEMS)
    assert all(set(s.methods[p]) <= set(METHODS) for s in STUDIES.values() for p in s.methods)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_equally_many_trials(method: str) -> None:
    spaces = METHODS[method].spaces
    declared = {f: p for s in STUDIES for f, p in trials.declared(s).get(method, {}).items()}
    assert set(declared) == set(spaces)
    for family, points in declared.items():
        assert len(points) == trials.POINTS == len({json.dumps(p) for p in points})
        ranges = spaces[family].ranges
        assert 1 <= len(ranges) <= 3
        for name, r in ranges.items():
            values = [p[name] for p in points]
            assert r.low <= min(values) and max(values) <= r.high
            below = r.at(0.5)
            assert sum(v <= below for v in values) == trials.POINTS // 2, "a Sobol sequence halves every range"


@pytest.mark.parametrize(
    ("r", "middle"), [(Range(1e-4, 1e-2), 1e-3), (Range(0, 4, "linear"), 2.0), (Range(0.9, 0.999, "one-minus"), 0.99)]
)
def test_ranges(r: Range, middle: float) -> None:
    assert r.at(0) == pytest.approx(r.low) and r.at(0.5) == pytest.approx(middle) and r.at(1) == pytest.approx(r.high)


@pytest.mark.parametrize(("kind", "names"), [("solver", METHODS), ("dataset", PROBLEMS)])
def test_one_plugin_takes_every_method_and_one_every_problem(kind: str, names: dict[str, Any]) -> None:
    (plugin,) = (Path(runner.__file__).parent / f"{kind}s").glob("*.py")
    assert f'"{plugin.stem}": list({"METHODS" if kind == "solver" else "PROBLEMS"})' in plugin.read_text("utf-8")
    if importlib.util.find_spec("benchopt") is not None:
        from benchopt.benchmark import Benchmark

        (found,) = getattr(Benchmark(plugin.parents[1]), f"get_{kind}s")()
        assert found.parameters[plugin.stem] == list(names)


# Keys and rows


def test_the_key_says_all_that_a_result_depends_on() -> None:
    run = tiny()
    keys = {run.key()}
    for changes in (
        {"problem": "mnist-autoencoder"}, {"method": "sgd"}, {"trial": 1}, {"seed": 1}, {"epochs": 3}, {"rows": 61},
        {"shape": "width=2"}, {"change": "batch=30"},
    ):  # fmt: skip
        keys.add(dataclasses.replace(run, **changes).key())
    assert len(keys) == 9
    assert dataclasses.replace(run, phase="ablation").key() == run.key(), "the same run in two parts is run once"


def test_rows_made_before_there_were_two_studies_still_count() -> None:
    run = Run("tune", "mnist-autoencoder", "sgd", 0, seed=100, epochs=3, rows=10_000)
    assert run.key()[4:] == ("80e65fd6c5cc", "0.1.0+1.1")
    assert plan.tuning("mnist-autoencoder", "sgd")[0] == run


def test_a_revised_method_has_new_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    before = tiny().key()
    monkeypatch.setitem(METHODS, "adam", dataclasses.replace(METHODS["adam"], revision=99))
    assert tiny().key() != before


def test_changes_are_one_word() -> None:
    changes = {"steps": 4, "rows": "all", "width": 0.5}
    assert plan.encode(changes) == "rows=all;steps=4;width=0.5" and plan.parse(plan.encode(changes)) == changes
    assert plan.parse("") == {}


def test_rows_come_back(tmp_path: Path) -> None:
    held, run = Rows(tmp_path), tiny()
    row = canned(run, [5.0, 4.0, 3.0])
    held.add(row)
    assert held.load(CURVES) == {run.key(): json.loads(json.dumps(row))}
    assert held.load("mnist-autoencoder") == {}


def test_a_failure_is_a_row_with_infinite_losses(tmp_path: Path) -> None:
    held, run = Rows(tmp_path), tiny()
    held.add(canned(run, [5.0], "Diverged: the loss is nan"))
    (row,) = held.load(CURVES).values()
    assert row["status"] == "failed" and row["train_loss"] == row["test_loss"] == math.inf
    assert row["train_curve"] == [5.0] and summaries.epochs_to(row, 6.0) == math.inf
    assert "Infinity" not in held.path(CURVES).read_text("utf-8"), "strict JSON"


def test_a_torn_last_line_is_mended(tmp_path: Path) -> None:
    held = Rows(tmp_path)
    held.add(canned(tiny(trial=0), [2.0]))
    whole = held.path(CURVES).read_bytes()
    for cut in range(1, len(whole)):  # killed after any byte of the second line
        held.path(CURVES).write_bytes(whole + whole[:cut])
        assert len(held.load(CURVES)) == 1
    held.add(canned(tiny(trial=1), [2.0]))
    assert sorted(k[2] for k in held.load(CURVES)) == [0, 1]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    held = Rows(tmp_path)
    held.path(CURVES).write_text('{"problem": \n{}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 1, is no row"):
        held.load(CURVES)


def add_many(folder: Path, start: int) -> None:
    for number in range(start, start + 40):
        rows.append(folder / "x.jsonl", {"number": number, "filler": "x" * 5000})


def test_processes_may_append_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=add_many, args=(tmp_path, start)) for start in (0, 100, 200)]
    for w in writers:
        w.start()
    for w in writers:
        w.join()
    numbers = [row["number"] for row in rows.read(tmp_path / "x.jsonl")]
    assert sorted(numbers) == [s + n for s in (0, 100, 200) for n in range(40)]


def test_an_append_waits_for_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with path.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        writer = threading.Thread(target=rows.append, args=(path, {"number": 1}))
        writer.start()
        writer.join(0.3)
        assert writer.is_alive() and path.read_bytes() == b""
    writer.join(10)
    assert [row["number"] for row in rows.read(path)] == [1]


# The plan


def test_the_best_trial_leaves_failures_out() -> None:
    runs = plan.tuning(CURVES, "adam")
    held = {r.key(): canned(r, [9.0, 8.0 - r.trial], "nan" if r.trial == 7 else "") for r in runs}
    assert plan.best(runs, held) == 6
    held.pop(runs[3].key())
    with pytest.raises(LookupError, match="trial 3 has not been run"):
        plan.best(runs, held)
    assert plan.best(runs, {r.key(): canned(r, [9.0], "nan") for r in runs}) is None


def test_a_problem_may_take_the_first_trials_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = plan.tuning(CURVES, "adam")
    monkeypatch.setitem(PROBLEMS, CURVES, dataclasses.replace(PROBLEMS[CURVES], trials=3))
    few = plan.tuning(CURVES, "adam")
    assert [run.trial for run in few] == [0, 1, 2] and [run.trial for run in whole] == list(range(trials.POINTS))
    assert [run.key() for run in few] == [run.key() for run in whole[:3]], "rows of the first trials count either way"
    held = {run.key(): canned(run, [9.0, 8.0 - run.trial]) for run in few}
    assert plan.best(few, held) == 2
    with pytest.raises(LookupError, match="trial 3 has not been run"):
        plan.best(whole, held)


def test_finals_wait_for_all_trials(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = Rows(tmp_path)
    runs = plan.tuning(CURVES, "adam")
    for run in runs[:-1]:
        held.add(canned(run, [9.0, 3.0 + run.trial]))
    assert command.runs_of("final", [CURVES], ["adam"], held) == []
    assert "trial 7 has not been run" in capsys.readouterr().err
    held.add(canned(runs[-1], [9.0, 1.0]))
    finals = command.runs_of("final", [CURVES], ["adam"], held)
    assert [(r.trial, r.seed, r.epochs) for r in finals] == [
        (7, s, STUDIES["locoprop"].final_epochs) for s in (0, 1, 2)
    ]
    assert all(s.tune_seed not in s.final_seeds and len(s.final_seeds) >= 3 for s in STUDIES.values())


def test_what_has_a_row_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    performed: list[int] = []

    def execute(run: Run, threads: int, limit: int) -> dict[str, Any]:
        performed.append(run.trial)
        if len(performed) == 4:
            raise KeyboardInterrupt
        return canned(run, [2.0, 1.0], "nan" if run.trial == 1 else "")

    monkeypatch.setattr(runner, "execute", execute)
    held, runs = Rows(tmp_path), plan.tuning(CURVES, "adam")
    with pytest.raises(KeyboardInterrupt):
        runner.perform(runs, held)
    assert runner.perform(runs, held) == (5, 0, 0)
    assert performed == [0, 1, 2, 3, 3, 4, 5, 6, 7], "the failed trial 1 has a row, the interrupted 3 has none"
    assert runner.perform(runs, held) == (0, 0, 0)


def test_an_unavailable_method_gets_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = dataclasses.replace(METHODS["adam"], unavailable=lambda: "not here")
    monkeypatch.setitem(METHODS, "adam", gone)
    assert runner.perform([tiny()], Rows(tmp_path)) == (0, 0, 1)
    assert Rows(tmp_path).load(CURVES) == {}


# Estimates


def test_the_cost_of_a_run() -> None:
    def times(problem: str) -> tuple[dict[str, float], float]:
        return {"adam": 0.5}, 2.0

    run = tiny(epochs=3, rows=2500)
    assert run.steps == 9  # the last batch of each epoch is half a batch
    assert budget.cost(run, times) == pytest.approx(budget.OVERHEAD + 9 * 0.5 + 4 * 2.0)
    smaller = dataclasses.replace(run, change="batch=500")
    assert budget.cost(smaller, times) == pytest.approx(budget.OVERHEAD + 15 * 0.25 + 4 * 2.0)
    guessed = budget.OVERHEAD + 9 * budget.ASSUMED * 0.5 + 4 * 2.0
    assert budget.cost(dataclasses.replace(run, method="sgd"), times) == pytest.approx(guessed)
    assert math.isnan(budget.cost(run, lambda problem: ({}, math.nan)))


def test_the_study_fits_its_budget_as_measured() -> None:
    parts = budget.estimate(step_time.measured, lambda problem: {}, list(STUDIES["locoprop"].methods))
    assert 1 < sum(p.hours for p in parts) <= STUDIES["locoprop"].budget


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timed = dict.fromkeys(study_of(CURVES).methods[CURVES], 3600.0)
    row = {"problem": CURVES, "seconds": timed, "relative": dict.fromkeys(timed, 1.0), "losses_seconds": 0.0,
           "repeats": 3, **step_time.rules(CURVES, timed)}  # fmt: skip
    rows.append(tmp_path / step_time.FILE.name, row)
    assert command.main(["--dry-run", "--problem", CURVES, "--rows", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    hours = sum(8 * (3 * 10 + 3 / 3600) + 3 * (20 * 10 + 3 / 3600) for _ in timed)
    assert f"{hours:.2f} core-hours in all, OVER the budget" in said
    assert not list(tmp_path.glob("curves*")), "nothing was run"
    assert command.main(["--dry-run", "--problem", "text-transformer", "--rows", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "nothing timed, not counted: text-transformer" in said and "at least 0.00 core-hours" in said


# The report


def study(folder: Path) -> Rows:
    """Adam ends at 4 with step 1 s; LocoProp-M is at 3 after one epoch of steps of 2 s; one seed of SGD fails."""
    held = Rows(folder)
    curves_by_method = {"sgd": [10.0, 9.0], "adam": [10.0] + [4.0] * 20, "locoprop-m": [10.0, 3.0]}
    for method, curve in curves_by_method.items():
        for run in plan.finals(CURVES, method, 2):
            failed = method == "sgd" and run.seed == 1
            held.add(canned(run, [loss + 0.1 * run.seed for loss in curve], "nan" if failed else ""))
    relative = {"adam": 1.0, "locoprop-m": 2.0, "sgd": 0.5}
    row = {"problem": CURVES, "seconds": relative, "relative": relative, "losses_seconds": 1.0, "repeats": 15,
           **step_time.rules(CURVES, relative)}  # fmt: skip
    rows.append(folder / step_time.FILE.name, row)
    return held


def test_report_of_canned_rows(tmp_path: Path) -> None:
    held = study(tmp_path)
    text = report.write(held, [CURVES], tmp_path / step_time.FILE.name, tmp_path / "out")
    assert "Target: train loss 4.1, the final median of adam." in text
    cells = {c[1]: c for line in text.splitlines() if (c := [p.strip() for p in line.split("|")]) and len(c) > 10}
    # seed 1 is the median: 10.1 -> 3.1 in epoch 1, at 4.1 after 6/7 of it; an epoch is ten steps
    epochs = 6 / 7
    assert cells["locoprop-m"][4] == "3" and cells["locoprop-m"][7] == f"{epochs:.4g}"
    assert cells["locoprop-m"][8] == f"{epochs * 10 * 2:.4g}" and cells["locoprop-m"][9] == "2"
    assert cells["locoprop-m"][5].startswith("3.1 [3, 3.2]")
    assert cells["sgd"][4] == "3 (1 failed)" and cells["sgd"][5] == "inf" and cells["sgd"][8] == "inf"
    assert (tmp_path / "out" / f"{CURVES}.png").stat().st_size > 10_000


def test_shared_rows_against_all_rows() -> None:
    shared = [{"train_curve": c} for c in ([9, 2, 3, 6], [9, 4, 3, 6], [9, 1, 3, 6])]  # medians 2, 3, 6
    everything = [{"train_curve": [9, 4, 3, 5]}]
    (line,) = report._by_epoch({"m": shared, "all": everything}, "m", "all")
    assert "m above all's, by epoch: -50.0 to 20.0 %, -10.0 % on average, 20.0 % at the end" in line
    assert report._by_epoch({"m": shared}, "m", "all") == []


def test_final_rows_of_other_code_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = study(tmp_path).load(CURVES).values()
    assert set(report.finals_of(CURVES, held)) == {"sgd", "adam", "locoprop-m"}
    monkeypatch.setitem(METHODS, "adam", dataclasses.replace(METHODS["adam"], revision=99))
    assert set(report.finals_of(CURVES, held)) == {"sgd", "locoprop-m"}


def test_interval() -> None:
    assert summaries.interval([2.0, 2.0, 2.0]) == (2.0, 2.0, 2.0)
    mean, low, high = summaries.interval([1.0, 2.0, 6.0])
    assert mean == 3.0 and 1.0 <= low < 2.0 and 4.0 < high <= 6.0
    assert summaries.interval([1.0, math.inf]) == (math.inf, math.inf, math.inf)


def test_times_of_a_revised_method_no_longer_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study(tmp_path)
    file = tmp_path / step_time.FILE.name
    assert step_time.seconds(CURVES, "locoprop-m", file) == 2.0
    monkeypatch.setitem(METHODS, "locoprop-m", dataclasses.replace(METHODS["locoprop-m"], revision=99))
    assert math.isnan(step_time.seconds(CURVES, "locoprop-m", file))


# Data, models, methods


def test_curves() -> None:
    images = curves(300, seed=3)
    assert images.shape == (300, 784) and images.min() >= 0 and images.amax(1).min() > 0.9 and images.max() <= 1
    assert torch.equal(curves(7, seed=3), images[:7]) and not torch.equal(curves(7, seed=4), images[:7])
    square = images.view(-1, 28, 28)
    edge = round(MARGIN) - 3  # ink ends three pixels from the curve
    assert square[:, :edge].max() < 1e-3 and square[:, :, -edge:].max() < 1e-3
    ink = (images > 0.5).sum(1).float()
    assert ink.min() > 5 and ink.mean() < 80, "thin lines, no blots"
    assert curves(0, seed=3).shape == (0, 784)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_models_start_alike_for_a_seed(problem: str) -> None:
    known = PROBLEMS[problem]
    first, again, other = known.model(1, {}), known.model(1, {}), known.model(2, {})
    weights = [next(p for p in m.parameters() if p.dim() > 1) for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    published = problem == "mnist-logistic"  # it starts at zero
    assert torch.equal(weights[0], weights[2]) == published


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ({"width": 0.5}, [784, 500, 250, 125, 30, 125, 250, 500, 784]),
        ({"fewer": 1}, [784, 1000, 500, 30, 500, 1000, 784]),
        ({"fewer": -1}, [784, 1000, 1000, 500, 250, 30, 250, 500, 1000, 1000, 784]),
    ],
)
def test_shapes(shape: dict[str, Any], sizes: list[int]) -> None:
    model = PROBLEMS["mnist-autoencoder"].model(0, {**shape, "activation": "relu"})
    linear = [m for m in model if isinstance(m, torch.nn.Linear)]
    assert [linear[0].in_features, *(m.out_features for m in linear)] == sizes
    assert sum(isinstance(m, torch.nn.ReLU) for m in model) == len(linear) - 2


def small(method: str, trial: int = 0) -> Training:
    x = curves(60, seed=1)
    run = tiny(method, trial)
    return Training(CURVES, Split(x, torch.zeros(60), x, torch.zeros(60), ""), method, run.hyperparameters(), 0, 30)


@pytest.mark.parametrize("method", [m for m in METHODS if "autoencoder" in METHODS[m].spaces])
def test_methods_train_and_repeat(method: str) -> None:
    if METHODS[method].unavailable():
        pytest.skip(METHODS[method].unavailable())
    gentle = step_time.gentle(method, CURVES)
    first, again = small(method, gentle), small(method, gentle)
    start, _ = first.losses()
    for training in (first, again):
        training.epoch()
    assert first.losses() == again.losses() and first.losses()[0] != start


def test_divergence_is_an_error() -> None:
    training = small("sgd")
    with torch.no_grad():
        next(training.model.parameters()).fill_(float("nan"))
    with pytest.raises(Diverged, match="step 1 of epoch 1"):
        training.epoch()
    with pytest.raises(Diverged, match="after epoch 0"):
        training.losses()


# Through Benchopt


@needs_benchopt
def test_a_run_through_benchopt_is_the_plain_loop() -> None:
    run = tiny("adam", trial=1)
    row = runner.execute(run)
    training = Training(
        CURVES, PROBLEMS[CURVES].load(60, 2000), "adam", run.hyperparameters(), run.seed, run.batch
    )  # fmt: skip
    expected = [training.losses()]
    for _ in range(2):
        training.epoch()
        expected.append(training.losses())
    assert row["status"] == "done" and row["failure"] == ""
    assert list(zip(row["train_curve"], row["test_curve"], strict=True)) == expected
    assert row["clock"]["cpu_seconds"] > 0


@needs_benchopt
def test_a_diverging_run_through_benchopt_is_a_failed_row() -> None:
    row = runner.execute(tiny("sgd", change="lr=1e38"))
    assert row["status"] == "failed" and row["failure"].startswith("Diverged") and row["train_loss"] == math.inf
    assert len(row["train_curve"]) >= 1 and math.isfinite(row["train_curve"][0])


@needs_benchopt
def test_a_run_out_of_time_is_a_failed_row() -> None:
    row = runner.execute(tiny(epochs=100_000), limit=4)
    assert row["status"] == "failed" and row["failure"] == "stopped after 4 s of CPU time"
    assert row["train_loss"] == math.inf


@needs_benchopt
def test_a_mistake_is_no_result() -> None:
    with pytest.raises(runner.Broken, match="unexpected keyword argument 'warmth'"):
        runner.execute(tiny("sgd", change="warmth=1"))


KILLS = 20


def few_runs(folder: Path) -> None:
    runner.perform([tiny(m, t) for m in ("adam", "locoprop-m") for t in (0, 1)] + [tiny("sgd", 0)], Rows(folder))


def without_clock(folder: Path) -> str:
    found = [{**row, "clock": {}} for row in rows.read(Rows(folder).path(CURVES))]
    return "\n".join(map(json.dumps, found))


@needs_benchopt
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_at_any_moment_the_study_goes_on(tmp_path: Path) -> None:
    """Killed 20 times and run again: the same rows, byte for byte, but for the clock."""
    context, moments = multiprocessing.get_context("spawn"), random.Random(0)

    def attempt(folder: Path, seconds: float | None) -> float:
        start = time.monotonic()
        process = context.Process(target=few_runs, args=(folder,))
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        return time.monotonic() - start

    whole = attempt(tmp_path / "whole", None)
    kills = 0
    while kills < KILLS:  # a study that got finished is begun again, for the remaining kills
        if len(list(rows.read(Rows(tmp_path / "cut").path(CURVES)))) == 5:
            Rows(tmp_path / "cut").path(CURVES).unlink()
        attempt(tmp_path / "cut", moments.uniform(0.1, 0.8) * whole)
        kills += 1
    attempt(tmp_path / "cut", None)
    assert without_clock(tmp_path / "cut") == without_clock(tmp_path / "whole") != ""
