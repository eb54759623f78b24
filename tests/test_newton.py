"""Optimizers with curvature, every kind: they survive anything, and their options equal brute force."""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from curvature_kinds import ASKED, KINDS
from state_checks import same, through_a_file
from torch import Tensor, nn

import layerwise as lw
from layerwise.errors import BadInput, NonFinite, Renamed
from layerwise.operators.kronecker import EigenBlock, KroneckerBlock
from layerwise.optim.second_order.averages import (
    Average,
    Inverse,
    average,
    eigenbasis,
    invert,
    rebased,
    with_moments,
)
from layerwise.optim.second_order.blocks import Blocks
from layerwise.optim.second_order.exchange import RankExchange
from layerwise.optim.second_order.trust import best_step, levenberg_marquardt
from layerwise.rows.layout import MatrixLayout

KFAC, DiagNewton, Preconditioner = lw.optim.KFAC, lw.optim.DiagNewton, lw.optim.Preconditioner
every_kind = pytest.mark.parametrize("kind", KINDS)


class Forms(nn.Module):
    """A grouped convolution, an embedding, a norm, slices, a derived weight, shared, frozen and idle layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 4)
        self.conv = nn.Conv1d(4, 4, 2, groups=2)
        self.norm = nn.LayerNorm(4)
        self.both = nn.Parameter(torch.randn(8, 4) / 2)
        self.twice = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.idle = nn.Linear(2, 2)
        self.derived = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(self.embed(x).mT).mT.tanh())
        one, two = self.both.chunk(2)
        h = F.linear(F.linear(h, one).tanh(), two)
        return self.derived(self.frozen(self.twice(self.twice(h).tanh())).mean(1))


class Chain(nn.Sequential):
    """A chain, which KFRA wants."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(20, 6), nn.Tanh(), nn.Linear(6, 3))


def model_for(kind: str) -> nn.Module:
    return Chain() if kind == "kfra" else Forms()


def batch(step: int) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(step)
    return torch.randint(9, (6, 5), generator=gen), torch.randint(3, (6,), generator=gen)


def closure_of(model: nn.Module, step: int, scale: float = 1.0) -> Callable[[], Tensor]:
    x, y = batch(step)
    return lambda: scale * F.cross_entropy(model(x), y)


def optimizer(kind: str, model: nn.Module, *args: Any, **more: Any) -> Any:
    if kind.startswith("diag"):
        every = more.pop("every", (3, 4))
        return DiagNewton(model, *args, **ASKED[kind], update_every=every[0], **more)
    factors, inverses = more.pop("every", (3, 4))
    return KFAC(model, *args, kind=kind, update_factors_every=factors, update_inverses_every=inverses, **more)


def state_of(model: nn.Module, *holders: Any) -> Any:
    return copy.deepcopy((model.state_dict(), [h.state_dict() for h in holders]))


# Resume ----------------------------------------------------------------------------------------------------------


OPTIONS: dict[str, Any] = {"step_size": "quadratic", "adapt_damping_every": 3, "damping": 1.0}
RESUMED = [(kind, {}) for kind in KINDS] + [(kind, OPTIONS) for kind in ("kfac", "ekfac", "diag-ggn drawn")]


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("kind", "options"), RESUMED, ids=[f"{k}{'-options' if o else ''}" for k, o in RESUMED])
def test_resumed_at_any_of_twenty_steps_it_goes_on_bitwise(kind: str, options: dict[str, Any], every: int) -> None:
    """A scheduler, two groups, frozen and idle parameters; the state goes through a file without pickle."""

    def make(model: nn.Module) -> tuple[Any, Any]:
        first, *rest = [p for p in model.parameters() if p.requires_grad]
        opt = optimizer(kind, model, [{"params": [first], "damping": 0.3}, {"params": rest}], weight_decay=0.01,
                        **options)  # fmt: skip
        return opt, torch.optim.lr_scheduler.StepLR(opt, 3, 0.9)

    model = model_for(kind)
    opt, schedule = make(model)
    saved, wanted = {}, []
    for step in range(20):
        if step % every == every // 2:
            saved[step] = through_a_file((model.state_dict(), opt.state_dict(), schedule.state_dict()))
        opt.step(closure_of(model, step))
        schedule.step()
        wanted.append(state_of(model, opt))
    assert opt.skipped == 0
    for step, (weights, state, rates) in saved.items():
        other = model_for(kind)
        resumed, again = make(other)
        if step % 4 in (0, 2):
            resumed.step(closure_of(other, 77))  # nothing of it may stay
        other.load_state_dict(weights)
        resumed.load_state_dict(state)
        again.load_state_dict(rates)
        for later in range(step, min(step + 2, 20)):
            resumed.step(closure_of(other, later))
            again.step()
            assert same(state_of(other, resumed), wanted[later]), (step, later)
    names = {n for n, _ in model.named_parameters()}
    blocks = opt.state_dict()["preconditioner"]["blocks"]
    assert {its["parameter"] or key for key, its in blocks.items()} <= names
    if options:  # λ is state
        assert opt.param_groups[0]["damping"] != 0.3


