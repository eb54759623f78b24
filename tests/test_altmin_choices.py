"""AltMin's choices: coupling, sparsity, multipliers, closed codes, repeats, refit; recurrent nets; workers, staleness;
the trace."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from grids import one_in
from local_cases import mlp
from torch import Tensor, nn

import layerwise as lw
from layerwise.errors import BadInput
from layerwise.local import CodeStep, Coupling, LocalSteps, Memory, ProximalSolve, WeightDecay
from layerwise.local.codes.code_step import Terms, sweep
from layerwise.optim.layer_local.coding import coded_layers, hidden_uses, swept
from layerwise.optim.layer_local.stale import Stale
from layerwise.optim.layer_local.updates import fused
from layerwise.replay.coded import CodedModel

codes_kinds = pytest.mark.parametrize("codes", ["jacobi", "sweep"])
Closure = Callable[[], Tensor]


def batch(n: int = 12, i: int = 5, classes: int = 3, seed: int = 1) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(n, i, generator=gen, dtype=torch.float64), torch.randint(classes, (n,), generator=gen)


def close(x: Tensor, y: Tensor, rtol: float = 1e-11) -> None:
    torch.testing.assert_close(x, y, rtol=0, atol=rtol * max(1e-6, float(y.abs().max())))


def closure_of(net: nn.Module, x: Tensor, y: Tensor) -> Closure:
    return lambda: F.cross_entropy(net(x), y)


def params_of(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


# Coupling --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("coupling", "wanted"),
    [
        (0.5, [0.5] * 4),
        (Coupling(0.5, add=0.1, most=0.75), [0.5, 0.6, 0.7, 0.75]),
        (Coupling(0.5, factor=2.0, most=3.0), [0.5, 1.0, 2.0, 3.0]),
    ],
)
def test_coupling_grows_by_minibatch_up_to_its_cap(coupling: Any, wanted: list[float]) -> None:
    """And is what a run with these numbers set by hand does; skipped batches do not count."""
    nets = [mlp(5, 4, 3) for _ in range(2)]
    ours, plain = lw.AltMin(nets[0], coupling=coupling), lw.AltMin(nets[1])
    x, y = batch()
    for mu in wanted:
        assert ours.param_groups[0]["coupling"] == pytest.approx(mu, rel=1e-12)
        ours.step(lambda: nets[0](x).sum() * float("nan"))
        plain.param_groups[0]["coupling"] = mu
        ours.step(closure_of(nets[0], x, y))
        plain.step(closure_of(nets[1], x, y))
    assert ours.skipped == 4
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        close(p.detach(), q.detach(), 1e-12)


def test_the_rate_is_never_overwritten() -> None:
    """In the released program that of the output layer was, after the first epoch."""
    net, (x, y) = mlp(5, 4, 3), batch()
    opt = lw.AltMin(net, [{"params": net[0].parameters(), "lr": 0.01}, {"params": net[2].parameters(), "lr": 0.02}],
                    coupling=Coupling(0.1, add=0.1))  # fmt: skip
    for _ in range(5):
        opt.step(closure_of(net, x, y))
    assert [g["lr"] for g in opt.param_groups] == [0.01, 0.02]
    for g in opt.param_groups:
        g["lr"] = 0.0
    before = params_of(net)
    opt.step(closure_of(net, x, y))
    assert all(map(torch.equal, before, net.parameters()))  # and a scheduler's is what counts


@codes_kinds
def test_mu_means_the_same_at_every_layer(codes: Any) -> None:
    """A net that holds another one twice, each with half the weight above: no mean over features shrinks a signal."""
    torch.manual_seed(0)
    narrow, wide = mlp(5, 4, 3), nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    with torch.no_grad():  # the wide one holds the narrow one twice, each with half of the weight above
        wide[0].weight.copy_(narrow[0].weight.repeat(2, 1))
        wide[0].bias.copy_(narrow[0].bias.repeat(2))
        wide[2].weight.copy_(narrow[2].weight.repeat(1, 2) / 2)
        wide[2].bias.copy_(narrow[2].bias)
    x, y = batch()
    moved = []
    for net in (narrow, wide):
        before = net[0].weight.detach().clone()
        opt = lw.AltMin(net, codes=codes, weights="sgd", lr=1.0, momentum=0.0, steps=1, rows="all", coupling=1.0,
                        code_step=CodeStep(steps=1, lr=1e-6, momentum=0.0) if codes == "sweep" else None)  # fmt: skip
        opt.step(closure_of(net, x, y))
        moved.append(before - net[0].weight.detach())
    close(moved[1][:4], moved[0] / 2, 1e-5)
    assert moved[0].norm() > 0


@pytest.mark.parametrize("wrong", [{"start": 0.0}, {"start": 1.0, "most": 0.5}, {"start": 1.0, "factor": 0.5},
                                   {"start": 1.0, "add": -1.0}])  # fmt: skip
def test_wrong_couplings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(BadInput):
        Coupling(**wrong)


# Codes -----------------------------------------------------------------------------------------------------


def linear_net(depth: int = 4, size: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(size, size) for _ in range(depth)]).double()


def test_closed_codes_are_where_the_objective_is_flat() -> None:
    """Each code but the last is read by a linear layer alone; by autograd, with multipliers, at the codes above."""
    net, (x, y) = linear_net(), batch(classes=5)
    coded = CodedModel(net, closure_of(net, x, y))
    z = {k: net[: k + 1](x).detach() for k in range(3)}
    gen = torch.Generator().manual_seed(2)
    u = {k: 0.1 * torch.randn(12, 5, generator=gen, dtype=torch.float64) for k in range(3)}
    mu = {0: 0.3, 1: 0.5, 2: 0.8}
    step = CodeStep(steps=3, lr=0.1, own=0.4, prox=0.05, solve="closed")
    codes = sweep(coded, z, Terms(mu, 12.0, None, u), step)
    for k in (1, 0):
        c = codes[k].clone().requires_grad_()
        energy = mu[k + 1] / 2 * (codes[k + 1] + u[k + 1] - net[k + 1](c)).square().sum()
        energy = energy + 0.4 * mu[k] / 2 * (c + u[k] - z[k]).square().sum() + 0.05 / 2 * (c - z[k]).square().sum()
        (g,) = torch.autograd.grad(energy, c)
        assert float(g.abs().max()) < 1e-11 and not torch.equal(codes[k], z[k])
    gradient = sweep(coded, z, Terms(mu, 12.0, None, u), CodeStep(steps=3, lr=0.1, own=0.4, prox=0.05))
    close(codes[2], gradient[2])  # the loss reads it: gradient steps
    many = sweep(coded, z, Terms(mu, 12.0, None, u), CodeStep(steps=4000, lr=0.3, own=0.4, prox=0.05))
    top = {**z, 2: many[2]}
    close(sweep(coded, top, Terms(mu, 12.0, None, u), CodeStep(steps=1, lr=0.0, own=0.4, prox=0.05))[2], many[2])


def test_codes_behind_a_nonlinearity_are_not_solved_in_closed_form() -> None:
    net, (x, y) = mlp(5, 4, 4, 3), batch()
    coded = CodedModel(net, closure_of(net, x, y))
    z = {0: net[0](x).detach(), 1: net[:3](x).detach()}
    pair = [
        sweep(coded, z, Terms({0: 0.5, 1: 0.5}, 12.0), CodeStep(steps=2, lr=0.1, solve=s))
        for s in ("closed", "gradient")
    ]  # type: ignore[arg-type]
    assert all(torch.equal(pair[0][k], pair[1][k]) for k in z)


@pytest.mark.parametrize("own", [1.0, 0.25])
def test_the_gain_of_closed_codes(own: float) -> None:
    """On orthogonal layers a displacement passes by 1/(own + 1): half a layer at own = 1, and Jacobi's passes whole."""
    net, (x, y) = linear_net(5), batch(classes=5)
    for m in net:
        nn.init.orthogonal_(m.weight)  # type: ignore[arg-type]
    z = {k: net[: k + 1](x).detach() for k in range(4)}
    coded = CodedModel(net, closure_of(net, x, y))
    codes = sweep(coded, z, Terms(dict.fromkeys(z, 0.5), 12.0), CodeStep(steps=1, own=own, solve="closed"))
    size = [float((codes[k] - z[k]).norm()) for k in range(4)]
    for k in (2, 1, 0):
        assert size[k] == pytest.approx(size[k + 1] / (own + 1), rel=1e-10)
    leaves = {k: v.requires_grad_() for k, v in z.items()}
    grads = [torch.autograd.grad(F.cross_entropy(net[k + 1 :](leaves[k]), y), leaves[k])[0].norm() for k in range(4)]
    assert all(float(g) == pytest.approx(float(grads[0]), rel=1e-10) for g in grads)


