"""One table that every optimizer of the library goes through: state, bad batches, leaks, learning."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from grids import one_in
from state_checks import through_a_file
from torch import Tensor, nn

import layerwise as lw
from layerwise import local
from layerwise.errors import BadInput, LayerwiseError, NonFinite
from layerwise.local.solvers.workspace import Workspace
from layerwise.optim.layer_local.base import LayerLocal

Closure = Callable[[], Tensor]
Make = Callable[..., LayerLocal]

OPTIMIZERS: dict[str, Make] = {
    "LocoProp": lambda m, *a, **k: lw.LocoProp(m, *a, **k),
    "LocoProp-S": lambda m, *a, **k: lw.LocoProp(m, *a, **{"loss": "squared", **k}),
    "LocoProp all rows": lambda m, *a, **k: lw.LocoProp(m, *a, **{"rows": "all", "lr": 1e-3, **k}),
    "LocoProp published-M": lambda m, *a, **k: lw.LocoProp(m, *a, **{"preset": "published-M", **k}),
    "LocoProp published-S": lambda m, *a, **k: lw.LocoProp(m, *a, **{"preset": "published-S", **k}),
    "LocoProp exact": lambda m, *a, **k: lw.LocoProp(m, *a, **{"solver": local.ProximalSolve(1.0), "lr": 0.5, **k}),
    "LocoProp Adam, elastic, threads": lambda m, *a, **k: lw.LocoProp(
        m, *a, **{"solver": local.LocalSteps(4, torch.optim.Adam), "regularizer": local.Elastic(0.1), "workers": 2, **k}
    ),
    "LocoProp swept": lambda m, *a, **k: lw.LocoProp(m, *a, **{"order": "input_to_output", "lr": 1e-3, **k}),
    "AltMin": lambda m, *a, **k: lw.AltMin(m, *a, **k),
    "AltMin sgd": lambda m, *a, **k: lw.AltMin(m, *a, **{"weights": "sgd", "lr": 0.05, **k}),
    "AltMin sweep": lambda m, *a, **k: lw.AltMin(m, *a, **{"codes": "sweep", **k}),
    "AltMin sweep sgd": lambda m, *a, **k: lw.AltMin(m, *a, **{"codes": "sweep", "weights": "sgd", "lr": 0.05, **k}),
    "AltMin memory": lambda m, *a, **k: lw.AltMin(
        m, *a, **{"weights": "memory", "codes": "jacobi", "coupling": 0.1, **k}
    ),
    "AltMin columns, threads": lambda m, *a, **k: lw.AltMin(
        m, *a, **{"weights": local.Memory(solve="columns"), "codes": "jacobi", "coupling": 0.1, "workers": 2, **k}
    ),
    "AltMin async, growing": lambda m, *a, **k: lw.AltMin(
        m, *a, **{"schedule": "async", "coupling": local.Coupling(0.1, add=0.01, most=0.2), **k}
    ),
    "AltMin multipliers": lambda m, *a, **k: lw.AltMin(
        m, *a, **{"codes": "sweep", "multipliers": True, "repeats": 2, "code_l1": 1e-4, **k}
    ),
    "AltMin published": lambda m, *a, **k: lw.AltMin(m, *a, **{"preset": "published", **k}),
    "KFAC": lambda m, *a, **k: lw.optim.KFAC(m, *a, **{"update_factors_every": 1, **k}),
    "KFAC eigen": lambda m, *a, **k: lw.optim.KFAC(m, *a, **{"damping_form": "eigen", "update_factors_every": 1, **k}),
    "KFAC ekfac": lambda m, *a, **k: lw.optim.KFAC(
        m, *a, **{"kind": "ekfac", "update_factors_every": 1, "update_inverses_every": 3, **k}
    ),
    "KFAC foof": lambda m, *a, **k: lw.optim.KFAC(m, *a, **{"kind": "foof", "update_factors_every": 1, **k}),
    "KFAC quadratic, adaptive": lambda m, *a, **k: lw.optim.KFAC(
        m, *a, **{"step_size": "quadratic", "adapt_damping_every": 2, "update_factors_every": 1, **k}
    ),
    "DiagNewton": lambda m, *a, **k: lw.optim.DiagNewton(m, *a, **{"update_every": 1, **k}),
    "DiagNewton hessian, adaptive": lambda m, *a, **k: lw.optim.DiagNewton(
        m, *a, **{"kind": "diag-hessian", "adapt_damping_every": 1, "update_every": 1, **k}
    ),
}
# Those that are meant to learn in a few epochs with their own defaults: the published settings warm up for five.
LEARN = ("LocoProp", "LocoProp-S", "AltMin", "AltMin sgd", "AltMin sweep", "AltMin published", "KFAC",
         "KFAC ekfac", "KFAC foof", "KFAC quadratic, adaptive", "DiagNewton")  # fmt: skip
CLOSED_FORM = OPTIMIZERS["LocoProp exact"]  # every parameter of the net below has a local problem, so it has no state
MEMORIES = (OPTIMIZERS["AltMin memory"], OPTIMIZERS["AltMin columns, threads"])
every = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


class Net(nn.Module):
    """A conv, batch norm, an in-place ReLU, a scale, a reused and a frozen layer, one that is never run."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.act = nn.ReLU(inplace=True)
        self.inner = nn.Linear(27, 8)
        self.scale = nn.LayerNorm(8)
        self.twice = nn.Linear(8, 8)
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.idle = nn.Linear(2, 2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(self.act(self.norm(self.conv(x))), 2).flatten(1)
        h = self.scale(self.inner(h)).tanh()
        h = self.twice(self.twice(h).sigmoid()).tanh()
        return self.head(F.gelu(self.frozen(h)))


def data(step: int = 0, n: int = 6) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(step)
    return torch.randn(n, 1, 6, 6, generator=gen), torch.randint(4, (n,), generator=gen)


def closure_of(net: nn.Module, step: int = 0) -> Closure:
    x, y = data(step)
    return lambda: F.cross_entropy(net(x), y)


def everything(net: nn.Module, opt: torch.optim.Optimizer) -> list[Tensor]:
    """Parameters, buffers and state, as copies."""
    tensors = [*net.parameters(), *net.buffers()]
    named = opt.state_dict()["state"]
    for key in sorted(named):
        tensors += [v for _, v in sorted(named[key].items()) if isinstance(v, Tensor)]
    return [t.detach().clone() for t in tensors]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


# State --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [(0, 4, 9), pytest.param(range(10), marks=pytest.mark.slow)], ids=["three", "each"])
@every
def test_saved_and_loaded_at_ten_steps_it_goes_on_bitwise(make: Make, at: Sequence[int]) -> None:
    net = Net()
    opt = make(net)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 3, 0.5)
    saved, wanted = {}, []
    for step in range(10):
        if step in at:
            saved[step] = through_a_file((copy.deepcopy(net.state_dict()), opt.state_dict(), scheduler.state_dict()))
        opt.step(closure_of(net, step))
        scheduler.step()
        wanted.append(everything(net, opt))
    for step in at:
        other = Net()
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        resumed = make(other)
        schedule = torch.optim.lr_scheduler.StepLR(resumed, 3, 0.5)
        if step % 4 == 0:  # a step of its own first: nothing of it may stay
            resumed.step(closure_of(other, 99))
        weights, state, rates = saved[step]
        other.load_state_dict(weights)
        resumed.load_state_dict(state)
        schedule.load_state_dict(rates)
        for later in range(step, min(step + 3, 10)):
            resumed.step(closure_of(other, later))
            schedule.step()
            assert same(everything(other, resumed), wanted[later]), (step, later)


