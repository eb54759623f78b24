"""LocoProp's choices in the optimizer: targets, regularizers, solvers, patterns, order, writing and workers."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from grids import one_in
from local_cases import mlp
from torch import Tensor, nn

import layerwise as lw
from layerwise import local
from layerwise.errors import BadInput, NonFinite, SquaredInstead, Undefined
from layerwise.local.layers.record import problem_of, record
from layerwise.local.transfer import IDENTITY

Settings = dict[str, Any]


def batch(n: int = 12, seed: int = 1) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=gen, dtype=torch.float64), torch.randint(3, (n,), generator=gen)


def closure_of(net: nn.Module, seed: int = 1) -> Callable[[], Tensor]:
    x, y = batch(seed=seed)
    return lambda: F.cross_entropy(net(x), y)


def params_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def run(count: int = 3, net: nn.Module | None = None, **settings: Any) -> dict[str, Tensor]:
    net = mlp(5, 6, 4, 3) if net is None else net
    opt = lw.LocoProp(net, **settings)
    for step in range(count):
        opt.step(closure_of(net, step))
    assert opt.skipped == 0
    return params_of(net)


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def close(x: Tensor, y: Tensor, rtol: float = 1e-11) -> None:
    torch.testing.assert_close(x, y, rtol=0, atol=rtol * float(y.abs().max()))


def half(z: Tensor, g: Tensor, transfer: local.Transfer) -> Tensor:
    """A user's target."""
    return transfer.f(z) - 5.0 * g


def to_ones(weight: Tensor, bias: Tensor | None, gamma: float, average: Any) -> local.Pull:
    """A user's regularizer."""
    return local.Pull(0.1 * gamma, torch.ones_like(weight))


def gradient_step(problem: local.LocalProblem) -> tuple[Tensor, Tensor | None]:
    """A user's solver."""
    dw, db = local.local_gradient(problem)
    return -dw, None if db is None else -db


SOLVERS: dict[str, Settings] = {
    "adam": {"solver": local.LocalSteps(4, torch.optim.Adam), "lr": 1e-3},
    "fresh sgd": {"solver": local.LocalSteps(4, partial(torch.optim.SGD, momentum=0.9), state="fresh"), "lr": 1e-3},
    "tf rmsprop constant": {"solver": local.LocalSteps(3, schedule="constant", rows="all")},
    "exact": {"solver": local.ProximalSolve(1.0), "gamma": 1.0},
    "exact, regularizer": {"solver": local.ProximalSolve(), "regularizer": local.Proximal(1.0), "gamma": 1.0},
    "cg": {"solver": local.ConjugateGradient(), "regularizer": local.Proximal(1.0), "gamma": 1.0},
    "spectral": {"solver": local.Spectral(5), "gamma": 1.0},
    "anderson": {"solver": local.Anderson(5), "regularizer": local.Proximal(1.0)},
    "newton": {"solver": local.Newton(3), "regularizer": local.Proximal(1.0), "gamma": 1.0},
    "user": {"solver": gradient_step, "lr": 0.1, "gamma": 1.0},
}
CHOICES: dict[str, Settings] = {
    **SOLVERS,
    "clipped": {"target": local.GradientStep(clip="range"), "lr": 1e-3},
    "mirror": {"target": local.Mirror(2.0), "lr": 1e-3},
    "natural": {"target": local.NaturalStep(0.1, damping=0.1), "solver": local.ProximalSolve(1.0)},
    "ball": {"regularizer": local.MaxNorm(1e-3), "lr": 1e-3},
    "ball, conditional": {"regularizer": local.SpectralNorm(1e-2), "solver": local.ConditionalGradient(3)},
    "per sample": {"target": local.GradientStep(1.0, per="sample"), "lr": 1e-3},
    "user target": {"target": half, "lr": 1e-3},
    "decay": {"regularizer": local.WeightDecay(0.1), "lr": 1e-3},
    "elastic": {"regularizer": [local.Elastic(0.1, 0.5), local.WeightDecay(0.01)], "lr": 1e-3},
    "user regularizer": {"regularizer": to_ones, "lr": 1e-3},
    "transfer": {"loss": local.SIGMOID, "lr": 1e-3},
    "layers": {"layers": {"2": {"loss": "squared", "solver": local.ProximalSolve(1.0)}, "*.bias": {"lr": 1e-4}}},
    "grad": {"write": "grad", "lr": 1e-3},
    "output to input": {"order": "output_to_input", "lr": 1e-3},
    "input to output": {"order": "input_to_output", "lr": 1e-3},
    "threads": {"workers": 2, "lr": 1e-3},
}
every = pytest.mark.parametrize("settings", CHOICES.values(), ids=CHOICES)
every_solver = pytest.mark.parametrize("settings", SOLVERS.values(), ids=SOLVERS)


