"""Norm balls as regularizers: vertices and projections by their definition, and local problems solved within them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from local_cases import biases, groups
from torch import Tensor, nn
from torch.nn import functional as F

import layerwise as lw
from layerwise import local
from layerwise.errors import BadInput
from layerwise.local.problem import LocalProblem, local_gradient, local_loss, predict, target_m
from layerwise.local.solvers.closed import spectral_step
from layerwise.local.transfer import IDENTITY, TANH, Transfer

EXACT = local.SpectralNorm(steps=None)
BALLS = [local.FrobeniusNorm(), local.MaxNorm(), local.RowNorm(), local.ColumnNorm(), EXACT]
each_ball = pytest.mark.parametrize("ball", BALLS, ids=lambda b: type(b).__name__)


def norm(ball: local.NormBall, d: Tensor) -> Tensor:
    """The norm of a matrix `[K,O,I]`, by its definition over the layer's block-diagonal matrix."""
    whole = torch.block_diag(*d)
    by_rows = [whole[n].norm() for n in range(len(whole))]
    by_columns = [whole[:, n].norm() for n in range(whole.shape[1])]
    return {
        local.FrobeniusNorm: lambda: whole.norm(), local.MaxNorm: lambda: whole.abs().max(),
        local.RowNorm: lambda: torch.stack(by_rows).max(), local.ColumnNorm: lambda: torch.stack(by_columns).max(),
        local.SpectralNorm: lambda: torch.linalg.svdvals(whole).max(),
    }[type(ball)]()  # fmt: skip


def problem_of(f: Transfer = IDENTITY, k: int = 1, bias: bool = True, ball: Any = None, seed: int = 0) -> LocalProblem:
    new = torch.Generator().manual_seed(seed)
    a, w, g = (torch.randn(*s, generator=new, dtype=torch.float64) for s in ((12, k, 4), (k, 3, 4), (12, k, 3)))
    b = torch.randn(k, 3, generator=new, dtype=torch.float64) if bias else None
    z = predict(LocalProblem(a, w, b, g))
    return LocalProblem(a, w, b, target_m(z, g / 3, 1.0, f), f, None, g / 3, 1.0, ball=ball)


@each_ball
@groups
def test_vertices_are_of_the_unit_ball_and_no_point_of_it_goes_further(ball: local.NormBall, k: int) -> None:
    gen = torch.Generator().manual_seed(k)
    g = torch.randn(k, 3, 4, generator=gen, dtype=torch.float64)
    at = ball.vertex(g)
    assert float(norm(ball, at)) == pytest.approx(1, abs=1e-12)
    for _ in range(60):
        other = torch.randn(k, 3, 4, generator=gen, dtype=torch.float64)
        assert float((g * other).sum() / norm(ball, other)) <= float((g * at).sum()) + 1e-12
    assert not ball.vertex(torch.zeros_like(g)).any()


@each_ball
@groups
def test_projections_are_the_nearest_points(ball: local.NormBall, k: int) -> None:
    """`⟨D − P, V − P⟩ ≤ 0` for every V of the ball; its vertex towards D − P is the furthest of them."""
    gen = torch.Generator().manual_seed(k)
    for size in (0.01, 0.6, 5.0):
        d = torch.randn(k, 3, 4, generator=gen, dtype=torch.float64) * size
        p = ball.nearest(d)
        assert float(norm(ball, p)) <= 1 + 1e-12
        assert float(((d - p) * (ball.vertex(d - p) - p)).sum()) <= 1e-12
        if float(norm(ball, d)) <= 1:
            torch.testing.assert_close(p, d, rtol=0, atol=1e-14)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@each_ball
def test_vertices_do_not_depend_on_the_size_of_the_gradient(ball: local.NormBall, size: float) -> None:
    g = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ball.vertex(g * size), ball.vertex(g), rtol=1e-5, atol=1e-5)


def test_the_spectral_vertex_of_a_singular_gradient_has_its_rank() -> None:
    u, v = torch.eye(4, 2, dtype=torch.float64), torch.eye(5, 2, dtype=torch.float64)
    g = (u * torch.tensor([3.0, 0.2], dtype=torch.float64)) @ v.T
    torch.testing.assert_close(EXACT.vertex(g[None])[0], u @ v.T)