def test_sparse_codes_by_proximal_gradient() -> None:
    """One plain step and its soft threshold; then, converged, the conditions of the lasso at a code."""
    net, (x, y) = mlp(5, 4, 3), batch()
    coded = CodedModel(net, closure_of(net, x, y))
    z, lam = net[0](x).detach(), 0.4
    terms = Terms({0: 0.5}, 12.0, {0: lam})
    leaf = z.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(net[2](leaf.tanh()), y, reduction="sum"), leaf)
    got = sweep(coded, {0: z}, terms, CodeStep(steps=1, lr=0.3, momentum=0.0))[0]
    close(got, F.softshrink(z - 0.3 * g, 0.3 * lam))
    got = sweep(coded, {0: z}, terms, CodeStep(steps=500, lr=0.3))[0]
    leaf = got.clone().requires_grad_()
    energy = F.cross_entropy(net[2](leaf.tanh()), y, reduction="sum") + 0.25 * (leaf - z).square().sum()
    (g,) = torch.autograd.grad(energy, leaf)
    assert 3 < int((got == 0).sum()) < got.numel() - 3
    assert bool((g[got == 0].abs() <= lam + 1e-8).all())
    close(g[got != 0], -lam * got[got != 0].sign(), 1e-7)


@codes_kinds
def test_sparse_codes_are_what_layers_are_fitted_to(codes: Any) -> None:
    """Jacobi: `c = S(z − g/μ, λ/μ)`; the hidden layer's gradient is then `(μ/B) (z − c) aᵀ`, the output's its own."""
    net, (x, y), mu, lam = mlp(5, 4, 3), batch(), 0.5, 0.3
    before = params_of(net)
    step = CodeStep(steps=2, lr=0.2)
    z = net[0](x).detach().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(net[2](z.tanh()), y), z)
    if codes == "jacobi":
        code = F.softshrink(z.detach() - 12 / mu * g, lam / mu)
    else:
        coded = CodedModel(net, closure_of(net, x, y))
        code = sweep(coded, {0: z.detach()}, Terms({0: mu}, 12.0, {0: lam}), step)[0]
    opt = lw.AltMin(net, codes=codes, weights="sgd", lr=1.0, momentum=0.0, steps=1, rows="all", coupling=mu,
                    code_l1=lam, code_step=step if codes == "sweep" else None)  # fmt: skip
    opt.step(closure_of(net, x, y))
    close(before[0] - net[0].weight.detach(), mu / 12 * (z.detach() - code).T @ x)


