"""AM-mem: running moments, their two solves, recentring, forgetting; state that is constant and resumes bitwise."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from grids import one_in
from local_cases import mlp
from torch import Tensor, nn

import layerwise as lw
from layerwise.errors import AmbiguousSamples, BadInput, NonFinite, SamplesMixed, Undefined, UnknownLoss
from layerwise.local import LocalProblem, Memory, WeightDecay, mairal
from layerwise.operators.ridge import coordinate_descent, ridge


def batch(n: int = 12, i: int = 5, classes: int = 3, seed: int = 1) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(n, i, generator=gen, dtype=torch.float64), torch.randint(classes, (n,), generator=gen)


def close(x: Tensor, y: Tensor, rtol: float = 1e-10) -> None:
    torch.testing.assert_close(x, y, rtol=0, atol=rtol * max(1e-6, float(y.abs().max())))


def streams(count: int, rows: int = 20, i: int = 6, o: int = 4) -> list[tuple[Tensor, Tensor]]:
    gen = torch.Generator().manual_seed(3)
    return [
        (torch.randn(rows + t, i, generator=gen, dtype=torch.float64),
         torch.randn(rows + t, o, generator=gen, dtype=torch.float64))
        for t in range(count)
    ]  # fmt: skip


def start(o: int = 4, i: int = 6) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(5)
    draw = {"generator": gen, "dtype": torch.float64}
    return torch.randn(1, o, i, **draw), torch.randn(1, o, **draw)  # type: ignore[call-overload,no-any-return]


def learned(memory: Memory, data: list[tuple[Tensor, Tensor]], state: dict[str, Any], **more: Any) -> Tensor:
    """Weight and bias `[O, I+1]` after a memory has met some batches of inputs and codes."""
    w, b = start()
    for a, c in data:
        dw, db = memory.step(LocalProblem(a[:, None], w, b, c[:, None]), state, **more)
        assert db is not None
        w, b = w + dw, b + db
    return torch.cat((w, b[..., None]), -1)[0]


def ones(a: Tensor) -> Tensor:
    return torch.cat((a, a.new_ones(len(a), 1)), -1)


# Moments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forget", [0.0, 0.3, "mairal", pytest.param(lambda step, rows: 1 - 1 / (step + 1), id="own")])
def test_absolute_memory_is_ridge_on_all_batches_seen(forget: Any) -> None:
    """Weighted least squares on the concatenated stream, each batch faded by what came after."""
    data, memory = streams(6), Memory(forget=forget, recentre=False, ridge=0.2)
    state: dict[str, Any] = {}
    got = learned(memory, data, state)
    betas = [memory.keeps(t + 1, len(a)) for t, (a, _) in enumerate(data)]
    weights = [torch.tensor(betas[t + 1 :], dtype=torch.float64).prod() for t in range(6)]
    rows = torch.cat([w.sqrt() * ones(a) for w, (a, _) in zip(weights, data, strict=True)])
    codes = torch.cat([w.sqrt() * c for w, (_, c) in zip(weights, data, strict=True)])
    n = sum(float(w) * len(a) for w, (a, _) in zip(weights, data, strict=True))
    gram = rows.T @ rows / n
    damping = 0.2 * gram.diagonal().mean()
    wanted = torch.linalg.solve(gram + damping * torch.eye(7, dtype=torch.float64), rows.T @ codes / n).T
    close(got, wanted)
    close(state["A"][0], gram)
    assert state["rows"] == pytest.approx(n, rel=1e-12) and state["steps"] == 6


def test_a_memory_that_never_forgets_is_least_squares_on_everything() -> None:
    data = streams(5)
    got = learned(Memory(forget=0.0, recentre=False, ridge=0.0), data, {})
    a, c = ones(torch.cat([a for a, _ in data])), torch.cat([c for _, c in data])
    close(got, torch.linalg.lstsq(a, c).solution.T)


def test_mairals_schedule() -> None:
    """β = (θ + 1 − η)/(θ + 1) with θ = tη for t < η, η² + t − η beyond: continuous, and tends to keep everything."""
    assert mairal(1, 10) == pytest.approx(1 / 11)
    assert mairal(9, 10) == pytest.approx(81 / 91)
    assert mairal(10, 10) == pytest.approx(91 / 101)
    assert mairal(11, 10) == pytest.approx(92 / 102)
    assert 1 - 2e-3 < mairal(10_000, 10) < 1


def test_recentring_by_hand() -> None:
    """`B ← (1−ρ) W A + ρ c aᵀ`, both averages, solved with a ridge around the present weights."""
    data = streams(5)
    got = learned(Memory(forget=0.2, ridge=0.7, gain=1, every=1), data, {})
    w = torch.cat((start()[0], start()[1][..., None]), -1)[0]
    gram, n = torch.zeros(7, 7, dtype=torch.float64), 0.0
    for a, c in data:
        x = ones(a)
        n = 0.8 * n + len(x)
        share = len(x) / n
        old = gram
        gram = (1 - share) * old + share * x.T @ x / len(x)
        cross = (1 - share) * w @ old + share * c.T @ x / len(x)
        damping = 0.7 * gram.diagonal().mean()
        held = gram + damping * torch.eye(7, dtype=torch.float64)
        w = torch.linalg.solve(held, (cross + damping * w).T).T
    close(got, w)


def test_with_ridge_zero_a_memory_moves_w_by_its_share_of_the_least_squares_step() -> None:
    """Forgetting is the learning rate: `ΔW = ρ Σ δ aᵀ/R A⁻¹`."""
    data: list[tuple[Tensor, Tensor]] = streams(30)
    state: dict[str, Any] = {}
    before = learned(Memory(forget=0.05, ridge=0.0, gain=1, every=1), data[:-1], state)
    a, c = ones(data[-1][0]), data[-1][1]
    n = 0.95 * state["rows"] + len(a)
    gram = (0.95 * state["rows"] * state["A"][0] + a.T @ a) / n
    w, b = before[:, :-1][None], before[:, -1][None]
    dw, db = Memory(forget=0.05, ridge=0.0, gain=1, every=1).step(
        LocalProblem(data[-1][0][:, None], w, b, c[:, None]), state
    )
    wanted = (c - a @ before.T).T @ a / n @ torch.linalg.inv(gram)
    close(torch.cat((dw, db[..., None]), -1)[0], wanted)  # type: ignore[index]
    assert 0.05 < len(a) / n < 0.1  # the share of a window of twenty batches


# Solves -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recentre", [True, False])
def test_many_sweeps_over_columns_are_the_exact_solve(recentre: bool) -> None:
    data = streams(3)
    settings = {"forget": 0.1, "recentre": recentre, "ridge": 0.5, "gain": 2.0, "every": 1}
    exact = learned(Memory(**settings), data, {})  # type: ignore[arg-type]
    close(learned(Memory(solve="columns", sweeps=400, **settings), data, {}), exact, 1e-9)  # type: ignore[arg-type]
    once = learned(Memory(solve="columns", sweeps=1, **settings), data, {})  # type: ignore[arg-type]
    assert float((once - exact).abs().max()) > 1e-3


def test_one_sweep_over_columns_by_hand() -> None:
    a, c = streams(1)[0]
    x, w = ones(a), torch.zeros(4, 7, dtype=torch.float64)
    gram, cross = x.T @ x / len(x), c.T @ x / len(x)
    for j in range(7):
        w[:, j] += (cross[:, j] - w @ gram[:, j]) / gram[j, j]
    zero = torch.zeros(1, 4, 6, dtype=torch.float64)
    problem = LocalProblem(a[:, None], zero, zero[..., 0], c[:, None])
    dw, db = Memory(solve="columns", recentre=False, ridge=0.0).step(problem, {})
    close(torch.cat((dw, db[..., None]), -1)[0], w)  # type: ignore[index]


@pytest.mark.parametrize("recentre", [True, False])
def test_a_sparse_memory_meets_the_lassos_conditions(recentre: bool) -> None:
    """|∂| ≤ λ at zeros, ∂ = −λ sign(w) elsewhere; the bias is not shrunk. Of one batch, from its own weights."""
    (a, c), l1 = streams(1, rows=40)[0], 0.15
    state: dict[str, Any] = {}
    memory = Memory(solve="columns", sweeps=500, ridge=0.0, recentre=recentre)
    got = learned(memory, [(a, c)], state, l1=l1)
    slope = (ones(a) @ got.T - c).T @ ones(a) / len(a)
    weights, at = got[:, :-1], slope[:, :-1]
    assert 3 < int((weights == 0).sum()) < weights.numel() - 3
    assert bool((at[weights == 0].abs() <= l1 + 1e-9).all())
    close(at[weights != 0], -l1 * weights[weights != 0].sign(), 1e-8)
    assert float(slope[:, -1].abs().max()) < 1e-9


def test_columns_with_a_threshold_by_hand() -> None:
    gen = torch.Generator().manual_seed(0)
    a = torch.randn(30, 4, generator=gen, dtype=torch.float64)
    w, b = (torch.randn(2, 4, generator=gen, dtype=torch.float64) for _ in range(2))
    gram, by_hand = a.T @ a / 30, w.clone()
    for j in range(4):
        free = by_hand[:, j] + (b[:, j] - by_hand @ gram[:, j]) / gram[j, j]
        by_hand[:, j] = F.softshrink(free * gram[j, j], 0.3) / gram[j, j]
    close(coordinate_descent(w, gram, b, l1=0.3), by_hand)
    with pytest.raises(BadInput, match="negative"):
        coordinate_descent(w, gram, b, l1=-0.1)


def test_regularizers_are_quadratic_terms_of_the_memory_too() -> None:
    """`|W|²/2` times rate, beside the mean over rows: to rows times rate in the problem's own units."""
    a, c = streams(1)[0]
    w, b = start()
    pull = WeightDecay(0.3)(w, b, float(len(a)), None)
    problem = LocalProblem(a[:, None], w, b, c[:, None], pulls=(pull,))
    for recentre in (True, False):
        dw, db = Memory(ridge=0.0, recentre=recentre)(problem)
        assert db is not None
        got, x = torch.cat((w + dw, (b + db)[..., None]), -1)[0], ones(a)
        close(got, ridge(x.T @ x / len(a), c.T @ x / len(a), 0.3))