# Against the local problems' definition -------------------------------------------------------------------------


def problems(net: nn.Module, closure: Callable[[], Tensor], gamma: float, squared: bool = False) -> Any:
    recorded = record(net, closure)
    return [(layer.names, problem_of(recorded, layer, gamma, IDENTITY if squared else layer.transfer))
            for layer in recorded.layers]  # fmt: skip


@pytest.mark.parametrize("name", ["exact", "exact, regularizer", "cg", "spectral", "newton", "anderson", "user"])
@pytest.mark.parametrize("lr", [None, 0.5])
def test_a_step_is_the_solvers_update_of_every_layers_problem(name: str, lr: float | None) -> None:
    settings = {**SOLVERS[name], **({} if lr is None else {"lr": lr})}
    net = mlp(5, 6, 4, 3)
    gamma, squared = settings.get("gamma", 10.0), name in ("exact", "exact, regularizer", "cg", "spectral")
    wanted = params_of(net)
    rate = settings.get("lr", 1.0)
    for names, problem in problems(net, closure_of(net, 0), gamma, squared):
        prox = None if name in ("user", "spectral", "exact") else 1.0
        problem = local.LocalProblem(**{**vars(problem), "prox": prox})
        dw, db = settings["solver"](problem)
        wanted[names[0]] += rate * dw[0]
        wanted[names[1]] += rate * db[0]
    found = run(1, net, **settings)
    for n in wanted:
        close(found[n], wanted[n])


@pytest.mark.parametrize(
    ("settings", "target", "pull"),
    [
        ({"target": local.Mirror(2.0)}, lambda z, g, f: f.f(z - 2.0 * g), None),
        ({"target": local.GradientStep(30.0, clip="range")}, lambda z, g, f: f.project(f.f(z) - 30.0 * g), None),
        ({"target": local.GradientStep(1.0, per="sample")}, lambda z, g, f: f.f(z) - 12.0 * g, None),
        ({"target": half}, half, None),
        ({"regularizer": local.Proximal(0.3)}, None, lambda w, start: ((w - start) ** 2).sum() / 0.6),
        ({"regularizer": local.WeightDecay(0.2)}, None, lambda w, start: 10 * 0.1 * (w**2).sum()),
        ({"regularizer": [to_ones, local.Proximal(0.3)]}, None,
         lambda w, start: 0.5 * ((w - (1.0 if w.dim() == 2 else start)) ** 2).sum() + ((w - start) ** 2).sum() / 0.6),
    ],
)  # fmt: skip
@pytest.mark.parametrize("loss", ["matching", "squared"])
def test_targets_and_regularizers_against_autograd(settings: Settings, target: Any, pull: Any, loss: str) -> None:
    """Four steps of SGD on each layer's objective, written out, by autograd."""
    net = mlp(5, 6, 3)
    (x, y), rate = batch(seed=0), 1e-3
    wanted = params_of(net)
    layers = [(0, torch.tanh, local.TANH), (2, lambda z: z.softmax(-1), local.SOFTMAX)]
    inputs, pre, h = [], [], x
    for number, f, _ in layers:
        inputs.append(h)
        pre.append(F.linear(h, wanted[f"{number}.weight"], wanted[f"{number}.bias"]).requires_grad_())
        h = f(pre[-1])
    grads = torch.autograd.grad(F.cross_entropy(pre[1], y), pre[1:])
    w1 = wanted["2.weight"]
    grads = ((grads[0] @ w1) * (1 - pre[0].detach().tanh() ** 2), grads[0])
    for (number, _, transfer), a, z, g in zip(layers, inputs, pre, grads, strict=True):
        transfer = transfer if loss == "matching" else local.IDENTITY
        made = (lambda z, g, f: f.f(z) - 10.0 * g) if target is None else target
        goal = made(z.detach(), g, transfer)
        params = [wanted[f"{number}.{kind}"].clone().requires_grad_() for kind in ("weight", "bias")]
        optimizer = torch.optim.SGD(params, lr=rate)
        for _ in range(4):
            optimizer.zero_grad()
            objective = transfer.matching(F.linear(a.detach(), *params), goal).sum()
            if pull is not None:
                objective = objective + sum(pull(p, wanted[f"{number}.{k}"]) for p, k in
                                            zip(params, ("weight", "bias"), strict=True))  # fmt: skip
            objective.backward()
            optimizer.step()
        for p, kind in zip(params, ("weight", "bias"), strict=True):
            wanted[f"{number}.{kind}"] = p.detach()
    solver = local.LocalSteps(4, torch.optim.SGD, "all", "constant")
    found = run(1, net, loss=loss, solver=solver, lr=rate, **settings)
    for n in wanted:
        close(found[n], wanted[n], 1e-12)