@every_kind
def test_in_front_of_adamw_it_goes_on_bitwise(kind: str) -> None:
    model = model_for(kind)

    def make(model: nn.Module) -> tuple[Any, Any]:
        pre = Preconditioner(model, **ASKED[kind], update_factors_every=2, update_inverses_every=3)
        return pre, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)

    def step(model: nn.Module, pre: Any, opt: Any, number: int) -> None:
        opt.zero_grad()
        with pre.watch():
            closure_of(model, number)().backward()
        assert pre.step()
        opt.step()

    pre, opt = make(model)
    saved, wanted = [], []
    for number in range(6):  # one with each remainder by the two periods
        pre.damping *= 0.9
        saved.append(through_a_file(state_of(model, pre, opt)))
        step(model, pre, opt, number)
        wanted.append(state_of(model, pre, opt))
    for number, (weights, (pre_state, opt_state)) in enumerate(saved):
        other = model_for(kind)
        pre, opt = make(other)
        other.load_state_dict(weights)
        pre.load_state_dict(pre_state)
        opt.load_state_dict(opt_state)
        step(other, pre, opt, number)
        assert same(state_of(other, pre, opt), wanted[number]), number


def test_states_of_another_kind_are_refused() -> None:
    model = Chain()
    state = Preconditioner(model, "diag-ggn", draws=2).state_dict()
    Preconditioner(model, "diag-ggn", draws=1).load_state_dict(state)
    for kind in ("ekfac", "diag-ggn", "diag-hessian"):
        with pytest.raises(BadInput, match=r"of kind 'diag-ggn \(draws=2\)', and ours '" + kind):
            Preconditioner(model, kind).load_state_dict(state)
    with pytest.raises(BadInput, match="kinds of curvature"):
        Preconditioner(model, "newton")
    with pytest.raises(BadInput, match="kfac, kflr"):
        KFAC(model, kind="diag-ggn")
    with pytest.raises(BadInput, match="kinds are diag-ggn, diag-hessian; got kind='kfac'"):
        DiagNewton(model, kind="kfac")
    for options in ({"step_size": "best"}, {"adapt_damping_every": 0}, {"kl_clip": -1.0}):
        for make in (KFAC, DiagNewton):
            with pytest.raises(BadInput, match=next(iter(options))):
                make(model, **options)


# Bad batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"step_size": "quadratic", "adapt_damping_every": 2}], ids=["", "options"])
@every_kind
def test_a_bad_batch_on_any_step_changes_nothing(kind: str, options: dict[str, Any]) -> None:
    model = model_for(kind)
    opt = optimizer(kind, model, every=(2, 2), **options)
    for step in range(4):
        for n, scale in enumerate((math.nan, math.inf, 1e30)):
            before = state_of(model, opt)
            opt.step(closure_of(model, step, scale))
            after = state_of(model, opt)
            assert opt.skipped == 3 * step + n + 1
            for state in (before, after):
                del state[1][0]["skipped"]
            assert same(before, after)
        opt.step(closure_of(model, step))
        assert opt.preconditioner.steps == step + 1