@every
def test_state_is_keyed_by_parameter_names(make: Make) -> None:
    names = {n for n, p in Net().named_parameters() if p.requires_grad}
    for params in (lambda m: None, lambda m: [p for p in m.parameters() if p.requires_grad],
                   lambda m: [(f"x{n}", p) for n, p in m.named_parameters() if p.requires_grad]):  # fmt: skip
        net = Net()
        opt = make(net, params(net))
        opt.step(closure_of(net))
        (group,) = opt.state_dict()["param_groups"]
        assert set(group["param_names"]) == names
        moved = {group["param_names"][group["params"].index(k)] for k in opt.state_dict()["state"]}
        wanted = {n for n in names if not n.startswith("idle")} if make is not CLOSED_FORM else set()
        if make in MEMORIES:  # a layer's moments are kept at its weight
            wanted -= {f"{layer}.bias" for layer in ("conv", "inner", "twice", "head")}
        assert moved == wanted


@every
def test_state_in_another_order_is_matched_by_name(make: Make) -> None:
    nets = [Net() for _ in range(2)]
    given = [[p for p in net.parameters() if p.requires_grad] for net in nets]
    one, two = make(nets[0], given[0]), make(nets[1], given[1][::-1])
    one.step(closure_of(nets[0]))
    nets[1].load_state_dict(nets[0].state_dict())
    two.load_state_dict(through_a_file(one.state_dict()))
    for net, opt in zip(nets, (one, two), strict=True):
        opt.step(closure_of(net, 1))
    assert all(torch.equal(p, q) for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True))
    before = everything(nets[1], two)
    other = nn.Linear(3, 2)
    foreign = make(other)
    with pytest.raises(BadInput, match="weight"):
        two.load_state_dict(foreign.state_dict())
    assert same(everything(nets[1], two), before)


