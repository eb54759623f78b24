"""Losses that hold derivatives of the model: gradient penalties, differential equations, forces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from program_checks import check_curvature, check_first_order
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import layerwise as lw
from layerwise import errors
from layerwise.local.layers.record import record
from layerwise.optim.layer_local.coding import weight_gradients

pytestmark = pytest.mark.usefixtures("float64")

N = 4
Terms = Callable[[nn.Module, Tensor], Tensor]  # (model, batch) -> the samples' terms [N]


def _grad(out: Tensor, x: Tensor, **options: Any) -> Tensor:
    return torch.autograd.grad(out, x, create_graph=True, **options)[0]


def _penalty(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return (_grad(model(x).sum(), x).flatten(1).norm(dim=1) - 1).square() / N


def _critic(model: nn.Module, x: Tensor) -> Tensor:
    """A critic on two batches, with the penalty between them."""
    fake, mix = x.flip(1).tanh(), torch.linspace(0.1, 0.9, N).view(-1, *[1] * (x.dim() - 1))
    between = (mix * x + (1 - mix) * fake).requires_grad_()
    slope = _grad(model(between), between, grad_outputs=torch.ones(N, 1)).flatten(1).norm(2, dim=1)
    return (model(fake)[:, 0] - model(x)[:, 0] + 10 * (slope - 1) ** 2) / N


def _equation(model: nn.Module, x: Tensor) -> Tensor:
    """The residual of u_xx + u_yy = u u_z."""
    x = x.clone().requires_grad_()
    u = model(x)
    first = _grad(u.sum(), x)
    second = [_grad(first[:, i].sum(), x)[:, i] for i in range(2)]
    return (second[0] + second[1] - u[:, 0] * first[:, 2]).square() / N


def _columns(model: nn.Module, x: Tensor) -> Tensor:
    """The columns of the batch as inputs of their own, as equations are often written."""
    t, s, r = (c[:, None].clone().requires_grad_() for c in x.unbind(1))
    u = model(torch.cat([t, s, r], 1))
    u_t, u_s = torch.autograd.grad(u, (t, s), torch.ones_like(u), create_graph=True)
    u_ss = _grad(u_s, s, grad_outputs=torch.ones_like(u_s))
    return (u_t + u * u_s - 0.1 * u_ss).square()[:, 0] / N


def _boundary(model: nn.Module, x: Tensor) -> Tensor:
    """An equation inside, and values at the edge by a known loss."""
    return _equation(model, x) + F.mse_loss(model(x.sign()), x[:, :1], reduction="none")[:, 0] / N


def _noise(model: nn.Module, x: Tensor) -> Tensor:
    """A loss whose own derivative by the input is penalised (double backpropagation)."""
    x = x.clone().requires_grad_()
    loss = F.binary_cross_entropy_with_logits(model(x), (x[:, :1] > 0).double(), reduction="none")[:, 0]
    return loss / N + _grad(loss.sum(), x).flatten(1).square().sum(1) / N


def _hidden(model: nn.Module, x: Tensor) -> Tensor:
    """A derivative by an activation, with the first layer below it."""
    h = model[0](x)  # type: ignore[index]
    return (_grad(model[1:](h).sum(), h).flatten(1).square().sum(1) + h.flatten(1).square().sum(1)) / N  # type: ignore[index]


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Softplus(), nn.Linear(3, 1))


def _normed() -> nn.Module:
    return nn.Sequential(weight_norm(nn.Linear(3, 3)), nn.Sigmoid(), nn.Linear(3, 1))


PROGRAMS: dict[str, tuple[Terms, Callable[[], nn.Module]]] = {
    "penalty": (_penalty, _net), "critic": (_critic, _net), "equation": (_equation, _net),
    "columns": (_columns, _net), "boundary": (_boundary, _net), "noise": (_noise, _net), "hidden": (_hidden, _net),
    "penalty_normed": (_penalty, _normed), "equation_normed": (_equation, _normed),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_first_order_and_the_hessian_are_exact(name: str) -> None:
    terms, make = PROGRAMS[name]
    model, x = make(), torch.randn(N, 3)
    check_first_order(model, lambda: terms(model, x).sum(), lambda: terms(model, x))
    with lw.observe(model, lw.DiagHessian(), lw.ClippedGrad(max_norm=0.1)) as seen:
        terms(model, x).sum().backward()
    named = oracle.parameters(model)
    used = {name: p for name, p in named.items() if name in oracle.used_names(named, lambda: terms(model, x).sum())}
    with oracle.plain_operations():
        want = oracle.diag_hessian(used, lambda: terms(model, x).sum())
    oracle.assert_close(dict(seen.diag_hessian), want)
    clipped, _ = oracle.clipped_grad(oracle.per_sample_grad(used, lambda: terms(model, x)), 0.1)
    oracle.assert_close(dict(seen.clipped_grad), clipped)


def test_convolutions_under_a_penalty() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(15, 1))
    x = torch.randn(N, 2, 5)
    check_first_order(model, lambda: _critic(model, x).sum(), lambda: _critic(model, x))


BIASED: dict[str, Callable[[], nn.Module]] = {
    "layer_norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)),
    "group_norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4)),
    "layer_norm_of_positions": lambda: nn.Sequential(nn.Unflatten(1, (3, 1)), nn.Linear(1, 4), nn.LayerNorm(4)),
    "instance_norm": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 4, 1), nn.InstanceNorm1d(4, affine=True)
    ),
}


@pytest.mark.parametrize("name", BIASED)
def test_a_bias_that_a_penalty_does_not_reach_has_a_gradient_of_zero(name: str) -> None:
    """The call reads it beside a weight that the penalty does reach."""
    torch.manual_seed(0)
    model, x = BIASED[name](), torch.randn(N, 3)
    terms = lambda: _penalty(nn.Sequential(model, nn.Tanh()) if "instance" in name else model, x)  # noqa: E731
    grads = oracle.per_sample_grad(oracle.parameters(model), terms)
    with lw.observe(model, lw.Variance(), lw.NoiseScale()) as seen:
        terms().sum().backward()
    got = dict(seen.variance)
    assert len(got) >= 3
    oracle.assert_close(got, {key: grads[key].var(0, correction=0) for key in got})
    bias = f"{len(model) - 1}.bias"
    if name.startswith("layer_norm"):
        assert not seen.grad[bias].any()
        assert not seen.noise_scale.snr[bias].any()


def test_a_third_derivative_that_torch_gets_wrong_is_refused() -> None:
    """That of a layer norm in torch 2.13; the gradient of a penalty needs the second alone."""
    model, x = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Sigmoid(), nn.Linear(3, 1)), torch.randn(N, 3)
    want = oracle.per_sample_grad(oracle.parameters(model), lambda: _critic(model, x))
    with lw.observe(model, lw.PerSampleGrad()) as seen:
        _critic(model, x).sum().backward()
    oracle.assert_close(dict(seen.per_sample_grad), want)
    with pytest.raises(errors.Undefined, match=r"not symmetric.*layer norm.*by its mean and variance"):
        lw.Hessian(model, lambda: _critic(model, x).sum())


def test_so_is_that_of_batch_norm_in_training_mode() -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Sigmoid(), nn.Linear(3, 1)), torch.randn(N, 3)
    with pytest.raises(errors.Undefined, match=r"not symmetric.*batch norm in training mode"):
        lw.Hessian(model, lambda: _critic(model, x).sum())
    lw.Hessian(model.eval(), lambda: _critic(model, x).sum())


class _NormedByFormula(nn.LayerNorm):
    """A layer norm by its mean and variance."""

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight + self.bias


def test_the_advice_on_that_derivative_helps() -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), _NormedByFormula(3), nn.Sigmoid(), nn.Linear(3, 1)), torch.randn(N, 3)
    named = oracle.parameters(model)
    got = lw.Hessian(model, lambda: _critic(model, x).sum()).to_dense()
    oracle.assert_close({"hessian": got}, {"hessian": oracle.hessian(named, lambda: _critic(model, x).sum())})


@pytest.mark.parametrize("quantity", [lw.DiagGGN(), lw.KFAC(), lw.KFLR(), lw.EKFAC()], ids=repr)
def test_curvature_is_refused_by_that_reason(quantity: Any) -> None:
    model, x = _net(), torch.randn(N, 3)
    says = r"holds derivatives of the model \(Use 3: grad of 0.weight.*line \d+ of test_derivatives_in_losses.py"
    with pytest.raises(errors.Undefined, match=says), lw.observe(model, quantity):
        _penalty(model, x).sum().backward()
    assert all(p.grad is None for p in model.parameters())


def test_the_operator_is_refused_by_that_reason() -> None:
    model, x = _net(), torch.randn(N, 3)
    with pytest.raises(errors.Undefined, match="holds derivatives of the model"):
        lw.GGN(model, lambda: _boundary(model, x).sum())


class _Field(nn.Module):
    """An energy, and the forces that follow from it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _net()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        energy = self.net(x)
        return energy, -_grad(energy.sum(), x)


