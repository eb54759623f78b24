"""AltMin's study: its problems, its baselines against brute force, accuracy over minibatches, its report."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import data
from benchmarks.training import budget, plan, report, rows, runner, step_time, trials
from benchmarks.training.altmin import methods as own
from benchmarks.training.altmin import offline
from benchmarks.training.altmin import report as classes
from benchmarks.training.altmin.admm import ADMM, nearest_activation, nearest_output, nearest_preactivation
from benchmarks.training.altmin.aims import aims_table
from benchmarks.training.altmin.nets import Sign, dense, elman, lenet5, linears, signs
from benchmarks.training.altmin.offline import OfflineAM
from benchmarks.training.altmin.target_propagation import TargetPropagation
from benchmarks.training.method import Stepping
from benchmarks.training.methods import METHODS
from benchmarks.training.plan import Run
from benchmarks.training.problem import Problem, Split, accuracy
from benchmarks.training.problems import PROBLEMS
from benchmarks.training.rows import Rows, row_of
from benchmarks.training.study import STUDIES, study_of
from benchmarks.training.train import Training, rate

STUDY = STUDIES["altmin"]
MNIST = "mnist-2x100"
AGAIN = {("higgs-2x300", m) for m in STUDY.methods[MNIST] if m not in ("adam", "am-mem")}  # the same kind of net
needs_benchopt = pytest.mark.skipif(
    importlib.util.find_spec("benchopt") is None, reason="Benchopt is not installed: make benchmarks"
)


def blobs(n: int, *shape: int, classes: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows around a random centre a class."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, *shape, generator=torch.Generator().manual_seed(99))
    y = torch.arange(n) % classes
    return centres[y] + 0.5 * torch.randn(n, *shape, generator=generator), y


def split(problem: str, n: int = 200) -> Split:
    """Blobs in the shape of a problem's rows."""
    family = "conv" if problem.startswith("fashion") else PROBLEMS[problem].family
    shape = {
        "conv": (1, 28, 28), "recurrent": (6, PROBLEMS[problem].model(0, {}).cell.in_features - 15)
        if family == "recurrent" else (), "tabular": (28,),
    }.get(family, (3072 if problem.startswith("cifar") else 784,))  # fmt: skip
    classes = 2 if family == "tabular" else 10
    return Split(*blobs(n, *shape, classes=classes), *blobs(50, *shape, classes=classes, seed=1), "blobs")


def training(problem: str, method: str, trial: int | None = None, batch: int = 50, **changes: Any) -> Training:
    chosen, rows_here = METHODS[method], split(problem)
    trial = step_time.gentle(method, problem) if trial is None else trial
    hyper = trials.hyperparameters(method, PROBLEMS[problem].family, trial)
    size = len(rows_here.x) if chosen.whole else batch
    return Training(problem, rows_here, method, hyper, 0, size, **changes)


# Problems


@pytest.mark.parametrize("problem", STUDY.methods)
def test_data_of_the_declared_size(problem: str) -> None:
    known = PROBLEMS[problem]
    if known.missing() or not data.available(known.data):
        pytest.skip(known.missing() or "no data")
    few = min(300, known.rows)
    whole = known.split(few)
    assert len(whole.x) == few and len(whole.x_test) == known.test_rows
    assert whole.x.dtype == torch.float32 and whole.y.dtype == torch.int64
    out = known.model(0, {})(whole.x[:3])
    assert out.shape[1] > int(whole.y.max())


@pytest.mark.parametrize("problem", ["mnist-2x100", "cifar10-2x100", "higgs-2x300"])
def test_trials_never_see_the_test_rows(problem: str) -> None:
    """The rows held out in tuning are training rows, and the finals' test rows are the test set's."""
    known = PROBLEMS[problem]
    if known.missing() or not data.available(known.data):
        pytest.skip(known.missing() or "no data")
    tune = plan.tuning(problem, "adam")[0]
    assert tune.validation and tune.rows + known.validation == known.rows
    held = known.split(tune.rows, tune.validation)
    final = known.split(known.rows)
    assert len(held.x) == tune.rows and len(held.x_test) == known.validation
    assert torch.equal(held.y_test, final.y[tune.rows :]) and torch.equal(held.x, final.x[: tune.rows])
    assert torch.equal(final.y_test, data.load(known.data).y_test[: known.test_rows])
    assert len(final.x) == known.rows