def test_an_inverse_kept_for_several_steps() -> None:
    """The first sixteen steps renew it at 1, 2, 4, 8, 12, 16; between, the step takes the old one."""
    data, state, made = streams(16), {}, []
    memory, exact = Memory(every=4, ridge=0.5), Memory(ridge=0.5, every=1)
    w, b = start()
    for t, (a, c) in enumerate(data):
        problem = LocalProblem(a[:, None], w, b, c[:, None])
        copy = dict(state)
        copy.pop("inverse", None)
        want, _ = exact.step(problem, copy)
        dw, db = memory.step(problem, state)
        if state["inverted"] == t + 1:
            made.append(t + 1)
            close(dw, want)
        else:
            assert float((dw - want).abs().max()) > 1e-6
        assert db is not None
        w, b = w + dw, b + db
    assert made == [1, 2, 4, 8, 12, 16]


def batch_error(problem: LocalProblem, weight: Tensor, bias: Tensor, strength: float) -> Tensor:
    """Its squared errors, so weighed, and its quadratic terms, `[K]`."""
    out = torch.einsum("rki,koi->rko", problem.a, weight) + bias
    found = strength / 2 * (out - problem.target).square().sum((0, 2))
    for pull in problem.pulls:
        assert pull.weight is not None and pull.bias is not None
        apart = (weight - pull.weight).square().sum((1, 2)) + (bias - pull.bias).square().sum(1)
        found = found + pull.strength / 2 * apart
    return found