def test_the_elastic_average_follows_the_weights_before_each_step() -> None:
    net = mlp(5, 3)
    opt = lw.LocoProp(net, regularizer=local.Elastic(0.1, 0.8), lr=1e-2)
    average = None
    for step in range(4):
        before = params_of(net)
        average = before if average is None else {n: 0.8 * average[n] + (1 - 0.8) * before[n] for n in before}
        opt.step(closure_of(net, step))
        assert same(dict(opt.state_dict()["averages"]), average)
    assert not same(run(3, regularizer=local.Elastic(5.0, 0.8), lr=1e-2), run(3, lr=1e-2))


def test_a_transfer_function_takes_the_place_of_the_one_found() -> None:
    by_layer = run(layers={"0": {"loss": local.SIGMOID}, "2.weight": {"loss": local.SIGMOID},
                           "4": {"loss": local.SIGMOID}}, lr=1e-3)  # fmt: skip
    assert same(by_layer, run(loss=local.SIGMOID, lr=1e-3))
    assert not same(by_layer, run(lr=1e-3))
    assert same(run(loss=local.IDENTITY, lr=1e-3, momentum=0.99), run(loss="squared", lr=1e-3, momentum=0.99))


# Presets and patterns -------------------------------------------------------------------------------------------


def test_presets_s_and_m_are_the_defaults() -> None:
    assert same(run(preset="M"), run()) and same(run(preset="S"), run(loss="squared"))
    assert same(run(solver=local.LocalSteps(rows="auto")), run())
    assert same(run(solver=local.LocalSteps(4, rows=5)), run(steps=4, rows=5))
    assert same(run(target=local.GradientStep(3.0)), run(gamma=3.0))


def test_numbers_by_pattern_are_those_of_parameter_groups() -> None:
    net, other = mlp(5, 6, 3), mlp(5, 6, 3)
    opt = lw.LocoProp(net, layers={"0.*": {"lr": 1e-3, "steps": 4}, "*": {"gamma": 5.0}})
    groups = [{"params": list(other[0].parameters()), "lr": 1e-3, "steps": 4},
              {"params": list(other[2].parameters()), "gamma": 5.0}]  # fmt: skip
    by_hand = lw.LocoProp(other, groups)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    for step in range(3):
        opt.step(closure_of(net, step))
        by_hand.step(closure_of(other, step))
        scheduler.step()
        for group in by_hand.param_groups:
            group["lr"] *= 0.5
    assert same(params_of(net), params_of(other))
    assert [set(g["param_names"]) for g in opt.param_groups] == [{"0.weight", "0.bias"}, {"2.weight", "2.bias"}]


def test_the_first_pattern_that_matches_wins_and_modules_may_be_named() -> None:
    first = run(layers={"0": {"lr": 1e-3}, "0.weight": {"lr": 1.0}})
    assert same(first, run(layers={"0.*": {"lr": 1e-3}}))


