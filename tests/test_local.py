"""Local problems: oracles, the identities that tie them to backprop, K-FAC and ridge, and the local steps."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from local_cases import biases, each, groups
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.local.problem import LocalProblem, local_gradient, local_loss, predict, target_m
from layerwise.local.solvers import steps as solvers
from layerwise.local.solvers import tf_rmsprop
from layerwise.local.solvers.closed import prox_step, spectral_step
from layerwise.local.solvers.steps import StepPlan, linear_floor, local_steps, row_slices
from layerwise.local.solvers.tf_rmsprop import TFRMSProp, tf_rmsprop_update
from layerwise.local.solvers.workspace import Owned, Workspace
from layerwise.local.transfer import IDENTITY, RELU, SOFTMAX, TANH, Transfer

GAMMA = 7.0


def layer(
    k: int, bias: bool, r: int = 24, i: int = 6, o: int = 5, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    gen = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=gen)  # noqa: E731
    return new(r, k, i), new(k, o, i) / i**0.5, new(k, o) if bias else None


def backprop(a: Tensor, w: Tensor, b: Tensor | None, f: Transfer) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """z, ∂L/∂z, ∂L/∂W, ∂L/∂b of a loss that reads f(z) through a further random map."""
    w, b = w.clone().requires_grad_(), None if b is None else b.clone().requires_grad_()
    z = torch.stack([F.linear(a[:, k], w[k], None if b is None else b[k]) for k in range(len(w))], 1)
    mix = torch.randn(z[0].numel(), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    loss = (f.f(z).flatten(1) @ mix).square().sum() / len(a)
    found = torch.autograd.grad(loss, [z, w] if b is None else [z, w, b])
    return z.detach(), found[0], found[1], None if b is None else found[2]


def problem_of(
    f: Transfer, k: int = 1, bias: bool = True, prox: float | None = None, known: bool = True, **sizes: int
) -> LocalProblem:
    a, w, b = layer(k, bias, **sizes)
    z, g, _, _ = backprop(a, w, b, f)
    target = target_s(z, g, GAMMA) if f is IDENTITY else target_m(z, g, GAMMA, f)
    return LocalProblem(a, w, b, target, f, prox, g if known else None, GAMMA)


def close(x: Tensor | None, y: Tensor | None, rtol: float = 1e-12) -> None:
    if x is None or y is None:
        assert x is None and y is None
    else:
        torch.testing.assert_close(x, y, rtol=0, atol=rtol * float(y.abs().max()))


def oracle_steps(
    problem: LocalProblem, make: Callable[..., torch.optim.Optimizer], steps: int,
    scaled_loss: Callable[[int, Tensor, Tensor | None], Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """T steps by autograd on the local objective: nothing of the solvers in it."""
    w = problem.weight.clone().requires_grad_()
    b = None if problem.bias is None else problem.bias.clone().requires_grad_()
    optimizer = make([w] if b is None else [w, b])
    base = optimizer.param_groups[0]["lr"]
    for t in range(steps):
        optimizer.zero_grad()
        (local_loss(problem, w, b) if scaled_loss is None else scaled_loss(t, w, b)).backward()
        optimizer.param_groups[0]["lr"] = base * max(1 - t / steps, 0.25)
        optimizer.step()
    return w.detach(), None if b is None else b.detach()


def target_s(z: Tensor, g: Tensor, gamma: float) -> Tensor:
    """LocoProp-S's targets before the transfer function."""
    return z - gamma * g


def run_steps(
    problem: LocalProblem, make: Callable[..., torch.optim.Optimizer], steps: int, **options
) -> tuple[Tensor, Tensor | None]:  # type: ignore[no-untyped-def]
    problem = copy.deepcopy(problem)
    params = [problem.weight] if problem.bias is None else [problem.weight, problem.bias]
    local_steps(problem, make(params), StepPlan(steps, **options))
    return problem.weight, problem.bias


def sgd(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=2e-3, momentum=0.9)


def tf(params: list[Tensor]) -> torch.optim.Optimizer:
    return TFRMSProp(params, lr=1e-2, momentum=0.9)


def adam(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-2)


makers = pytest.mark.parametrize("make", [sgd, tf, adam])


# The objective and its gradient


