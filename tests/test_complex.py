"""Complex parameters and activations: first order by Wirtinger's rule, all else as for the real parts, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layerwise as lw
from layerwise import errors

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore::layerwise.errors.SlowPath"),
]

KINDS = "einsum mul matmul linear conv derived twice".split()


class Spectral(nn.Module):
    """A layer in the frequencies, whose weight is complex, or a real one of its two parts."""

    def __init__(self, kind: str, parts: bool) -> None:
        super().__init__()
        self.kind, self.parts = kind, parts
        shape = {"mul": (3,), "conv": (1, 1, 2)}.get(kind, (3, 3))
        weight, shift = torch.randn(*shape, 2), torch.randn(3, 2)
        made = (lambda x: x) if parts else torch.view_as_complex
        self.weight, self.shift = nn.Parameter(made(weight)), nn.Parameter(made(shift))
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        w, c = ((torch.view_as_complex(p) if self.parts else p) for p in (self.weight, self.shift))
        h = torch.fft.rfft(x)
        if self.kind == "einsum":
            h = torch.einsum("ni,io->no", h, w)
        elif self.kind == "mul":
            h = h * w + c
        elif self.kind == "matmul":
            h = h @ w + c.conj()
        elif self.kind == "linear":
            h = F.linear(h, w, c)
        elif self.kind == "conv":
            h = F.pad(F.conv1d(h[:, None], w)[:, 0], (0, 1)) * c
        elif self.kind == "derived":
            h = h @ (w.conj().T * c)
        elif self.kind == "twice":
            h = torch.einsum("ni,ij,jk->nk", h, w, w)
        return self.last(torch.fft.irfft(h, n=4).tanh())


def _twins(kind: str) -> tuple[Spectral, Spectral]:
    one, real = Spectral(kind, parts=False), Spectral(kind, parts=True)
    with torch.no_grad():
        for p, q in zip(one.parameters(), real.parameters(), strict=True):
            q.copy_(torch.view_as_real(p) if p.is_complex() else p)
    return one, real


def _batch() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 4), torch.randn(5, 2)


FIRST = (
    lw.PerSampleGrad(), lw.SquaredNorm(), lw.SecondMoment(), lw.Variance(), lw.PairwiseDot(), lw.NoiseScale(),
    lw.NoiseScale(snr=False), lw.ClippedGrad(0.1),
)  # fmt: skip


@pytest.mark.parametrize("scale", ["loss", "sample"])
@pytest.mark.parametrize("kind", KINDS)
def test_first_order_is_that_of_the_two_parts(kind: str, scale: str) -> None:
    """Brute force: the same model with a real parameter of both parts, a loop over its samples."""
    one, real = _twins(kind)
    x, y = _batch()
    with lw.observe(one, *FIRST, scale=scale) as seen:
        F.mse_loss(one(x), y).backward()
    params = {n: p for n, p in real.named_parameters() if n in seen.grad}
    factor = len(x) if scale == "sample" else 1
    terms = lambda: (real(x) - y).square().mean(1) / len(x)  # noqa: E731
    grads = oracle.per_sample_grad(params, terms)
    scaled = {n: factor * g for n, g in grads.items()}
    complex_ = {n for n, p in one.named_parameters() if p.is_complex()}

    def whole(values: Any) -> dict[str, Tensor]:
        return {n: torch.view_as_complex(v.contiguous()) if n in complex_ else v for n, v in values.items()}

    def summed(values: Any) -> dict[str, Tensor]:
        return {n: v.sum(-1) if n in complex_ else v for n, v in values.items()}

    oracle.assert_close(dict(seen.per_sample_grad), whole(scaled))
    oracle.assert_close(dict(seen.squared_norm), oracle.squared_norm(scaled))
    oracle.assert_close(dict(seen.second_moment), summed(oracle.second_moment(grads, scale)))
    oracle.assert_close(dict(seen.variance), summed(oracle.variance(grads, scale)))
    oracle.assert_close(dict(seen.pairwise_dot), oracle.pairwise_dot(scaled))
    for quantity in FIRST[5:7]:
        noise = oracle.noise_scale(grads, len(x))
        oracle.assert_close(dict(seen[quantity].noise), noise["noise"])
        oracle.assert_close(dict(seen[quantity].signal), noise["signal"])
    for name, snr in seen[FIRST[5]].snr.items():
        h = len(x) * grads[name]
        mean, spread = h.mean(0).square(), h.var(0)
        mean, spread = (summed({name: v})[name] for v in (mean, spread))
        want = torch.where(mean == 0, mean, mean / spread)
        oracle.assert_close({name: snr}, {name: want})
    clipped, norms = oracle.clipped_grad(grads, 0.1, factor)
    oracle.assert_close(dict(seen.clipped_grad), whole(clipped))
    oracle.assert_close(seen.clipped_grad.norms, norms)
    assert not any(v.is_complex() for q in FIRST[1:7] for v in dict(seen[q]).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_another_type_of_results(dtype: torch.dtype) -> None:
    one, _ = _twins("einsum")
    x, y = _batch()
    with lw.observe(one, lw.PerSampleGrad(), lw.Variance(), dtype=dtype) as seen:
        F.mse_loss(one(x), y).backward()
    assert seen.per_sample_grad["weight"].dtype == dtype.to_complex()
    assert seen.variance["weight"].dtype == dtype


SECOND = (
    lw.Sketch(4), lw.FisherDiag(), lw.DiagGGN(), lw.SqrtGGN(), lw.DiagHessian(), lw.DiagHessian(draws=1), lw.KFAC(),
    lw.KFLR(), lw.EKFAC(), lw.KFRA(),
)  # fmt: skip


@pytest.mark.parametrize("quantity", SECOND, ids=repr)
def test_other_quantities_name_the_complex_parameter(quantity: Any) -> None:
    one, _ = _twins("mul")
    x, y = _batch()
    with pytest.raises(errors.Undefined, match="'shift' is complex"), lw.observe(one, quantity):
        F.mse_loss(one(x), y).backward()
    assert all(p.grad is None for p in one.parameters())


@pytest.mark.parametrize("made", [lw.GGN, lw.Hessian, lw.PCH])
def test_operators_name_the_complex_parameter(made: Any) -> None:
    one, _ = _twins("mul")
    x, y = _batch()
    with pytest.raises(errors.Undefined, match="'weight' is complex"):
        made(one, lambda: F.mse_loss(one(x), y))


@pytest.mark.parametrize("made", [lw.LocoProp, lw.AltMin, lw.optim.KFAC, lw.optim.DiagNewton])
def test_optimizers_name_the_complex_parameter(made: Any) -> None:
    one, _ = _twins("mul")
    with pytest.raises(errors.BadInput, match="'weight' is complex"):
        made(one, lr=0.1)


# Complex intermediates of real parameters -------------------------------------------------------------------


class _Magnitudes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.fft.rfft(self.first(x)).abs())


class _Mixed(nn.Module):
    """A real weight in a complex product."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight, self.last = nn.Linear(4, 4), nn.Parameter(torch.randn(3)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.fft.irfft(torch.fft.rfft(self.first(x)) * self.weight, n=4).tanh())


