"""Watching training: numbers against loops in float64, and a run that is what it would have been."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import json
import math
import pickle
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack

import layerwise as lw
from layerwise import monitor as watching
from layerwise.errors import BadInput, LeftOut
from layerwise.monitor import History, Measure, Monitor
from layerwise.monitor import monitor as module
from layerwise.monitor.watch import Group
from layerwise.replay.state import seed_of

Named = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _float64(float64: None) -> None:
    """Exact comparisons."""


def mlp() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def conv() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 2, 2, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(18, 3)
    )


def batch(n: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    return x, x[:, :3].argmax(1)


def every_measure() -> list[Measure]:
    extra = [watching.signal_to_noise(), watching.largest_eigenvalue()]
    return [*(m for m in watching.default() if m.name != "curvature"), *extra, watching.curvature(None)]


def one_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, measures: list[Measure], *batches: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    history = History()
    monitor = Monitor(model, history, measures=measures)
    with monitor.step():
        optimizer.zero_grad()
        for x, y in batches:
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return history.records[0]


def numbers(record: Mapping[str, Any], measure: str) -> Named:
    """A measure's numbers by parameter, "" for the whole model."""
    found = {k.partition("/")[2]: v for k, v in record.items() if k.partition("/")[0] == measure}
    return {name: torch.tensor(value) for name, value in found.items()}


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors.values()])


def with_whole(tensors: Named) -> Named:
    """The same, and all of them as one vector under the name ""."""
    return {**tensors, "": flat(tensors)}


def assert_close_or_infinite(got: Named, want: Named) -> None:
    infinite = {name for name, v in want.items() if v.isinf()}
    assert infinite == {name for name, v in got.items() if v.isinf()} and len(infinite) < len(want)
    oracle.assert_close(*({k: v for k, v in t.items() if k not in infinite} for t in (got, want)))


# -- values ---------------------------------------------------------------------------------------------------