@each
@groups
@biases
def test_first_local_gradient_is_gamma_times_backprop(f: Transfer, k: int, bias: bool) -> None:
    a, w, b = layer(k, bias)
    z, g, dw, db = backprop(a, w, b, f)
    for target, loss in ((target_m(z, g, GAMMA, f), f), (target_s(z, g, GAMMA), IDENTITY)):
        got_w, got_b = local_gradient(LocalProblem(a, w, b, target, loss))
        close(got_w, GAMMA * dw)
        close(got_b, None if db is None else GAMMA * db)


@each
@groups
@biases
@pytest.mark.parametrize("prox", [None, 0.3])
def test_local_gradient_is_the_gradient_of_the_local_loss(f: Transfer, k: int, bias: bool, prox: float | None) -> None:
    problem = problem_of(f, k, bias, prox)
    w = (problem.weight + 0.1).requires_grad_()
    b = None if problem.bias is None else (problem.bias - 0.2).requires_grad_()
    wanted = torch.autograd.grad(local_loss(problem, w, b), [w] if b is None else [w, b])
    got = local_gradient(problem, w.detach(), None if b is None else b.detach())
    close(got[0], wanted[0])
    close(got[1], None if b is None else wanted[1])


@each
def test_local_loss_is_convex_in_the_weights(f: Transfer) -> None:
    problem = problem_of(f)
    u, v = (
        problem.weight + 0.5 * torch.randn_like(problem.weight),
        problem.weight - torch.randn_like(problem.weight),
    )
    for s in (0.2, 0.5, 0.7):
        chord = s * local_loss(problem, u) + (1 - s) * local_loss(problem, v)
        assert local_loss(problem, s * u + (1 - s) * v) <= chord + 1e-10


def test_shapes_are_checked() -> None:
    a, w, b = layer(2, True)
    y = torch.zeros(24, 2, 5, dtype=torch.float64)
    for wrong in (
        (a[:, :1], w, b, y),
        (a, w[0], b, y),
        (a, w, b[:1], y),
        (a, w, b, y[:3]),
        (a[:0], w, b, y[:0]),
    ):
        with pytest.raises(BadInput, match="local problem needs"):
            LocalProblem(*wrong)
    with pytest.raises(BadInput, match="η > 0"):
        LocalProblem(a, w, b, y, prox=0.0)


# Targets out of range


def drift(target: Tensor) -> list[float]:
    """The weight of one tanh unit with input 1 after each 1,000 steps of gradient descent of rate 0.1."""
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    problem = LocalProblem(one, 0.1 * one, None, target, TANH)
    optimizer, sizes = torch.optim.SGD([problem.weight], lr=0.1), []
    for _ in range(4):
        local_steps(problem, optimizer, StepPlan(1000, schedule=lambda t, steps: 1.0))
        sizes.append(float(problem.weight))
    return sizes


def test_a_tanh_target_of_1_2_drifts_for_ever_unless_clipped_or_held() -> None:
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    z, g, gamma = 0.5 * one, -one, 1.2 - float(TANH.f(0.5 * one))
    target = target_m(z, g, gamma, TANH)
    close(target, 1.2 * one)
    free = drift(target)
    # f never passes 1, so every step moves by at least 0.1 · 0.2: by 20 in every 1,000.
    assert all(later - earlier >= 20 - 1e-9 for earlier, later in itertools.pairwise(free))
    for clip in ("range", "bounded"):
        clipped = target_m(z, g, gamma, TANH, clip=clip)
        close(clipped, one)
        assert drift(clipped)[-1] < 4  # logarithmic: about ½ log(4 · 0.1 · 4000) = 3.7
    held = LocalProblem(one, 0.1 * one, None, target, TANH, prox=5.0)
    local_steps(held, torch.optim.SGD([held.weight], lr=0.1), StepPlan(4000))
    start = LocalProblem(one, 0.1 * one, None, target, TANH, prox=5.0)
    assert float(local_gradient(start, held.weight)[0].abs()) < 1e-12 and float(held.weight) < 2