def test_sparse_weights_by_a_soft_threshold_after_each_step() -> None:
    net, (x, y), lam = mlp(5, 4, 3), batch(), 0.05
    w, b = net[2].weight.detach().clone(), net[2].bias.detach().clone()  # type: ignore[operator,union-attr]
    h = net[:2](x).detach()
    opt = lw.AltMin(net, weights="sgd", lr=0.5, momentum=0.0, steps=3, rows="all", l1=lam)
    opt.step(closure_of(net, x, y))
    for _ in range(3):
        w, b = w.requires_grad_(), b.requires_grad_()
        dw, db = torch.autograd.grad(F.cross_entropy(F.linear(h, w, b), y), [w, b])
        w, b = F.softshrink((w - 0.5 * dw).detach(), 0.5 * lam), (b - 0.5 * db).detach()
    close(net[2].weight.detach(), w)  # type: ignore[operator,arg-type]
    close(net[2].bias.detach(), b)  # type: ignore[operator,arg-type]
    for _ in range(60):
        opt.step(closure_of(net, x, y))
    assert int((net[0].weight == 0).sum()) > 0 and int((net[0].bias == 0).sum()) == 0  # type: ignore[union-attr,operator,arg-type]


# Repeats, multipliers, refit -------------------------------------------------------------------------------