def test_higgs_is_shuffled_and_standardised() -> None:
    if not data.available("higgs"):
        pytest.skip("no data")
    found = PROBLEMS["higgs-2x300"].split(20_970)
    assert found.x.mean(0).abs().max() < 1e-4 and (found.x.std(0) - 1).abs().max() < 1e-4
    assert not torch.equal(found.y, data.load("higgs").y_train)
    assert found.y.bincount().tolist() == data.load("higgs").y_train.bincount().tolist()


def test_a_missing_data_set_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(data.VARIABLE, str(tmp_path))
    run = plan.tuning("cifar10-2x100", "adam")[0]
    assert "cifar10 is not in the folder" in run.unavailable()
    assert runner.perform([run], Rows(tmp_path)) == (0, 0, 1)


def test_sign_is_minus_one_at_zero_and_straight_through_inside_one() -> None:
    z = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0], requires_grad=True)
    s = Sign()(z)
    assert s.tolist() == [-1, -1, -1, 1, 1]
    assert torch.autograd.grad(s.sum(), z)[0].tolist() == [0, 1, 1, 1, 0]


def test_elman_is_torchs_rnn() -> None:
    model = elman(4, 5, 3)(0, {})
    net = nn.RNN(4, 5, batch_first=True)
    with torch.no_grad():
        net.weight_ih_l0.copy_(model.cell.weight[:, :4])
        net.weight_hh_l0.copy_(model.cell.weight[:, 4:])
        net.bias_ih_l0.copy_(model.cell.bias)
        net.bias_hh_l0.zero_()
    x = torch.randn(2, 7, 4)
    torch.testing.assert_close(model(x), model.head(net(x)[0][:, -1]))


def test_only_chains_are_taken_apart() -> None:
    assert len(linears(dense(3, 4, 5, 2)(0, {}), nn.ReLU)) == 3
    for other in (lenet5()(0, {}), nn.Linear(2, 2), signs(3, 4, 2)(0, {})):
        with pytest.raises(ValueError, match="a chain of linear layers"):
            linears(other, nn.ReLU)


def test_tables_of_trials_have_a_column_for_each_trial_that_is_run() -> None:
    heads = {}
    for problem in STUDY.methods:
        shown = classes.tuning_table(problem, Rows().load(problem)).splitlines()
        assert len({line.count("|") for line in shown}) == 1, problem
        heads[problem] = shown[0]
    assert heads["fashion-resnet8"].endswith("| method | 0 | 1 | 2 |") and heads[MNIST].endswith("| 6 | 7 |")


# Accuracy, first minibatches, schedule


def test_accuracy_counts_rows() -> None:
    model, y = nn.Identity(), torch.tensor([0, 1, 1, 0])
    x = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0], [float("nan"), 0.0]])
    problem = dataclasses.replace(PROBLEMS[MNIST], batch=3)
    assert accuracy(problem, model, x, y) == 0.5, "the third is wrong, and so is what is not a number"