def test_clipping_is_off_by_default_and_spares_relu_unless_asked() -> None:
    z, g = torch.randn(9, 1, 4, dtype=torch.float64), 5 * torch.randn(9, 1, 4, dtype=torch.float64)
    for f in (TANH, RELU, SOFTMAX):
        assert torch.equal(target_m(z, g, 1.0, f), f.f(z) - g)
    assert torch.equal(target_m(z, g, 1.0, RELU, clip="bounded"), target_m(z, g, 1.0, RELU))
    assert target_m(z, g, 1.0, RELU, clip="range").min() == 0
    torch.testing.assert_close(target_m(z, g, 1.0, SOFTMAX, clip="bounded").sum(-1), torch.ones_like(z[..., 0]))
    with pytest.raises(BadInput, match="unknown"):
        target_m(z, g, 1.0, TANH, clip="always")  # type: ignore[arg-type]


# Local steps


@each
@groups
@biases
@pytest.mark.parametrize("prox", [None, 0.05])
def test_plain_steps_equal_autograd(f: Transfer, k: int, bias: bool, prox: float | None) -> None:
    problem = problem_of(f, k, bias, prox)
    wanted = oracle_steps(problem, sgd, 5)
    for known in (problem, problem_of(f, k, bias, prox, known=False)):
        got = run_steps(known, sgd, 5, form="plain")
        close(got[0], wanted[0])
        close(got[1], wanted[1])


@makers
@groups
def test_steps_equal_autograd_for_every_optimizer(make: Callable[..., torch.optim.Optimizer], k: int) -> None:
    problem = problem_of(TANH, k)
    wanted = oracle_steps(problem, make, 6)
    got = run_steps(problem, make, 6)
    close(got[0], wanted[0], 1e-11)
    close(got[1], wanted[1], 1e-11)


@makers
@groups
@biases
@pytest.mark.parametrize("prox", [None, 0.05])
@pytest.mark.parametrize("known", [True, False])
def test_gram_form_equals_plain_form(
    make: Callable[..., torch.optim.Optimizer], k: int, bias: bool, prox: float | None, known: bool
) -> None:
    problem = problem_of(IDENTITY, k, bias, prox, known)
    plain, gram = (run_steps(problem, make, 6, form=form) for form in ("plain", "gram"))
    assert not torch.equal(plain[0], problem.weight)
    close(gram[0], plain[0])
    close(gram[1], plain[1])


@pytest.mark.parametrize("prox", [None, 0.05])
@pytest.mark.parametrize("form", ["plain", "gram"])
def test_scale_multiplies_the_objective(form: str, prox: float | None) -> None:
    problem = problem_of(IDENTITY, prox=prox)
    wanted = oracle_steps(problem, sgd, 5, lambda t, w, b: 0.3 * local_loss(problem, w, b))
    got = run_steps(problem, sgd, 5, form=form, scale=0.3)
    close(got[0], wanted[0])
    close(got[1], wanted[1])


def test_gram_form_is_chosen_by_cost_and_refused_where_it_does_not_hold() -> None:
    assert solvers._use_gram(problem_of(IDENTITY), "auto", 24, 10)
    assert not solvers._use_gram(problem_of(IDENTITY, i=40), "auto", 24, 10)
    assert not solvers._use_gram(problem_of(TANH), "auto", 24, 10)
    for problem, rows in ((problem_of(TANH), None), (problem_of(IDENTITY), 6)):
        with pytest.raises(BadInput, match="gram"):
            run_steps(problem, sgd, 3, form="gram", rows=rows)


@pytest.mark.parametrize("rows", [24, 100])
def test_minibatches_of_all_rows_equal_plain(rows: int) -> None:
    problem = problem_of(TANH)
    wanted, got = run_steps(problem, sgd, 5), run_steps(problem, sgd, 5, rows=rows)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


@groups
@pytest.mark.parametrize("f", [IDENTITY, TANH, SOFTMAX], ids=lambda t: t.name)
@pytest.mark.parametrize("rows", [4, 7])
@pytest.mark.parametrize("seed", [None, 3])
def test_local_minibatches_equal_autograd_on_their_slices(f: Transfer, k: int, rows: int, seed: int | None) -> None:
    problem, total, steps = problem_of(f, k), 24, 9  # 9 · 4 and 9 · 7 both run past the end
    offset = 0 if seed is None else int(torch.randint(total, (), generator=torch.Generator().manual_seed(seed)))

    def scaled(t: int, w: Tensor, b: Tensor | None) -> Tensor:
        index = (torch.arange(rows) + offset + t * rows) % total
        part = LocalProblem(problem.a[index], problem.weight, problem.bias, problem.target[index], f)
        return total / rows * local_loss(part, w, b)

    wanted = oracle_steps(problem, sgd, steps, scaled)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for known in (problem, problem_of(f, k, known=False)):
        got = run_steps(known, sgd, steps, rows=rows, generator=None if generator is None else generator.clone_state())
        close(got[0], wanted[0])
        close(got[1], wanted[1])