@codes_kinds
def test_repeats_are_steps_on_the_same_minibatch_that_advance_everything_else_once(codes: Any) -> None:
    """Equal to steps whose random numbers and batch statistics are put back; those of one run remain."""
    x, y = batch()
    nets = []
    for _ in range(3):
        torch.manual_seed(0)
        nets.append(
            nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Tanh(), nn.Linear(6, 3)).double()
        )
    opts = [lw.AltMin(nets[0], codes=codes, repeats=3), lw.AltMin(nets[1], codes=codes)]
    torch.manual_seed(7)
    start = torch.get_rng_state()
    first = opts[0].step(closure_of(nets[0], x, y))
    after = torch.get_rng_state()
    for t in range(3):
        torch.set_rng_state(start)
        loss = opts[1].step(closure_of(nets[1], x, y))
        assert t or torch.equal(loss, first)
    torch.set_rng_state(start)
    nets[2](x)
    assert torch.equal(after, torch.get_rng_state())
    assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))
    assert all(map(torch.equal, nets[0].buffers(), nets[2].buffers()))
    assert int(nets[1][1].num_batches_tracked) == 3  # type: ignore[arg-type]


def test_multipliers_by_hand() -> None:
    """Scaled form: codes around `z − u`, weights on `c + u`, `u ← u + c − W a` with the new weights; twice."""
    net, plain, (x, y), mu = mlp(5, 4, 3), mlp(5, 4, 3), batch(), 0.5
    settings: dict[str, Any] = {"codes": "sweep", "weights": "sgd", "lr": 0.1, "momentum": 0.0, "steps": 1,
                                "rows": "all", "coupling": mu,
                                "code_step": CodeStep(steps=1, lr=0.2, momentum=0.0)}  # fmt: skip
    lw.AltMin(net, multipliers=True, repeats=3, **settings).step(closure_of(net, x, y))
    u = torch.zeros(12, 4, dtype=torch.float64)
    for _ in range(3):
        z = plain[0](x).detach().requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(plain[2](z.tanh()), y, reduction="sum"), z)
        c = (z - 0.2 * (g + mu * u)).detach()
        objective = F.cross_entropy(plain[2](c.tanh()), y) + mu / 24 * (c + u - plain[0](x)).square().sum()
        grads = torch.autograd.grad(objective, list(plain.parameters()))
        with torch.no_grad():
            for p, dp in zip(plain.parameters(), grads, strict=True):
                p.sub_(0.1 * dp)
            u = u + c - plain[0](x)
    assert float(u.abs().max()) > 1e-3
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        close(p.detach(), q.detach())
    for wrong in ({"codes": "jacobi", "repeats": 3}, {"codes": "sweep"}):
        with pytest.raises(BadInput, match="multipliers"):
            lw.AltMin(net, multipliers=True, **wrong)  # type: ignore[arg-type]


def test_refit_moves_the_output_layer_alone() -> None:
    net, (x, y) = mlp(5, 4, 3), batch()
    opt = lw.AltMin(net, lr=0.05, trace=lw.optim.Trace())
    opt.step(closure_of(net, x, y))
    before = params_of(net)
    losses = [opt.refit(closure_of(net, x, y) for _ in range(20)) for _ in range(3)]
    assert losses[2] < losses[0]
    moved = [not torch.equal(p, q) for p, q in zip(before, net.parameters(), strict=True)]
    assert moved == [False, False, True, True] and opt._fitter.trace is not None and opt._fitter.trace.steps == [0]
    with pytest.raises(BadInput, match="reads none of a layer that moves"):
        opt.refit([lambda: net(x).abs().pow(1.5).mean()])
    with pytest.raises(BadInput, match="closure"):
        opt.refit([])


def test_normalised_layers_descend_by_their_rows_per_sample() -> None:
    """A convolution's gradient over its positions; others as they are. Rates that diverge otherwise do not."""
    (x, y), moved = images(), []
    for normalise in (False, True):
        net = wide()
        before = params_of(net)
        opt = lw.AltMin(net, weights="sgd", lr=1e-3, momentum=0.0, steps=1, rows="all", normalise=normalise)
        opt.step(closure_of(net, x, y))
        moved.append([p - q.detach() for p, q in zip(before, net.parameters(), strict=True)])
    for k, (plain, scaled) in enumerate(zip(*moved, strict=True)):
        torch.testing.assert_close(scaled, plain / (16 if k < 2 else 1), rtol=2e-2, atol=1e-7)
        assert plain.any()


# Shared seams ----------------------------------------------------------------------------------------------