def test_first_minibatches_are_of_the_problems_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method with half the batch takes two steps for each; measuring crosses epochs, and changes nothing."""
    monkeypatch.setitem(PROBLEMS, MNIST, dataclasses.replace(PROBLEMS[MNIST], batch=50))
    for batch, steps in ((50, [0, 1, 2, 3, 4, 5, 6]), (25, [0, 2, 4, 6, 8, 10, 12])):
        seen: list[int] = []
        measured, plain = training(MNIST, "adam", batch=batch), training(MNIST, "adam", batch=batch)
        for _ in range(2):  # four minibatches an epoch
            measured.epoch(6, lambda: seen.append(measured.steps))  # noqa: B023
            plain.epoch()
        assert seen == steps
        assert measured.losses() == plain.losses()


def test_the_rate_rises_and_falls_for_every_method_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = [rate(s, 100) for s in range(100)]
    assert factors[0] == 0.2 and max(factors) == factors[4] == 1.0 and factors[-1] == pytest.approx(1 / 95)
    assert factors[5:] == sorted(factors[5:], reverse=True)
    for method in ("adam", "momentum", "am-adam"):
        scheduled = training("mnist-2x100-one-epoch", method, epochs=1)
        assert isinstance(scheduled._step, Stepping)
        used: list[float] = []
        group = scheduled._step.optimizer.param_groups[0]
        base = group["lr"]
        for index in scheduled.batches():
            scheduled.step(index)
            used.append(group["lr"] / base)
        assert used == pytest.approx([rate(s, 4) for s in range(4)])
    constant = training(MNIST, "adam", epochs=1)
    base = constant._step.optimizer.param_groups[0]["lr"]
    constant.epoch()
    assert constant._step.optimizer.param_groups[0]["lr"] == base


def test_repeats_take_two_steps_on_a_minibatch() -> None:
    twice, once = training(MNIST, "adam-twice", 0), training(MNIST, "adam", 0)
    index = torch.arange(50)
    first = twice.step(index)
    assert torch.equal(first, once.step(index)), "the loss before the first step"
    once.step(index)
    for a, b in zip(twice.model.parameters(), once.model.parameters(), strict=True):
        assert torch.equal(a, b)


# Methods


@pytest.mark.parametrize(
    ("problem", "method"),
    [
        pytest.param(p, m, marks=pytest.mark.slow if p.startswith("cifar10") or (p, m) in AGAIN else ())
        for p in STUDY.methods
        for m in STUDY.methods[p]
        if not p.endswith(("one-epoch", "2x500"))
    ]
    + [("mnist-binary-2x500", m) for m in STUDY.methods["mnist-binary-2x500"]],
)
def test_methods_lower_the_loss_and_repeat(problem: str, method: str) -> None:
    if METHODS[method].missing(PROBLEMS[problem].family):
        pytest.skip(METHODS[method].missing(PROBLEMS[problem].family))
    ends = []
    for _ in range(2):
        one = training(problem, method)  # seeds the noise of methods that sample
        start, _ = one.losses()
        for _ in range(2):
            one.epoch()
        ends.append(one.losses())
    assert ends[0] == ends[1] and ends[0][0] < start


def test_what_the_library_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert METHODS["am-adam"].missing("dense") == METHODS["am-sgd"].missing("conv") == ""
    reason = own._takes("am-x", own._altmin(weights="telepathy"), METHODS["am-adam"].spaces["dense"])()
    assert reason.startswith("layerwise does not take what am-x needs yet:") and "telepathy" in reason
    lacking = dataclasses.replace(METHODS["am-adam"], needs={"dense": lambda: "no codes"})
    assert lacking.missing("dense") == "no codes" and lacking.missing("conv") == ""


# Offline baselines against brute force


def grid_minimum(cost: Any, low: float = -6, high: float = 6) -> Tensor:
    z = torch.linspace(low, high, 240_001, dtype=torch.float64)
    return z[cost(z).argmin()]


def test_admm_activations_solve_their_least_squares() -> None:
    torch.manual_seed(0)
    w, z, h = (torch.randn(*s, dtype=torch.float64) for s in ((4, 3), (5, 4), (5, 3)))
    a = nearest_activation(w, z, h, beta=0.7, gamma=3.0).requires_grad_()
    cost = 0.7 * (z - a @ w.T).square().sum() + 3.0 * (a - h).square().sum()
    assert torch.autograd.grad(cost, a)[0].abs().max() < 1e-10


def test_admm_preactivations_are_the_minimum() -> None:
    torch.manual_seed(1)
    for a, m in torch.randn(30, 2, dtype=torch.float64) * 2:
        for beta, gamma in ((1.0, 10.0), (2.0, 0.5)):

            def cost(z: Tensor) -> Tensor:
                return gamma * (a - z.relu()).square() + beta * (z - m).square()  # noqa: B023

            found = nearest_preactivation(a, m, beta, gamma)
            assert cost(found) <= cost(grid_minimum(cost)) + 1e-9


@pytest.mark.parametrize("target", [0, 1])
def test_admm_outputs_are_the_minimum(target: int) -> None:
    torch.manual_seed(2)
    for m, multiplier in torch.randn(40, 2, dtype=torch.float64) * 1.5:
        for beta in (0.3, 1.0, 4.0):

            def cost(z: Tensor) -> Tensor:
                hinge = (1 - z).relu() if target else z.relu()
                return hinge + multiplier * z + beta * (z - m).square()  # noqa: B023

            found = nearest_output(torch.tensor(target), m, multiplier, beta)
            assert cost(found) <= cost(grid_minimum(cost, -12, 12)) + 1e-8


def test_admm_weights_are_least_squares_and_the_fit_gets_better() -> None:
    x, y = (t.double() if t.is_floating_point() else t for t in blobs(120, 6, classes=3))
    model = dense(6, 12, 3)(0, {}).double()
    torch.manual_seed(0)
    method = ADMM(linears(model, nn.ReLU), beta=1.0, gamma=10.0)
    method.sweep(x, y)
    below = torch.cat([method.activations[0], torch.ones(120, 1, dtype=torch.float64)], 1)
    z = method.preactivations[-1]
    method._solve_weights(1, method.activations[0])
    expected = torch.linalg.lstsq(below, z).solution.T
    torch.testing.assert_close(model[2].weight, expected[:, :-1], rtol=1e-3, atol=1e-3)
    for _ in range(40):
        method.sweep(x, y)
    assert (model(x).argmax(1) == y).double().mean() > 0.95
    assert method.multiplier.abs().max() > 0, "the multipliers move after the warm-up"


def test_offline_am_descends_its_objective() -> None:
    """No block's update raises the relaxed objective, and hidden weights solve their ridge regression."""
    x, y = (t.double() if t.is_floating_point() else t for t in blobs(90, 5, classes=3))
    model = dense(5, 8, 7, 3)(0, {}).double()
    layers = linears(model, nn.ReLU)
    method = OfflineAM(layers, coupling=0.3, ridge=1e-3)
    values = []
    with torch.no_grad():
        for _ in range(15):
            before = layers[1].weight.clone()
            method.sweep(x, y)
            values.append(float(method.objective(x, y)))
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(values)) and values[-1] < 0.75 * values[0]
    a = torch.cat([method.codes[0].relu(), torch.ones(90, 1, dtype=torch.float64)], 1)
    r = 1e-3 * (a.T @ a).diagonal().mean()
    w = torch.cat([layers[1].weight, layers[1].bias[:, None]], 1)
    residual = a.T @ (method.codes[1] - a @ w.T)
    moved = layers[1].weight - before
    torch.testing.assert_close(residual[:-1].T, r * moved, rtol=1e-6, atol=1e-8)