def test_solvers_by_pattern() -> None:
    """The exact layer moves as in an exact optimizer, the others as in a plain one, and each has its own rate."""
    mixed = run(1, layers={"2": {"solver": local.ProximalSolve(1.0)}})
    exact, plain = run(1, solver=local.ProximalSolve(1.0)), run(1)
    assert all(torch.equal(mixed[n], (exact if n.startswith("2") else plain)[n]) for n in mixed)
    other = run(1, solver=local.ProximalSolve(1.0), layers={"2": {"solver": local.LocalSteps(), "loss": "matching"}})
    wanted = run(1, momentum=0.999)
    assert all(torch.equal(other[n], (wanted if n.startswith("2") else exact)[n]) for n in mixed)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"layers": {"7.*": {"lr": 1.0}}}, "0.weight, 0.bias"),
        ({"layers": {"0": {"rate": 1.0}}}, "rate"),
        ({"layers": {"0": {"lr": -1.0}}}, "lr"),
        ({"layers": {"0": {"solver": "newton"}}}, "solver"),
        ({"layers": {"0": {"loss": "cubic"}}}, "cubic"),
        ({"target": "mirror"}, "target"),
        ({"regularizer": [1.0]}, "regularizer"),
        ({"solver": local.Newton}, "solver"),
        ({"order": "random"}, "order"),
        ({"write": "nowhere"}, "write"),
        ({"workers": 0}, "workers"),
        ({"workers": ("fork", 2)}, "workers"),
        ({"workers": "two"}, "workers"),
        ({"workers": 2, "order": "output_to_input"}, "order"),
        ({"solver": local.LocalSteps(optimizer=lambda groups, lr: torch.optim.SGD(groups, lr))}, "lr"),
    ],
)
def test_wrong_choices_are_refused(wrong: Settings, match: str) -> None:
    with pytest.raises(BadInput, match=match):
        lw.LocoProp(mlp(5, 3), **wrong)


def test_a_squared_solver_refuses_a_matching_loss_before_anything_moves() -> None:
    net = mlp(5, 6, 3)
    before = params_of(net)
    opt = lw.LocoProp(net, loss="matching", solver=local.ProximalSolve(1.0))
    with pytest.raises(BadInput, match=r"0\.weight has tanh"):
        opt.step(closure_of(net))
    assert same(params_of(net), before)


@pytest.mark.parametrize(
    ("update", "given"),
    [
        (lambda problem: (problem.weight[:, :3], problem.bias), r"\[\(1, 3, 5\), \(1, 6\)\]"),
        (lambda problem: (problem.weight, None), r"\[\(1, 6, 5\), None\]"),
        (lambda problem: problem.weight, r"\[\(1, 6, 5\)\]"),
        (lambda problem: None, r"\[None\]"),
    ],
)
def test_a_solver_whose_update_does_not_fit_changes_nothing(update: Any, given: str) -> None:
    net = mlp(5, 6, 3)
    before = params_of(net)
    with pytest.raises(BadInput, match=rf"solver <lambda> gave, for 0\.weight, updates of shapes {given} for a weight"):
        lw.LocoProp(net, solver=update).step(closure_of(net))
    assert same(params_of(net), before)


def test_a_target_that_is_not_finite_is_named_once() -> None:
    opt = lw.LocoProp(net := mlp(5, 6, 3), target=lambda a, g, gamma: a * float("nan"), on_nonfinite="raise")
    with pytest.raises(NonFinite, match=r"^the target of 0\.weight holds NaN or infinity, or overflows; the batch"):
        opt.step(closure_of(net))


# Order, writing, workers ------------------------------------------------------------------------------------------


@every
def test_identity_output_to_input_equals_together_on_a_chain_bitwise(settings: Settings) -> None:
    if settings.keys() & {"order", "workers"}:
        return
    assert same(run(**settings, order="output_to_input"), run(**settings))


def test_input_to_output_reads_inputs_anew_for_fixed_targets() -> None:
    """By hand, with exact solves."""
    net = mlp(5, 6, 4, 3)
    made = problems(net, closure_of(net, 0), 1.0, squared=True)
    wanted, (x, _) = params_of(net), batch(seed=0)
    solve = local.ProximalSolve(1.0)
    for (weight, bias), problem in made:
        a = x
        for number in (0, 2):
            if int(weight[0]) > number:
                a = torch.tanh(F.linear(a, wanted[f"{number}.weight"], wanted[f"{number}.bias"]))
        dw, db = solve(local.LocalProblem(a.unsqueeze(1), problem.weight, problem.bias, problem.target))
        wanted[weight] = wanted[weight] + dw[0]
        wanted[bias] = wanted[bias] + db[0]
    found = run(1, net, solver=solve, gamma=1.0, order="input_to_output")
    for n in wanted:
        close(found[n], wanted[n])


