"""float16, bfloat16 and autocast: sums are accumulated in float32, and held to a loop over samples in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layerwise as lw
from layerwise import local
from layerwise.errors import BadInput
from layerwise.operators.kronecker import Kronecker, KroneckerBlock
from layerwise.optim.layer_local.updates import fused

LOW = pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
AUTOCAST = pytest.mark.parametrize("autocast", [False, True], ids=["parameters", "autocast"])


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def batch(n: int) -> tuple[Tensor, Tensor]:
    """Inputs around 1 and one class: sums that a type of few digits would cease to add to."""
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(1)) * 0.5 + 1, torch.zeros(n, dtype=torch.int64)


def brute(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, dict[str, Tensor]]:
    """Squared norms, second moments and variances of a sum loss, and the GGN's diagonal, by loops in float64."""
    params = dict(model.named_parameters())
    rows: dict[str, list[Tensor]] = {name: [] for name in params}
    ggn = {name: torch.zeros_like(p) for name, p in params.items()}
    for xn, yn in zip(x, y, strict=True):
        z = model(xn[None])
        grads = torch.autograd.grad(F.cross_entropy(z, yn[None]), list(params.values()), retain_graph=True)
        for name, g in zip(params, grads, strict=True):
            rows[name].append(g)
        p = z[0].detach().softmax(0)
        jacobian = [torch.autograd.grad(zc, params.values(), retain_graph=True) for zc in z[0]]
        for i, name in enumerate(params):
            j = torch.stack([row[i] for row in jacobian])
            ggn[name] += torch.einsum("c,c...->...", p, j.square()) - torch.einsum("c,c...->...", p, j).square()
    g = {name: torch.stack(found) for name, found in rows.items()}
    return {
        "squared_norm": {name: r.flatten(1).square().sum(1) for name, r in g.items()},
        "second_moment": {name: r.square().sum(0) for name, r in g.items()},
        "variance": {name: r.var(0, unbiased=False) for name, r in g.items()},
        "diag_ggn": ggn,
    }


@cache
def wanted(low: torch.dtype, autocast: bool, n: int) -> dict[str, dict[str, Tensor]]:
    """Brute force on the model's weights and inputs as they are in few digits, or for autocast in float32."""
    x, y = batch(n)
    model, x = (net(), x) if autocast else (net().to(low), x.to(low))
    return brute(model.double(), x.double(), y)


def seen_in(low: torch.dtype, autocast: bool, n: int, dtype: torch.dtype | None) -> tuple[Any, Any]:
    """What is observed of a model in few digits, and brute force in float64 on its weights and inputs."""
    x, y = batch(n)
    model, x = (net(), x) if autocast else (net().to(low), x.to(low))
    with lw.observe(model, lw.SquaredNorm(), lw.SecondMoment(), lw.Variance(), lw.DiagGGN(), dtype=dtype) as seen:
        with torch.autocast("cpu", low, enabled=autocast):
            z = model(x)
        F.cross_entropy(z.float(), y, reduction="sum").backward()
    return seen, wanted(low, autocast, n)


@LOW
@AUTOCAST
@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("n", [16, 320])
def test_quantities(low: torch.dtype, autocast: bool, dtype: torch.dtype | None, n: int) -> None:
    """Within two units of the type's last place, whatever the number of samples.

    A variance is a difference of a second moment and the square of a mean: that share of the second moment.
    """
    seen, want = seen_in(low, autocast, n, dtype)
    tol = 2 * torch.finfo(low).eps
    for quantity, values in want.items():
        for name, value in values.items():
            found = getattr(seen, quantity)[name].double()
            scale = want["second_moment"][name] / n if quantity == "variance" else value
            assert (found - value).norm() <= tol * scale.norm(), (quantity, name)


@LOW
def test_sums_are_closer_than_the_type_of_the_model(low: torch.dtype) -> None:
    """Rounding of the model's own numbers averages out in a sum of many; what is left is far below its last place."""
    seen, want = seen_in(low, False, 320, None)
    for quantity in ("second_moment", "diag_ggn"):
        for name, value in want[quantity].items():
            assert (getattr(seen, quantity)[name] - value).norm() <= 0.1 * torch.finfo(low).eps * value.norm()