@every_kind
def test_raise_names_the_layer(kind: str) -> None:
    model = model_for(kind)
    opt = optimizer(kind, model, on_nonfinite="raise", every=(1, 1))
    with torch.no_grad():
        model.get_parameter("2.weight" if kind == "kfra" else "twice.weight")[1, 1] = math.nan
    with pytest.raises(NonFinite, match=r"(2|twice)\.weight"):
        opt.step(closure_of(model, 0))


# Bad factors ----------------------------------------------------------------------------------------------------------


def bad_factor(gen: torch.Generator, size: int) -> Tensor:
    """Rank deficient, of condition 1e12, zero, not symmetric, negative, far from 1, or not finite."""
    rank = int(torch.randint(size + 1, (), generator=gen))
    root = torch.randn(1, size, rank, generator=gen)
    factor, kind = root @ root.mT, int(torch.randint(7, (), generator=gen))
    if kind == 1:
        factor = factor + 0.1 * torch.randn(1, size, size, generator=gen)
    elif kind == 2:
        factor = -factor
    elif kind == 3:
        scales = 10.0 ** torch.empty(size).uniform_(-6, 6, generator=gen)
        factor = scales[:, None] * factor * scales
    elif kind == 4:
        factor = factor * 0
    elif kind == 5:
        factor[0, 0, -1] = math.nan if rank % 2 else math.inf
    return factor * 10.0 ** float(torch.empty(()).uniform_(-15, 15, generator=gen))