def test_layers_regularizers_and_solvers_by_pattern() -> None:
    """Weight decay is `rate/2 |W|²` beside the relaxed objective; a closed solver is one on the squared problem."""
    net, (x, y), mu = mlp(5, 4, 6, 3), batch(), 0.7
    before = params_of(net)
    z = net[0](x).detach().requires_grad_()
    z2 = net[2](z.tanh())
    g, g2 = torch.autograd.grad(F.cross_entropy(net[4](z2.tanh()), y), [z, z2])
    opt = lw.AltMin(net, weights="sgd", lr=1.0, momentum=0.0, steps=1, rows="all", coupling=mu,
                    regularizer=WeightDecay(0.1),
                    layers={"2": {"weights": ProximalSolve(eta=2.0), "lr": 0.5}})  # fmt: skip
    opt.step(closure_of(net, x, y))
    close(before[0] - net[0].weight.detach(), g.T @ x + 0.1 * before[0])
    a = torch.cat((z.detach().tanh(), torch.ones(12, 1, dtype=torch.float64)), 1)
    held = a.T @ a + (0.5 + 12 / mu * 0.1) * torch.eye(5, dtype=torch.float64)
    w = torch.cat((before[2], before[3][:, None]), 1)
    moved = -(12 / mu * g2.T @ a + 12 / mu * 0.1 * w) @ torch.linalg.inv(held)
    close(torch.cat((net[2].weight.detach(), net[2].bias.detach()[:, None]), 1) - w, 0.5 * moved)  # type: ignore[operator,union-attr]
    with pytest.raises(BadInput, match="matches no parameter"):
        lw.AltMin(net, layers={"9": {"lr": 0.1}})
    with pytest.raises(BadInput, match="sets gamma"):
        lw.AltMin(net, layers={"2": {"gamma": 0.1}})
    own = lw.AltMin(mlp(5, 4, 3), weights=LocalSteps(3, torch.optim.NAdam))
    assert own.param_groups[0]["lr"] == 2e-3


# Recurrent nets --------------------------------------------------------------------------------------------


class Elman(nn.Module):
    """An RNN and a head on its last step."""

    def __init__(self, kind: str = "tanh", size: int = 4, inputs: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = nn.RNN(inputs, size, nonlinearity=kind, batch_first=True)
        self.head = nn.Linear(size, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])  # type: ignore[no-any-return]


def sequences(n: int = 6, steps: int = 4, inputs: int = 3) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(n, steps, inputs, generator=gen, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=gen)


@pytest.mark.parametrize("kind", ["tanh", "relu"])
def test_codes_of_a_recurrent_net_by_time_step(kind: str) -> None:
    """A code at every use: of `W x` for all steps and of `U h` for each. Four sgd steps on all steps' rows, by hand."""
    net, (x, y), mu = Elman(kind).double(), sequences(), 0.8
    f = torch.tanh if kind == "tanh" else torch.relu
    rnn = net.rnn
    v = F.linear(x, rnn.weight_ih_l0, rnn.bias_ih_l0).detach().requires_grad_()
    h, states, us = torch.zeros(6, 4, dtype=torch.float64), [], []
    for t in range(4):
        states.append(h.detach())
        us.append(F.linear(h, rnn.weight_hh_l0, rnn.bias_hh_l0))
        h = f(v[:, t] + us[-1])
    gv, *gu = torch.autograd.grad(F.cross_entropy(net.head(h), y), [v, *us])
    data = {"ih": (x.flatten(0, 1), (v - 6 / mu * gv).detach().flatten(0, 1)),
            "hh": (torch.cat(states), (torch.cat(us) - 6 / mu * torch.cat(gu)).detach())}  # fmt: skip
    start = {k: [getattr(rnn, f"{s}_{k}_l0").detach().clone() for s in ("weight", "bias")] for k in data}
    opt = lw.AltMin(net, weights="sgd", lr=0.1, momentum=0.0, steps=4, rows="all", coupling=mu)
    opt.step(closure_of(net, x, y))
    for k, (a, c) in data.items():
        w, b = start[k]
        for _ in range(4):
            r = a @ w.T + b - c
            w, b = w - 0.1 * mu / 6 * r.T @ a, b - 0.1 * mu / 6 * r.sum(0)
        close(getattr(rnn, f"weight_{k}_l0").detach(), w)
        close(getattr(rnn, f"bias_{k}_l0").detach(), b)