@pytest.mark.parametrize("rate", [1.0, 2.0])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("settings", [{}, {"every": 1}, {"solve": "columns", "sweeps": 3}], ids=str)
def test_a_step_ends_where_its_own_batch_would_get_worse(settings: dict[str, Any], decay: float, rate: float) -> None:
    """Two layers side by side: the inputs of one change a hundredfold, those of the other stay."""
    gen = torch.Generator().manual_seed(0)
    memory, state, made = Memory(ridge=3.0, **settings), {}, []
    w, b = torch.randn(2, 3, 4, generator=gen).double(), torch.zeros(2, 3).double()
    for t in range(1, 8):
        a, c = torch.randn(30, 2, 4, generator=gen).double(), torch.randn(30, 2, 3, generator=gen).double()
        if t == 7:
            a[:, 1] *= torch.tensor([1, 1, 1, 100.0]).double()
        pulls = (WeightDecay(decay)(w, b, 30.0, None),) if decay else ()
        problem = LocalProblem(a, w, b, c, pulls=pulls)
        dw, db = memory.step(problem, state, rate=rate)
        assert db is not None
        before = batch_error(problem, w, b, min(1.0, memory.gain * 30 / state["rows"]))
        w, b = w + rate * dw, b + rate * db
        made.append(state.get("inverted"))
    after = batch_error(problem, w, b, min(1.0, memory.gain * 30 / state["rows"]))
    assert after[0] < 0.999 * before[0] and float(after[1]) == pytest.approx(float(before[1]), rel=1e-9)
    if not settings and rate == 1:
        assert made == [1, 2, 2, 4, 4, 4, 7], "at the change a fresh inverse first"


