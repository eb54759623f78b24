"""Whitening: local problems measured by running second moments, beside the equations of FOOF and K-FAC."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from local_cases import biases, each, groups
from torch import Tensor, nn
from torch.nn import functional as F

import layerwise as lw
from layerwise import local
from layerwise.errors import BadInput
from layerwise.local import LocalProblem, LocalSteps, Metric, Pull, Whitening, whitened
from layerwise.local.metric import second_moment
from layerwise.local.transfer import IDENTITY, Transfer

LABELS = torch.arange(10) % 3
DECAY, DAMPING = 0.8, 0.1


class Twice(nn.Module):
    """A table that is also the output layer, without a local problem, beside a layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.middle = nn.Embedding(5, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.middle(torch.tanh(self.middle(self.table(x)))) @ self.table.weight.T


def nets() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    found = {
        "dense": nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3, bias=False)),
        "conv": nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)),
        "embedding": nn.Sequential(nn.Embedding(5, 4), nn.Tanh(), nn.Linear(4, 3)),
        "batch norm": nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)),
        "tied": Twice(),
    }
    return {name: net.double() for name, net in found.items()}


def batch(name: str, t: int) -> Tensor:
    generator = torch.Generator().manual_seed(t)
    if name in ("embedding", "tied"):
        return torch.randint(5, (10,), generator=generator)
    return torch.randn(*((10, 2, 4, 4) if name == "conv" else (10, 6)), generator=generator).double()


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(net(x), LABELS)