@each_ball
@pytest.mark.parametrize(("f", "around"), [(TANH, "start"), (IDENTITY, "zero")], ids=["tanh", "zero"])
def test_both_solvers_end_where_no_vertex_lowers_the_loss(ball: local.NormBall, f: Transfer, around: Any) -> None:
    """The gap `⟨∇, W − V⟩` bounds the distance to the least loss: 0 by projected gradient, 1/T by Frank-Wolfe."""
    ball = replace(ball, radius=0.2 if around == "start" else 0.7, around=around)
    problem = problem_of(f, ball=ball)
    solved = {}
    for name, solver, bound in (
        ("steps", local.LocalSteps(300, torch.optim.SGD, "all", "constant", form="plain"), 1e-6),
        ("conditional", local.ConditionalGradient(100), 4e-1),
    ):
        dw, db = solver(problem, 0.03) if isinstance(solver, local.LocalSteps) else solver(problem)
        assert problem.bias is not None and db is not None
        now = problem.weight + dw, problem.bias + db
        for new, start in zip(now, (problem.weight, problem.bias), strict=True):
            inside = (new - start if around == "start" else new).reshape(1, 3, -1)
            assert float(norm(ball, inside)) <= ball.radius + 1e-12
        gradient = local_gradient(problem, *now)
        gap = sum(
            float((g * (new - start - ball.lowest(g, start))).sum())
            for g, new, start in zip(gradient, now, (problem.weight, problem.bias), strict=True)  # type: ignore[arg-type]
        )
        assert -1e-12 <= gap <= bound
        solved[name] = float(local_loss(problem, *now))
    assert solved["steps"] - 1e-9 <= solved["conditional"] <= solved["steps"] + 4e-1


@each_ball
@groups
@biases
def test_one_step_is_steepest_descent_from_the_cotangents(ball: local.NormBall, k: int, bias: bool) -> None:
    """A radius of its own, for weight and bias each; with a quadratic term its slope is part of the gradient."""
    ball = replace(ball, radius=0.3)
    problem = problem_of(TANH, k, bias, ball)
    for asked in (problem, replace(problem, pulls=(lw.local.Pull(0.5, torch.zeros_like(problem.weight)),))):
        g, gb = local_gradient(replace(asked, g=None))
        dw, db = local.ConditionalGradient()(asked)
        torch.testing.assert_close(dw, -0.3 * ball.vertex(g), rtol=0, atol=1e-12)
        if bias:
            torch.testing.assert_close(db, -0.3 * ball.vertex(gb[..., None])[..., 0], rtol=0, atol=1e-12)  # type: ignore[index]
        else:
            assert db is None


def test_newton_schulz_is_near_the_exact_vertex() -> None:
    g = torch.randn(1, 8, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = torch.linalg.svdvals(local.SpectralNorm(dtype=None).vertex(g))
    assert float(values.min()) > 0.6 and float(values.max()) < 1.25
    many = local.SpectralNorm(steps=30, coefficients=(1.5, -0.5, 0.0), dtype=None).vertex(g)  # the cubic one converges
    torch.testing.assert_close(many, EXACT.vertex(g), rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_shampoo_without_accumulation_is_the_spectral_vertex(shape: tuple[int, int]) -> None:
    """(G Gᵀ)^(−¼) G (Gᵀ G)^(−¼) = U Vᵀ (Gupta, Koren and Singer, 2018, algorithm 1 with one gradient)."""

    def power(m: Tensor, rank: int) -> Tensor:
        values, basis = torch.linalg.eigh(m)
        return basis[:, -rank:] * values[-rank:] ** -0.25 @ basis[:, -rank:].T

    g = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rank = min(shape)
    wanted = power(g @ g.T, rank) @ g @ power(g.T @ g, rank)
    torch.testing.assert_close(EXACT.vertex(g[None])[0], wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 5, 3)])
