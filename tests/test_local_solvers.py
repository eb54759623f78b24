"""Targets, regularizers and solvers as values: each against the local objective written out, and against each other."""

from __future__ import annotations

import pickle
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from local_cases import TRANSFERS, biases, each, groups
from torch import Tensor

import layerwise as lw
from layerwise import local
from layerwise.errors import BadInput
from layerwise.local import transfer as tr
from layerwise.local.problem import LocalProblem, Pull, local_gradient, local_loss, predict, target_m
from layerwise.local.solvers.closed import largest_curvature, prox_step, spectral_step
from layerwise.local.solvers.steps import StepPlan, local_steps
from layerwise.local.solvers.workspace import Owned
from layerwise.local.targets import fill_in
from layerwise.local.transfer import IDENTITY, RELU, SOFTMAX, TANH, Transfer

GAMMA = 3.0


def problem_of(
    f: Transfer = IDENTITY, k: int = 1, bias: bool = True, r: int = 24, i: int = 6, o: int = 5, *, clip: Any = None,
    prox: float | None = None, pulls: bool = False, table: bool = False, seed: int = 0,
) -> LocalProblem:  # fmt: skip
    gen = torch.Generator().manual_seed(seed)
    new = partial(torch.randn, dtype=torch.float64, generator=gen)
    a = torch.randint(i, (r,), generator=gen) if table else new(r, k, i)
    w, b = new(k, o, i) / i**0.5, new(k, o) if bias else None
    z = predict(LocalProblem(a, w, b, torch.zeros(r, k, o, dtype=torch.float64)))
    centres = (Pull(0.7, new(k, o, i), None if b is None else new(k, o)), Pull(0.2, torch.zeros_like(w)))
    return LocalProblem(a, w, b, target_m(z, new(r, k, o) / 5, GAMMA, f, clip), f, prox, pulls=centres if pulls else ())


def joined(update: tuple[Tensor, Tensor | None]) -> Tensor:
    w, b = update
    return w.flatten() if b is None else torch.cat((w.flatten(), b.flatten()))


def moved(problem: LocalProblem, update: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    dw, db = update
    return problem.weight + dw, None if problem.bias is None or db is None else problem.bias + db


def close(x: Tensor, y: Tensor, rtol: float = 1e-10) -> None:
    torch.testing.assert_close(x, y, rtol=0, atol=rtol * float(y.abs().max()))


def minimiser(problem: LocalProblem) -> Tensor:
    """The squared problem's, from its dense Hessian and gradient by autograd: nothing of the solvers in it."""
    start = joined((problem.weight, problem.bias))

    def loss(x: Tensor) -> Tensor:
        w = x[: problem.weight.numel()].view_as(problem.weight)
        return local_loss(problem, w, None if problem.bias is None else x[w.numel() :].view_as(problem.bias))

    h = torch.autograd.functional.hessian(loss, start)
    g = torch.autograd.functional.jacobian(loss, start)
    return -torch.linalg.solve(h, g)


# Targets ------------------------------------------------------------------------------------------------------


@each
@groups
@biases
def test_identity_first_local_gradient_is_gamma_times_backprop(f: Transfer, k: int, bias: bool) -> None:
    problem = problem_of(f, k, bias)
    w = problem.weight.clone().requires_grad_()
    b = None if problem.bias is None else problem.bias.clone().requires_grad_()
    z = predict(problem, w, b)
    loss = (f.f(z) * torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view_as(z)).square().sum()
    g, *wanted = torch.autograd.grad(loss, [z, w] if b is None else [z, w, b])
    made = local.GradientStep(GAMMA)(z.detach(), g, f)
    found = local_gradient(replace(problem, target=made))
    close(joined(found), GAMMA * torch.cat([t.flatten() for t in wanted]), 1e-12)


def test_identity_first_local_gradient_of_a_convolution_is_gamma_times_backprop() -> None:
    x, w = torch.randn(4, 2, 5, 5, dtype=torch.float64), torch.randn(3, 2, 3, 3, dtype=torch.float64).requires_grad_()
    z = F.conv2d(x, w)
    g, wanted = torch.autograd.grad(z.tanh().square().sum(), [z, w])
    a = F.unfold(x, 3).transpose(1, 2).reshape(-1, 1, 18)
    rows = [t.detach().flatten(2).transpose(1, 2).reshape(-1, 1, 3) for t in (z, g)]
    problem = LocalProblem(a, w.detach().view(1, 3, 18), None, local.GradientStep(GAMMA)(*rows, TANH), TANH)
    close(local_gradient(problem)[0].view_as(w), GAMMA * wanted, 1e-12)


@each
def test_mirror_targets_are_in_the_range_and_agree_to_first_order(f: Transfer) -> None:
    z, g = torch.randn(40, 1, 4, dtype=torch.float64), torch.randn(40, 1, 4, dtype=torch.float64)
    far = local.Mirror(50.0)(z, g, f)
    close(f.project(far), far, 1e-12)
    if f.is_squared:
        close(far, local.GradientStep(50.0)(z, g, f), 1e-14)
    small = (f.f(z) - local.Mirror(1e-6)(z, g, f)) / 1e-6
    torch.testing.assert_close(small, torch.func.jvp(f.f, (z,), (g,))[1], rtol=0, atol=1e-4)


@each
def test_identity_targets_clipped_into_the_range(f: Transfer) -> None:
    z, g = torch.randn(40, 1, 4, dtype=torch.float64), 5 * torch.randn(40, 1, 4, dtype=torch.float64)
    found = local.GradientStep(GAMMA, clip="range")(z, g, f)
    assert found.min() >= f.low - 1e-12 and found.max() <= f.high + 1e-12
    close(found, f.project(f.f(z) - GAMMA * g), 1e-14)


def test_gamma_per_sample_is_gamma_times_the_batch() -> None:
    z, g = torch.randn(8, 1, 3, dtype=torch.float64), torch.randn(8, 1, 3, dtype=torch.float64)
    target = fill_in(local.GradientStep(per="sample"), 16.0)
    assert torch.equal(target(z, g, TANH), local.GradientStep(16.0)(z, g, TANH))
    for wrong in ({"gamma": 0.0}, {"gamma": float("inf")}, {"per": "row"}, {"clip": "both"}):
        with pytest.raises(BadInput):
            local.GradientStep(**wrong)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="no step size"):
        local.Mirror()(z, g, TANH)