@pytest.mark.parametrize("kind", ["tanh", "relu"])
def test_a_sweep_over_time_steps_sends_each_of_them_backprops_direction(kind: str) -> None:
    """With small steps; each code moves by rate·μ of the next one's, so their sum leans to the last ones."""
    net, (x, y) = Elman(kind).double(), sequences()
    coded = CodedModel(net, closure_of(net, x, y))
    step = CodeStep(steps=1, lr=5e-3, momentum=0.0)
    hidden = hidden_uses(coded, coded_layers(coded, lambda p: True))
    assert sorted(hidden) == [0, 1, 2, 3, 4]  # W x for all steps, and U h for each
    terms = Terms(dict.fromkeys(hidden, 1.0), 6.0)
    run, codes = swept(coded, coded_layers(coded, lambda p: True), terms, step, lambda p: True, 1)
    plain = torch.autograd.grad(coded.loss, [use.edge for use in coded.uses], allow_unused=True)
    for index in hidden:
        one, two = run.cotangents[index], plain[index]
        columns = range(4) if index == 0 else [slice(None)]  # of all steps, each by itself
        for t in columns:
            g, h = (c[:, t].flatten() for c in (one, two))
            assert g.norm() > 0 and float(g @ h / g.norm() / h.norm()) > 1 - 1e-3, (index, t)
    assert len(codes) == 5


@one_in(2, kind=["tanh", "relu"], settings=[{}, {"codes": "sweep"}, {"weights": "memory"}, {"weights": "sgd"}])
def test_recurrent_nets_learn_and_every_weight_drifts(kind: str, settings: dict[str, Any]) -> None:
    net, (x, y) = Elman(kind, 8).double(), sequences(60, 5)
    y = (x[:, -1] + x[:, -2]).argmax(1)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    opt = lw.AltMin(net, **{"lr": 0.02, **settings} if settings.get("weights") != "memory" else settings)  # type: ignore[arg-type]
    first = float(opt.step(closure_of(net, x, y)))
    for _ in range(40):
        last = float(opt.step(closure_of(net, x, y)))
    assert last < 0.8 * first and opt.skipped == 0
    for n, p in net.named_parameters():
        assert float((p.detach() - before[n]).norm() / before[n].norm()) > 1e-2, n


# Workers and staleness ---------------------------------------------------------------------------------------


def wide(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 12), nn.ReLU(),
                         nn.Linear(12, 3))  # fmt: skip


def images(n: int = 10, seed: int = 1) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 6, 6, generator=gen), torch.randint(3, (n,), generator=gen)


UPDATES: dict[str, dict[str, Any]] = {
    "adam": {}, "sgd": {"weights": "sgd"}, "memory": {"weights": "memory"},
    "columns": {"weights": Memory(solve="columns")},
    "sparse": {"l1": 1e-3}, "sweep": {"codes": "sweep"},
}  # fmt: skip


@pytest.mark.parametrize("name", UPDATES)
def test_threads_have_the_same_bits(name: str) -> None:
    nets = [wide(), wide()]
    opts = [lw.AltMin(nets[0], **UPDATES[name]), lw.AltMin(nets[1], workers=2, **UPDATES[name])]
    for t in range(4):
        for net, opt in zip(nets, opts, strict=True):
            opt.step(closure_of(net, *images(seed=t)))
    assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))


def test_processes_have_the_same_bits() -> None:
    updates: dict[str, dict[str, Any]] = {"4": {"weights": Memory(every=2), "coupling": 3.0}, "0": {"weights": "sgd"}}
    nets = [wide(), wide()]
    opts = [lw.AltMin(nets[0], layers=updates), lw.AltMin(nets[1], layers=updates, workers=("process", 1))]
    for t in range(3):
        for net, opt in zip(nets, opts, strict=True):
            opt.step(closure_of(net, *images(seed=t)))
    assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        assert opts[0].state[p].keys() == opts[1].state[q].keys()