@pytest.mark.parametrize("order", ["output_to_input", "input_to_output"])
def test_orders_keep_random_numbers_and_buffers_of_the_first_run(order: Any) -> None:
    def net() -> nn.Sequential:
        torch.manual_seed(0)
        layers = [nn.Dropout(0.5), nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)]
        return nn.Sequential(*layers).double()

    one, two = net(), net()
    ends = []
    for model, settings in ((one, {}), (two, {"order": order})):
        torch.manual_seed(3)
        opt = lw.LocoProp(model, lr=1e-3, **settings)  # type: ignore[arg-type]
        opt.step(closure_of(model))
        ends.append(torch.rand(3))
    assert torch.equal(*ends)
    assert all(torch.equal(p, q) for p, q in zip(one.buffers(), two.buffers(), strict=True))
    alike = [torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True)]
    assert all(alike) == (order == "output_to_input") and all(alike[:2])


def test_a_closure_that_changes_its_calls_cannot_be_swept() -> None:
    net, runs = mlp(5, 6, 3), []

    def closure() -> Tensor:
        runs.append(1)
        x, y = batch()
        h = net[0](x)
        h = h if len(runs) == 1 else net[0](x).relu()
        return F.cross_entropy(net[2](h), y)

    before = params_of(net)
    with pytest.raises(Undefined, match=r"order=.output_to_input., the closure made other calls with 0\.weight"):
        lw.LocoProp(net, order="output_to_input", lr=1e-3).step(closure)
    assert same(params_of(net), before)


@every
def test_identity_written_as_gradients_and_taken_by_sgd_of_rate_1_it_is_the_same(settings: Settings) -> None:
    if "write" in settings:
        return
    wanted = run(**settings)
    net = mlp(5, 6, 4, 3)
    opt, outer = lw.LocoProp(net, write="grad", **settings), torch.optim.SGD(net.parameters(), lr=1.0)
    for step in range(3):
        before = params_of(net)
        opt.step(closure_of(net, step))
        assert same(params_of(net), before)
        outer.step()
    for n, p in net.named_parameters():
        close(p.detach(), wanted[n], 1e-12)


def test_written_gradients_replace_what_was_there_and_a_skipped_batch_leaves_none() -> None:
    net = mlp(5, 6, 3)
    opt = lw.LocoProp(net, write="grad")
    for p in net.parameters():
        p.grad = torch.full_like(p, 7.0)

    def backward() -> Tensor:
        loss = closure_of(net)()
        loss.backward()
        return loss

    opt.step(backward)
    found = [p.grad.clone() for p in net.parameters()]  # type: ignore[union-attr]
    assert all(g.abs().max() < 1 and g.any() for g in found)
    opt.step(lambda: closure_of(net)() * float("nan"))
    assert opt.skipped == 1 and all(p.grad is None for p in net.parameters())


@every
def test_identity_threads_give_the_same_bits(settings: Settings) -> None:
    if settings.keys() & {"order", "workers"}:
        return
    wanted = run(**settings)
    for workers in (1, 3, ("thread", 2)):
        assert same(run(**settings, workers=workers), wanted)


