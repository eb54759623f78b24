"""Every kind of parameter, quantity and optimizer in float16, in bfloat16 and under autocast, beside float64.

The float64 result is held to brute force (`quantity_table`) on the same weights and batch, which half precision holds
exactly; that of half precision then differs by units of the type's last place, of each tensor by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import quantity_table
import torch
import torch.nn.functional as F
from device_compare import tensors_in
from quantity_checks import Truth
from quantity_table import COLUMNS, Column
from torch import Tensor, nn
from zoo import LOSSES, Case, Problem
from zoo.problem import tokens

import layerwise as lw
from layerwise.losses import Likelihood
from layerwise.optim import Curvature

MODES = [(torch.float16, False), (torch.bfloat16, False), (torch.float16, True), (torch.bfloat16, True)]
MODE = pytest.mark.parametrize(
    ("low", "autocast"), MODES, ids=["float16", "bfloat16", "float16 autocast", "bfloat16 autocast"]
)


class Kinds(nn.Module):
    """A table, a convolution, a norm's scale and shift, a weight and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv = nn.Embedding(5, 4), nn.Conv1d(4, 4, 3, padding=1)
        self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(self.table(x).mT).tanh().mT
        return self.out(self.norm(h)).mean(1)


class Rounded(Problem):
    """Weights that half precision holds exactly."""

    def build(self, seed: int = 0) -> Any:
        model = super().build(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(p.mul(32).round() / 32)
        return model


def _chain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def _numbers(gen: torch.Generator) -> Tensor:
    return torch.randn(8, 4, generator=gen, dtype=torch.float64).mul(32).round() / 32


KINDS = Case(Rounded("kinds", Kinds, tokens(5, 8, 4), (8, 3)), LOSSES["ce_mean"])
CHAIN = Case(Rounded("chain", _chain, _numbers, (8, 3)), LOSSES["ce_mean"])


class Run:
    """A case with its model in a type, or under autocast; its loss is taken in float32 at least."""

    def __init__(self, case: Case, low: torch.dtype | None = None, autocast: bool = False) -> None:
        made = case.make(seed=0)
        dtype = torch.float64 if low is None else torch.float32 if autocast else low
        self.model: Any = made.model.to(dtype)
        self.x, self.y = made.x.to(dtype) if made.x.is_floating_point() else made.x, made.y
        self._within = lambda: torch.autocast("cpu", low or torch.bfloat16, enabled=autocast)
        torch.manual_seed(3)

    def loss(self) -> Tensor:
        with self._within():
            z = self.model(self.x)
        return F.cross_entropy(z.to(torch.promote_types(z.dtype, torch.float32)), self.y)


def jittered(case: Case, low: torch.dtype, seed: int) -> Run:
    """In float64, with what each layer gives forwards and backwards rounded at random to the type's last place."""
    run, gen = Run(case), torch.Generator().manual_seed(seed)

    def rounded(t: Tensor) -> Tensor:
        return t * (1 + torch.finfo(low).eps * (torch.rand(t.shape, generator=gen, dtype=t.dtype) - 0.5))

    def both_ways(module: nn.Module, inputs: Any, out: Tensor) -> Tensor:
        out = rounded(out)
        out.register_hook(rounded)
        return out

    for module in run.model.modules():
        if not list(module.children()):
            module.register_forward_hook(both_ways)
    return run


# Quantities -----------------------------------------------------------------------------------------------------------

QUANTITIES = [(KINDS, c) for c in COLUMNS.values() if not c.chain] + [(CHAIN, c) for c in COLUMNS.values() if c.chain]
QUANTITIES = [(case, column) for case, column in QUANTITIES if column.build is None]


@pytest.fixture(autouse=True)
def _same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws are columns of the root, since each type draws numbers of its own."""
    monkeypatch.setattr(Likelihood, "sample", lambda self, draws, generator=None: self.root(0, draws))


@cache
def brute(case: Case) -> Truth:
    return Truth(case)


def observed(case: Case, column: Column, run: Run | None = None) -> dict[str, Tensor]:
    """All tensors of a result; for what is divided by differences, those; in an eigenbasis, a product."""
    run = run or Run(case)
    with lw.observe(run.model, quantity := column.ask(brute(case))) as seen:  # type: ignore[misc]
        run.loss().backward()
    result: Any = seen[quantity]
    if isinstance(result, lw.EigenKronecker):
        gen = torch.Generator().manual_seed(0)
        result = result @ {
            n: torch.randn(p.shape, generator=gen, dtype=torch.float64) for n, p in run.model.named_parameters()
        }
    if hasattr(result, "noise"):
        result = {"noise": dict(result.noise), "signal": dict(result.signal)}
    return dict(tensors_in(result))


@pytest.mark.parametrize("case, column", QUANTITIES, ids=lambda part: getattr(part, "name", ""))
def test_the_float64_results_are_brute_forces(case: Case, column: Column) -> None:
    if not column.sampled:
        quantity_table.check_result(brute(case), column)


@pytest.mark.thinned(2)
@MODE
@pytest.mark.parametrize("case, column", QUANTITIES, ids=lambda part: getattr(part, "name", ""))
def test_quantities(case: Case, column: Column, low: torch.dtype, autocast: bool) -> None:
    """Within 3 units of the type's last place, each tensor in norm.

    A cotangent has passed up to four operations that round by half a unit each, its input as many; where both are
    squared that is twice as much. Second derivatives are taken in the graph's types: they may differ besides by 3 times
    what rounding each layer's outputs and cotangents once changes in float64. Noise, signal, variance are differences
    of moments, of which they have that share.
    """
    found, want = observed(case, column, Run(case, low, autocast)), observed(case, column)
    moment = observed(case, COLUMNS["SecondMoment"])
    assert found.keys() == want.keys()
    tries = [observed(case, column, jittered(case, low, n)) for n in range(3)] if "Hessian" in column.name else []
    for path, exact in want.items():
        size = exact.norm()
        if column.name in ("NoiseScale", "Variance"):
            name = path.removeprefix(".noise").removeprefix(".signal")
            size = moment[name].sum() * 8 if column.name == "NoiseScale" else moment[name].norm() / 8
        change = max(((each[path] - exact).norm() for each in tries), default=0.0)
        assert found[path].dtype not in (torch.float16, torch.bfloat16), path
        assert (found[path].double() - exact).norm() <= 3 * (torch.finfo(low).eps * size + change), path


# Optimizers -----------------------------------------------------------------------------------------------------------


def _curved(kind: Any) -> Callable[[nn.Module], Any]:
    return lambda model: lw.optim.KFAC(model, curvature=Curvature(kind))


SECOND_ORDER: dict[str, Callable[[nn.Module], Any]] = {
    "KFAC": lw.optim.KFAC, "EKFAC": _curved("ekfac"), "FOOF": _curved("foof"), "DiagNewton": lw.optim.DiagNewton,
    "KFAC reduce": partial(lw.optim.KFAC, curvature=Curvature(sharing="reduce")),
}  # fmt: skip
LOCAL: dict[str, Callable[[nn.Module], Any]] = {
    "LocoProp": partial(lw.LocoProp, lr=0.01), "LocoProp squared": partial(lw.LocoProp, lr=0.01, loss="squared"),
    "AltMin": partial(lw.AltMin, lr=0.1, eps=1e-3), "AltMin SGD": partial(lw.AltMin, weights="sgd", lr=0.1),
    "sweep": partial(lw.AltMin, codes="sweep", lr=0.1, eps=1e-3),
    "sweep SGD": partial(lw.AltMin, codes="sweep", weights="sgd", lr=0.1),
    "Gauss-Newton": partial(lw.AltMin, codes="gauss-newton", lr=0.1, eps=1e-3),
    "memory": partial(lw.AltMin, weights="memory"),
}  # fmt: skip


def moves(run: Run, make: Callable[[nn.Module], Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """By parameter how one step moves it, and where it is then."""
    start = {n: p.detach().double().clone() for n, p in run.model.named_parameters()}
    optimizer = make(run.model)
    optimizer.step(run.loss)
    assert not optimizer.skipped
    return {n: (p.detach().double() - start[n], p.detach().double()) for n, p in run.model.named_parameters()}


@cache
def sensitivity(case: Case, name: str, low: torch.dtype) -> dict[str, Tensor]:
    """The most that rounding each layer once changes a step in float64, of three tries: inverses amplify it."""
    exact = moves(Run(case), SECOND_ORDER[name])
    tries = [moves(jittered(case, low, seed), SECOND_ORDER[name]) for seed in range(3)]
    return {n: torch.stack([(each[n][0] - exact[n][0]).norm() for each in tries]).max() for n in exact}


@MODE
@pytest.mark.parametrize("case", [KINDS, CHAIN], ids=lambda case: case.problem.name)
@pytest.mark.parametrize("name", SECOND_ORDER)
def test_second_order_steps(case: Case, name: str, low: torch.dtype, autocast: bool) -> None:
    """Within 3 times what rounding each layer's outputs and cotangents once changes in float64, and a unit of the move.

    The first is 18 units of the move for FOOF behind a layer norm, whose factor is nearly singular, and 1 to 5 for
    others. Parameters in half precision are rounded themselves, by half a unit of the sum.
    """
    want, found = moves(Run(case), SECOND_ORDER[name]), moves(Run(case, low, autocast), SECOND_ORDER[name])
    for n, (move, at) in want.items():
        unit = torch.finfo(low).eps
        most = 3 * sensitivity(case, name, low)[n] + unit * move.norm() + (0 if autocast else unit / 2 * at.norm())
        assert (found[n][0] - move).norm() <= most, n


@MODE
@pytest.mark.parametrize("case", [KINDS, CHAIN], ids=lambda case: case.problem.name)
@pytest.mark.parametrize("name", LOCAL)
def test_local_steps(case: Case, name: str, low: torch.dtype, autocast: bool) -> None:
    """Within 3 units of the last place of move and parameter."""
    want, found = moves(Run(case), LOCAL[name]), moves(Run(case, low, autocast), LOCAL[name])
    for n, (move, at) in want.items():
        assert (found[n][0] - move).norm() <= 3 * torch.finfo(low).eps * (move.norm() + at.norm()), n