@every
def test_the_number_of_skipped_batches_is_state(make: Make) -> None:
    net = Net()
    opt = make(net)
    opt.step(lambda: F.cross_entropy(net(data()[0] * float("nan")), data()[1]))
    other = make(Net())
    other.load_state_dict(through_a_file(opt.state_dict()))
    assert opt.skipped == other.skipped == 1


# Groups ---------------------------------------------------------------------------------------------------------


@every
def test_groups_schedulers_and_what_stays(make: Make) -> None:
    net = Net()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    opt = make(
        net, [{"params": net.conv.parameters(), "lr": 0.0}, {"params": [net.inner.weight, *net.head.parameters()]}]
    )
    torch.optim.lr_scheduler.LambdaLR(opt, [lambda e: 1.0, lambda e: 0.5])
    opt.add_param_group({"params": net.scale.named_parameters(), "lr": 1e-3})
    for step in range(3):
        opt.step(closure_of(net, step))
    moved = {n for n, p in net.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"inner.weight", "head.weight", "head.bias", "scale.weight", "scale.bias"}
    assert opt.param_groups[0]["lr"] == 0.0 and opt.param_groups[2]["lr"] == 1e-3
    stranger = nn.Linear(2, 2)
    for params in (list(stranger.parameters()), [net.twice.weight, stranger.bias]):
        with pytest.raises(BadInput, match="not the model's"):
            opt.add_param_group({"params": params})
    assert len(opt.param_groups) == 3


@every
def test_frozen_parameters_never_move_and_may_be_thawed(make: Make) -> None:
    net = Net()
    opt = make(net, net.named_parameters())
    before = net.frozen.weight.detach().clone()
    for step in range(3):
        opt.step(closure_of(net, step))
    assert torch.equal(net.frozen.weight, before)
    net.frozen.requires_grad_(True)
    opt.step(closure_of(net, 3))
    assert not torch.equal(net.frozen.weight, before)


@every
def test_a_functional_model_is_trained_by_its_names(make: Make) -> None:
    params = {"w": torch.randn(5, 8).requires_grad_(), "v": torch.randn(8, 3).requires_grad_(), "fixed": torch.ones(5)}
    before = {n: p.detach().clone() for n, p in params.items()}
    x, y = torch.randn(7, 5), torch.randint(3, (7,))
    opt = make(params)

    def loss() -> Tensor:
        return F.cross_entropy(((x * params["fixed"]) @ params["w"]).tanh() @ params["v"], y)

    for _ in range(3):
        opt.step(loss)
    assert {n for n, p in params.items() if not torch.equal(p, before[n])} == {"w", "v"}
    assert opt.param_groups[0]["param_names"] == ["w", "v"]


@every
def test_bad_calls_are_refused(make: Make) -> None:
    net = Net()
    opt = make(net)
    before = everything(net, opt)
    x, y = data()
    with pytest.raises(BadInput, match="needs a closure"):
        opt.step()
    for out in (None, 1.5, torch.zeros(3), "loss"):
        with pytest.raises(BadInput, match="must return the loss"):
            opt.step(lambda out=out: (net(x), out)[1])
    with pytest.raises(BadInput, match="must return the loss"):
        opt.step(lambda: F.cross_entropy(net(x), y, reduction="none"))
    with pytest.raises(LayerwiseError):
        opt.step(lambda: F.cross_entropy(net(x), y).detach())
    assert same(everything(net, opt), before) and opt.skipped == 0
    with pytest.raises(BadInput, match="requires grad"):
        make(nn.ReLU())
    with pytest.raises(BadInput):
        make(net, [])
    with pytest.raises(BadInput):
        make(torch.zeros(3))