class Truth:
    """One step of momentum SGD with a clipped gradient, by loops."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        self.model = make()
        self.x, self.y = batch()
        params = oracle.parameters(self.model)
        self.before = {name: p.detach().clone() for name, p in params.items()}
        self.grads = oracle.per_sample_grad(params, self.terms)
        self.gradient = {name: sum(row for row in g) for name, g in self.grads.items()}
        self.ggn = oracle.diag_ggn(
            params, lambda: self.model(self.x), lambda z: F.cross_entropy(z, self.y, reduction="mean")
        )
        rate = {name: 0.1 + 0.05 * i for i, name in enumerate(params)}
        self.rates = [{"params": [p], "lr": rate[name]} for name, p in self.model.named_parameters()]
        self.after = {name: p - rate[name] * self.gradient[name] for name, p in self.before.items()}
        self.record = one_step(self.model, torch.optim.SGD(self.rates), every_measure(), (self.x, self.y))

    def terms(self) -> Tensor:
        return F.cross_entropy(self.model(self.x), self.y, reduction="none") / len(self.x)


@pytest.fixture(params=[mlp, conv], ids=["mlp", "conv"])
def truth(request: pytest.FixtureRequest, float64: None) -> Truth:
    return Truth(request.param)


def test_loss_and_gradient_norm(truth: Truth) -> None:
    model = copy.deepcopy(truth.model)
    for name, p in model.named_parameters():
        p.data.copy_(truth.before[name])
    loss = sum(F.cross_entropy(model(a[None]), b[None]) for a, b in zip(truth.x, truth.y, strict=True)) / len(truth.x)
    oracle.assert_close(numbers(truth.record, "loss"), {"": loss})
    norms = {name: g.square().sum().sqrt() for name, g in with_whole(truth.gradient).items()}
    oracle.assert_close(numbers(truth.record, "gradient_norm"), norms)


def test_update_size_and_cosine(truth: Truth) -> None:
    old, new, grads = with_whole(truth.before), with_whole(truth.after), with_whole(truth.gradient)
    size, cosine = {}, {}
    for name, before in old.items():
        moved = [float(a - b) for a, b in zip(new[name].reshape(-1), before.reshape(-1), strict=True)]
        down = [-float(g) for g in grads[name].reshape(-1)]
        norm = math.sqrt(sum(m * m for m in moved))
        size[name] = torch.tensor(norm / math.sqrt(sum(float(b) ** 2 for b in before.reshape(-1))))
        dot = sum(a * b for a, b in zip(moved, down, strict=True))
        cosine[name] = torch.tensor(dot / norm / math.sqrt(sum(d * d for d in down)))
    oracle.assert_close(numbers(truth.record, "update_size"), size)
    oracle.assert_close(numbers(truth.record, "update_cosine"), cosine)
    assert 0.5 < float(cosine[""]) < 0.9999  # rates differ by layer, so the whole move is not the gradient's
    assert all(float(c) == pytest.approx(1) for name, c in cosine.items() if name)


def test_noise_scale(truth: Truth) -> None:
    n = len(truth.x)
    whole = {**truth.grads, "": torch.cat([g.reshape(n, -1) for g in truth.grads.values()], 1)}
    found = oracle.noise_scale(whole, n)
    ratio = {name: found["noise"][name] / s if s > 0 else torch.tensor(math.inf) for name, s in found["signal"].items()}
    assert_close_or_infinite(numbers(truth.record, "noise_scale"), ratio)
    median = {name: sorted(r.reshape(-1))[(r.numel() - 1) // 2] for name, r in found["snr"].items()}
    oracle.assert_close(numbers(truth.record, "signal_to_noise"), median)


def test_alignment(truth: Truth) -> None:
    n = len(truth.x)
    rows = {name: g.reshape(n, -1) for name, g in truth.grads.items()}
    rows[""] = torch.cat(list(rows.values()), 1)
    want = {}
    for name, g in rows.items():
        pairs = [a @ b / (a.norm() * b.norm()) for i, a in enumerate(g) for j, b in enumerate(g) if i != j]
        want[name] = sum(pairs) / len(pairs)
    oracle.assert_close(numbers(truth.record, "alignment"), want)


def test_exact_curvature(truth: Truth) -> None:
    want = {name: d.sum() for name, d in with_whole(truth.ggn).items()}
    oracle.assert_close(numbers(truth.record, "curvature"), want)


@pytest.mark.parametrize("make", [mlp, conv], ids=["mlp", "conv"])
def test_sampled_curvature_is_that_of_the_same_draws(make: Callable[[], nn.Module]) -> None:
    model, (x, y) = make(), batch()
    start = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    curvature = one_step(model, optimizer, [watching.curvature()], (x, y))
    model.load_state_dict(start.state_dict())
    largest = one_step(model, optimizer, [watching.largest_eigenvalue()], (x, y))
    root = lw.SqrtGGN(draws=1, generator=torch.Generator().manual_seed(seed_of(0, 0)))
    with lw.observe(start, root) as seen:
        F.cross_entropy(start(x), y).backward()
    columns = {name: t.reshape(len(x), -1) for name, t in seen[root].items()}
    columns[""] = torch.cat(list(columns.values()), 1)
    matrices = {name: sum(torch.outer(s, s) for s in rows) for name, rows in columns.items()}
    oracle.assert_close(numbers(curvature, "curvature"), {name: m.trace() for name, m in matrices.items()})
    top = {name: torch.linalg.eigvalsh(m)[-1] for name, m in matrices.items()}
    oracle.assert_close(numbers(largest, "largest_eigenvalue"), top)


def test_pairs_with_a_zero_gradient_have_cosine_zero_and_one_sample_has_no_pairs() -> None:
    model, (x, y) = nn.Sequential(nn.Linear(4, 3)), batch(3)
    monitor = Monitor(model, history := History(), measures=[watching.alignment()], every=1)
    for rows, weight in ((slice(0, 3), torch.tensor([1.0, 1.0, 0.0])), (slice(0, 1), torch.ones(1))):
        with monitor.step():
            (F.cross_entropy(model(x[rows]), y[rows], reduction="none") * weight).sum().backward()
    params = oracle.parameters(model)
    a, b, _ = oracle.per_sample_grad(params, lambda: F.cross_entropy(model(x), y, reduction="none"))["0.weight"]
    values = history.series("alignment/0.weight")[1]
    assert values[0] == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())) / 3, rel=1e-10)  # one pair of three
    assert math.isnan(values[1])


def test_undefined_ratios_are_nan_or_infinite() -> None:
    model, (x, y) = nn.Sequential(nn.Linear(4, 3)), batch()
    nn.init.zeros_(model[0].bias)
    still = one_step(model, torch.optim.SGD(model.parameters(), lr=0.0), list(watching.default()), (x, y))
    assert still["update_size"] == 0 and math.isnan(still["update_size/0.bias"]) and math.isnan(still["update_cosine"])
    moved = one_step(model, torch.optim.SGD(model.parameters(), lr=0.1), list(watching.default()), (x, y))
    assert moved["update_size/0.bias"] == math.inf and 0 < moved["update_size/0.weight"] < math.inf


# -- several backward passes --------------------------------------------------------------------------------------


def test_accumulated_gradients_are_of_the_sum_of_the_losses() -> None:
    (x, y), (u, v) = batch(6), batch(4, seed=1)
    model, opt = mlp(), torch.optim.SGD([torch.zeros(1)])
    both = Monitor(model, together := History(), measures=every_measure())
    with pytest.warns(LeftOut, match="alignment|eigenvalue"), both.step():
        F.cross_entropy(model(x), y).backward()
        F.cross_entropy(model(u), v).backward()
        for p in model.parameters():
            p.data -= 0.01 * p.grad
    del opt
    got = together.records[0]
    start = mlp()
    loss = F.cross_entropy(start(x), y) + F.cross_entropy(start(u), v)
    grads = dict(zip(dict(start.named_parameters()), torch.autograd.grad(loss, start.parameters()), strict=True))
    oracle.assert_close(numbers(got, "loss"), {"": loss.detach()})
    oracle.assert_close(numbers(got, "gradient_norm"), {name: g.norm() for name, g in with_whole(grads).items()})
    params = oracle.parameters(start)
    parts = [
        oracle.diag_ggn(params, lambda a=a: start(a), lambda z, b=b: F.cross_entropy(z, b)) for a, b in ((x, y), (u, v))
    ]
    curvature = {name: parts[0][name] + parts[1][name] for name in params}
    oracle.assert_close(numbers(got, "curvature"), {name: d.sum() for name, d in with_whole(curvature).items()})
    counts = torch.tensor([6.0] * 6 + [4.0] * 4)
    each = oracle.per_sample_grad(
        params, lambda: F.cross_entropy(start(torch.cat([x, u])), torch.cat([y, v]), reduction="none") / counts
    )
    want = oracle.noise_scale(each, 10)
    ratios = {name: want["noise"][name] / s if s > 0 else torch.tensor(math.inf) for name, s in want["signal"].items()}
    whole = sum(want["noise"].values()) / sum(want["signal"].values())
    assert_close_or_infinite(
        numbers(got, "noise_scale"), {**ratios, "": whole if whole > 0 else torch.tensor(math.inf)}
    )
    assert set(together.left_out) == {"alignment", "largest_eigenvalue"}
    assert "alignment" not in got and "PairwiseDot" in together.left_out["alignment"]


def test_passes_from_other_parameters_do_not_count() -> None:
    model, (x, y) = mlp(), batch()
    opt = torch.optim.LBFGS(model.parameters(), max_iter=4)
    losses: list[float] = []

    def closure() -> Tensor:
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        losses.append(float(loss.detach()))
        return loss

    monitor = Monitor(model, history := History())
    with monitor.step():
        opt.step(closure)
    assert len(losses) > 2 and history.records[0]["loss"] == losses[0]
    assert history.records[0]["curvature"] > 0 and not history.left_out


# -- a run is what it would have been -------------------------------------------------------------------------------


def noisy() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))


def normed() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def loop(
    make: Callable[[], nn.Module], optimizer: Callable[[nn.Module], Any], every: int | None, clip: bool = False
) -> tuple[Named, Tensor, History]:
    """Five steps, watched or not (None); the state, the next random numbers, and the records."""
    model, history = make(), History()
    opt = optimizer(model)
    monitor = Monitor(model, history, every=every or 10**9)
    monitor.steps = 0 if every else 1
    torch.manual_seed(5)
    for i in range(5):
        x, y = batch(seed=i)
        if clip:
            with monitor.step():
                opt.zero_grad(set_to_none=i % 2 == 0)
                F.cross_entropy(model(x), y).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                opt.step()
        else:
            closure = lambda x=x, y=y: F.cross_entropy(model(x), y)  # noqa: E731
            with monitor.step(closure):
                opt.step(closure)
    return {k: v.clone() for k, v in model.state_dict().items()}, torch.rand(3), history


RUNS = {
    "adam": (noisy, lambda m: torch.optim.Adam(m.parameters(), 0.01), True),
    "adam, batch norm": (normed, lambda m: torch.optim.Adam(m.parameters(), 0.01), True),
    "locoprop": (noisy, lw.LocoProp, False),
    "locoprop, batch norm": (normed, lw.LocoProp, False),
    "altmin": (noisy, lw.AltMin, False),
    "kfac": (noisy, lw.optim.KFAC, False),
    "diagonal newton": (noisy, lw.optim.DiagNewton, False),
}


@pytest.mark.filterwarnings("ignore::layerwise.errors.LeftOut")
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("name", RUNS)
def test_watching_changes_no_bit(name: str, every: int) -> None:
    make, optimizer, ordinary = RUNS[name]
    state, drawn, history = loop(make, optimizer, every, ordinary)
    plain, same, nothing = loop(make, optimizer, None, ordinary)
    assert [r["step"] for r in history.records] == list(range(0, 5, every)) and not nothing.records
    assert all(torch.equal(state[k], plain[k]) for k in plain) and torch.equal(drawn, same)
    assert all(math.isfinite(r["loss"]) and r["update_size"] > 0 for r in history.records)
    if make is noisy:
        assert not history.left_out and all(r["curvature"] > 0 for r in history.records)


def test_a_preconditioner_may_watch_inside() -> None:
    def trained(watched: bool) -> tuple[Named, History]:
        model, history = noisy(), History()
        opt, pre = torch.optim.SGD(model.parameters(), lr=0.01), lw.optim.Preconditioner(model)
        monitor = Monitor(model, history, every=1)
        torch.manual_seed(5)
        for i in range(4):
            x, y = batch(seed=i)
            with monitor.step() if watched else contextlib.nullcontext():
                opt.zero_grad()
                with pre.watch():
                    F.cross_entropy(model(x), y).backward()
                pre.step()
                opt.step()
        return model.state_dict(), history

    (state, history), (plain, _) = trained(True), trained(False)
    assert all(torch.equal(state[k], plain[k]) for k in plain) and not history.left_out
    assert all(0 < r["update_cosine"] < 0.99 and r["curvature"] > 0 for r in history.records)


@pytest.mark.parametrize("has", [True, False])
def test_a_closure_that_calls_backward_keeps_its_gradients(has: bool) -> None:
    model, (x, y) = mlp(), batch()
    for p in model.parameters():
        p.grad = torch.ones_like(p) if has else None
    held = [p.grad for p in model.parameters()]

    def closure() -> Tensor:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    monitor = Monitor(model, history := History())
    with monitor.step(closure):
        assert all(p.grad is g for p, g in zip(model.parameters(), held, strict=True))
        assert all(bool((g == 1).all()) for g in held if g is not None)
    assert history.records[0]["gradient_norm"] > 0 and history.records[0]["update_size"] == 0


def tensors() -> int:
    return sum(type(o) in (Tensor, nn.Parameter) for o in gc.get_objects())


def test_other_steps_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = mlp(), batch()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, history := History(), every=3)
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        return F.cross_entropy(model(x), y)

    def forbidden(*_: Any) -> None:
        raise AssertionError("a step that is not due made a watch")

    with monitor.step():
        assert len(_get_current_function_mode_stack()) > 0
        closure().backward()
    monkeypatch.setattr(module, "Watch", forbidden)
    for _ in range(2):
        before = tensors()
        with monitor.step(closure):
            assert not _get_current_function_mode_stack() and len(calls) == 1
            assert tensors() == before
        opt.step()
    assert len(history) == 1 and monitor.steps == 3 and monitor.due


def test_nothing_is_left_behind() -> None:
    model, (x, y) = mlp(), batch()
    names = set(vars(model)), [set(vars(p)) for p in model.parameters()]
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, lambda step, record: None, every=1)
    refs: list[weakref.ref[Tensor]] = []

    class Failure(Exception):
        pass

    with pytest.raises(Failure), monitor.step():
        raise Failure
    assert not _get_current_function_mode_stack() and monitor.steps == 0
    for _ in range(2):
        with monitor.step():
            out = model(x)
            refs.append(weakref.ref(out))
            F.cross_entropy(out, y).backward()
            opt.step()
        del out
    gc.collect()
    assert all(ref() is None for ref in refs)
    assert (set(vars(model)), [set(vars(p)) for p in model.parameters()]) == names
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


# -- what has no answer -------------------------------------------------------------------------------------------


def run(monitor: Monitor, model: nn.Module, x: Tensor, y: Tensor) -> None:
    opt = torch.optim.SGD(model.parameters(), lr=0.01)
    with monitor.step():
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()


def test_refused_measures_are_said_once_and_come_back() -> None:
    model, (x, y) = normed(), batch()
    monitor = Monitor(model, history := History(), every=1)
    with pytest.warns(LeftOut) as said:
        run(monitor, model, x, y)
    first = history.records[0]
    apart = {"noise_scale", "alignment", "curvature"}
    assert len(said) == 3 and all(w.filename == __file__ for w in said)
    assert set(history.left_out) == set(monitor.left_out) == apart
    assert all(first[f"left_out/{name}"].startswith("SamplesMixed: ") for name in apart)
    assert not apart & set(first) and first["update_size/0.weight"] > 0 and first["gradient_norm"] > 0
    run(monitor, model, x, y)  # no further warning: they are errors here
    assert not any(key.startswith("left_out") for key in history.records[1])
    model.eval()
    run(monitor, model, x, y)
    assert apart <= set(history.records[2])
    run(monitor, model, x, y)  # together with the others again
    assert apart <= set(history.records[3]) and not monitor._apart & apart


def test_one_odd_batch_costs_that_batch_alone() -> None:
    model = mlp()
    monitor = Monitor(model, history := History(), every=1)
    run(monitor, model, *batch())
    with pytest.warns(LeftOut, match="noise_scale.*N = 1 sample"):
        run(monitor, model, *batch(1))
    run(monitor, model, *batch())
    assert ["noise_scale" in r for r in history.records] == [True, False, True]
    assert all("curvature" in r for r in history.records)


def test_a_refusal_by_one_does_not_take_the_others_along() -> None:
    """Once all have worked together, a refused one costs the others at most that step."""
    model = mlp()
    monitor = Monitor(model, history := History(), every=1)
    (x, y), (u, v) = batch(), batch(4, seed=1)
    run(monitor, model, x, y)
    with pytest.warns(LeftOut):
        for _ in range(3):
            with monitor.step():
                F.cross_entropy(model(x), y).backward()
                F.cross_entropy(model(u), v).backward()
    assert "alignment" not in history.records[2] and "alignment" not in history.records[3]
    assert all({"curvature", "noise_scale"} <= set(r) for r in history.records[2:])


def spoiled(kind: str, x: Tensor) -> Tensor:
    """A batch with a loss of NaN, or one with a finite loss whose gradient is infinity times zero."""
    x = x.clone()
    x[0, 0] = math.nan if kind == "nan" else math.inf
    return x


@pytest.mark.parametrize("clear", [True, False])
@pytest.mark.parametrize("kind", ["nan", "gradient"])
def test_batches_that_are_not_finite_are_logged_and_change_nothing(kind: str, clear: bool) -> None:
    def trained(watched: bool) -> tuple[list[Tensor], History]:
        model, (x, y) = mlp(), batch()
        monitor = Monitor(model, history := History(), every=1)
        for _ in range(2):
            with monitor.step() if watched else torch.enable_grad():
                if clear:
                    model.zero_grad()
                F.cross_entropy(model(spoiled(kind, x)), y).backward()
        return [p.grad for p in model.parameters() if p.grad is not None], history

    watched, history = trained(True)
    plain, _ = trained(False)
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(watched, plain, strict=True)) and plain
    for record in history.records:
        assert math.isnan(record["loss"]) == (kind == "nan") and math.isnan(record["gradient_norm"])
        assert math.isnan(record["noise_scale"]) and record["update_size"] == 0
        assert math.isnan(next(v for k, v in record.items() if k.startswith("curvature/")))
    assert not history.left_out


def test_a_call_that_no_tape_records_does_not_break_the_run() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(4, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_sequence([x[:2], x[2:]], enforce_sorted=False)
            return self.rnn(packed)[1][0][0]

    model, (x, _) = Packed(), batch()
    y = torch.tensor([0, 1])
    monitor = Monitor(model, history := History())
    with pytest.warns(LeftOut), monitor.step():
        loss = F.cross_entropy(model(x), y)
        loss.backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(got, model.parameters(), strict=True))
    assert history.records[0]["loss"] == float(loss.detach())
    assert {"noise_scale", "curvature"} <= set(history.left_out)


def test_a_backward_pass_from_several_tensors_runs_and_is_left_out() -> None:
    model, (x, y) = mlp(), batch()
    monitor = Monitor(model, history := History())
    with pytest.warns(LeftOut, match="2 tensors"), monitor.step():
        z = model(x)
        torch.autograd.backward([F.cross_entropy(z, y), z.square().sum()])
    assert model[0].weight.grad is not None and set(history.left_out) == {m.name for m in watching.default()}


def test_a_due_step_without_a_backward_pass_is_refused() -> None:
    model, (x, y) = mlp(), batch()
    monitor = Monitor(model, History())
    with pytest.raises(BadInput, match=r"monitor\.step\(closure\)"), monitor.step():
        lw.LocoProp(model).step(lambda: F.cross_entropy(model(x), y))
    assert not _get_current_function_mode_stack()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"every": 0}, "every=0"),
        ({"every": 1.5}, "every=1.5"),
        ({"measures": [lw.NoiseScale()]}, "noise_scale\\(\\)"),
        ({"measures": [watching.loss(), watching.loss()]}, "one name"),
        ({"measures": [Measure("a/b", lambda step: {})]}, "'a/b'"),
        ({"measures": [Measure("step", lambda step: {})]}, "'step'"),
        ({"log": None}, "callable"),
        ({"model": 3}, "int"),
    ],
    ids=["every", "fraction", "quantity", "twice", "slash", "reserved", "log", "model"],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], says: str) -> None:
    given: dict[str, Any] = {"model": mlp(), "log": History(), **arguments}
    with pytest.raises(BadInput, match=says):
        Monitor(given.pop("model"), given.pop("log"), **given)


# -- measures of one's own, resuming, loops ---------------------------------------------------------------------


def test_measures_of_ones_own() -> None:
    model = mlp()
    own = [
        Measure("weight_norm", lambda step: {name: p.norm() for name, p in step.after.items()}),
        Measure(
            "spread", lambda step, v: {name: t.sum().sqrt() for name, t in v.items()}, lambda generator: [lw.Variance()]
        ),
        Measure("number", lambda step: {"": step.number}),
    ]
    record = one_step(model, torch.optim.SGD(model.parameters(), lr=0.1), own, batch())
    oracle.assert_close(numbers(record, "weight_norm"), {n: p.detach().norm() for n, p in model.named_parameters()})
    grads = oracle.per_sample_grad(
        oracle.parameters(start := mlp()), lambda: F.cross_entropy(start(batch()[0]), batch()[1], reduction="none") / 6
    )
    want = {name: v.sum().sqrt() for name, v in oracle.variance(grads).items()}
    oracle.assert_close(numbers(record, "spread"), want)
    assert record["number"] == 0 and set(record) == {"step", "number"} | {
        f"{m}/{n}" for m in ("weight_norm", "spread") for n, _ in model.named_parameters()
    }


def test_errors_of_a_measure_of_ones_own_are_not_hidden() -> None:
    model = mlp()
    with pytest.raises(ZeroDivisionError):
        one_step(model, torch.optim.SGD(model.parameters()), [Measure("bad", lambda step: {"": 1 / 0})], batch())


def test_a_resumed_run_logs_the_same() -> None:
    def steps(monitor: Monitor, model: nn.Module, numbers: range) -> None:
        for i in numbers:
            run(monitor, model, *batch(seed=i))

    whole, model = History(), mlp()
    steps(Monitor(model, whole, every=2), model, range(6))
    history, model = History(), mlp()
    first = Monitor(model, history, every=2)
    steps(first, model, range(3))
    saved = copy.deepcopy((model.state_dict(), first.state_dict()))
    steps(first, model, range(3, 5))
    model.load_state_dict(saved[0])
    second = Monitor(model, history, every=2)
    second.load_state_dict(saved[1])
    steps(second, model, range(3, 6))
    assert history.records == whole.records and [r["step"] for r in whole.records] == [0, 2, 4]


def test_draws_depend_on_seed_and_step() -> None:
    def curvature(seed: int) -> list[float]:
        model, history = mlp(), History()
        monitor = Monitor(model, history, measures=[watching.curvature()], every=1, seed=seed)
        for _ in range(2):
            with monitor.step():
                F.cross_entropy(model(batch()[0]), batch()[1]).backward()
        return history.series("curvature")[1]

    assert curvature(0) == curvature(0) and len({*curvature(0), *curvature(1)}) == 4


def test_functional_models_and_frozen_parameters() -> None:
    params = {"w": torch.randn(4, 3, requires_grad=True), "b": torch.zeros(3)}
    monitor = Monitor(params, history := History())
    x, y = batch()
    with monitor.step():
        F.cross_entropy(x @ params["w"] + params["b"], y).backward()
        params["w"].data -= params["w"].grad
    record = history.records[0]
    assert record["update_cosine/w"] == pytest.approx(1) and not any(key.endswith("/b") for key in record)


def test_sparse_gradients_and_lower_precision() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten(), nn.Linear(12, 3)).float()
    plain = copy.deepcopy(model)
    monitor = Monitor(model, history := History(), every=1)
    x, y = torch.randint(7, (6, 3)), torch.randint(3, (6,))
    for net, context in ((model, monitor.step), (plain, contextlib.nullcontext)):
        opt = torch.optim.SGD(net.parameters(), lr=0.1)
        for clear in (True, False):
            with context():
                if clear:
                    opt.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    loss = F.cross_entropy(net(x), y)
                loss.backward()
                opt.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    for record in history.records:
        assert record["gradient_norm/0.weight"] > 0 and record["update_size/0.weight"] > 0
        assert record["curvature/2.weight"] > 0


def loops(model: nn.Module) -> Iterator[tuple[str, Callable[[Monitor, Tensor, Tensor], None]]]:
    adam, loco, altmin = torch.optim.Adam(model.parameters(), 0.01), lw.LocoProp(model), lw.AltMin(model)

    def ordinary(monitor: Monitor, x: Tensor, y: Tensor) -> None:
        with monitor.step():
            loss = F.cross_entropy(model(x), y)
            adam.zero_grad()
            loss.backward()
            adam.step()

    def closures(opt: Any) -> Callable[[Monitor, Tensor, Tensor], None]:
        def step(monitor: Monitor, x: Tensor, y: Tensor) -> None:
            closure = lambda: F.cross_entropy(model(x), y)  # noqa: E731
            with monitor.step(closure):
                opt.step(closure)

        return step

    yield from (("adam", ordinary), ("locoprop", closures(loco)), ("altmin", closures(altmin)))


@pytest.mark.parametrize("which", [0, 1, 2], ids=["adam", "locoprop", "altmin"])
def test_loops_of_the_documentation(which: int) -> None:
    model = noisy()
    _, step = next(itertools.islice(loops(model), which, None))
    monitor = Monitor(model, history := History(), every=5)
    for i in range(11):
        step(monitor, *batch(16, seed=i))
    assert [r["step"] for r in history.records] == [0, 5, 10]
    names = {name for name, _ in model.named_parameters()}
    for measure in ("gradient_norm", "update_size", "update_cosine", "noise_scale", "alignment", "curvature"):
        assert names | {""} == set(numbers(history.records[2], measure))
    assert 0 < history.series("update_cosine")[1][0] <= 1


def test_a_group_is_freed_without_the_garbage_collector() -> None:
    model, x, y = nn.Linear(3, 2), torch.randn(4, 3), torch.randint(2, (4,))
    gc.collect()
    gc.disable()  # what only the collector frees is held by a cycle
    try:
        group = Group(model, [lw.SquaredNorm()])
        with group:
            F.cross_entropy(model(x), y).backward()
        freed = weakref.ref(group)
        del group
        assert freed() is None
    finally:
        gc.enable()


def test_a_log_without_a_record_is_refused(tmp_path: Any) -> None:
    for name, content in (("empty", ""), ("cut", '{"step": 0, "lo')):
        path = tmp_path / name
        path.write_text(content)
        with pytest.raises(BadInput, match=f"{name} is a record of a monitor: it has no complete line"):
            lw.monitor.read(path)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copied_monitor_goes_on_for_the_copied_model(copied: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(6, 3)
    measures = [*watching.default(), watching.signal_to_noise(), watching.largest_eigenvalue()]
    pair = model, Monitor(model, History(), measures=measures, every=1)
    for _ in range(2):
        its, twin = copied(pair), pair
        for net, monitor in (its, twin):
            with monitor.step():
                F.cross_entropy(net(x), torch.arange(6) % 2).backward()
        assert repr(its[1]._log.records[-1]) == repr(twin[1]._log.records[-1])


@pytest.mark.parametrize("value", ['{"a": 1}', "[1]", '"abc"', "null"])
def test_a_line_whose_value_is_no_number_is_skipped_with_a_warning(tmp_path: Any, value: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(f'{{"step": 1, "loss": 2.0}}\n{{"step": 2, "loss": {value}}}\n{{"step": 3, "loss": "nan"}}\n')
    with pytest.warns(lw.errors.LogDamaged, match="1 lines.*line 2"):
        history = lw.monitor.read(path)
    assert [record["step"] for record in history.records] == [1, 3]
    assert history.table() and len(history.rows()) == 2
    history.html(tmp_path / "page.html")
    with pytest.raises(lw.errors.BadInput, match="step 4 holds loss"):
        history(4, {"loss": json.loads(value)})
    assert len(history) == 2