def test_identity_relu_matching_loss_is_zero_where_both_are_negative() -> None:
    a, y = -torch.rand(50, dtype=torch.float64), -torch.rand(50, dtype=torch.float64)
    assert not (RELU.f(a) - RELU.project(y)).any()
    assert not RELU.gap(a, RELU.project(y)).any()
    assert not RELU.bregman(a, y).any()
    assert RELU.bregman(a + 2, y).min() > 0


# Regularizers -------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("prox", [None, 0.3])
@pytest.mark.parametrize("table", [False, True], ids=["rows", "table"])
def test_gradient_with_quadratic_terms_is_that_of_the_local_loss(f: Transfer, prox: float | None, table: bool) -> None:
    problem = problem_of(f, prox=prox, pulls=True, table=table)
    for shift in (0.0, 0.1):
        w, b = ((t + shift).requires_grad_() for t in (problem.weight, problem.bias))  # type: ignore[operator]
        wanted = torch.autograd.grad(local_loss(problem, w, b), [w, b])
        close(joined(local_gradient(problem, w.detach(), b.detach())), joined(tuple(wanted)), 1e-12)  # type: ignore[arg-type]
        if not shift:
            close(joined(local_gradient(problem)), joined(tuple(wanted)), 1e-12)  # type: ignore[arg-type]


def test_regularizers_are_the_terms_they_say() -> None:
    w, b = torch.randn(1, 3, 4, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64)
    average = (torch.randn_like(w), torch.randn_like(b))
    base = problem_of(i=4, o=3)
    base = replace(base, weight=w, bias=b)
    at = (w + 1, b - 1)

    def term(pull: Pull) -> Tensor:
        return local_loss(replace(base, pulls=(pull,)), *at) - local_loss(base, *at)

    close(term(local.Proximal(0.4)(w, b, GAMMA, None)), torch.tensor((12 + 3) / 0.8, dtype=torch.float64))
    close(term(local.WeightDecay(0.1)(w, b, GAMMA, None)), GAMMA * 0.05 * joined(at).square().sum())
    close(term(local.Elastic(0.1)(w, b, GAMMA, average)), GAMMA * 0.05 * (joined(at) - joined(average)).square().sum())
    for make in (lambda: local.Proximal(0.0), lambda: local.WeightDecay(-1.0), lambda: local.Elastic(0.1, 1.0),
                 lambda: Pull(-1.0), lambda: local.Elastic(0.1)(w, b, GAMMA, None)):  # fmt: skip
        with pytest.raises(BadInput):
            make()