# Bad batches --------------------------------------------------------------------------------------------------


class Saturating(nn.Module):
    """Infinite inputs give a finite loss here: tanh hides them, and their weight gradient is 0 · inf."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b, self.c = nn.Linear(4, 5), nn.BatchNorm1d(4), nn.Linear(5, 5), nn.Linear(5, 3)
        with torch.no_grad():
            self.a.weight.mul_(4).abs_()

    def forward(self, x: Tensor) -> Tensor:
        self.norm(x)  # its statistics see the batch
        return self.c(self.b(self.a(x).tanh()).relu())


def poisoned(kind: str) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(5)
    x, y = torch.randn(6, 4, generator=gen), torch.randn(6, 3, generator=gen)
    if kind == "overflowing statistics":
        x[3, 0] = 1e25
    elif kind == "nan input":
        x[2, 1] = float("nan")
    elif kind == "inf input":
        x[2, 1] = float("inf")
    elif kind == "nan target":
        y[1, 2] = float("nan")
    elif kind == "inf target":
        y[1, 2] = float("inf")
    elif kind == "overflowing activation":
        x[3] = 3e38
    elif kind == "overflowing gradient":
        y[1, 2] = 1.8e19  # the loss and its gradient are finite, the gradient's square is not
    return x, y


KINDS = (
    "overflowing statistics",
    "nan input",
    "inf input",
    "nan target",
    "inf target",
    "overflowing activation",
    "overflowing gradient",
)


@one_in(2, name=OPTIMIZERS, kind=KINDS, backward=[False, True])
def test_a_bad_batch_changes_nothing(name: str, kind: str, backward: bool) -> None:
    net = Saturating()
    opt = OPTIMIZERS[name](net)

    def step(x: Tensor, y: Tensor) -> Tensor:
        def closure() -> Tensor:
            loss = F.mse_loss(net(x), y)
            if backward:
                opt.zero_grad()
                loss.backward()
            return loss

        return opt.step(closure)

    step(*poisoned("none"))
    assert opt.skipped == 0
    before = everything(net, opt)
    for n in range(1, 3):
        step(*poisoned(kind))
        assert opt.skipped == n
        assert same(everything(net, opt), before)
    step(*poisoned("none"))
    assert all(bool(torch.isfinite(t).all()) for t in everything(net, opt))
    assert not same(everything(net, opt), before)


@every
@pytest.mark.parametrize(
    ("kind", "place"),
    [("nan input", "input of norm.bias, norm.weight"), ("inf input", "input of (a.bias, )?a.weight"),
     ("overflowing activation", "output of (a.bias, )?a.weight"), ("nan target", "the loss"),
     ("overflowing gradient", "gradient of [abc].(weight|bias)"),
     ("overflowing statistics", "norm.running_var|(factor|curvature) of a.weight")],
)  # fmt: skip
def test_raise_names_the_place(make: Make, kind: str, place: str) -> None:
    net = Saturating()
    opt = make(net, on_nonfinite="raise")
    before = everything(net, opt)
    x, y = poisoned(kind)
    with pytest.raises(NonFinite, match=place):
        opt.step(lambda: F.mse_loss(net(x), y))
    assert same(everything(net, opt), before) and opt.skipped == 0


@every
def test_nan_in_a_weight_is_found_before_it_spreads(make: Make) -> None:
    net = Saturating()
    opt = make(net, on_nonfinite="raise")
    with torch.no_grad():
        net.b.weight[1, 1] = float("nan")
    with pytest.raises(NonFinite, match=r"b\.weight"):
        opt.step(lambda: F.mse_loss(net(poisoned("none")[0]), poisoned("none")[1]))


@one_in(2, name=OPTIMIZERS, wrong=["empty", "target", "shape", "own"])
def test_errors_leave_everything_as_it_was(name: str, wrong: str) -> None:
    net = Net()
    opt = OPTIMIZERS[name](net)
    opt.step(closure_of(net))
    before = everything(net, opt)
    x, y = data()
    gradients = [p.grad for p in net.parameters()]

    def closure() -> Tensor:
        if wrong == "empty":
            return F.cross_entropy(net(x)[:0], y[:0])
        if wrong == "target":
            return F.cross_entropy(net(x), y + 3)
        if wrong == "shape":
            return F.cross_entropy(net(x), y) + net.inner(x.flatten(1)).sum()
        net(x)
        raise KeyError("my own")

    with pytest.raises(KeyError if wrong == "own" else BadInput):
        opt.step(closure)
    assert same(everything(net, opt), before)
    assert torch.overrides._get_current_function_mode_stack() == []
    assert [p.grad for p in net.parameters()] == gradients
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in net.modules())
    opt.step(closure_of(net, 1))
    assert not same(everything(net, opt), before)


@every
def test_an_uncovered_parameter_is_refused_by_name(make: Make) -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return x * w

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
            x, w = ctx.saved_tensors
            return g * w, (g * x).sum(0)

    net = nn.Module()
    net.a, net.w = nn.Linear(4, 3), nn.Parameter(torch.ones(3))
    opt = make(net)
    before = everything(net, opt)
    x, y = torch.randn(5, 4), torch.randint(3, (5,))
    with pytest.raises(LayerwiseError, match="'w'"):
        opt.step(lambda: F.cross_entropy(Doubled.apply(net.a(x), net.w), y))
    assert same(everything(net, opt), before)


# Leaks and learning --------------------------------------------------------------------------------------------


def live() -> int:
    """Tensors there are, less scratch memory: which layers a thread's has met depends on when the thread was free."""
    objects = gc.get_objects()
    spaces = [o for o in objects if type(o) is Workspace]
    scratch = {id(t) for o in spaces for t in (*o._flat.values(), *o._shaped.values())}
    for of, made in (pair for o in spaces for pair in o._made.values()):
        scratch |= {id(t) for t in vars(made).values() if isinstance(t, Tensor)} - set(map(id, of))
    return sum(issubclass(type(o), Tensor) and id(o) not in scratch for o in objects)