def test_groups_are_orthogonalized_each_by_itself(shape: tuple[int, ...]) -> None:
    g = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ball = local.SpectralNorm(dtype=None)
    apart = torch.cat([ball.vertex(one[None]) for one in g])
    torch.testing.assert_close(ball.vertex(g), apart, rtol=0, atol=1e-12)


def test_every_layer_and_optimizer_takes_a_ball() -> None:
    """Convolutions, groups, embeddings and norms stay in the ball, by either solver, in LocoProp and in AltMin."""
    x, y = torch.randint(9, (6, 5)), torch.randint(3, (6,))

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Embedding(9, 4), nn.Tanh(), nn.Conv1d(5, 10, 2, groups=5), nn.ReLU(), nn.LayerNorm(3), nn.Flatten(),
            nn.Linear(30, 3),
        ).double()  # fmt: skip

    made = [
        lambda m: lw.LocoProp(m, regularizer=local.SpectralNorm(1e-3, steps=None), solver=local.ConditionalGradient(3)),
        lambda m: lw.LocoProp(m, regularizer=local.SpectralNorm(1e-3), lr=1.0),
        lambda m: lw.AltMin(m, regularizer=local.SpectralNorm(1e-3), lr=1.0),
        lambda m: lw.AltMin(m, regularizer=local.SpectralNorm(1e-3, steps=None), weights=local.ConditionalGradient(3)),
    ]
    for number, make in enumerate(made):
        model = net()
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        opt = make(model)
        loss = opt.step(lambda model=model: F.cross_entropy(model(x), y))
        assert opt.skipped == 0 and torch.isfinite(loss)
        table = [] if number > 1 else ["0.weight"]  # which has no code in AltMin
        for name in (*table, "2.weight", "6.weight", "6.bias"):
            moved = dict(model.named_parameters())[name].detach() - start[name]
            parts = moved.view(5, 2, -1) if name == "2.weight" else moved.view(1, moved.shape[0], -1)
            assert 0 < float(torch.linalg.svdvals(parts).max()) <= 1e-3 * (1 + 1e-9), name


@pytest.mark.parametrize(
    "solver", [local.ProximalSolve(0.1), local.ConjugateGradient(), local.Spectral(), local.Anderson(), local.Newton(),
               local.Memory(), lambda problem: spectral_step(replace(problem, ball=None), [0.1])],
    ids=lambda s: type(s).__name__,
)  # fmt: skip
def test_solvers_of_quadratic_terms_refuse_a_ball_and_nothing_moves(solver: Any) -> None:
    if not callable(getattr(solver, "__wrapped__", None)) and type(solver).__name__ != "function":
        with pytest.raises(BadInput, match="norm ball"):
            solver(problem_of(ball=EXACT))
    model, x = nn.Linear(3, 2), torch.ones(4, 3)
    start = model.weight.detach().clone()
    opt = lw.LocoProp(model, loss="squared", solver=solver, regularizer=EXACT)
    with pytest.raises(BadInput, match="ConditionalGradient or LocalSteps"):
        opt.step(lambda: model(x).square().sum())
    assert torch.equal(model.weight, start)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: local.MaxNorm(0.0), "radius"), (lambda: local.MaxNorm(around="here"), "around"),  # type: ignore[arg-type]
        (lambda: local.SpectralNorm(steps=0), "steps"), (lambda: local.SpectralNorm(adjust="x"), "adjust"),  # type: ignore[arg-type]
        (lambda: local.ConditionalGradient(0), "steps"), (lambda: local.ConditionalGradient(schedule="x"), "schedule"),  # type: ignore[arg-type]
        (lambda: local.ConditionalGradient()(problem_of()), "needs? a|norm ball"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(make: Any, match: str) -> None:
    with pytest.raises(BadInput, match=match):
        make()


def test_two_balls_are_refused() -> None:
    model, x = nn.Linear(3, 2), torch.ones(4, 3)
    opt = lw.LocoProp(model, regularizer=[EXACT, local.MaxNorm()])
    with pytest.raises(BadInput, match="one norm ball"):
        opt.step(lambda: model(x).square().sum())