def rows_of(module: nn.Module, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs with a 1 for a bias, `[K,R,I']`, and output gradients `[K,R,O]`, written out for each kind of layer."""
    bias = getattr(module, "bias", None) is not None
    if isinstance(module, nn.Conv2d):
        a, g = F.unfold(a, module.kernel_size).mT.flatten(0, 1), g.flatten(2).mT.flatten(0, 1)
        a, g = (t.unflatten(1, (module.groups, -1)).transpose(0, 1) for t in (a, g))
    elif isinstance(module, nn.Embedding):
        a, g = F.one_hot(a, module.num_embeddings).double()[None], g[None]
    elif isinstance(module, nn.BatchNorm1d):  # of each unit, its scaled value by itself
        a, g = ((a - a.mean(0)) / (a.var(0, unbiased=False) + module.eps).sqrt()).T.unsqueeze(-1), g.T.unsqueeze(-1)
    else:
        a, g = a[None], g[None]
    return (F.pad(a, (0, 1), value=1.0) if bias else a), g


def layers_of(net: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Rows of each module with a weight, over all its calls, by hooks and one backward pass."""
    seen: list[tuple[str, nn.Module, Tensor, Tensor]] = []

    def keep(name: str, module: nn.Module, given: Any, out: Tensor) -> None:
        seen.append((name, module, given[0].detach(), out))

    handles = [m.register_forward_hook(partial(lambda name, *rest: keep(name, *rest), name))
               for name, m in net.named_modules() if hasattr(m, "weight")]  # fmt: skip
    loss = loss_of(net, x)
    for handle in handles:
        handle.remove()
    gs = torch.autograd.grad(loss, [out for *_, out in seen])
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for (name, module, a, _), g in zip(seen, gs, strict=True):
        found.setdefault(name, []).append(rows_of(module, a, g))
    return {name: tuple(torch.cat(t, 1) for t in zip(*parts, strict=True)) for name, parts in found.items()}  # type: ignore[misc]


def damped(second: Tensor, damping: float) -> Tensor:
    eye = torch.eye(second.shape[-1]).double()
    return second + damping * second.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * eye


def moved_by(module: Any, change: Tensor) -> None:
    """Add `[K,O,I']` to a weight and bias, the last column."""
    with torch.no_grad():
        if getattr(module, "bias", None) is not None:
            module.bias += change[..., -1].reshape(module.bias.shape)
            change = change[..., :-1]
        flat = change.mT if isinstance(module, nn.Embedding) else change
        module.weight += flat.reshape(module.weight.shape)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("name", nets())
def test_one_plain_step_is_foofs_and_with_natural_targets_kfacs(name: str, outputs: bool, every: int) -> None:
    """`W ← W − lr γ (B̄ + λ)⁻¹ G (Ā + λ)⁻¹` with running means of both factors, or of A alone, at every k-th batch."""
    ours, theirs = nets()[name], nets()[name]
    target = local.NaturalStep(2.0, damping=0.3, decay=DECAY) if outputs else local.GradientStep(2.0)
    opt = lw.LocoProp(
        ours, preset="gradient-descent", target=target, regularizer=Whitening(DECAY, DAMPING, every), lr=0.02
    )
    means: dict[str, list[Tensor]] = {}
    for t in range(3 if every == 1 else 5):
        x = batch(name, t)
        opt.step(lambda x=x: loss_of(ours, x))  # type: ignore[misc]
        rows, lone = layers_of(theirs, x), {}
        if name == "tied":
            rows.pop("table")
            lone = {"table.weight": torch.autograd.grad(loss_of(theirs, x), theirs.table.weight)[0]}  # type: ignore[union-attr, arg-type]
        for key, (a, g) in rows.items():
            now = [a.mT @ a / a.shape[1], g.mT @ g]
            old = means.get(key, now)
            new = [DECAY * m + (1 - DECAY) * n for m, n in zip(old, now, strict=True)]
            means[key] = [new[0] if t % every == 0 else old[0], new[1]]
            change = g.mT @ a @ torch.linalg.inv(damped(means[key][0], DAMPING))
            if outputs:
                change = torch.linalg.inv(damped(means[key][1], 0.3)) @ change
            module: Any = theirs.get_submodule(key)
            moved_by(module, -0.02 * 2.0 * change)
        for key, grad in lone.items():
            theirs.get_parameter(key).data -= 0.02 * 2.0 * grad
    for (key, p), q in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(p, q[1], rtol=1e-12, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")


def problem_with(
    k: int, bias: bool, f: Transfer = IDENTITY, table: bool = False, o: int = 4, **more: Any
) -> LocalProblem:  # fmt: skip
    torch.manual_seed(0)
    r, i = 12, 3
    weight, b = torch.randn(k, o, i).double(), torch.randn(k, o).double() if bias else None
    a = torch.randint(i, (r,)) if table else torch.randn(r, k, i).double()
    metric = Metric(second_moment(a, i, bias, weight) * 1.5, 0.2)
    return LocalProblem(a, weight, b, f.f(torch.randn(r, k, o).double()), f, metric=metric, **more)


def pulls(problem: LocalProblem) -> tuple[Pull, ...]:
    bias = None if problem.bias is None else torch.ones_like(problem.bias)
    return Pull(0.3, torch.zeros_like(problem.weight), bias), Pull(0.2)


def close(ours: Any, theirs: Any, tolerance: float = 1e-10) -> None:
    for p, q in zip(ours, theirs, strict=True):
        assert (p is None) == (q is None)
        if p is not None:
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("rows", "outputs"), [("all", 4), (3, 4), (5, 6), (5, 4)])
@each
@groups
@biases
def test_plain_steps_are_those_in_white_coordinates(
    f: Transfer, k: int, bias: bool, rows: Any, outputs: int
) -> None:  # fmt: skip
    """T gradient steps with quadratic terms, in the metric and on inputs and weights that were transformed: on all
    rows, and on slices with fewer rows than outputs or more, some of which come round to the first rows again."""
    problem = problem_with(k, bias, f, o=outputs)
    problem = replace(problem, pulls=pulls(problem), prox=2.0)
    steps = LocalSteps(5, torch.optim.SGD, rows, "constant", form="plain")
    white, plain = whitened(problem)
    assert white.metric is None and white.bias is None
    fit = local.local_loss(replace(problem, metric=None, pulls=(), prox=None))
    held = 0.15 * (white.weight - white.pulls[0].weight).square().sum()
    torch.testing.assert_close(local.local_loss(white), fit + held)
    close(steps(problem, 0.02), plain(steps(white, 0.02)))


@biases
def test_a_looked_up_table_has_a_diagonal_metric(bias: bool) -> None:
    problem = problem_with(1, bias, table=True)
    steps = LocalSteps(5, torch.optim.SGD, "all", "constant")
    white, plain = whitened(problem)
    close(steps(problem, 0.02), plain(steps(white, 0.02)))
    a = F.one_hot(problem.a, 3).double()
    torch.testing.assert_close(problem.metric.second.diag_embed()[0], 1.5 * a.T @ a / 12)  # type: ignore[union-attr]


@biases
@groups
def test_the_exact_solve_is_damped_by_the_metric(k: int, bias: bool) -> None:
    """`[ΔW Δb] = −Σ_r (z_r − y_r) a_rᵀ (AᵀA + M/η)⁻¹`, and so for the iterative solvers."""
    problem = problem_with(k, bias)
    plain = replace(problem, metric=None)
    a = plain.a.transpose(0, 1)
    a = F.pad(a, (0, 1), value=1.0) if bias else a
    residual = (local.problem.predict(plain) - plain.target).transpose(0, 1)
    m = damped(problem.metric.second, 0.2)  # type: ignore[union-attr]
    expected = -residual.mT @ a @ torch.linalg.inv(a.mT @ a + m / 0.7)
    white, back = whitened(replace(problem, prox=0.7))
    pair = (expected[..., :-1], expected[..., -1]) if bias else (expected, None)
    close(back(local.ProximalSolve(0.7)(white)), pair)
    for solver in (local.ConjugateGradient(200, 0.0), local.Newton(3)):
        close(back(solver(white)), pair, 1e-4)


@pytest.mark.parametrize("ball", [local.SpectralNorm(0.1, steps=None), local.FrobeniusNorm(0.1), local.RowNorm(0.1)])
def test_a_norm_ball_is_one_of_white_weights(ball: Any) -> None:
    """One step of a conditional gradient is `−r vertex(G M^{-1/2}) M^{-1/2}`; projected steps of a large rate agree."""
    ours = nets()["dense"]
    x, before = batch("dense", 0), [p.detach().clone() for p in ours.parameters()]
    rows = layers_of(ours, x)
    settings: dict[str, Any] = {"regularizer": [ball, Whitening(DECAY, DAMPING)], "target": local.GradientStep(1.0)}
    lw.LocoProp(ours, solver=local.ConditionalGradient(), lr=1.0, **settings).step(lambda: loss_of(ours, x))
    a, g = rows["0"]
    values, basis = torch.linalg.eigh(damped(a.mT @ a / 10, DAMPING)[0])
    root = (basis / values.sqrt()) @ basis.T
    expected = -0.1 * ball.vertex(g.mT @ a @ root) @ root
    found = torch.cat((ours[0].weight - before[0], (ours[0].bias - before[1])[:, None]), 1)  # type: ignore[index, operator]
    torch.testing.assert_close(found, expected[0], rtol=1e-10, atol=1e-10)
    if isinstance(ball, local.SpectralNorm):
        theirs = nets()["dense"]
        steps = LocalSteps(1, torch.optim.SGD, "all", "constant")
        lw.LocoProp(theirs, solver=steps, lr=1e9, **settings).step(lambda: loss_of(theirs, x))
        close(theirs.parameters(), ours.parameters(), 1e-6)


def test_the_rule_of_steps_measures_in_the_metric() -> None:
    """The decrease of the squared loss in the metric is the objective's own."""
    problem = problem_with(1, True)
    heard: list[float] = []

    def listen(d: Any, c: Any, outer: float) -> bool:
        heard[:] = list(d)
        return False

    values = []
    for count in range(5):
        moved = LocalSteps(count + 1, torch.optim.SGD, "all", "constant", stop=listen)(problem, 0.02)
        white, _ = whitened(problem)
        at = problem.metric.white(problem.weight + moved[0], problem.bias + moved[1])  # type: ignore[union-attr, operator]
        values.append(float(local.local_loss(white, at)))
    exact = [old - new for old, new in pairwise(values[:4])]
    assert heard[1:] == pytest.approx(exact, rel=1e-9) and min(exact) > 0


SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "squared": {"loss": "squared", "solver": local.ProximalSolve(0.1), "target": local.NaturalStep(1.0, decay=0.9)},
    "newton": {"solver": local.Newton(2), "target": local.GradientStep(0.5, clip="range"), "lr": 0.1},
    "user's": {"solver": lambda problem: (problem.weight * 0.01 + 0.01, None), "lr": 0.1},
    "stopping": {"solver": LocalSteps(6, stop=local.marginal_value)},
    "muon": {"solver": local.ConditionalGradient(2), "lr": 1.0, "target": local.Mirror(1.0)},
    "polyak": {
        "solver": LocalSteps(2, torch.optim.Adam),
        "target": local.NaturalStep(1.0, per=local.Polyak(), decay=0.9),
    },
    "adamw": {"write": "grad"},
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("name", nets())
def test_every_choice_takes_it_and_resumes_bitwise(name: str, kind: str, every: int) -> None:
    more = SETTINGS[kind]
    terms: list[Any] = [
        Whitening(DECAY, DAMPING, every),
        local.SpectralNorm(0.05) if kind == "muon" else local.Elastic(0.1),
    ]

    def run(cut: int | None, workers: Any = None) -> list[Tensor]:
        net = nets()[name]
        make = partial(lw.LocoProp, net, regularizer=terms, workers=workers, **more)
        opt = make()
        outer = torch.optim.AdamW(net.parameters(), lr=0.01)
        for t in range(5):
            if t == cut:
                saved = copy.deepcopy(opt.state_dict())
                opt = make()
                opt.load_state_dict(saved)
            opt.step(lambda t=t: loss_of(net, batch(name, t)))
            if more.get("write"):
                outer.step()
        return [p.detach().clone() for p in net.parameters()]

    whole = run(None)
    for other in (run(2), run(None, workers=2)):
        assert all(torch.equal(p, q) for p, q in zip(whole, other, strict=True))
    assert all(
        torch.isfinite(p).all() and not torch.equal(p, q) for p, q in zip(whole, nets()[name].parameters(), strict=True)
    )


@pytest.mark.slow
def test_processes_give_the_same_bits() -> None:
    def run(workers: Any) -> list[Tensor]:
        net = nets()["dense"]
        opt = lw.LocoProp(net, regularizer=Whitening(), workers=workers)
        for t in range(2):
            opt.step(lambda t=t: loss_of(net, batch("dense", t)))
        return [p.detach().clone() for p in net.parameters()]

    assert all(torch.equal(p, q) for p, q in zip(run(None), run(("process", 1)), strict=True))


@pytest.mark.parametrize("weights", ["adam", "sgd", local.ProximalSolve(1.0)])
def test_altmin_takes_it(weights: Any) -> None:
    net, plain = nets()["dense"], nets()["dense"]
    for model, term in ((net, Whitening()), (plain, None)):
        opt = lw.AltMin(model, weights=weights, regularizer=term)
        for t in range(3):
            opt.step(lambda t=t, model=model: loss_of(model, batch("dense", t)))  # type: ignore[misc]
    assert all(torch.isfinite(p).all() for p in net.parameters())
    assert not any(torch.equal(p, q) for p, q in zip(net.parameters(), plain.parameters(), strict=True))


def test_a_bad_batch_changes_neither_weights_nor_means() -> None:
    net = nets()["dense"]
    opt = lw.LocoProp(net, regularizer=Whitening(), target=local.NaturalStep(1.0, decay=0.9))
    opt.step(lambda: loss_of(net, batch("dense", 0)))
    before, state = [p.detach().clone() for p in net.parameters()], copy.deepcopy(opt.state_dict())
    for bad in (math.nan, 1e200):
        opt.step(lambda bad=bad: loss_of(net, batch("dense", 1) * bad))  # type: ignore[misc]
    assert opt.skipped == 2 and all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    assert all(torch.equal(t, state["averages"][key]) for key, t in opt.state_dict()["averages"].items())


def test_inputs_that_are_zero_move_nothing() -> None:
    net = nn.Sequential(nn.Linear(6, 3, bias=False)).double()
    before, nothing = net[0].weight.detach().clone(), batch("dense", 0) * 0
    for solver in (LocalSteps(2, torch.optim.SGD), local.ConditionalGradient()):
        terms = [Whitening(), local.FrobeniusNorm(0.1)]
        opt = lw.LocoProp(net, regularizer=terms, solver=solver, lr=1.0)
        opt.step(lambda: loss_of(net, nothing))
    assert torch.equal(net[0].weight, before)


def test_the_means_start_anew_where_a_bias_is_frozen() -> None:
    net = nets()["dense"]
    opt = lw.LocoProp(net, regularizer=Whitening())
    opt.step(lambda: loss_of(net, batch("dense", 0)))
    net[0].bias.requires_grad_(False)  # type: ignore[index, union-attr, operator]
    opt.step(lambda: loss_of(net, batch("dense", 1)))
    assert opt.state_dict()["averages"]["0.weight inputs"].shape == (1, 6, 6)


def test_an_inverse_is_computed_at_every_kth_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a batch was refused, which counts for none, and of a copy, which computes it once more."""
    asked: list[int] = []
    plain = local.metric.inverse
    monkeypatch.setattr(local.metric, "inverse", lambda *args: asked.append(1) or plain(*args))
    net = nets()["dense"]
    opt = lw.LocoProp(net, regularizer=Whitening(every=3))
    for t, (factor, count) in enumerate([(1, 2), (1, 2), (math.nan, 2), (1, 2), (1, 4), (1, 4)]):
        opt.step(lambda t=t, factor=factor: loss_of(net, batch("dense", t) * factor))  # type: ignore[misc]
        assert len(asked) == count
    assert opt.skipped == 1
    again = copy.deepcopy(opt)
    again.step(lambda: loss_of(again._model, batch("dense", 9)))
    assert len(asked) == 6


def test_saved_means_of_another_size_are_refused() -> None:
    net = nets()["dense"]
    opt = lw.LocoProp(net, regularizer=Whitening(every=2))
    opt.step(lambda: loss_of(net, batch("dense", 0)))
    saved = copy.deepcopy(opt.state_dict())
    for bad in (torch.tensor(0), torch.tensor(1.0), torch.ones(2)):
        saved["averages"]["0.weight inputs age"] = bad
        with pytest.raises(BadInput, match="averages"):
            opt.load_state_dict(saved)
    for wrong in (torch.eye(5).double()[None], torch.zeros(2, 7, 6), 3.0):
        saved = copy.deepcopy(opt.state_dict())
        saved["averages"]["0.weight inputs"] = wrong
        with pytest.raises(BadInput, match="averages"):
            opt.load_state_dict(saved)


def test_wrong_settings_are_refused() -> None:
    for wrong in ({"decay": 1.0}, {"damping": 0.0}, {"damping": math.inf}, {"every": 0}, {"every": 1.5}):
        with pytest.raises(BadInput, match="Whitening needs"):
            Whitening(**wrong)
    with pytest.raises(BadInput, match="NaturalStep needs"):
        local.NaturalStep(decay=1.0)
    problem = problem_with(1, True)
    functions: list[Any] = [local.local_loss, local.local_gradient, local.ProximalSolve(1.0), local.Newton()]
    functions += [local.Memory(), local.Anderson(), local.ConjugateGradient(), local.Spectral()]
    for function in [*functions, local.ConditionalGradient()]:
        with pytest.raises(BadInput, match="metric"):
            function(problem)
    with pytest.raises(BadInput, match="gram"):
        LocalSteps(2, torch.optim.SGD, form="gram")(problem, 0.1)
    net = nets()["dense"]
    two = lw.LocoProp(net, regularizer=[Whitening(), Whitening(0.5)])
    with pytest.raises(BadInput, match="one metric"):
        two.step(lambda: loss_of(net, batch("dense", 0)))
    with pytest.raises(BadInput, match="metric"):
        lw.LocoProp(net, solver=local.Memory(), regularizer=Whitening()).step(lambda: loss_of(net, batch("dense", 0)))