@pytest.mark.parametrize("trials", [400, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["pi", "factored", "eigen", "input", "ekfac"])
def test_ten_thousand_bad_factors(form: str, trials: int) -> None:
    """For each of five ways to an inverse: none raises, and each is finite and at most 1/λ long, or kept."""
    gen = torch.Generator().manual_seed(0)
    counts = {"raised": 0, "kept": 0, "identity": 0}
    last: Inverse | None = None
    for trial in range(trials):
        o, i = (int(torch.randint(1, 6, (), generator=gen)) for _ in range(2))
        block: Any = KroneckerBlock(bad_factor(gen, i), bad_factor(gen, o))
        damping = 10.0 ** float(torch.empty(()).uniform_(-8, 1, generator=gen))
        if form == "input":
            block = KroneckerBlock(block.A, torch.ones(1, o))
        if form == "ekfac":
            basis = eigenbasis("w", block)
            if basis is None:
                counts["identity"] += 1
                continue
            held = Average(replace(block, layout=MatrixLayout.whole((o, i), (1, o, i))), 2)
            held = rebased(with_moments(held, basis, (10.0 * basis.spectrum).square(), 0.9), basis)
            assert held.eigen is not None
            block = held.eigen
        last = last if trial % 2 else None
        found = invert("w", block, damping, "pi" if form == "ekfac" else form, last)
        counts["raised"] += found.raised
        counts["kept"] += found.kept
        counts["identity"] += found.block is None
        if found.kept or found.block is None:
            assert last is not None or found.block is None
            continue
        w = torch.randn(1, o, i, generator=gen)
        out = found.block.apply(w)
        assert bool(torch.isfinite(out).all()), trial
        assert float(out.norm()) <= 2.1 * max(o, i) * float(w.norm()) / damping, trial
        last = found
    assert counts["identity"] < 0.4 * trials and (counts["raised"] > 0 or form == "ekfac")
    assert counts["kept"] > 0 or form == "ekfac"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_diagonals_keep_the_last_inverse(bad: float) -> None:
    good = EigenBlock(None, None, torch.tensor([[[1.0, -3.0, 0.0]]]))
    inverse = invert("w", good, 1.0, "pi")
    assert inverse.block is not None and inverse.block.spectrum.tolist() == [[[0.5, 0.25, 1.0]]]
    spoiled = EigenBlock(None, None, torch.tensor([[[1.0, bad, 0.0]]]))
    assert invert("w", spoiled, 1.0, "pi", inverse) == inverse._replace(kept=True)
    assert invert("w", spoiled, 1.0, "pi") == (None, True, False)


def test_an_eigenbasis_that_fails_keeps_the_one_before() -> None:
    a, b = torch.diag(torch.tensor([2.0, 1.0]))[None], torch.eye(3)[None]
    basis = eigenbasis("w", KroneckerBlock(a, b))
    assert basis is not None
    held = with_moments(Average(KroneckerBlock(a, b)), basis, basis.spectrum + 1, 0.9)
    spoiled = held._replace(block=KroneckerBlock(a * math.nan, b), batches=2)
    exchange = RankExchange(None, {})
    exchange.assign({"w": held.block})
    kept, turned = (
        Blocks({"w": its}, {}, {"w": "ekfac"}).inverted({}, True, lambda name: 0.1, "pi", exchange).averages["w"]
        for its in (spoiled, held._replace(batches=2))
    )
    assert kept.eigen is held.eigen and turned.eigen is not held.eigen
    assert held.eigen is not None and turned.eigen is not None
    assert torch.allclose(turned.eigen.spectrum.sum(), held.eigen.spectrum.sum())  # a trace
    anew = average(held, KroneckerBlock(torch.ones(1, 4, 4), b), 0.9)
    assert anew.eigen is None and anew.batches == 1


def test_what_was_kept_is_said_and_saved() -> None:
    model = Chain()
    pre = Preconditioner(model, "ekfac", update_factors_every=1, update_inverses_every=1)
    for step in range(2):
        with pre.watch():
            closure_of(model, step)().backward()
        pre.step()
    pre.blocks.inverses["2.weight"] = pre.blocks.inverses["2.weight"]._replace(kept=True)
    assert pre.counters == {"raised": 0, "kept": 1, "identity": 0}
    assert pre.describe()["2.weight"].endswith("an earlier inverse")
    other = Preconditioner(model, "ekfac")
    other.load_state_dict(through_a_file(pre.state_dict()))
    assert other.counters == pre.counters and other.describe() == pre.describe()


@pytest.mark.parametrize("how", ["half", "autocast"])
@every_kind
def test_every_kind_takes_half_precision(kind: str, how: str) -> None:
    """A model in bfloat16, whose curvature is kept in float32, or autocast; loss and state stay finite and it falls."""
    model = Chain().to(torch.bfloat16 if how == "half" else torch.float32)
    opt = optimizer(kind, model, every=(1, 2))
    x, y = batch(0)

    def closure() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            return F.cross_entropy(model(x), y)

    losses = [float(opt.step(closure)) for _ in range(10)]
    assert losses[-1] < 0.9 * losses[0] and opt.skipped == 0
    blocks = opt.preconditioner.blocks.averages.values()
    assert all(held.block.like.dtype == torch.float32 for held in blocks)


# Options against brute force -----------------------------------------------------------------------------------------


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def points(seed: int) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(7, 4, generator=gen), torch.randint(3, (7,), generator=gen)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("backward", [False, True], ids=["", "backward"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("clip", [None, 1e-3])
def test_the_quadratic_step_and_the_damping_equal_brute_force(
    momentum: float, clip: float | None, backward: bool
) -> None:
    """θ ← θ + α Δ + μ δ₀ by the dense GGN, λ by the reduction ratio, over five steps."""
    model, mirror, every = net(), net(), 2
    opt = DiagNewton(
        model, draws=None, damping=0.5, momentum=momentum, weight_decay=0.02, step_size="quadratic", kl_clip=clip,
        adapt_damping_every=every, update_every=1, decay=0.0,
    )  # fmt: skip
    damping, last = 0.5, None
    params = oracle.parameters(mirror)
    for step in range(5):
        x, y = points(step)

        def loss(x: Tensor = x, y: Tensor = y) -> Tensor:
            return F.cross_entropy(mirror(x), y)

        ggn = oracle.ggn(params, lambda x=x: mirror(x), lambda z, y=y: F.cross_entropy(z, y))
        g = torch.cat([v.flatten() for v in oracle.gradient(params, loss).values()])
        theta = torch.cat([p.detach().flatten() for p in params.values()])
        direction = g / (ggn.diagonal() + damping)
        tried = torch.stack([direction] if last is None or not momentum else [direction, last], 1)
        matrix = ggn + damping * torch.eye(len(ggn))
        m = tried @ torch.linalg.solve(tried.T @ matrix @ tried, tried.T @ g)
        m = m * (1 if clip is None else min(1.0, math.sqrt(clip / float(m @ ggn @ m))))
        move = -(m + 0.02 * theta)
        before = float(loss().detach())
        with torch.no_grad():
            for p, part in zip(params.values(), move.split([p.numel() for p in params.values()]), strict=True):
                p.add_(part.view_as(p))
        if (step + 1) % every == 0:
            model_change = float(g @ move + move @ matrix @ move / 2)
            damping = levenberg_marquardt(damping, (float(loss().detach()) - before) / model_change, every)
        last = m

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            out = F.cross_entropy(model(x), y)
            if backward:
                opt.zero_grad()
                out.backward()
            return out

        opt.step(closure)
        got = {n: p.detach() for n, p in model.named_parameters()}
        oracle.assert_close(got, {n: p.detach() for n, p in params.items()}, 1e-9)
        assert opt.param_groups[0]["damping"] == pytest.approx(damping, rel=1e-12)
    assert damping != 0.5


def test_the_rule_for_the_damping() -> None:
    omega = (19 / 20) ** 5
    for ratio, factor in [(1.0, omega), (0.5, 1.0), (0.25, 1.0), (0.75, 1.0), (0.2, 1 / omega), (-3.0, 1 / omega),
                          (math.nan, 1 / omega), (math.inf, omega)]:  # fmt: skip
        assert levenberg_marquardt(2.0, ratio, 5) == pytest.approx(2 * factor)
    tiny = huge = 1.0
    for _ in range(20000):
        tiny, huge = levenberg_marquardt(tiny, 1.0, 5), levenberg_marquardt(huge, 0.0, 5)
    assert 0 < tiny < 1e-9 and 1e9 < huge < math.inf


@pytest.mark.usefixtures("float64")
def test_the_best_step_minimizes_the_model_also_of_dependent_directions() -> None:
    torch.manual_seed(0)
    root = torch.randn(6, 6)
    matrix, g = root @ root.T, torch.randn(6)
    d, e = torch.randn(6), 1e-8 * torch.randn(6)

    def value(c: list[float], tried: list[Tensor]) -> float:
        move = torch.stack([a * t for a, t in zip(c, tried, strict=True)]).sum(0)
        return float(g @ move + move @ matrix @ move / 2 + 0.1 * move @ move / 2)

    for tried in ([d], [d, e], [d, 3 * d], [d, torch.zeros(6)]):
        found = best_step({"w": g}, [{"w": t} for t in tried], [{"w": matrix @ t} for t in tried], {"w": 0.1})
        least = value(found, tried)
        for i in range(len(tried)):
            for change in (1e-4, -1e-4):
                other = [c * (1 + change * (i == j)) for j, c in enumerate(found)]
                assert value(other, tried) >= least - 1e-12
    assert all(math.isnan(c) for c in best_step({"w": g * math.nan}, [{"w": d}], [{"w": d}], {"w": 0.1}))


class Noisy(nn.Module):
    """Dropout and batch norm: a second run that were not the first's twin would show."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.drop, self.b = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(self.norm(self.a(x)).tanh()))


def test_more_runs_of_the_closure_leave_no_trace() -> None:
    """Losses of all runs at the same parameters, statistics, generators and gradients are those of one run."""
    model, twin = Noisy(), Noisy()
    opt = KFAC(model, step_size="quadratic", adapt_damping_every=1, lr=1e-30, momentum=0.0)
    x, y = points(0)
    seen: list[float] = []

    def closure() -> Tensor:
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        seen.append(float(loss.detach()))
        return loss

    torch.manual_seed(5)
    opt.step(closure)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    loss = F.cross_entropy(twin(x), y)
    loss.backward()
    assert torch.equal(state, torch.get_rng_state())
    assert len(seen) == 3 and len(set(seen)) == 1 and seen[0] == float(loss.detach())
    for (name, b), c in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(b, c), name
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.grad is not None and torch.equal(p.grad, q.grad)
    assert torch.overrides._get_current_function_mode_stack() == []


@pytest.mark.parametrize("how", ["raises", "nan"])
@pytest.mark.parametrize("step_size", ["lr", "quadratic"])
def test_a_step_into_trouble_is_taken_back(how: str, step_size: str) -> None:
    """The loss after the step raises or is NaN: parameters, state and buffers are as before; λ alone grows on NaN."""
    model = Noisy()
    opt = KFAC(model, step_size=step_size, adapt_damping_every=2)
    x, y = points(0)
    opt.step(lambda: F.cross_entropy(model(x), y))
    start, runs = model.a.weight.detach().clone(), []

    def closure() -> Tensor:
        runs.append(1)
        if len(runs) < 3:  # the gradient's, and that of the quadratic model
            return F.cross_entropy(model(x), y)
        if how == "raises":
            raise KeyError("my own")
        return F.cross_entropy(model(x * math.nan), y)

    before = state_of(model, opt)
    if how == "raises":
        with pytest.raises(KeyError):
            opt.step(closure)
    else:
        opt.step(closure)
        assert opt.skipped == 1
        assert opt.param_groups[0]["damping"] == pytest.approx(1e-2 / 0.95**2)
        opt.param_groups[0]["damping"] = 1e-2
        opt.skipped = 0
    assert same(before, state_of(model, opt))
    opt.step(lambda: F.cross_entropy(model(x), y))
    assert not torch.equal(model.a.weight, start)


# Learning ---------------------------------------------------------------------------------------------------------


class Attentive(nn.Module):
    """A transformer layer over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.norm, self.out = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 10)
        self.place = nn.Parameter(0.02 * torch.randn(8, 16))
        self.encode = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.rows(x.view(-1, 8, 8)) + self.place
        return self.out(self.norm(self.encode(h)).mean(1))


class Recurrent(nn.Module):
    """An LSTM over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.out = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rows(x.view(-1, 8, 8))[0][:, -1])


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 10))


def normed() -> nn.Module:
    """Weights without factors: derived from directions and lengths."""
    layers = [nn.utils.parametrizations.weight_norm(m) if isinstance(m, nn.Linear) else m for m in perceptron()]
    return nn.Sequential(*layers)


NETS: dict[str, Callable[[], nn.Module]] = {
    "perceptron": perceptron, "convolutional": convolutional, "attentive": Attentive, "recurrent": Recurrent,
    "normed": normed,
}  # fmt: skip
SLOW = {"diag-hessian"}  # thousands of products a step here
LEARN = [
    (net, kind) for net in NETS for kind in KINDS
    if kind not in SLOW and not (kind == "kfra" and net in ("attentive", "recurrent"))
    and not (kind == "foof" and net == "normed")  # it has no curvature to put in the place of factors
]  # fmt: skip


def trained(make: Callable[[nn.Module], Any], net: str) -> float:
    """The loss over scikit-learn's digits after 2 epochs of batches of 50."""
    digits = pytest.importorskip("sklearn.datasets", reason="the digits come with scikit-learn").load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    torch.manual_seed(0)
    model = NETS[net]()
    opt = make(model)
    for _ in range(2):
        for rows in torch.randperm(len(x)).split(50):

            def closure(rows: Tensor = rows) -> Tensor:
                opt.zero_grad()
                loss = F.cross_entropy(model(x[rows]), y[rows])
                loss.backward()
                return loss

            opt.step(closure)
    with torch.no_grad():
        return float(F.cross_entropy(model(x), y))


@pytest.fixture(scope="module")
def others() -> dict[str, float]:
    """The best of Adam and SGD at their usual rates, by net."""
    return {
        net: min(trained(lambda m: torch.optim.Adam(m.parameters()), net),
                 trained(lambda m: torch.optim.SGD(m.parameters(), 0.01, momentum=0.9), net))
        for net in NETS
    }  # fmt: skip


# `make test` takes every kind on one net, and one kind on every net.
@pytest.mark.parametrize(
    ("net", "kind"),
    [
        pytest.param(net, kind, marks=() if net == "perceptron" or kind == "kfac" else pytest.mark.slow)
        for net, kind in LEARN
    ],
)
def test_every_kind_learns_with_its_defaults_faster_than_adam_and_sgd(
    net: str, kind: str, others: dict[str, float]
) -> None:
    make = DiagNewton if kind.startswith("diag") else KFAC
    assert trained(lambda m: make(m, **ASKED[kind]), net) < 0.8 * others[net], others


# Keywords, and the values whose fields they are -----------------------------------------------------------------

Curvature, Schedule = lw.optim.Curvature, lw.optim.Schedule
FACES = {"KFAC": KFAC, "DiagNewton": DiagNewton, "Preconditioner": Preconditioner}
FIELDS: dict[str, tuple[str, str, Any]] = {  # keyword: the value that has it as a field, and another than the default
    "kind": ("curvature", "kind", "ekfac"),
    "draws": ("curvature", "draws", 3),
    "sharing": ("curvature", "sharing", "reduce"),
    "joint": ("curvature", "joint", False),
    "largest_factor": ("curvature", "largest", 7),
    "factor_decay": ("schedule", "decay", 0.5),
    "update_factors_every": ("schedule", "factors", 2),
    "update_inverses_every": ("schedule", "inverses", 9),
}


def preconditioner(made: Any) -> Any:
    return getattr(made, "preconditioner", made)


def set_up(made: Any) -> Any:
    pre = preconditioner(made)
    return pre.curvature, pre.schedule, pre.damping, pre.damping_form, pre.on_nonfinite


@pytest.mark.parametrize("word", FIELDS)
@pytest.mark.parametrize("face", ["KFAC", "Preconditioner"])
def test_a_keyword_is_the_field_of_a_value(face: str, word: str) -> None:
    owner, field, value = FIELDS[word]
    make = FACES[face]
    by_word, by_value = make(Chain(), **{word: value}), make(Chain(), **{owner: TYPES[owner](**{field: value})})
    assert set_up(by_word) == set_up(by_value) != set_up(make(Chain()))
    assert getattr(getattr(preconditioner(by_word), owner), field) == value
    with pytest.raises(BadInput, match=f"{word}= is the field '{field}' of {owner}="):
        make(Chain(), **{word: value, owner: TYPES[owner]()})
    with pytest.raises(BadInput, match=r"takes a lw\.optim\.Curvature"):
        make(Chain(), **{owner: value})


TYPES = {"curvature": Curvature, "schedule": Schedule}


def test_the_keywords_of_diagonals_are_fields_of_the_same_values() -> None:
    made = DiagNewton(Chain(), kind="diag-hessian", draws=2, decay=0.5, update_every=3)
    values = {"curvature": Curvature("diag-hessian", 2), "schedule": Schedule(3, decay=0.5)}
    assert set_up(made) == set_up(DiagNewton(Chain(), **values)) == set_up(Preconditioner(Chain(), **values))
    assert DiagNewton(Chain()).preconditioner.curvature == Curvature("diag-ggn", draws=1)
    assert DiagNewton(Chain(), kind="diag-hessian").preconditioner.curvature == Curvature("diag-hessian", draws=1)


def test_draws_of_a_kind_are_one_for_factors_and_none_for_diagonals() -> None:
    assert {kind: Curvature(kind).draws for kind in ("kfac", "kflr", "foof", "diag-ggn", "diag-hessian")} == {
        "kfac": 1, "kflr": 1, "foof": 1, "diag-ggn": None, "diag-hessian": None,
    }  # fmt: skip
    for bad in ({"kind": "newton"}, {"draws": None}, {"draws": 0}, {"kind": "diag-ggn", "draws": 0}, {"largest": 0},
                {"kind": "ekfac", "sharing": "reduce"}):  # fmt: skip
        with pytest.raises(BadInput):
            Curvature(**bad)
    for bad in ({"factors": 0}, {"inverses": 2.5}, {"decay": 1.0}):
        with pytest.raises(BadInput):
            Schedule(**bad)  # type: ignore[arg-type]


def test_a_schedule_can_be_changed_by_its_keywords() -> None:
    pre = Preconditioner(Chain())
    pre.update_factors_every, pre.update_inverses_every, pre.factor_decay = 7, 8, 0.25
    assert pre.schedule == Schedule(7, 8, 0.25) and pre.update_inverses_every == 8
    with pytest.raises(BadInput, match="update_factors_every"):
        pre.update_factors_every = 0


@pytest.mark.parametrize("face", FACES)
def test_a_constructor_shows_its_keywords_and_takes_no_others(face: str) -> None:
    make, shown = FACES[face], inspect.signature(FACES[face]).parameters
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in shown.values())
    others = {"DiagNewton": {"kind", "draws", "decay", "update_every"}}.get(face, set(FIELDS))
    assert shown.keys() >= others | {"curvature", "schedule", "damping", "seed", "on_nonfinite", "parallel"}
    defaults = {
        name: p.default for name, p in shown.items() if name not in ("model", "curvature", "schedule")
    }  # fmt: skip
    assert set_up(make(Chain(), **defaults)) == set_up(make(Chain()))
    for word in ("sample", *({"joint", "damping_form"} if face == "DiagNewton" else {"update_every"})):
        with pytest.raises(TypeError) as said:
            make(Chain(), **{word: 1})
        assert str(said.value) == f"{face}.__init__() got an unexpected keyword argument '{word}'"


# Old words --------------------------------------------------------------------------------------------------

OLD: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("KFAC", {"samples": 2}, {"draws": 2}),
    ("KFAC", {"kind": "kflr", "samples": 2}, {"kind": "kflr", "draws": 2}),
    ("DiagNewton", {"samples": 2}, {"draws": 2}),
    ("DiagNewton", {"curvature": "ggn"}, {"draws": None}),
    ("DiagNewton", {"curvature": "ggn", "samples": 3}, {"draws": None}),
    ("DiagNewton", {"curvature": "ggn-mc", "samples": 3}, {"draws": 3}),
    ("DiagNewton", {"curvature": "hessian"}, {"kind": "diag-hessian", "draws": None}),
    ("DiagNewton", {"curvature": "hessian-mc"}, {"kind": "diag-hessian"}),
    ("Preconditioner", {"samples": 2}, {"draws": 2}),
    ("Preconditioner", {"kind": "diag-ggn-mc"}, {"kind": "diag-ggn", "draws": 1}),
    ("Preconditioner", {"kind": "diag-ggn-mc", "samples": 4}, {"kind": "diag-ggn", "draws": 4}),
    ("Preconditioner", {"kind": "diag-hessian-mc"}, {"kind": "diag-hessian", "draws": 1}),
    ("Preconditioner", {"kind": "diag-ggn", "samples": 4}, {"kind": "diag-ggn"}),
]