def test_a_memory_lives_through_a_change_of_its_stream() -> None:
    """Pixels that were always zero appear: without the bound the first steps after it go a thousand times too far."""
    gen, worst = torch.Generator().manual_seed(0), 0.0
    truth = torch.randn(3, 40, generator=gen)
    memory, state, w = Memory(), {}, torch.zeros(1, 3, 40)
    for t in range(120):
        a = torch.rand(50, 40, generator=gen)
        a[:, :20] *= float(t >= 60)
        a[:, 20:] *= 0.1 if t < 60 else 1.0
        goal = a @ truth.T
        dw, _ = memory.step(LocalProblem(a[:, None], w, None, goal[:, None]), state, rate=2.0)
        w = w + 2 * dw
        worst = max(worst, float((a @ w[0].T - goal).norm() / goal.norm()))
    assert worst < 2 and float((a @ w[0].T - goal).norm() / goal.norm()) < 0.1


# As an optimizer --------------------------------------------------------------------------------------------


def closure_of(net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(net(x), y)


@pytest.mark.parametrize("forget", [0.0, 0.25, mairal])
def test_the_state_holds_the_mean_and_its_rows(forget: Any) -> None:
    """`A/n` and n of the page on AltMin, where `A <- beta A + sum aa^T` and `n <- beta n + R`."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    opt = lw.AltMin(net, weights=Memory(forget=forget))
    total, rows = torch.zeros(6, 6, dtype=torch.float64), 0.0
    for seed, size in enumerate((12, 7, 9)):
        x, y = batch(size, seed=seed)
        opt.step(closure_of(net, x, y))
        state = opt.state[net[0].weight]
        beta = (state["rows"] - size) / rows if rows else 0.0
        a = torch.cat((x, x.new_ones(size, 1)), 1)
        total, rows = beta * total + a.T @ a, state["rows"]
        assert 0 <= beta <= 1 and rows >= size
        close(state["A"][0] * rows, total)


def test_am_mem_by_hand_on_a_dense_net() -> None:
    """Jacobi codes at all layers, the output layer's too, three minibatches, by explicit normal equations."""
    net, plain, mu, eta, lr = mlp(5, 4, 3), mlp(5, 4, 3), 2.0, 0.1, 1.5
    memory = Memory(forget=eta, ridge=0.4, gain=3, every=1)
    opt = lw.AltMin(net, weights=memory, codes="jacobi", coupling=mu, lr=lr)
    weights = [torch.cat((m.weight, m.bias[:, None]), 1).detach() for m in (plain[0], plain[2])]  # type: ignore[union-attr,operator,index]
    grams: list[Tensor | float] = [0.0, 0.0]
    rows = 0.0
    for t in range(3):
        x, y = batch(seed=t)
        opt.step(closure_of(net, x, y))
        z0 = (ones(x) @ weights[0].T).requires_grad_()
        h = ones(z0.tanh())
        z1 = h @ weights[1].T
        g0, g1 = torch.autograd.grad(F.cross_entropy(z1, y), [z0, z1])
        rows = (1 - eta) * rows + 12
        share = 12 / rows
        for k, (a, g) in enumerate(((ones(x), g0), (h.detach(), g1))):
            grams[k] = (1 - share) * grams[k] + share * a.T @ a / 12
            damping = 0.4 * grams[k].diagonal().mean()  # type: ignore[union-attr]
            held = grams[k] + damping * torch.eye(a.shape[1], dtype=torch.float64)
            move = (12 / mu * g).T @ a / 12 @ torch.linalg.inv(held)
            weights[k] = weights[k] - lr * min(1, 3 * share) * move
    for k, m in enumerate((net[0], net[2])):
        close(torch.cat((m.weight, m.bias[:, None]), 1).detach(), weights[k], 1e-10)  # type: ignore[operator,index,arg-type]


def test_gauss_newton_codes_minimise_the_model_of_each_sample() -> None:
    """`d = −(J H Jᵀ + μ I)⁻¹ J g` with dense Jacobians, sample by sample; and small μ-free limits."""
    net, (x, y), mu = mlp(5, 4, 6, 3), batch(6), 0.7
    opt = lw.AltMin(net, weights="memory", coupling=mu)
    run = opt_run(opt, closure_of(net, x, y))
    parts = [net[1:], net[3:], nn.Identity()]
    z = [net[0](x), net[:3](x), net(x)]
    for n in range(6):
        p = net(x)[n].softmax(0).detach()
        hessian = p.diag() - torch.outer(p, p)
        residual = p - F.one_hot(y[n], 3)
        for k, (rest, out) in enumerate(zip(parts, z, strict=True)):
            jacobian = torch.autograd.functional.jacobian(rest, out[n].detach())
            model = jacobian.T @ hessian @ jacobian + mu * torch.eye(len(out[n]), dtype=torch.float64)
            d = -torch.linalg.solve(model, jacobian.T @ residual)
            close(-(6 / mu) * run.cotangents[run.layers[k].use.index][n], d, 1e-9)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e20])