def test_offline_codes_move_against_their_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A move is minus autograd's gradient of the objective over its curvature, or none where that is worse."""
    monkeypatch.setattr(offline, "CODE_STEPS", 1)
    x, y = (t.double() if t.is_floating_point() else t for t in blobs(20, 5, classes=3))
    layers = linears(dense(5, 6, 4, 3)(1, {}).double(), nn.ReLU)
    for depth, share in ((1, 0.5), (0, 0.3)):
        method = OfflineAM(layers, coupling=0.3, ridge=1e-3)
        torch.manual_seed(3)
        method.codes = [torch.randn(20, n, dtype=torch.float64, requires_grad=True) for n in (6, 4)]
        g = torch.autograd.grad(method.objective(x, y), method.codes[depth])[0]
        start = [c.detach().clone() for c in method.codes]
        method.codes = [c.clone() for c in start]
        with torch.no_grad():
            before = method.objective(x, y)
            method._move_code(depth, x, y)
            assert method.objective(x, y) < before
        moved = method.codes[depth] - start[depth]
        norm = torch.linalg.matrix_norm(layers[depth + 1].weight.detach(), 2) ** 2
        curvature = share * norm + 0.3
        went = moved.abs().sum(1) > 0
        torch.testing.assert_close(moved[went], -g[went] / curvature)
        assert went.sum() >= 15 and torch.equal(method.codes[1 - depth], start[1 - depth])


# Difference target propagation


def test_targets_are_differences_of_the_inverses() -> None:
    model, (x, y) = signs(6, 8, 7, 3)(0, {}), blobs(10, 6, classes=3)
    method = TargetPropagation(linears(model, Sign), lr=1e-3, target_rate=0.5, noise=0.3)
    h = [t.detach() for t in method.activations(x)]
    top = torch.sign(h[1]).requires_grad_()
    F.cross_entropy(model[4](top), y, reduction="sum").backward()
    targets = method.targets(h, y)
    torch.testing.assert_close(targets[1], h[1] - 0.5 * top.grad)
    v = method.inverses[0]
    expected = h[0] + torch.tanh(v(torch.sign(targets[1]))) - torch.tanh(v(torch.sign(h[1])))
    torch.testing.assert_close(targets[0], expected)
    still = TargetPropagation(linears(model, Sign), lr=1e-3, target_rate=0.0, noise=0.3)
    still.inverses = method.inverses
    assert all(torch.equal(a, b) for a, b in zip(still.targets(h, y), h, strict=True)), "no loss signal, no difference"