@pytest.mark.parametrize("rows", [5, 8])
def test_local_minibatch_gradient_is_unbiased(rows: int) -> None:
    # Exactly: the mean over all 24 offsets of one scaled step is the step of the whole batch.
    problem = problem_of(TANH)
    layer_ = solvers._Layer(problem, Workspace())
    found = [next(layer_.plain(1, rows, offset))[0].clone() for offset in range(24)]
    close(torch.stack(found).mean(0), local_gradient(problem)[0])


def test_row_slices_are_consecutive_and_cyclic() -> None:
    assert [row_slices(10, 4, t) for t in range(3)] == [[(0, 4)], [(4, 8)], [(8, 10), (0, 2)]]
    assert row_slices(10, 10, 3) == [(0, 10)]
    seen = [r for t in range(5) for low, high in row_slices(10, 2, t, offset=3) for r in range(low, high)]
    assert sorted(seen) == list(range(10))


def test_a_parameter_of_another_shape_moves_through_its_view() -> None:
    problem = problem_of(TANH, k=3)
    wanted = run_steps(problem, tf, 4)
    stored = problem.weight.permute(2, 0, 1).contiguous()  # [I,K,O], the problem's weight a strided view
    bias = torch.nn.Parameter(problem.bias.flatten())
    weight = torch.nn.Parameter(stored)
    viewed = LocalProblem(
        problem.a,
        weight.detach().permute(1, 2, 0),
        bias.detach().view(3, 5),
        problem.target,
        TANH,
        g=problem.g,
        gamma=GAMMA,
    )
    weight.grad = torch.ones_like(weight)
    optimizer = tf([weight, bias])
    local_steps(viewed, optimizer, StepPlan(4), Owned(weight, bias, lambda x: x.permute(2, 0, 1)))
    close(weight.detach().permute(1, 2, 0), wanted[0])
    close(bias.detach().view(3, 5), wanted[1])
    assert torch.equal(weight.grad, torch.ones_like(weight)) and bias.grad is None
    assert optimizer.param_groups[0]["lr"] == 1e-2


def test_one_optimizer_and_workspace_may_serve_several_layers() -> None:
    problems = [problem_of(TANH, seed=s, i=i) for s, i in ((1, 6), (2, 9))]
    wanted = [run_steps(p, tf, 4) for p in problems]
    optimizer = tf([t for p in problems for t in (p.weight, p.bias)])
    workspace = Workspace()
    for p in problems:
        local_steps(p, optimizer, StepPlan(4), workspace=workspace)
    for p, (w, b) in zip(problems, wanted, strict=True):
        assert torch.equal(p.weight, w) and torch.equal(p.bias, b)


def test_scratch_memory_is_what_the_layers_need_and_stays() -> None:
    problems = [problem_of(TANH, seed=s, i=i) for s, i in ((1, 6), (2, 9))]
    workspace, kept = Workspace(), []
    for _ in range(4):
        for p in problems:
            local_steps(p, sgd([p.weight, p.bias]), StepPlan(2), workspace=workspace)
        kept.append(sum(len(each) for each in vars(workspace).values()))
    assert kept[0] > 0 and kept[1:] == [kept[1]] * 3


def test_a_failing_step_puts_rates_and_gradients_back() -> None:
    problem = problem_of(TANH)
    optimizer = sgd([problem.weight, problem.bias])

    def broken(t: int, steps: int) -> float:
        if t == 1:
            raise RuntimeError("broken schedule")
        return 0.5

    with pytest.raises(RuntimeError, match="broken"):
        local_steps(problem, optimizer, StepPlan(3, schedule=broken))
    assert optimizer.param_groups[0]["lr"] == 2e-3 and problem.weight.grad is None