def test_forces_in_known_losses_are_exact_for_all_quantities() -> None:
    model, x = _Field(), torch.randn(N, 3)
    energy, forces = torch.randn(N, 1), torch.randn(N, 3)
    loss_of = lambda z: F.mse_loss(z[0], energy) + 5 * F.mse_loss(z[1], forces)  # noqa: E731

    def terms() -> Tensor:
        e, f = model(x)
        return ((e - energy).square().mean(1) + 5 * (f - forces).square().mean(1)) / N

    check_first_order(model, lambda: loss_of(model(x)), terms)
    check_curvature(model, lambda: model(x), loss_of)


def test_a_penalty_of_the_whole_batch_has_a_gradient_and_no_samples() -> None:
    model, x = _net(), torch.randn(N, 3)

    def loss() -> Tensor:
        value = F.mse_loss(model(x), x[:, :1])
        grads = torch.autograd.grad(value, list(model.parameters()), create_graph=True)
        return value + sum(g.square().sum() for g in grads)

    with lw.observe(model) as seen:
        loss().backward()
    oracle.assert_close(dict(seen.grad), oracle.gradient(oracle.parameters(model), loss))
    hessian = oracle.hessian(oracle.parameters(model), loss)
    oracle.assert_close({"matrix": lw.Hessian(model, loss).to_dense()}, {"matrix": hessian})
    with pytest.raises((errors.SamplesMixed, errors.BadInput)), lw.observe(model, lw.Variance()):
        loss().backward()