def test_identity_processes_give_the_same_bits() -> None:
    """One pool for many choices, since starting it takes seconds; layouts of every kind travel."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.norm = nn.Embedding(7, 6), nn.LayerNorm(6)
            self.conv, self.head = nn.Conv1d(6, 4, 3, padding=1), nn.Linear(4, 3)
            self.mix = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            h = (self.norm(self.embed(x)) @ self.mix).relu()
            return self.head(self.conv(h.transpose(1, 2)).tanh().mean(2))

    def steps(net: nn.Module, opt: lw.LocoProp) -> list[Tensor]:
        for seed in range(2):
            gen = torch.Generator().manual_seed(seed)
            x, y = torch.randint(7, (9, 5), generator=gen), torch.randint(3, (9,), generator=gen)
            opt.step(lambda x=x, y=y: F.cross_entropy(net(x), y))  # type: ignore[misc]
        assert opt.skipped == 0
        state = opt.state_dict()["state"]
        return [*params_of(net).values(), *(v for s in state.values() for v in s.values() if isinstance(v, Tensor))]

    pool = None
    for settings in ({}, CHOICES["elastic"], CHOICES["mirror"], CHOICES["adam"], CHOICES["fresh sgd"],
                     CHOICES["newton"], CHOICES["exact"], CHOICES["user"], CHOICES["grad"]):  # fmt: skip
        one, two = Net(), Net()
        here, away = lw.LocoProp(one, **settings), lw.LocoProp(two, **settings, workers=("process", 2))
        pool = away._executor = away._executor if pool is None else pool
        found = zip(steps(one, here), steps(two, away), strict=True)
        assert all(torch.equal(a, b) for a, b in found), settings
    net = mlp(5, 3)
    before = params_of(net)
    opt = lw.LocoProp(net, solver=lambda problem: (problem.weight, problem.bias), workers=("process", 1))
    opt._executor = pool  # type: ignore[assignment]
    with pytest.raises(BadInput, match="pickled"):
        opt.step(closure_of(net))
    assert same(params_of(net), before)
    pool._pool.shutdown()  # type: ignore[union-attr]


# State and bad batches ----------------------------------------------------------------------------------------------


@every
def test_identity_saved_and_resumed_it_goes_on_bitwise(settings: Settings) -> None:
    wanted = run(6, **settings)
    net = mlp(5, 6, 4, 3)
    opt = lw.LocoProp(net, **settings)
    for step in range(3):
        opt.step(closure_of(net, step))
    file = io.BytesIO()
    torch.save((net.state_dict(), opt.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other = mlp(5, 6, 4, 3, seed=9)
    resumed = lw.LocoProp(other, **settings)
    resumed.step(closure_of(other, 99))  # nothing of it may stay
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    for step in range(3, 6):
        resumed.step(closure_of(other, step))
    assert same(params_of(other), wanted)


def test_averages_of_other_parameters_are_refused() -> None:
    opt = lw.LocoProp(mlp(5, 3), regularizer=local.Elastic(0.1))
    state = opt.state_dict()
    with pytest.raises(BadInput, match="averages"):
        opt.load_state_dict({**state, "averages": {"0.weight": torch.zeros(2)}})


@every
@pytest.mark.parametrize("kind", ["nan input", "inf target"])
def test_identity_a_nan_batch_changes_nothing(settings: Settings, kind: str) -> None:
    net = mlp(5, 6, 3)
    if "layers" in settings:
        settings = {"layers": {"2": {"loss": "squared", "solver": local.ProximalSolve(1.0)}}}
    opt = lw.LocoProp(net, **settings)
    x, y = batch()
    bad = x.clone()
    if kind == "nan input":
        bad[3, 2] = float("nan")
    opt.step(lambda: F.mse_loss(net(x), F.one_hot(y, 3).double()))
    before, state = params_of(net), str(opt.state_dict())
    goal = F.one_hot(y, 3).double() * (float("inf") if kind == "inf target" else 1.0)
    opt.step(lambda: F.mse_loss(net(bad), goal))
    assert opt.skipped == 1 and same(params_of(net), before)
    assert str(opt.state_dict()).replace("'skipped': 1", "'skipped': 0") == state


BROKEN: dict[str, Settings] = {
    "target": {"target": lambda z, g, f: z / (z - z)},
    "solver": {"solver": lambda problem: (problem.weight / 0, problem.bias)},
    "regularizer": {"regularizer": lambda w, b, gamma, average: local.Pull(1.0, w / 0)},
    "local optimizer": {"solver": local.LocalSteps(60, torch.optim.SGD, "all"), "lr": 1e200, "loss": "squared"},
}


@pytest.mark.parametrize("settings", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("workers", [None, 2])
def test_a_choice_that_gives_nan_changes_nothing_either(settings: Settings, workers: Any) -> None:
    net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    layers = {"3": settings}
    opt = lw.LocoProp(net, layers=layers, lr=1e-3, workers=workers)
    before, buffers = params_of(net), [b.clone() for b in net.buffers()]
    opt.step(closure_of(net))
    assert opt.skipped == 1 and same(params_of(net), before) and not opt.state_dict()["state"]
    assert all(torch.equal(b, c) for b, c in zip(net.buffers(), buffers, strict=True))
    strict = lw.LocoProp(net, layers=layers, lr=1e-3, on_nonfinite="raise")
    with pytest.raises(NonFinite, match=r"3\.(weight|bias)|local problem"):
        strict.step(closure_of(net))
    assert same(params_of(net), before)


# Layers of every kind -----------------------------------------------------------------------------------------------


@one_in(2, case=zoo.cases(first_loss_only=True))
def test_exact_solves_and_threads_on_the_whole_zoo(case: zoo.Case) -> None:
    """Each layer, tied, looked up or elementwise, ends where its own problem's gradient is zero."""
    made = case.make()
    recorded = record(made.subject, made.loss)
    problems = [(layer, problem_of(recorded, layer, 0.5, IDENTITY)) for layer in recorded.layers]
    start = [(p.weight.clone(), None if p.bias is None else p.bias.clone()) for _, p in problems]
    opt = lw.LocoProp(made.subject, solver=local.ProximalSolve(2.0), gamma=0.5, workers=2)
    opt.step(made.loss)
    assert opt.skipped == 0
    forms = opt.describe()
    for (layer, problem), (w, b) in zip(problems, start, strict=True):
        anchored = local.LocalProblem(problem.a, w, b, problem.target, prox=2.0, rest=problem.rest)
        here = torch.cat(
            [t.flatten() for t in local.local_gradient(anchored, problem.weight, problem.bias) if t is not None]
        )
        first = torch.cat([t.flatten() for t in local.local_gradient(anchored) if t is not None])
        assert here.norm() <= 1e-9 * max(1e-3, float(first.norm()))
        assert forms[layer.name].startswith("squared loss")
    assert set(forms) == set(made.params)