def test_gauss_newton_codes_of_huge_slopes_are_finite_or_the_batch_is_skipped(size: float) -> None:
    """In float32 the damping is lost beside such curvature, and a plain Cholesky factorization fails."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 30))
    x, y = torch.randn(40, 5), torch.arange(40)
    with torch.no_grad():
        net[2].weight.mul_(size)  # type: ignore[operator,union-attr]
    before = [p.detach().clone() for p in net.parameters()]
    opt = lw.AltMin(net, weights="memory", coupling=1e-3)
    opt.step(lambda: F.mse_loss(net(x), F.one_hot(y % 30, 30).float()))
    same = [torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True)]
    assert all(torch.isfinite(p).all() for p in net.parameters())
    assert all(same) if opt.skipped else not any(same)


def opt_run(opt: lw.AltMin, closure: Callable[[], Tensor]) -> Any:
    opt._group_at = {id(p): group for group in opt.param_groups for p in group["params"]}
    return opt._record(closure, None).run


@pytest.mark.parametrize("kind", ["conv", "recurrent"])
def test_gauss_newton_codes_where_samples_lie_elsewhere(kind: str) -> None:
    """Each sample's displacement is what the sample alone gives."""
    torch.manual_seed(0)
    net: nn.Module
    if kind == "conv":
        net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)).double()
        x = torch.randn(4, 1, 6, 6, dtype=torch.float64)
    else:
        net, x = Elman().double(), torch.randn(4, 5, 3, dtype=torch.float64)
    y = torch.tensor([0, 2, 1, 2])
    opt = lw.AltMin(net, weights="memory", coupling=0.5)
    together = opt_run(opt, closure_of(net, x, y))
    for n in range(4):
        alone = opt_run(opt, closure_of(net, x[n : n + 1], y[n : n + 1]))
        for layer, other in zip(together.layers, alone.layers, strict=True):
            for part, single in zip(layer.parts, other.parts, strict=True):
                g, one = together.cotangents[part.use.index], alone.cotangents[single.use.index]
                axis = next(a for a in range(g.dim()) if g.shape[a] == 4 and one.shape[a] == 1)
                close(4 * g.select(axis, n), one.select(axis, 0), 1e-9)


def test_gauss_newton_codes_refuse_what_they_do_not_know() -> None:
    net, (x, y) = mlp(5, 4, 3), batch()
    with pytest.raises(UnknownLoss):
        lw.AltMin(net, weights="memory").step(lambda: (net(x) - 1).abs().pow(1.5).mean())
    normed = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    with pytest.raises(SamplesMixed):
        lw.AltMin(normed, weights="memory").step(closure_of(normed, x, y))
    lw.AltMin(normed, weights="memory", codes="jacobi").step(closure_of(normed, x, y))


class Elman(nn.Module):
    """An RNN and a head on its last step."""

    def __init__(self, kind: str = "tanh", size: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = nn.RNN(3, size, nonlinearity=kind, batch_first=True)
        self.head = nn.Linear(size, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])  # type: ignore[no-any-return]