def test_copies_and_impossible_numbers_are_refused() -> None:
    problem = problem_of(TANH)
    other = problem.weight.clone()
    with pytest.raises(BadInput, match="share no memory"):
        local_steps(problem, sgd([other]), StepPlan(), Owned(other, problem.bias))
    for options in ({"steps": 0}, {"rows": 0}):
        with pytest.raises(BadInput, match="steps ≥ 1 and rows ≥ 1"):
            local_steps(problem, sgd([problem.weight]), StepPlan(**options))


def test_rate_schedule_is_the_published_one() -> None:
    assert [linear_floor(t, 10) for t in (0, 1, 5, 7, 8, 9)] == [1, 0.9, 0.5, pytest.approx(0.3), 0.25, 0.25]


# Closed forms


@groups
@biases
def test_exact_step_minimises_the_local_loss(k: int, bias: bool) -> None:
    problem = problem_of(IDENTITY, k, bias, prox=0.2)
    dw, db = prox_step(problem)
    gradient = local_gradient(problem, problem.weight + dw, None if db is None else problem.bias + db)
    size = local_gradient(problem)[0].abs().max()
    assert gradient[0].abs().max() <= 1e-12 * size
    assert gradient[1] is None or gradient[1].abs().max() <= 1e-12 * size
    again = prox_step(problem_of(IDENTITY, k, bias, prox=0.2, known=False))
    close(again[0], dw, 1e-11)


def test_exact_step_is_kfac_with_the_input_factor_alone() -> None:
    # K-FAC: vec ΔW = −lr (Ā ⊗ B + damping)⁻¹ vec(∂L/∂W), with B = I and Ā the mean of aaᵀ over the batch.
    a, w, b = layer(1, False)
    z, g, dw, _ = backprop(a, w, b, TANH)
    r, eta = len(a), 0.3
    mean = torch.stack([torch.outer(x, x) for x in a[:, 0]]).mean(0)
    curvature = torch.kron(torch.eye(5, dtype=torch.float64), mean) + torch.eye(30, dtype=torch.float64) / (eta * r)
    kfac = -(GAMMA / r) * torch.linalg.solve(curvature, dw[0].flatten()).view(5, 6)
    close(prox_step(LocalProblem(a, w, b, target_s(z, g, GAMMA), prox=eta))[0][0], kfac)


@groups
@biases
@pytest.mark.parametrize("r", [4, 24])
def test_push_through_equals_the_direct_solve(k: int, bias: bool, r: int) -> None:
    problem = problem_of(IDENTITY, k, bias, prox=0.2, r=r)
    direct, pushed, auto = (prox_step(problem, side) for side in ("inputs", "rows", "auto"))
    close(pushed[0], direct[0])
    close(pushed[1], direct[1])
    assert torch.equal(auto[0], (pushed if r == 4 else direct)[0])


@groups
@biases
@pytest.mark.parametrize("prox", [None, 0.1])
@pytest.mark.parametrize("r", [4, 24])
def test_spectral_filter_equals_gradient_steps(k: int, bias: bool, prox: float | None, r: int) -> None:
    problem, rate, steps = problem_of(IDENTITY, k, bias, prox, r=r), 5e-3, 30
    w, b = run_steps(problem, lambda p: torch.optim.SGD(p, lr=rate), steps)
    rates = [rate * linear_floor(t, steps) for t in range(steps)]
    for side in ("inputs", "rows"):
        dw, db = spectral_step(problem, rates, side)
        close(problem.weight + dw, w)
        close(None if db is None else problem.bias + db, b)


def test_spectral_filter_has_the_closed_form_and_acts_as_damping() -> None:
    problem, rate, steps = problem_of(IDENTITY, bias=False), 4e-3, 20
    a, g = problem.a[:, 0], GAMMA * problem.g[:, 0]
    s, v = torch.linalg.eigh(a.T @ a)
    h = (1 - (1 - rate * s) ** steps) / s
    dw = spectral_step(problem, [rate] * steps)[0][0]
    close(dw, -(g.T @ a @ v * h) @ v.T)
    # Filters of x = ηTs: (1 − e^−x)(1 + x)/x lies between 1 and 1.2985; T = 20 is a little above e^−x.
    damped = prox_step(LocalProblem(problem.a, problem.weight, None, problem.target, prox=rate * steps))[0][0]
    ratio = (-dw @ v / (g.T @ a @ v)) / (-damped @ v / (g.T @ a @ v))
    assert ratio.min() >= 1 and ratio.max() < 1.33