KINDS: dict[str, tuple[str, str, str]] = {
    "embedding": ("embedding_pool", "0.weight", "squared loss"),
    "reused": ("reused", "", "uses together"),
    "tied to its transpose": ("tied_autoencoder", "", "no local problem"),
}


@pytest.mark.parametrize(("name", "parameter", "form"), KINDS.values(), ids=KINDS)
def test_describe_says_how_each_parameter_moved(name: str, parameter: str, form: str) -> None:
    made = zoo.case(name).make()
    opt = lw.LocoProp(made.subject)
    with pytest.raises(BadInput, match="none yet"):
        opt.describe()
    opt.step(made.loss)
    found = opt.describe()
    assert set(found) == set(made.params)
    assert form in (found[parameter] if parameter else " ".join(found.values()))


def test_norms_attention_and_recurrent_layers_have_local_problems() -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            self.lstm, self.head = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(self.block(x))[0][:, -1])

    net = Net().double()
    x, y = torch.randn(6, 4, 8, dtype=torch.float64), torch.randint(3, (6,))
    opt = lw.LocoProp(net, lr=1e-3)
    first = opt.step(lambda: F.cross_entropy(net(x), y))
    found = opt.describe()
    assert not any("no local problem" in form for form in found.values()), found
    assert found["block.self_attn.in_proj_weight"].startswith("squared loss")
    assert found["block.linear1.weight"].startswith("matching loss of relu")
    assert found["block.norm1.weight"].startswith("squared") and found["block.norm1.bias"] == "with block.norm1.weight"
    assert "4 uses together" in found["lstm.weight_hh_l0"]
    for _ in range(20):
        last = opt.step(lambda: F.cross_entropy(net(x), y))
    assert last < 0.5 * first


@pytest.mark.parametrize(("second", "form"), [(torch.tanh, "matching loss of tanh"), (torch.sigmoid, "squared loss")])
def test_a_layer_called_twice_has_one_problem_whose_rows_alternate(second: Any, form: str) -> None:
    """So that slices of rows hold both uses; functions that differ mean the squared loss."""
    net = mlp(5, 5, 3)
    x, y = batch()

    def loss() -> Tensor:
        return F.cross_entropy(net[2](second(net[0](net[0](x).tanh()))), y)

    recorded = record(net, loss)
    (layer,) = [layer for layer in recorded.layers if layer.name == "0.weight"]
    problem = problem_of(recorded, layer, 1.0, layer.transfer)
    assert torch.equal(problem.a[0::2, 0], x)
    close(problem.a[1::2, 0], net[0](x).tanh().detach(), 1e-15)
    opt = lw.LocoProp(net)
    opt.step(loss)
    assert opt.describe()["0.weight"].startswith(form) and "2 uses together" in opt.describe()["0.weight"]