@pytest.mark.parametrize(("face", "old", "new"), OLD, ids=[f"{face} {old}" for face, old, _ in OLD])
def test_old_words_mean_what_they_did_and_warn(face: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    with pytest.warns(Renamed, match=rf"{face}\({re.escape(next(iter(old)))}=.* now: ") as said:
        made = FACES[face](Chain(), **old)
    assert len(said) == 1 and said[0].filename == __file__
    assert set_up(made) == set_up(FACES[face](Chain(), **new))


@pytest.mark.parametrize("kind", ["kfac", *(kind for kind in KINDS if kind.startswith("diag"))])
def test_states_saved_with_old_words_load(kind: str) -> None:
    model = Forms() if kind == "kfac" else Chain()
    opt = optimizer(kind, model)
    opt.step(closure_of(model, 0))
    old = copy.deepcopy(opt.state_dict())
    state = old["preconditioner"]
    drawn = state.pop("draws")
    if kind.startswith("diag") and drawn:
        state["kind"] += "-mc"
    for block in state["blocks"].values():
        if block["kind"].startswith("diag") and drawn:
            block["kind"] += "-mc"
    other = optimizer(kind, copy.deepcopy(model))
    other.load_state_dict(old)
    assert same(other.state_dict(), opt.state_dict()) and other.describe() == opt.describe()
    if kind == "kfac":
        assert "diag-ggn (draws=1)" in other.describe().values()