@pytest.mark.parametrize("f", [IDENTITY, TANH], ids=lambda t: t.name)
@pytest.mark.parametrize("form", ["plain", "gram"])
@groups
def test_local_steps_with_quadratic_terms_equal_autograd(f: Transfer, form: Any, k: int) -> None:
    if form == "gram" and f is TANH:
        form = "auto"
    problem = problem_of(f, k, prox=0.5, pulls=True)
    w, b = problem.weight.clone().requires_grad_(), problem.bias.clone().requires_grad_()  # type: ignore[union-attr]
    optimizer = torch.optim.SGD([w, b], lr=1e-2, momentum=0.9)
    for _ in range(6):
        optimizer.zero_grad()
        local_loss(problem, w, b).backward()
        optimizer.step()
    make = partial(torch.optim.SGD, momentum=0.9)
    solver = local.LocalSteps(6, make, "all", "constant", form=form)
    close(joined(moved(problem, solver(problem, 1e-2))), joined((w.detach(), b.detach())), 1e-12)


@pytest.mark.parametrize("f", [IDENTITY, TANH, SOFTMAX], ids=lambda t: t.name)
@pytest.mark.parametrize("rows", ["all", 7])
@pytest.mark.parametrize("prox", [None, 0.4])
def test_a_looked_up_table_is_a_layer_on_one_hot_rows(f: Transfer, rows: Any, prox: float | None) -> None:
    for bias in (True, False):
        table = problem_of(f, bias=bias, table=True, prox=prox, pulls=prox is not None)
        dense = replace(table, a=F.one_hot(table.a, 6).double().unsqueeze(1))
        close(predict(table), predict(dense), 1e-15)
        solver = local.LocalSteps(9, torch.optim.SGD, rows)
        close(joined(solver(table, 1e-2)), joined(solver(dense, 1e-2)), 1e-12)
        if f is IDENTITY and prox is not None:
            for closed in (prox_step, partial(spectral_step, rates=[1e-2] * 9)):
                close(joined(closed(table)), joined(closed(dense)))  # type: ignore[operator]


# Solvers ------------------------------------------------------------------------------------------------------


@groups
@biases
@pytest.mark.parametrize("r", [4, 24])
@pytest.mark.parametrize("side", ["inputs", "rows", "auto"])
def test_exact_solve_with_quadratic_terms_is_the_minimiser_on_both_sides(k: int, bias: bool, r: int, side: Any) -> None:
    """Push-through and Woodbury: the same from the R x R side."""
    problem = problem_of(IDENTITY, k, bias, r, prox=0.3, pulls=True)
    close(joined(local.ProximalSolve(side=side)(problem)), minimiser(problem), 1e-9)