def test_functions_without_a_matching_loss_are_said_once() -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4), nn.SELU(),
                        nn.Linear(4, 3)).double()  # fmt: skip
    opt = lw.LocoProp(net)
    with pytest.warns(SquaredInstead) as said:
        for _ in range(3):
            opt.step(closure_of(net))
    assert [str(w.message).split(",")[0] for w in said] == ["gelu", "selu"]
    assert "not monotone" in str(said[0].message) and "tabulated" in str(said[1].message)
    assert "gelu has no matching loss" in opt.describe()["0.weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lw.LocoProp(net, loss="squared").step(closure_of(net))
        lw.LocoProp(net, loss=local.TANH).step(closure_of(net))


def test_a_rearranged_view_of_a_parameter_is_a_layer() -> None:
    """`x @ w.T`, `w.view(...)`: the parameter moves as if it were used as it is."""
    x, y = batch()
    made = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    uses: list[Callable[[Tensor], Tensor]] = [
        lambda w: F.linear(x, w), lambda w: x @ w.t(), lambda w: x @ w.view(3, 5, 1).squeeze(2).mT,
    ]  # fmt: skip
    for settings in ({}, {"solver": local.ProximalSolve(1.0)}, {"solver": local.LocalSteps(3, torch.optim.Adam)}):
        found = []
        for use in uses:
            params = {"w": made.clone().requires_grad_()}
            opt = lw.LocoProp(params, **settings)  # type: ignore[arg-type]
            opt.step(lambda use=use, params=params: F.cross_entropy(use(params["w"]), y))  # type: ignore[misc]
            assert "no local problem" not in opt.describe()["w"]
            found.append(params["w"].detach())
        for other in found[1:]:
            close(other, found[0], 1e-13)


def test_parameters_without_a_local_problem_take_steps_beside_a_closed_form() -> None:
    """Ten of TFRMSProp at 5e-5 times lr, along γ times the gradient."""
    made, other = zoo.case("tied_autoencoder").make(), zoo.case("tied_autoencoder").make()
    opt = lw.LocoProp(made.subject, solver=local.ProximalSolve(1.0), lr=0.5, gamma=2.0, momentum=0.99)
    opt.step(made.loss)
    names = [n for n, form in opt.describe().items() if "no local problem" in form]
    plain = lw.LocoProp(other.subject, lr=0.5 * 5e-5, gamma=2.0, momentum=0.99)
    plain.step(other.loss)
    assert names and all(torch.equal(made.params[n], other.params[n]) for n in names)


# Keywords that change nothing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["decay", "momentum", "eps"])
def test_a_number_of_tf_rmsprop_is_refused_beside_another_local_optimizer(word: str) -> None:
    sgd, net = local.LocalSteps(optimizer=torch.optim.SGD), mlp(3, 4, 2)
    with pytest.raises(BadInput, match=f"{word}=0.5 changes nothing here: it belongs to TFRMSProp"):
        lw.LocoProp(net, solver=sgd, **{word: 0.5})
    with pytest.raises(BadInput, match=rf"in layers\['0'\], {word}=0.5 changes nothing here"):
        lw.LocoProp(net, layers={"0": {"solver": sgd, word: 0.5}})
    lw.LocoProp(net, layers={"0": {"solver": sgd}}, **{word: 0.5})
    lw.LocoProp(net, solver=sgd, layers={"0": {"solver": local.LocalSteps(), word: 0.5}})
    lw.LocoProp(net, solver=local.ProximalSolve(1.0), **{word: 0.5})  # of parameters without a local problem


def test_rows_of_local_steps_are_refused_beside_another_solver() -> None:
    with pytest.raises(BadInput, match="rows='all' changes nothing here: it belongs to LocalSteps"):
        lw.LocoProp(mlp(3, 4, 2), solver=local.ProximalSolve(1.0), rows="all")