def test_moments_of_convolutions_are_of_windows_and_of_recurrent_weights_of_steps() -> None:
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)).double()
    x, y = torch.randn(4, 2, 6, 6, dtype=torch.float64), torch.tensor([0, 2, 1, 2])
    opt = lw.AltMin(conv, weights=Memory(), codes="jacobi")
    opt.step(closure_of(conv, x, y))
    windows = F.unfold(x, 3, stride=2).transpose(1, 2).flatten(0, 1)
    assert windows.shape == (16, 18)
    close(opt.state[conv[0].weight]["A"][0], ones(windows).T @ ones(windows) / 16)

    net, x = Elman().double(), torch.randn(4, 5, 3, dtype=torch.float64)
    opt = lw.AltMin(net, weights=Memory(), codes="jacobi")
    with torch.no_grad():
        states = net.rnn(x)[0]
    opt.step(closure_of(net, x, y))
    before = torch.cat((torch.zeros(4, 1, 4, dtype=torch.float64), states[:, :-1]), 1).flatten(0, 1)
    close(opt.state[net.rnn.weight_hh_l0]["A"][0], ones(before).T @ ones(before) / 20)
    assert opt.state[net.rnn.weight_hh_l0]["rows"] == 20


def test_memory_is_constant_and_resumes_bitwise_at_any_minibatch() -> None:
    def make() -> tuple[nn.Sequential, lw.AltMin]:
        net = mlp(5, 4, 3)
        return net, lw.AltMin(net, weights=Memory(every=3), layers={"2": {"weights": "adam", "coupling": 0.1}})

    (net, opt), sizes = make(), []
    for t in range(9):
        if t == 4:
            buffer = io.BytesIO()
            torch.save((net.state_dict(), opt.state_dict()), buffer)
        opt.step(closure_of(net, *batch(seed=t)))
        sizes.append(sum(v.numel() for s in opt.state.values() for v in s.values() if isinstance(v, Tensor)))
    assert len(set(sizes)) == 1
    other, resumed = make()
    buffer.seek(0)
    weights, state = torch.load(buffer, weights_only=True)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    for t in range(4, 9):
        resumed.step(closure_of(other, *batch(seed=t)))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))
    assert opt.state[net[0].weight].keys() == {"A", "rows", "steps", "inverse", "inverted"}


def test_a_memory_that_breaks_down_changes_nothing() -> None:
    net, (x, y) = mlp(5, 4, 3), batch()
    opt = lw.AltMin(net, weights=lambda problem: (problem.weight * float("nan"), problem.bias), coupling=1.0)
    before = [p.detach().clone() for p in net.parameters()]
    opt.step(closure_of(net, x, y))
    assert opt.skipped == 1 and all(map(torch.equal, before, net.parameters()))
    a, w = torch.full((3, 1, 2), 1e200, dtype=torch.float64), torch.zeros(1, 2, 2, dtype=torch.float64)
    state = {"kept": 1}
    with pytest.raises(NonFinite):
        Memory().step(LocalProblem(a, w, None, torch.ones(3, 1, 2, dtype=torch.float64)), state)
    assert state == {"kept": 1}


@one_in(2, case=zoo.cases(first_loss_only=True), codes=["jacobi", "gauss-newton"])
def test_a_memory_steps_every_model_of_the_zoo(case: zoo.Case, codes: Any) -> None:
    """Or, for Gauss-Newton codes, a typed error that changes nothing: losses without a root, samples that are mixed."""
    made = case.make()
    before = {n: p.detach().clone() for n, p in made.model.named_parameters()}
    opt = lw.AltMin(made.subject, weights="memory", codes=codes)
    try:
        opt.step(made.loss)
    except (UnknownLoss, SamplesMixed, AmbiguousSamples, Undefined):
        assert codes == "gauss-newton"
        assert all(torch.equal(p, before[n]) for n, p in made.model.named_parameters())
        return
    assert opt.skipped == 0
    for _, p in made.model.named_parameters():
        assert bool(torch.isfinite(p).all())


@pytest.mark.parametrize(
    "wrong",
    [{"forget": 1.0}, {"forget": "never"}, {"solve": "qr"}, {"ridge": -1.0}, {"sweeps": 0}, {"every": 0},
     {"gain": 0.0}],
)  # fmt: skip
def test_wrong_memories_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        Memory(**wrong)
    net = mlp(5, 4, 3)
    with pytest.raises(BadInput, match="columns"):
        lw.AltMin(net, weights="memory", l1=0.1).step(closure_of(net, *batch()))