def test_closed_forms_refuse_other_problems() -> None:
    with pytest.raises(BadInput, match="tanh"):
        prox_step(problem_of(TANH, prox=1.0))
    with pytest.raises(BadInput, match="tanh"):
        spectral_step(problem_of(TANH), [0.1])
    with pytest.raises(BadInput, match="Proximal"):
        prox_step(problem_of(IDENTITY))


# TensorFlow 1's RMSProp


def test_update_by_hand() -> None:
    w, g, one, zero = (torch.tensor([x], dtype=torch.float64) for x in (2.0, 3.0, 1.0, 0.0))
    got = tf_rmsprop_update(w, g, one, zero, 0.1, 0.9, 0.999, 1e-5)
    ms = 0.9 + 0.1 * 9
    assert [float(x) for x in got] == pytest.approx(
        [2 - 0.3 / (ms + 1e-5) ** 0.5, ms, 0.3 / (ms + 1e-5) ** 0.5], rel=1e-15
    )
    # The rate lies inside the momentum: with lr 0 the old momentum moves on.
    again = tf_rmsprop_update(got[0], g, got[1], got[2], 0.0, 0.9, 0.999, 1e-5)
    assert float(got[0] - again[0]) == pytest.approx(0.999 * float(got[2]), rel=1e-12)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "slices"])
def test_optimizer_equals_the_pure_update(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if layout == "slices":
        monkeypatch.setattr(tf_rmsprop, "SLICE", 7)
    p = torch.randn(6, 5, dtype=torch.float64)
    p = {"transposed": p.t(), "strided": torch.randn(6, 10, dtype=torch.float64)[:, ::2]}.get(layout, p)
    state = p.clone(), torch.ones_like(p), torch.zeros_like(p)
    optimizer = TFRMSProp([p], lr=0.03, decay=0.8, momentum=0.95, eps=1e-3)
    for t in range(6):
        grad = (
            torch.randn(6, 5, dtype=torch.float64) if layout != "transposed" else torch.randn(5, 6, dtype=torch.float64)
        )
        p.grad = grad
        optimizer.param_groups[0]["lr"] = lr = 0.03 / (t + 1)
        optimizer.step()
        state = tf_rmsprop_update(state[0], grad, state[1], state[2], lr, 0.8, 0.95, 1e-3)
    for got, wanted in zip((p, *optimizer.state[p].values()), state, strict=True):
        close(got, wanted)


def test_state_starts_at_one_and_differs_from_torch() -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = TFRMSProp([p])
    p.grad = torch.zeros(3)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["mean_square"], torch.full((3,), 0.9))
    assert optimizer.defaults == {"lr": 1e-5, "decay": 0.9, "momentum": 0.999, "eps": 1e-5}


def test_state_dict_goes_on_bitwise_and_loads_with_weights_only() -> None:
    def run(model: torch.nn.Module, optimizer: TFRMSProp, seeds: range) -> None:
        for seed in seeds:
            optimizer.zero_grad()
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
            optimizer.step(lambda x=x: model(x).square().sum().backward())

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    twin = copy.deepcopy(model)
    optimizer, other = TFRMSProp(model.parameters(), lr=1e-2), TFRMSProp(twin.parameters(), lr=1e-2)
    run(model, optimizer, range(6))
    run(twin, other, range(3))
    buffer = io.BytesIO()
    torch.save({"model": twin.state_dict(), "optimizer": other.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    fresh = torch.nn.Linear(4, 3)
    fresh.load_state_dict(saved["model"])
    resumed = TFRMSProp(fresh.parameters())
    resumed.load_state_dict(saved["optimizer"])
    run(fresh, resumed, range(3, 6))
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), fresh.parameters(), strict=True))


def test_impossible_constants_and_sparse_gradients_are_refused() -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    for wrong in ({"lr": -1.0}, {"decay": 1.0}, {"momentum": 1.0}, {"eps": -1e-9}):
        with pytest.raises(BadInput, match=next(iter(wrong))):
            TFRMSProp([p], **wrong)
    p.grad = torch.zeros(3).to_sparse()
    with pytest.raises(BadInput, match="sparse"):
        TFRMSProp([p]).step()
    assert predict(problem_of(IDENTITY)).shape == (24, 1, 5)