@LOW
@pytest.mark.parametrize("quantity", [lw.KFAC(1), lw.KFLR(), lw.EKFAC(None)], ids=repr)
def test_inverses_of_factors(low: torch.dtype, quantity: lw.Quantity) -> None:
    """They are in float32, as in float64 to two units of the last place of the type, times 3 for the damped inverse."""
    x, y = batch(8)
    found = []
    for dtype in (low, torch.float64):
        torch.manual_seed(3)
        model = net().to(low).to(dtype)
        with lw.observe(model, quantity) as seen:
            F.cross_entropy(model(x.to(low).to(dtype)).to(torch.promote_types(dtype, torch.float32)), y).backward()
        found.append(seen[quantity].inverse(damping=0.1) @ {n: g.double() for n, g in seen.grad.items()})
    for one, two in zip(found[0].values(), found[1].values(), strict=True):
        assert (one - two).norm() <= 6 * torch.finfo(low).eps * two.norm()


@LOW
def test_factors_in_half_precision_have_no_inverse(low: torch.dtype) -> None:
    """Those of another program; the library's own are never held so."""
    block = KroneckerBlock(torch.eye(2, dtype=low)[None], torch.eye(2, dtype=low)[None])
    with pytest.raises(BadInput, match=r"observe\(\.\.\., dtype=torch\.float32\)"):
        Kronecker({"w": block}).inverse(damping=0.1)


LOCAL: dict[str, tuple[Callable[[nn.Module], torch.optim.Optimizer], int]] = {  # with units of the last place
    "LocoProp": (lambda m: lw.LocoProp(m, lr=0.01), 2),
    "AltMin": (lambda m: lw.AltMin(m, lr=0.1, eps=1e-3), 3),  # float16 holds no smaller mean of squares
}


@LOW
@AUTOCAST
@pytest.mark.parametrize(("make", "units"), LOCAL.values(), ids=LOCAL)
def test_local_steps_move_as_in_float64(low: torch.dtype, autocast: bool, make: Any, units: int) -> None:
    """A step from the same weights and inputs: within units of the type's last place, of move and parameter."""
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    y = torch.arange(16) % 3
    model, x = (net(), x) if autocast else (net().to(low), x.to(low))
    exact, start = copy.deepcopy(model).double(), [p.detach().double() for p in model.parameters()]

    def loss() -> Tensor:
        with torch.autocast("cpu", low, enabled=autocast):
            return F.cross_entropy(model(x), y)

    make(model).step(loss)
    make(exact).step(lambda: F.cross_entropy(exact(x.double()), y))
    held = list(zip(model.parameters(), exact.parameters(), start, strict=True))
    for found, want, before in held:
        move = want.detach() - before
        size = move.norm() + want.norm()  # the parameter itself is rounded at each local step
        assert move.norm() > 50 * torch.finfo(torch.float16).eps * size
        assert (found.detach().double() - want).norm() <= units * torch.finfo(low).eps * size


@LOW
def test_running_averages_of_parameters_and_norms_are_in_float32(low: torch.dtype) -> None:
    """An average in half precision ceases to follow; a square of a norm of 300 overflows float16."""
    model, x, y = net().to(low), *batch(16)
    with torch.no_grad():
        model[0].weight.copy_(torch.linspace(100, 200, 20).view(5, 4))
    history: list[dict[str, float]] = []
    opt = lw.LocoProp(model, lr=1e-3, regularizer=local.Elastic(1.0, decay=0.99))
    monitor = lw.monitor.Monitor(
        model, lambda step, record: history.append(record), every=1, measures=[lw.monitor.update_size()]
    )
    average: dict[str, Tensor] = {}
    for _ in range(30):
        now = {name: p.detach().double().clone() for name, p in model.named_parameters()}
        average = {n: 0.99 * average[n] + 0.01 * p for n, p in now.items()} if average else now
        opt.step(lambda: F.cross_entropy(model(x.to(low)).float(), y))
    kept = opt.state_dict()["averages"]
    other = lw.LocoProp(model, lr=1e-3, regularizer=local.Elastic(1.0, decay=0.99))
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert all(torch.equal(t, other.state_dict()["averages"][key]) for key, t in kept.items())
    for name, exact in average.items():
        assert (kept[name] - exact).norm() <= 1e-6 * exact.norm(), name
    with monitor.step():
        F.cross_entropy(model(x.to(low)).float(), y).backward()
        with torch.no_grad():
            model[0].weight.mul_(2)
    assert all(math.isfinite(value) for record in history for value in record.values()), history


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 64, 1000])
def test_fused_kernels_are_taken_where_they_move_as_the_plain_ones(kind: Any, dtype: torch.dtype, size: int) -> None:
    """torch 2.13's fused SGD on the CPU skips whole vectors in half precision (pytorch/pytorch#191763)."""
    found = []
    for make in (kind, fused(kind, [torch.ones(size, dtype=dtype)])):
        p = torch.ones(size, dtype=dtype).requires_grad_()
        p.grad = torch.linspace(1, 2, size).to(dtype)
        optimizer = make([p], lr=0.1)
        for _ in range(3):
            optimizer.step()
        found.append(p.detach())
    torch.testing.assert_close(*found, rtol=8 * torch.finfo(dtype).eps, atol=0.0)
    assert not (found[1] == 1).any()