class _Assembled(nn.Module):
    """A weight assembled of frozen and learned parts, or a shift that all samples share."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.head = kind, nn.Linear(2, 3), nn.Linear(3, 3)
        self.u, self.d = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3), requires_grad=kind != "frozen")
        self.table, self.upper = nn.EmbeddingBag(4, 3, mode="sum"), torch.triu_indices(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        if self.kind == "table":
            h = F.gelu(h * self.table(torch.arange(8).view(4, 2) % 4)[:, None])
        U = torch.zeros(3, 3)
        if self.kind == "table":
            U.diagonal().copy_(self.d)
        U[self.upper[0], self.upper[1]] = self.u
        if self.kind != "learned":
            U.mul_(self.d)
        h = h + self.d * self.u if self.kind == "shift" else h @ U
        return self.head(F.gelu(h))


@pytest.mark.parametrize("total", [torch.sum, torch.mean])
@pytest.mark.parametrize("kind", ["learned", "frozen", "both", "shift", "table"])
def test_penalties_on_models_with_assembled_weights(kind: str, total: Callable[[Tensor], Tensor]) -> None:
    model, x = _Assembled(kind), torch.randn(N, 2, 2)
    model.first.weight.requires_grad_(requires_grad=False)

    def each() -> Tensor:
        batch = x.clone().requires_grad_()
        return (_grad(model(batch).sum(), batch).flatten(1).norm(dim=1) - 1).square()

    terms = lambda: each() / (N if total is torch.mean else 1)  # noqa: E731
    for _ in range(3):  # what was measured is remembered
        with lw.observe(model, lw.PerSampleGrad()) as seen:
            total(each()).backward()
        want = oracle.per_sample_grad(oracle.parameters(model), terms)
        oracle.assert_close(dict(seen.per_sample_grad), {name: want[name] for name in seen.grad})
    if kind != "table":  # torch has no second derivative of a bag's gradient
        check_first_order(model, lambda: total(each()), terms)


# Local learning ------------------------------------------------------------------------------------------------------


class _Deep(nn.Sequential):
    """Three layers, and a slope by the first one's output, which reads the weights above it alone."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Softplus(), nn.Linear(3, 1))

    def inner(self, x: Tensor) -> Tensor:
        h = self[0](x)
        u = self[4](self[3](self[2](self[1](h))))
        return (u - _grad(u.sum(), h).norm(dim=1, keepdim=True)).square()[:, 0] / N


LOCAL: dict[str, tuple[Callable[[_Deep, Tensor], Tensor], set[str]]] = {  # terms, and the weights with a local problem
    "penalty": (_penalty, set()),
    "equation": (_equation, set()),
    "penalty within the model": (_Deep.inner, {"0.weight"}),
}


@pytest.mark.parametrize("name", LOCAL)
def test_local_problems_and_the_other_gradients_are_together_the_gradient(name: str) -> None:
    model, x, (terms, local) = _Deep(), torch.randn(N, 3), LOCAL[name]
    run = record(model, lambda: terms(model, x).sum())
    found = {**weight_gradients(run), **run.gradients}
    params = {
        n: p for n, p in model.named_parameters() if n not in {b for layer in run.layers for b in layer.names[1:]}
    }
    grads = torch.autograd.grad(terms(model, x).sum(), list(params.values()), allow_unused=True)
    want = {n: g for n, g in zip(params, grads, strict=True) if g is not None}
    assert {layer.name for layer in run.layers} == local
    oracle.assert_close({n: found[n] for n in want}, want)


@pytest.mark.parametrize("name", LOCAL)
def test_codes_are_refused_by_name_where_the_loss_holds_derivatives(name: str) -> None:
    model, x, (terms, _) = _Deep(), torch.randn(N, 3), LOCAL[name]
    before = [p.clone() for p in model.parameters()]
    opt = lw.AltMin(model, codes="sweep")
    with pytest.raises(errors.Undefined, match=r"takes derivatives of the model \(Use \d+: grad of .* codes='jacobi'"):
        opt.step(lambda: terms(model, x).sum())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert float(lw.AltMin(model).step(lambda: terms(model, x).sum())) > 0