def test_identity_exact_s_is_foof_and_proxprop() -> None:
    """ΔW = −γ G (XᵀX + I/η)⁻¹, written out; and from N x N when N < d."""
    for r in (24, 4):
        problem = problem_of(bias=False, r=r)
        x, g = problem.a[:, 0], (predict(problem) - problem.target)[:, 0] / GAMMA
        wanted = -GAMMA * g.T @ x @ torch.linalg.inv(x.T @ x + torch.eye(6, dtype=x.dtype) / 0.3)
        for side in ("inputs", "rows", "auto"):
            close(local.ProximalSolve(0.3, side)(problem)[0][0], wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("pulls", [False, True])
@pytest.mark.parametrize("r", [4, 24])
@biases
def test_identity_spectral_filter_is_t_plain_gradient_steps(pulls: bool, r: int, bias: bool) -> None:
    problem = problem_of(bias=bias, r=r, pulls=pulls)
    steps = local.LocalSteps(25, torch.optim.SGD, "all", "constant", form="plain")(problem, 5e-3)
    for side in ("inputs", "rows"):
        close(joined(spectral_step(problem, [5e-3] * 25, side)), joined(steps))  # type: ignore[arg-type]
    close(joined(local.Spectral(25, 5e-3)(problem)), joined(steps))
    own = local.Spectral(3)(problem)
    if not bias:
        h = torch.autograd.functional.hessian(lambda w: local_loss(problem, w), problem.weight).view(30, 30)
        close(joined(own), joined(local.Spectral(3, 1 / float(torch.linalg.eigvalsh(h).max()))(problem)))
    assert local_loss(problem, *moved(problem, own)) < local_loss(problem)


@groups
@biases
@pytest.mark.parametrize("pulls", [False, True])
def test_identity_cg_anderson_and_newton_converge_to_the_exact_solve(k: int, bias: bool, pulls: bool) -> None:
    problem = problem_of(IDENTITY, k, bias, prox=0.3, pulls=pulls)
    wanted = joined(prox_step(problem))
    close(joined(local.ConjugateGradient(200, 1e-13)(problem)), wanted)
    close(joined(local.Newton(5, inner=300, tol=1e-13)(problem)), wanted, 1e-9)
    close(joined(local.Anderson(300, 10, 1e-12)(problem)), wanted, 1e-8)


def test_anderson_needs_fewer_steps_than_the_gradient_descent_it_extrapolates() -> None:
    problem = problem_of(prox=10.0)
    wanted, rate = joined(prox_step(problem)), 1 / float(largest_curvature(problem))
    plain = local.LocalSteps(20, torch.optim.SGD, "all", "constant")(problem, rate)
    far = [float((joined(u) - wanted).norm()) for u in (local.Anderson(20)(problem), plain)]
    assert far[0] < 0.05 * far[1]


@each
@biases
@pytest.mark.parametrize("table", [False, True], ids=["rows", "table"])
def test_identity_newton_for_m_lowers_the_local_loss_to_its_minimum(f: Transfer, bias: bool, table: bool) -> None:
    """Held by the proximal term, the problem has one minimum: where the gradient is zero."""
    problem = problem_of(f, bias=bias, table=table, prox=2.0)
    solved = moved(problem, local.Newton(60, inner=200)(problem))
    first, last = (joined(local_gradient(problem, *at)) for at in ((None, None), solved))
    assert last.norm() <= 1e-7 * first.norm()
    losses = [float(local_loss(problem, *moved(problem, local.Newton(n)(problem)))) for n in range(1, 6)]
    assert losses[0] < float(local_loss(problem)) and losses == sorted(losses, reverse=True)


@each
def test_anderson_for_m_ends_where_newton_does_and_never_raises_the_loss(f: Transfer) -> None:
    problem = problem_of(f, prox=0.5)
    if f is tr.RELU_SQUARED:
        with pytest.raises(BadInput, match="slope"):
            local.Anderson()(problem)
        return
    losses = [float(local_loss(problem))]
    losses += [float(local_loss(problem, *moved(problem, local.Anderson(n)(problem)))) for n in range(1, 9)]
    assert all(b <= a for a, b in pairwise(losses)) and losses[1] < losses[0]
    close(joined(local.Anderson(400, 8)(problem)), joined(local.Newton(60, inner=200)(problem)), 1e-5)


@each
def test_newton_and_anderson_on_clipped_targets_stay_finite_without_a_quadratic_term(f: Transfer) -> None:
    problem = problem_of(f, clip="range")
    for solver in (local.Newton(20), local.Anderson(20)):
        if f is tr.RELU_SQUARED and isinstance(solver, local.Anderson):
            continue
        after = local_loss(problem, *moved(problem, solver(problem)))
        assert after < local_loss(problem) and torch.isfinite(after)


@pytest.mark.parametrize("f", [TRANSFERS[0], TANH, SOFTMAX], ids=lambda t: t.name)
def test_solvers_are_pure(f: Transfer) -> None:
    problem = problem_of(f, prox=0.5)
    before = joined((problem.weight, problem.bias)).clone()
    solvers = [local.LocalSteps(), local.LocalSteps(3, torch.optim.Adam), local.Newton(), local.Anderson()]
    if f is IDENTITY:
        solvers += [local.ProximalSolve(), local.ConjugateGradient(), local.Spectral()]  # type: ignore[list-item]
    for solver in solvers:
        one, two = joined(solver(problem)), joined(solver(problem))
        assert torch.equal(one, two) and one.any()
        assert torch.equal(joined((problem.weight, problem.bias)), before)


def test_local_steps_take_any_optimizer_of_torch() -> None:
    """As by hand with `.grad` set from the oracle's gradient."""
    for make in (
        torch.optim.Adam,
        torch.optim.RMSprop,
        torch.optim.Adagrad,
        partial(torch.optim.NAdam, betas=(0.8, 0.9)),
    ):
        problem = problem_of(TANH)
        w, b = (torch.nn.Parameter(t.clone()) for t in (problem.weight, problem.bias))  # type: ignore[union-attr]
        optimizer = make([w, b], lr=1e-2)  # type: ignore[operator]
        for _ in range(5):
            w.grad, b.grad = local_gradient(problem, w.detach(), b.detach())
            optimizer.step()
        found = moved(problem, local.LocalSteps(5, make, "all", "constant")(problem, 1e-2))
        close(joined(found), torch.cat((w.detach().flatten(), b.detach().flatten())))


@pytest.mark.parametrize("solver", [local.ProximalSolve(1.0), local.ConjugateGradient(), local.Spectral()])
def test_squared_solvers_refuse_a_matching_loss(solver: Any) -> None:
    with pytest.raises(BadInput, match="tanh"):
        solver(problem_of(TANH))


@pytest.mark.parametrize(
    "make",
    [
        lambda: local.LocalSteps(0), lambda: local.LocalSteps(rows="some"), lambda: local.LocalSteps(schedule="cosine"),
        lambda: local.LocalSteps(state="lost"), lambda: local.LocalSteps(optimizer="adam"),
        lambda: local.LocalSteps(form="dense"), lambda: local.ProximalSolve(0.0),
        lambda: local.ProximalSolve(side="left"),
        lambda: local.ConjugateGradient(0), lambda: local.Spectral(rate=-1.0), lambda: local.Spectral(steps=0),
        lambda: local.Anderson(memory=0), lambda: local.Newton(damping=-1.0), lambda: local.Newton(iterations=0),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(make: Any) -> None:
    with pytest.raises(BadInput):
        make()


@each
def test_transfer_functions_travel_by_name_and_changed_ones_do_not(f: Transfer) -> None:
    found = pickle.loads(pickle.dumps(f))
    x = torch.linspace(-3, 3, 24, dtype=torch.float64).view(4, 6)
    assert found.name == f.name and torch.equal(found.f(x), f.f(x)) and found.is_squared == f.is_squared
    other = replace(f, f=torch.sin)
    try:
        there = pickle.loads(pickle.dumps(other))
    except (pickle.PicklingError, AttributeError):
        return
    assert torch.equal(there.f(x), x.sin())


@each
def test_slopes_bound_the_transfer_functions(f: Transfer) -> None:
    z, v = 3 * torch.randn(500, 4, dtype=torch.float64), torch.randn(500, 4, dtype=torch.float64)
    slopes = torch.func.jvp(f.f, (z,), (v,))[1].norm(dim=-1) / v.norm(dim=-1)
    assert slopes.max() <= f.slope + 1e-12


def test_one_optimizer_serves_a_table_in_place() -> None:
    problem = problem_of(TANH, table=True)
    start = problem.weight.clone()
    stored = torch.nn.Parameter(problem.weight[0].t().contiguous())
    bias = torch.nn.Parameter(problem.bias.flatten())  # type: ignore[union-attr]
    live = replace(problem, weight=stored.detach().t().unsqueeze(0), bias=bias.detach().view(1, -1))
    wanted = moved(problem, local.LocalSteps(4, torch.optim.Adam, "all")(problem, 1e-2))
    owned = Owned(stored, bias, lambda w: w[0].t())
    local_steps(live, torch.optim.Adam([stored, bias], lr=1e-2), StepPlan(4), owned)
    close(live.weight, wanted[0])
    close(live.bias, wanted[1])  # type: ignore[arg-type]
    assert not torch.equal(live.weight, start)


@pytest.mark.parametrize("scale", [1e19, 1e30, 1e38])
@pytest.mark.parametrize("rows", [24, 4], ids=["inputs", "rows"])
@pytest.mark.parametrize("solver", [lw.local.Spectral(), lw.local.Anderson(), lw.local.Newton()], ids=repr)
def test_huge_rows_end_no_training_with_any_solver(solver: Any, rows: int, scale: float) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)).float()
    x, y = torch.randn(rows, 12, dtype=torch.float32), torch.randint(3, (rows,))
    opt = lw.LocoProp(model, solver=solver, regularizer=lw.local.WeightDecay(0.1), loss="squared")
    for factor in (1.0, scale, 1.0):
        opt.step(lambda factor=factor: F.cross_entropy(model(x * factor), y))
    assert opt.skipped <= 1  # Newton may go a finite way
    assert all(torch.isfinite(p).all() for p in model.parameters())
