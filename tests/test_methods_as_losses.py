"""Losses made from other methods of a model than `forward`, and from parts of its output that are parameters alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from program_checks import check_curvature, check_first_order
from quantity_checks import dense_factors
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

import layerwise as lw
from layerwise import errors

pytestmark = pytest.mark.usefixtures("float64")

N = 4
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
NOISE = torch.randn(N, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class _Autoencoder(nn.Module):
    """Variational; its criterion is a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
        self.mean, self.log_var, self.decoder = nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(2, 3)
        self.criterion = _Cubed()

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x)
        return self.mean(h), self.log_var(h)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_var = self.encode(x)
        return self.decode(mean + NOISE * (0.5 * log_var).exp()), mean, log_var


class _Cubed(nn.Module):
    """A criterion of the user's own: a term for each sample."""

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return (z - y).abs().pow(3).mean(1)


def _parts(m: _Autoencoder) -> tuple[Tensor, Tensor, Tensor]:
    mean, log_var = m.encode(X)
    return m.decode(mean + NOISE * (0.5 * log_var).exp()), mean, log_var


def _kl(mean: Tensor, log_var: Tensor) -> Tensor:
    return 0.5 * (mean.square() + log_var.exp() - log_var - 1).sum(1)


def _known(m: _Autoencoder, out: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return F.mse_loss(out[0], X, reduction="none").mean(1) + _kl(*out[1:])


def _own(m: _Autoencoder, out: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return m.criterion(out[0], X) + _kl(*out[1:])


@pytest.mark.parametrize("terms", [_known, _own])
def test_encode_and_decode_are_as_exact_as_forward(terms: Callable[[Any, Any], Tensor]) -> None:
    model = _Autoencoder()
    check_first_order(model, lambda: terms(model, _parts(model)).mean(), lambda: terms(model, _parts(model)) / N)
    check_curvature(model, lambda: _parts(model), lambda z: terms(model, z).mean())
    found = []
    for run in (lambda: model(X), lambda: _parts(model)):
        torch.manual_seed(1)
        with lw.observe(model, lw.KFLR(), lw.KFAC(draws=2)) as seen:
            terms(model, run()).mean().backward()
        found.append([dense_factors(seen.kflr), dense_factors(seen.kfac)])
    for one, other in zip(*found, strict=True):
        for i in (0, 1):
            oracle.assert_close({n: f[i] for n, f in one.items()}, {n: f[i] for n, f in other.items()})


def test_modules_called_one_by_one() -> None:
    """A backbone and a projection, whose model has no forward, under a loss of the user's own."""
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(3, 4), nn.Tanh()), "head": nn.Linear(4, 2)})
    logits = lambda: model["head"](model["body"](X))  # noqa: E731
    terms = lambda: (logits() - NOISE).cosh().log().sum(1) / N  # noqa: E731
    check_first_order(model, lambda: terms().sum(), terms)
    check_curvature(model, logits, lambda z: (z - NOISE).cosh().log().sum() / N)


def test_steps_on_methods_are_those_on_forward() -> None:
    one, other = _Autoencoder(), _Autoencoder()
    other.load_state_dict(one.state_dict())
    for model, run in ((one, _parts), (other, lambda m: m(X))):
        torch.manual_seed(1)
        opt = lw.optim.KFAC(model, lr=0.1)
        for _ in range(2):
            opt.step(lambda model=model, run=run: _known(model, run(model)).mean())
    oracle.assert_close(dict(one.named_parameters()), dict(other.named_parameters()))


class _Flow(nn.Module):
    """An affine flow after a coupling; its log-determinant is of parameters alone, or of both."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 4)
        self.scale, self.shift = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (x - self.shift) * self.scale.exp(), self.scale.sum()

    def coupled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, det = self(x)
        s, t = self.net(z[:, :1]).tanh().chunk(2, 1)
        return torch.cat([z[:, :1], z[:, 1:] * s.exp() + t], 1), det + s.sum(1)

    def log_prob(self, x: Tensor) -> Tensor:
        z, det = self.coupled(x)
        return torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1) + det

    def expanded(self, x: Tensor) -> Tensor:
        z, det = self(x)
        return -0.5 * z.square().sum(1) + det.expand(len(x))


FLOWS: dict[str, Callable[[_Flow], Tensor]] = {
    "log_prob": lambda m: m.log_prob(X),
    "tuple": lambda m: (lambda z, det: -0.5 * z.square().sum(1) + det)(*m(X)),
    "tuple_scaled": lambda m: (lambda z, det: det * 0.3 - z.abs().pow(3).sum(1))(*m(X)),
    "expanded": lambda m: m.expanded(X),
    "coupled": lambda m: (lambda z, det: -0.5 * z.square().sum(1) + det)(*m.coupled(X)),
}


@pytest.mark.parametrize("name", FLOWS)
def test_likelihoods_by_methods_and_tuples(name: str) -> None:
    """Before the mean; after it, a term of parameters alone belongs to no sample."""
    model, terms = _Flow(), FLOWS[name]
    check_first_order(model, lambda: -terms(model).mean(), lambda: -terms(model) / N)
    with lw.observe(model, lw.DiagHessian()) as seen:
        (-terms(model).mean()).backward()
    named = {n: p for n, p in model.named_parameters() if n in seen.diag_hessian}
    oracle.assert_close(dict(seen.diag_hessian), oracle.diag_hessian(named, lambda: -terms(model).mean()))
    with pytest.raises(errors.UnknownLoss, match="line"):
        lw.GGN(model, lambda: -terms(model).mean())


def test_a_determinant_after_the_mean_is_refused_with_the_remedy() -> None:
    model = _Flow()
    with pytest.raises(errors.Undefined, match=r"scale.*before the mean"), lw.observe(model, lw.Variance()):
        z, det = model(X)
        (0.5 * z.square().sum(1).mean() - det).backward()


def test_no_hook_is_left_behind_and_a_failed_call_changes_nothing() -> None:
    model = _Autoencoder()
    with lw.observe(model, lw.DiagGGN()) as seen:
        for call in (model, model.encode, model.decode):
            with pytest.raises(errors.BadInput):
                call(torch.randn(2, 7))
        _own(model, _parts(model)).mean().backward()
    want = oracle.diag_ggn(oracle.parameters(model), lambda: _parts(model), lambda z: _own(model, z).mean())
    oracle.assert_close(dict(seen.diag_ggn), want)
    assert not torch_module._global_forward_hooks and not torch_module._global_forward_pre_hooks