def test_local_losses_reach_one_layer_each() -> None:
    """A hidden layer's gradient is that of `‖tanh(W s) − ĥ‖²` on its own, and the output layer's is backprop's."""
    model, (x, y) = signs(6, 8, 7, 3)(0, {}), blobs(10, 6, classes=3)
    layers = linears(model, Sign)
    method = TargetPropagation(layers, lr=1e-3, target_rate=2.0, noise=0.3)
    with torch.no_grad():
        h = method.activations(x)
    targets = method.targets(h, y)
    method.local_loss(x, y, h, targets).backward()
    with torch.no_grad():
        for layer, s, target in ((layers[0], x, targets[0]), (layers[1], torch.sign(h[0]), targets[1])):
            value = torch.tanh(layer(s))
            delta = 2 * (value - target) * (1 - value**2) / len(x)
            torch.testing.assert_close(layer.weight.grad, delta.T @ s)
    logits = model(x)
    delta = (logits.softmax(1) - F.one_hot(y, 3)) / len(x)
    torch.testing.assert_close(layers[2].weight.grad, delta.T @ torch.sign(h[1]))


def test_inverses_learn() -> None:
    model, (x, _) = signs(6, 20, 20, 3)(0, {}), blobs(100, 6, classes=3)
    torch.manual_seed(0)
    method = TargetPropagation(linears(model, Sign), lr=1e-2, target_rate=0.0, noise=0.1)
    with torch.no_grad():
        h = method.activations(x)
    first = float(method.inverse_loss(h).detach())
    for _ in range(60):
        method.backward.zero_grad()
        method.inverse_loss(h).backward()
        method.backward.step()
    assert float(method.inverse_loss(h).detach()) < 0.5 * first


# Plan, rows, report


def canned(run: Run, accuracies: list[float], failure: str = "") -> dict[str, Any]:
    losses = [(1 - a, 1.1 - a) for a in accuracies]
    early = [i / (run.early + 1) for i in range(run.early + 1)] if run.early else []
    return row_of(run, losses, failure, {}, accuracies, early)


def test_the_best_trial_is_the_most_accurate_on_held_out_rows() -> None:
    runs = plan.tuning(MNIST, "adam")
    held = {r.key(): canned(r, [0.1, 0.5 + 0.05 * r.trial], "nan" if r.trial == 7 else "") for r in runs}
    assert plan.best(runs, held) == 6
    row = held[runs[7].key()]
    assert row["test_accuracy"] == -math.inf and row["status"] == "failed"
    tied = {r.key(): {**canned(r, [0.1, 0.5]), "train_loss": 9.0 - r.trial} for r in runs}
    assert plan.best(runs, tied) == 7, "of equals, the lowest train loss"


def test_rows_with_accuracies_come_back(tmp_path: Path) -> None:
    run = plan.finals(MNIST, "adam", 3)[0]
    assert run.early == 100 and not run.validation and run.rows == 60_000
    held = Rows(tmp_path)
    held.add(canned(run, [0.1, 0.9]))
    held.add(canned(plan.finals(MNIST, "adam", 4)[0], [0.1], "nan"))
    good, bad = held.load(MNIST).values()
    assert good["accuracy_curve"] == [0.1, 0.9] and good["test_accuracy"] == 0.9 and len(good["early_curve"]) == 101
    assert bad["test_accuracy"] == -math.inf
    assert len({dataclasses.replace(run, **c).key() for c in ({}, {"early": 0}, {"validation": True})}) == 3


@pytest.mark.parametrize("method", ["offline-am", "admm"])
def test_offline_methods_see_all_rows_in_order(method: str) -> None:
    run = plan.finals(MNIST, method, 0)[0]
    assert run.batch == run.rows and run.steps == run.epochs and run.early == 0
    assert list(training(MNIST, method).batches()) == [slice(None)]


def test_the_study_fits_its_budget_as_measured() -> None:
    parts = budget.estimate(step_time.measured, lambda problem: {}, list(STUDY.methods))
    assert not any(math.isnan(p.hours) for p in parts), "every problem has been timed"
    assert 1 < sum(p.hours for p in parts) <= STUDY.budget