class _Polar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.angle, self.last = nn.Linear(4, 3), nn.Parameter(torch.randn(3)), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.polar(self.first(x).exp(), self.angle.expand(len(x), 3))
        return self.last((z * z.conj().sum(1, keepdim=True)).imag)


class _Narrow(nn.Module):
    """So few units above a complex function that a column for each is the cheapest way to the Hessian's diagonal."""

    def __init__(self, curved: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.curved = nn.Linear(4, 2), nn.Linear(2, 2), curved

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.curved(torch.fft.rfft(self.first(x))))


NARROW: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs, "exp": lambda z: (z * (1 + 1j)).exp().imag, "sgn": lambda z: (z + 1j).sgn().real,
    "angle": lambda z: (z + 1j).angle(),
}  # fmt: skip

MODELS = {
    **{f"narrow_{name}": (lambda curved=curved: _Narrow(curved)) for name, curved in NARROW.items()},
    "magnitudes": _Magnitudes, "mixed": _Mixed, "polar": _Polar,
    **{f"parts_{kind}": (lambda kind=kind: Spectral(kind, parts=True)) for kind in KINDS},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_real_parameters_under_complex_activations_are_exact(name: str) -> None:
    model, (x, y) = MODELS[name](), _batch()
    every = oracle.parameters(model)
    loss_of = lambda z: F.mse_loss(z, y)  # noqa: E731
    used = oracle.used_names(every, lambda: model(x).sum())
    params = {n: p for n, p in every.items() if n in used}
    grads = oracle.per_sample_grad(params, lambda: (model(x) - y).square().mean(1) / len(x))
    quantities = lw.PerSampleGrad(), lw.Variance(), lw.DiagGGN(), lw.DiagHessian(), lw.DiagHessian(per_sample=True)
    with lw.observe(model, *quantities) as seen:
        loss_of(model(x)).backward()
    hessian = oracle.diag_hessian(params, lambda: loss_of(model(x)))
    oracle.assert_close(dict(seen.per_sample_grad), grads)
    oracle.assert_close(dict(seen.variance), oracle.variance(grads))
    oracle.assert_close(dict(seen.diag_ggn), oracle.diag_ggn(params, lambda: model(x), loss_of))
    oracle.assert_close(dict(seen[quantities[3]]), hessian)
    oracle.assert_close({n: h.sum(0) for n, h in seen[quantities[4]].items()}, hessian)
    for operator, dense in (
        (lw.GGN(model, lambda: loss_of(model(x))), oracle.ggn(every, lambda: model(x), loss_of)),
        (lw.Hessian(model, lambda: loss_of(model(x))), oracle.hessian(every, lambda: loss_of(model(x)))),
    ):
        oracle.assert_close({"matrix": operator.to_dense()}, {"matrix": dense})
    for made in (lw.LocoProp, lw.AltMin, lw.optim.KFAC, lw.optim.DiagNewton):
        made(model, lr=0.01).step(lambda: loss_of(model(x)))
    assert all(bool(p.isfinite().all()) for p in model.parameters())