@LOW
def test_codes_by_sgd_move_every_weight_in_half_precision(low: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)).to(low)
    before = model[2].weight.detach().clone()
    x, y = torch.randn(8, 16).to(low), torch.arange(8) % 3
    lw.AltMin(model, weights="sgd", lr=1.0).step(lambda: F.cross_entropy(model(x), y))
    assert ((model[2].weight != before).sum() >= 40).item()


# Matrix decompositions -----------------------------------------------------------------------------------------------

_SPECTRAL = local.SpectralNorm(0.5, steps=None)
DECOMPOSING: dict[str, Any] = {
    "exact": lambda m: lw.LocoProp(m, solver=local.ProximalSolve(1.0)),
    "exact, threads": lambda m: lw.LocoProp(m, solver=local.ProximalSolve(1.0), workers=2),
    "spectral": lambda m: lw.LocoProp(m, solver=local.Spectral()),
    "Anderson": lambda m: lw.LocoProp(m, solver=local.Anderson()),
    "natural": lambda m: lw.LocoProp(m, target=local.NaturalStep(1.0)),
    "whitened": lambda m: lw.LocoProp(m, regularizer=local.Whitening()),
    "one layer": lambda m: lw.LocoProp(m, layers={"2.weight": {"solver": local.ProximalSolve(1.0)}}),
    "AltMin solver": lambda m: lw.AltMin(m, weights=local.ProximalSolve(1.0)),
    "memory": lambda m: lw.AltMin(m, weights="memory", codes="jacobi"),
    "columns": lambda m: lw.AltMin(m, weights=local.Memory(solve="columns"), codes="jacobi"),
    "Gauss-Newton codes": lambda m: lw.AltMin(m, codes="gauss-newton"),
    "codes in closed form": lambda m: lw.AltMin(m, codes="sweep", code_step=local.CodeStep(solve="closed")),
}


def _half(make: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Identity(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    x, y, opt = torch.randn(8, 4).to(dtype), torch.randint(3, (8,)), make(model)
    before = [p.detach().clone() for p in model.parameters()]
    try:
        for _ in range(2):
            opt.step(lambda: F.cross_entropy(model(x), y))
    except BaseException:
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)) and not opt.state
        raise
    assert not opt.skipped and not all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", DECOMPOSING)
def test_a_choice_that_decomposes_matrices_does_so_in_float32_of_half_precision(name: str, dtype: torch.dtype) -> None:
    _half(DECOMPOSING[name], dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("solver", [local.LocalSteps(3), local.ConditionalGradient(2)], ids=["steps", "Frank-Wolfe"])
def test_a_spectral_ball_decomposes_half_precision_in_float32(solver: Any, dtype: torch.dtype) -> None:
    _half(lambda m: lw.LocoProp(m, regularizer=_SPECTRAL, solver=solver), dtype)


@LOW
@pytest.mark.parametrize("settings", [{"codes": "sweep", "lr": 0.1, "eps": 1e-3}, {"weights": "memory"}], ids=str)
def test_codes_under_autocast_move_as_in_float64(low: torch.dtype, settings: Any) -> None:
    """Codes are held and solved for in float32: within three units of the type's last place, of move and parameter."""
    x, y = torch.randn(16, 4, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3
    model = net()
    exact, start = copy.deepcopy(model).double(), [p.detach().double() for p in model.parameters()]

    def loss() -> Tensor:
        with torch.autocast("cpu", low):
            return F.cross_entropy(model(x), y)

    lw.AltMin(model, **settings).step(loss)
    lw.AltMin(exact, **settings).step(lambda: F.cross_entropy(exact(x.double()), y))
    for found, want, before in zip(model.parameters(), exact.parameters(), start, strict=True):
        size = (want - before).norm() + want.norm()
        assert (found.double() - want).norm() <= 3 * torch.finfo(low).eps * size