def test_report_of_canned_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = dataclasses.replace(METHODS["am-mem"], unavailable=lambda: "no memory")
    monkeypatch.setitem(METHODS, "am-mem", gone)
    held = Rows(tmp_path)
    for problem in (MNIST, "higgs-2x300", "mnist-binary-2x500"):
        for m, (method, last) in enumerate((("adam", 0.96), ("adam-100", 0.965), ("am-adam", 0.97))):
            for run in plan.tuning(problem, method):
                held.add(canned(run, [0.1, 0.9 + run.trial / 100]))
            for run in plan.finals(problem, method, 7):
                failed = "nan" if (method, run.seed, problem) == ("adam-100", 1, MNIST) else ""
                held.add(canned(run, [0.1, 0.9 + m / 100, last + 0.001 * run.seed], failed))
        relative = {"adam": 1.0, "adam-100": 0.6, "am-adam": 1.5}
        row = {"problem": problem, "seconds": relative, "relative": relative, "losses_seconds": 1.0, "repeats": 15,
               **step_time.rules(problem, relative)}  # fmt: skip
        rows.append(tmp_path / step_time.FILE.name, row)
    text = report.write(
        held, [MNIST, "higgs-2x300", "mnist-binary-2x500"], tmp_path / step_time.FILE.name, tmp_path / "out"
    )
    summary = text.split("## ")[0]
    assert "| am-adam | 92.00, 97.10 | 92.00, 97.10 | 92.00, 97.10 |" in summary
    assert "| adam-100 | 91.00, failed | 91.00, 96.60 | 91.00, 96.60 |" in summary
    found = {c[1]: c for line in text.split("## ")[1].splitlines() if (c := [p.strip() for p in line.split("|")])[13:]}
    # method, trial, batch, seeds, after 10, 50, 100, epoch 1, last, loss, step, epoch
    assert found["am-adam"][2:5] == ["7", "200", "3"] and found["am-adam"][5] == f"{100 * 10 / 101:.2f}"
    assert found["am-adam"][8].startswith("92.00 [") and found["am-adam"][9] == "97.10 [97.00, 97.20]"
    assert found["am-adam"][11:13] == ["1.5", "1.5"] and found["adam-100"][11:13] == ["0.6", "1.2"]
    assert found["adam-100"][4] == "3 (1 failed)" and found["adam-100"][9] == "failed"
    assert "**97.00**" in text and "STE-Adam" in text and "Not run: am-mem: no memory." in text
    for problem in (MNIST, "higgs-2x300", "mnist-binary-2x500"):
        assert (tmp_path / "out" / f"{problem}.png").stat().st_size > 10_000


@needs_benchopt
def test_a_run_through_benchopt_is_the_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    if not data.available("cifar10"):
        pytest.skip("no data")
    run = Run("final", "cifar10-2x100", "am-adam", 1, 0, epochs=2, rows=500, early=4)
    row = runner.execute(run)
    assert row["failure"] == ""
    known: Problem = PROBLEMS[run.problem]
    one = Training(run.problem, known.split(500), "am-adam", run.hyperparameters(), 0, 200, epochs=2)
    losses, accuracies, early = [one.losses()], [one.accuracy()], []
    for _ in range(2):
        one.epoch(4, lambda: early.append(one.accuracy(known.early_rows)))
        losses.append(one.losses())
        accuracies.append(one.accuracy())
    assert list(zip(row["train_curve"], row["test_curve"], strict=True)) == losses
    assert row["accuracy_curve"] == accuracies and row["early_curve"] == early and len(early) == 5
    assert study_of(run.problem) is STUDY


def test_aims_stand_beside_what_was_reached_at_their_epoch() -> None:
    def row(*curve: float) -> dict[str, Any]:
        return {"accuracy_curve": curve}

    table = aims_table({
        "mnist-binary-2x500": {"am-adam": [row(0.1, 0.9, 0.95, 0.97), row(0.1, 0.9, 0.95, 0.98, 0.98, 0.99)]},
        "mnist-2x100-one-epoch": {"am-sgd": [row(0.1, 0.96)], "adam": [row(0.1, 0.9)]},
    })  # fmt: skip
    assert table.splitlines()[2:] == [
        "| mnist-binary-2x500 | am-adam | 3 | 97.5 | 97.50 [97.00, 98.00] |",
        "| mnist-binary-2x500 | am-adam | 5 | 98 | - |",
        "| mnist-2x100-one-epoch | am-sgd | 1 | 96.8 | 96.00 [96.00, 96.00] |",
    ]