def test_stale_layers_by_hand() -> None:
    """Each layer takes its T = 2 steps on what it heard a drawn number of minibatches ago, from its present weights."""
    net, mu, rate = mlp(5, 4, 3), 0.6, 0.1
    weights = {k: [net[k].weight.detach().clone(), net[k].bias.detach().clone()] for k in (0, 2)}  # type: ignore[union-attr,operator]
    opt = lw.AltMin(net, weights="sgd", lr=rate, momentum=0.0, steps=2, rows="all", coupling=mu, schedule="async",
                    staleness=3)  # fmt: skip
    draw, heard, delays = Stale(3), [], []
    for t in range(8):
        x, y = batch(seed=t)
        opt.step(closure_of(net, x, y))
        z = F.linear(x, *weights[0]).requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(F.linear(z.tanh(), *weights[2]), y), z)
        heard.append((x, (z - 12 / mu * g).detach(), z.detach().tanh(), y))
        back = {k: min(draw.delay(f"{k}.weight", t), t) for k in (0, 2)}
        delays += list(back.values())
        a, c, _, _ = heard[t - back[0]]
        _, _, h, labels = heard[t - back[2]]
        for _ in range(2):
            w, b = weights[0]
            r = F.linear(a, w, b) - c
            weights[0] = [w - rate * mu / 12 * r.T @ a, b - rate * mu / 12 * r.sum(0)]
            w, b = (p.requires_grad_() for p in weights[2])
            dw, db = torch.autograd.grad(F.cross_entropy(F.linear(h, w, b), labels), [w, b])
            weights[2] = [(w - rate * dw).detach(), (b - rate * db).detach()]
        for k in (0, 2):
            close(net[k].weight.detach(), weights[k][0])  # type: ignore[union-attr,operator]
            close(net[k].bias.detach(), weights[k][1])  # type: ignore[union-attr,operator]
    assert set(delays) == {0, 1, 2, 3}


@pytest.mark.parametrize("codes", ["jacobi", "sweep"])
def test_staleness_zero_is_together_and_any_resumes_bitwise(codes: Any) -> None:
    nets = [mlp(5, 4, 3) for _ in range(4)]
    together, zero = lw.AltMin(nets[0], codes=codes), lw.AltMin(nets[1], codes=codes, schedule="async", staleness=0)
    for t in range(4):
        together.step(closure_of(nets[0], *batch(seed=t)))
        zero.step(closure_of(nets[1], *batch(seed=t)))
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        close(p.detach(), q.detach(), 1e-12)  # bitwise but for the fresh cotangent's shortcut
    opts = [lw.AltMin(net, codes=codes, schedule="async", staleness=3) for net in nets[2:]]
    for t in range(9):
        if t == 5:
            buffer = io.BytesIO()
            torch.save((nets[2].state_dict(), opts[0].state_dict()), buffer)
            buffer.seek(0)
            weights, state = torch.load(buffer, weights_only=True)
            nets[3].load_state_dict(weights)
            opts[1].load_state_dict(state)
        opts[0].step(closure_of(nets[2], *batch(seed=t)))
        if t >= 5:
            opts[1].step(closure_of(nets[3], *batch(seed=t)))
    assert all(map(torch.equal, nets[2].parameters(), nets[3].parameters()))


# Trace ---------------------------------------------------------------------------------------------------------


@codes_kinds
def test_the_trace_by_hand(codes: Any) -> None:
    """Displacement and violation of the codes, cosine with backprop's gradient, drift; steps 0 and 2 of four."""
    net, mu = mlp(5, 4, 3), 0.5
    step, trace = CodeStep(steps=2, lr=0.1), lw.optim.Trace(every=2)
    opt = lw.AltMin(net, codes=codes, coupling=mu, code_step=step if codes == "sweep" else None, trace=trace)
    start = net[0].weight.detach().clone()  # type: ignore[union-attr,operator]
    for t in range(4):
        x, y = batch(seed=t)
        before, z = params_of(net), net[0](x).detach().requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(net[2](z.tanh()), y), z)
        grads = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
        c = (z - 12 / mu * g).detach()
        if codes == "sweep":
            c = sweep(CodedModel(net, closure_of(net, x, y)), {0: z.detach()}, Terms({0: mu}, 12.0), step)[0]
        opt.step(closure_of(net, x, y))
        if t == 2:
            assert trace.displacement["0.weight"][1] == pytest.approx(float((c - z).detach().square().mean().sqrt()))
            now = net[0](x).detach()
            assert trace.violation["0.weight"][1] == pytest.approx(float((c - now).square().mean().sqrt()))
            for name, k in (("0.weight", 0), ("2.weight", 2)):
                moved = before[k] - list(net.parameters())[k].detach()
                cosine = float((moved * grads[k]).sum() / moved.norm() / grads[k].norm())
                assert trace.cosine[name][1] == pytest.approx(cosine, abs=1e-9)
            drift = float((net[0].weight.detach() - start).norm() / start.norm())  # type: ignore[union-attr,operator]
            assert trace.drift["0.weight"][1] == pytest.approx(drift)
    assert (
        trace.steps == [0, 2]
        and set(trace.displacement) == {"0.weight"}
        and set(trace.drift) == {"0.weight", "2.weight"}
    )
    assert len(trace.rows()) == 4 and set(trace.rows()[0]) == {
        "step",
        "layer",
        "displacement",
        "violation",
        "cosine",
        "drift",
    }
    with pytest.raises(BadInput):
        lw.optim.Trace(every=0)