@every
@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("conv", 31),
        ("inf input", 20),
        pytest.param("none", 41, marks=pytest.mark.slow),
        pytest.param("none", 1000, marks=pytest.mark.slow),
    ],
)
def test_the_number_of_live_tensors_stays(make: Make, kind: str, count: int) -> None:
    model: nn.Module = Net() if kind == "conv" else Saturating()
    opt = make(model)
    x, y = poisoned(kind)
    closure = closure_of(model) if kind == "conv" else (lambda: F.mse_loss(model(x), y))
    gc.collect()
    gc.disable()  # what only the collector frees is held by a cycle
    try:
        for step in range(count):
            opt.step(closure)
            if step == max(count - 21, 9):  # what is due every 20 steps is as at the end
                start = live()
        assert live() <= start
    finally:
        gc.enable()


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    datasets = pytest.importorskip("sklearn.datasets", reason="the digits come with scikit-learn")
    found = datasets.load_digits()
    return torch.tensor(found.data / 16, dtype=torch.float32), torch.tensor(found.target)


@pytest.mark.parametrize("name", LEARN)
@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2))])
def test_it_learns_with_its_defaults(name: str, seed: int, digits: tuple[Tensor, Tensor]) -> None:
    """scikit-learn's digits, 64-100-100-10, 3 epochs of batches of 100: train loss below 1 and falling."""
    x, y = digits
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
    opt = OPTIMIZERS[name](net)
    losses = []
    for _ in range(3):
        for rows in torch.randperm(len(x)).split(100):
            opt.step(lambda rows=rows: F.cross_entropy(net(x[rows]), y[rows]))
        with torch.no_grad():
            losses.append(float(F.cross_entropy(net(x), y)))
    assert losses[-1] < min(1.0, losses[0]), losses
    assert opt.skipped == 0


@every
def test_every_step_returns_the_loss_before_it(make: Make) -> None:
    net = Net()
    opt = make(net)
    for step in range(3):
        twin = copy.deepcopy(net)
        wanted = closure_of(twin, step)()
        found = opt.step(closure_of(net, step))
        assert torch.equal(found, wanted.detach()) and not found.requires_grad


def test_the_table_holds_every_optimizer() -> None:
    """A new optimizer gets its row."""
    ours = {v for v in vars(lw.optim).values() if isinstance(v, type) and issubclass(v, torch.optim.Optimizer)}
    assert ours == {type(make(Saturating())) for make in OPTIMIZERS.values()}