def test_a_trace_changes_nothing() -> None:
    nets = [mlp(5, 4, 3) for _ in range(2)]
    opts = [lw.AltMin(nets[0], weights="memory"), lw.AltMin(nets[1], weights="memory", trace=lw.optim.Trace())]
    for t in range(3):
        for net, opt in zip(nets, opts, strict=True):
            opt.step(closure_of(net, *batch(seed=t)))
    assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))


@pytest.mark.parametrize(
    "wrong",
    [
        {"repeats": 0}, {"schedule": "later"}, {"staleness": 2}, {"schedule": "async", "staleness": -1},
        {"workers": 0}, {"l1": -1.0}, {"code_l1": float("inf")}, {"regularizer": "l2"}, {"weights": torch.optim.Adam},
        {"codes": "newton"}, {"coupling": 0.0},
    ],
)  # fmt: skip
def test_wrong_choices_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        lw.AltMin(mlp(5, 4, 3), **wrong)


@pytest.mark.parametrize("wrong", [{"own": -1.0}, {"solve": "cg"}])
def test_wrong_code_steps_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        CodeStep(**wrong)


# Kernels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"betas": (0.5, 0.9), "eps": 1e-3}, {"weights": "sgd"},
                                      {"weights": "sgd", "momentum": 0.0}], ids=str)  # fmt: skip
def test_fused_steps_have_the_bits_of_torchs(settings: dict[str, Any]) -> None:
    """Weight and bias at one rate, and at two; after a load, too."""
    kind = torch.optim.SGD if "weights" in settings else torch.optim.Adam
    chosen = {k: v for k, v in settings.items() if k != "weights"}
    if kind is torch.optim.SGD:
        momentum = chosen.setdefault("momentum", 0.9)
        chosen["nesterov"] = momentum > 0
    for rates in ((0.01, 0.01), (0.01, 0.02)):
        params = [[torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (40, 7)] for _ in range(2)]
        ours, theirs = (
            make([{"params": [p], "lr": lr} for p, lr in zip(some, rates, strict=True)], **chosen)
            for make, some in zip(
                (fused(kind, params[0]), lambda *a, **k: kind(*a, fused=True, **k)), params, strict=True
            )
        )
        assert type(ours) is not kind and type(theirs) is kind
        for t in range(6):
            for p, q in zip(*params, strict=True):
                p.grad = q.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t))
            if t == 3:
                ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
            if t in (0, 3, 4):  # gathered at a step, it serves as long as the state is the same
                advance = ours.ready()
            with torch.no_grad():
                advance()
            theirs.step()
            assert all(map(torch.equal, *params))


# Keywords that change nothing ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "owner"),
    [
        ({"code_step": CodeStep()}, 'codes="sweep"'),
        ({"codes": "gauss-newton", "code_step": CodeStep()}, 'codes="sweep"'),
        ({"momentum": 0.5}, 'weights="sgd"'),
        ({"weights": "sgd", "betas": (0.5, 0.9)}, 'weights="adam"'),
        ({"weights": "sgd", "eps": 1e-3}, 'weights="adam"'),
        ({"weights": "memory", "rows": 2}, 'weights="adam" and "sgd"'),
        ({"weights": "memory", "normalise": True}, "LocalSteps"),
    ],
)
def test_a_keyword_that_changes_nothing_names_what_it_belongs_to(words: dict[str, Any], owner: str) -> None:
    with pytest.raises(BadInput, match=f"changes nothing here: it belongs to .*{owner}"):
        lw.AltMin(mlp(3, 2), **words)


def test_a_keyword_of_one_layer_or_group_is_taken() -> None:
    net = mlp(3, 4, 2)
    lw.AltMin(net, layers={"0": {"weights": "sgd"}}, momentum=0.5)
    lw.AltMin(net, [{"params": net.parameters(), "weights": "sgd"}], momentum=0.5)
    lw.AltMin(net, weights="memory", betas=(0.5, 0.9))  # of parameters without a code
    lw.AltMin(net, codes="sweep", code_step=CodeStep())
