"""LocoProp and AltMin of parameters in half precision: float32 to the end of a step, then rounded once."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from state_checks import same as same_state
from state_checks import through_a_file
from torch import Tensor, nn

import layerwise as lw
from layerwise import local
from layerwise.optim.layer_local.stale import Stale

LOW = pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
ROWS = pytest.mark.parametrize("n", [16, 200, 1000, 5000])
Move = tuple[Tensor, Tensor]


def dense(low: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(low)


def batch(low: torch.dtype, n: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(n, 5).to(low), torch.randint(3, (n,))


def unit(x: Tensor) -> Tensor:
    """The distance of neighbours in a type of few digits at each number, in float64."""
    info = torch.finfo(x.dtype)
    size = x.detach().double().abs().clamp_min(info.tiny)
    return torch.exp2(torch.log2(size).floor()) * info.eps


def softmax(z: Tensor) -> Tensor:
    return z.softmax(-1)


def same(z: Tensor) -> Tensor:
    return z


def recorded(model: nn.Sequential, x: Tensor, y: Tensor) -> list[Move]:
    """The inputs and cotangents of the two layers of `dense`, in the model's type as its graph has them."""
    z = model[0](x)
    h = model[1](z)
    out = model[2](h)
    g = torch.autograd.grad(F.cross_entropy(out, y), [z, out])
    return [(x, g[0]), (h.detach(), g[1])]


def fitted(layer: Any, rows: Move, f: Any, gamma: float, share: int, steps: int, step: Any) -> list[Tensor]:
    """W and b after steps on `Σ F(W a + b) − y·(W a + b)` in float64, y = f(z) − γ g, each from the next rows.

    step: from `(p, gradient, t, state)` to p.
    """
    a, g = (t.double() for t in rows)
    w, b = layer.weight.detach().double().flatten(1), layer.bias.detach().double()
    y, states = f(a @ w.T + b) - gamma * g, ({}, {})
    for t in range(steps):
        part = (torch.arange(share) + t * share) % len(a)
        delta = (f(a[part] @ w.T + b) - y[part]) * (len(a) / share)
        w, b = step(w, delta.T @ a[part], t, states[0]), step(b, delta.sum(0), t, states[1])
    return [w.view_as(layer.weight), b]


def along(p: Tensor, g: Tensor, steps: int, step: Any) -> Tensor:
    """A parameter after steps along one gradient, in float64."""
    p, g, state = p.detach().double(), g.double(), {}
    for t in range(steps):
        p = step(p, g, t, state)
    return p


def rmsprop(group: Mapping[str, Any], steps: int) -> Callable[..., Tensor]:
    """A step of TensorFlow's RMSProp at the published schedule."""

    def step(p: Tensor, g: Tensor, t: int, state: dict[str, Tensor]) -> Tensor:
        square, momentum = state.get("square", torch.ones_like(p)), state.get("momentum", torch.zeros_like(p))
        state["square"] = group["decay"] * square + (1 - group["decay"]) * g.square()
        rate = group["lr"] * max(1 - t / steps, 0.25)
        state["momentum"] = group["momentum"] * momentum + rate * g / (state["square"] + group["eps"]).sqrt()
        return p - state["momentum"]

    return step


def adam(group: Mapping[str, Any], scale: float) -> Callable[..., Tensor]:
    """A step of Adam on a gradient times a number."""
    beta, gamma = group["betas"]

    def step(p: Tensor, g: Tensor, t: int, state: dict[str, Tensor]) -> Tensor:
        zero, g = torch.zeros_like(p), g * scale
        state["mean"] = beta * state.get("mean", zero) + (1 - beta) * g
        state["square"] = gamma * state.get("square", zero) + (1 - gamma) * g.square()
        root = (state["square"] / (1 - gamma ** (t + 1))).sqrt()
        return p - group["lr"] / (1 - beta ** (t + 1)) * state["mean"] / (root + group["eps"])

    return step


def check(params: list[Tensor], before: list[Tensor], want: list[Tensor], units: float, share: float) -> None:
    """Each number within units of its last place, and a share of the largest move of its tensor."""
    for p, old, new in zip(params, before, want, strict=True):
        error, move = (p.detach().double() - new).abs(), (new - old.double()).abs().max()
        assert move > 0
        assert bool((error <= units * unit(p) + share * move).all()), (tuple(p.shape), (error / unit(p)).max(), move)


@LOW
@ROWS
@pytest.mark.parametrize("loss", ["matching", "squared"])
@pytest.mark.parametrize("steps", [1, 10])
def test_locoprop_rounds_once(low: torch.dtype, n: int, loss: Any, steps: int) -> None:
    """The move is that of float64 from the same inputs and cotangents, to half a unit and float32's own digits."""
    model, (x, y) = dense(low), batch(low, n)
    opt = lw.LocoProp(model, lr=5e-3, loss=loss, steps=steps)
    (group,) = opt.param_groups
    share = min(n, max(-(-n // steps), 100 if loss == "squared" else 1))
    want, before = [], [p.detach().clone() for p in model.parameters()]
    for layer, rows, f in zip((model[0], model[2]), recorded(model, x, y), (torch.tanh, softmax), strict=True):
        f = f if loss == "matching" else same
        want += fitted(layer, rows, f, group["gamma"], share, steps, rmsprop(group, steps))
    opt.step(lambda: F.cross_entropy(model(x), y))
    check(list(model.parameters()), before, want, 0.51, 2e-3)


@LOW
@ROWS
def test_altmin_rounds_once(low: torch.dtype, n: int) -> None:
    """Adam's means and squares are in float32: from float64's by half a unit."""
    model, (x, y) = dense(low), batch(low, n)
    opt = lw.AltMin(model)
    (group,) = opt.param_groups
    gamma, share = n / group["coupling"], -(-n // group["steps"])
    hidden, out = recorded(model, x, y)
    before = [p.detach().clone() for p in model.parameters()]
    want = fitted(model[0], hidden, same, gamma, share, 2, adam(group, 1 / gamma))
    want += fitted(model[2], out, softmax, float(n), share, 2, adam(group, 1 / n))
    opt.step(lambda: F.cross_entropy(model(x), y))
    check(list(model.parameters()), before, want, 0.51, 2e-3)


class Around(nn.Module):
    """A convolution, a product, and a lone shift, which has no local problem."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.shift, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Parameter(torch.zeros(4)), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh((self.between(self.conv(x))).flatten(1)))

    def between(self, z: Tensor) -> Tensor:
        return torch.relu(z) + self.shift[:, None, None]


def around(low: torch.dtype, n: int) -> tuple[Around, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Around().to(low)
    return model, torch.randn(n, 2, 4, 4).to(low), torch.randint(3, (n,))


@LOW
@pytest.mark.parametrize("n", [16, 1000])
@pytest.mark.parametrize("method", ["LocoProp", "AltMin"])
def test_convolutions_and_lone_parameters(low: torch.dtype, n: int, method: str) -> None:
    """As dense layers, on patches; a parameter without a local problem takes its steps in float32, too."""
    model, x, y = around(low, n)
    z = model.conv(x)
    h = model.between(z)
    g_z, g_shift = torch.autograd.grad(F.cross_entropy(model.head(torch.tanh(h.flatten(1))), y), [z, model.shift])
    patches = F.unfold(x.double(), 3, padding=1).transpose(1, 2).flatten(0, 1), g_z.movedim(1, -1).flatten(0, 2)
    total = len(patches[0])
    if method == "LocoProp":
        opt: Any = lw.LocoProp(model, lr=1e-3)
        (group,) = opt.param_groups
        step, gamma = rmsprop(group, 10), group["gamma"]
        want = [*fitted(model.conv, patches, torch.relu, gamma, total // 10 + (total % 10 > 0), 10, step)]
        want.append(along(model.shift, gamma * g_shift.double(), 10, step))
    else:
        opt = lw.AltMin(model)
        (group,) = opt.param_groups
        gamma = n / group["coupling"]
        want = fitted(model.conv, patches, same, gamma, -(-total // 2), 2, adam(group, 1 / gamma))
        want.append(along(model.shift, g_shift, 2, adam(group, 1.0)))
    params = [model.conv.weight, model.conv.bias, model.shift]
    before = [p.detach().clone() for p in params]
    opt.step(lambda: F.cross_entropy(model(x), y))
    check(params, before, want, 0.51, 2e-3)


# Every way of a step -------------------------------------------------------------------------------------------------

WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "M": lambda m: lw.LocoProp(m, lr=5e-3),
    "S": lambda m: lw.LocoProp(m, lr=5e-3, loss="squared"),
    "gram": lambda m: lw.LocoProp(m, lr=1e-4, loss="squared", solver=local.LocalSteps(5, torch.optim.SGD, form="gram")),
    "Adam": lambda m: lw.LocoProp(m, lr=1e-2, solver=local.LocalSteps(4, torch.optim.Adam)),
    "in turn": lambda m: lw.LocoProp(m, lr=5e-3, order="input_to_output"),
    "exact": lambda m: lw.LocoProp(m, preset="foof", lr=0.1),
    "conjugate": lambda m: lw.LocoProp(m, solver=local.ConjugateGradient(10), regularizer=local.Proximal(1.0)),
    "Newton": lambda m: lw.LocoProp(m, solver=local.Newton(3), regularizer=local.Proximal(1.0)),
    "natural": lambda m: lw.LocoProp(m, lr=1e-3, target=local.NaturalStep(1.0, damping=1.0)),
    "whitened": lambda m: lw.LocoProp(m, lr=1e-3, regularizer=local.Whitening()),
    "adam": lw.AltMin,
    "sgd": lambda m: lw.AltMin(m, weights="sgd"),
    "memory": lambda m: lw.AltMin(m, weights="memory"),
    "sweep": lambda m: lw.AltMin(m, codes="sweep"),
    "closed": lambda m: lw.AltMin(m, codes="sweep", code_step=local.CodeStep(solve="closed")),
    "solver": lambda m: lw.AltMin(m, weights=local.ProximalSolve(1.0)),
}


@pytest.mark.thinned(3)
@LOW
@pytest.mark.parametrize("n", [16, 1000])
@pytest.mark.parametrize("autocast", [False, True], ids=["parameters", "autocast"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_moves_as_in_float64(low: torch.dtype, n: int, autocast: bool, way: str) -> None:
    """From the same weights and inputs: a unit of the parameters, and ten of the move for the graph's own rounding.

    Of norms: a step of Adam or RMSProp is as large for a small gradient, of which cotangents of few digits leave less.
    """
    model, (x, y) = dense(low), batch(low, n)
    model, x = (model.float(), x.float()) if autocast else (model, x)
    exact, before = copy.deepcopy(model).double(), [p.detach().clone() for p in model.parameters()]

    def loss() -> Tensor:
        with torch.autocast("cpu", low, enabled=autocast):
            return F.cross_entropy(model(x), y)

    opt = WAYS[way](model)
    opt.step(loss)
    assert not opt.skipped
    WAYS[way](exact).step(lambda: F.cross_entropy(exact(x.double()), y))
    for p, old, new in zip(model.parameters(), before, exact.parameters(), strict=True):
        move = (new - old).norm()
        error, least = (p.double() - new).norm(), unit(p.detach()).norm()
        assert error <= least + 10 * torch.finfo(low).eps * move, (way, error / move, error / least)


def steps(model: nn.Module, opt: Any, x: Tensor, y: Tensor, count: int) -> None:
    for _ in range(count):
        opt.step(lambda: F.cross_entropy(model(x), y))


@LOW
@pytest.mark.parametrize("way", ["M", "Adam", "adam", "sgd", "memory", "sweep"])
def test_state_is_in_float32_and_goes_on_bitwise(low: torch.dtype, way: str) -> None:
    model, x, y = around(low, 16)
    opt = WAYS[way](model)
    steps(model, opt, x, y, 2)
    saved = through_a_file(opt.state_dict())
    tensors = [t for own in saved["state"].values() for t in own.values() if isinstance(t, Tensor) and t.dim()]
    assert tensors and all(t.dtype is torch.float32 for t in tensors)
    twin = copy.deepcopy((model, opt))
    other = copy.deepcopy(model), None
    other = other[0], WAYS[way](other[0])
    other[1].load_state_dict(saved)
    assert same_state(other[1].state_dict(), saved)
    thawed = pickle.loads(pickle.dumps((model, opt))) if way not in ("M", "Adam") else copy.deepcopy((model, opt))
    for net, its in ((model, opt), twin, other, thawed):
        steps(net, its, x, y, 2)
        assert all(map(torch.equal, net.parameters(), model.parameters()))
        assert same_state(its.state_dict()["state"], opt.state_dict()["state"])


@LOW
@pytest.mark.parametrize("way", ["M", "Adam", "adam", "memory"])
def test_states_in_half_precision_of_earlier_releases_load(low: torch.dtype, way: str) -> None:
    model, x, y = around(low, 16)
    opt = WAYS[way](model)
    steps(model, opt, x, y, 1)
    saved = copy.deepcopy(opt.state_dict())
    for own in saved["state"].values():
        own |= {key: t.to(low) for key, t in own.items() if isinstance(t, Tensor) and t.dim()}
    opt.load_state_dict(saved)
    for number, own in opt.state_dict()["state"].items():
        for key, t in own.items():
            assert not isinstance(t, Tensor) or not t.dim() or t.dtype is torch.float32
            assert not isinstance(t, Tensor) or torch.equal(t, saved["state"][number][key].float())
    steps(model, opt, x, y, 1)
    wide = WAYS[way](copy.deepcopy(model).float())
    with pytest.raises(lw.errors.BadInput, match=str(low)):
        wide.load_state_dict(saved)


@LOW
@pytest.mark.parametrize("way", ["M", "adam"])
def test_models_converted_on_the_way_keep_their_state_in_float32(low: torch.dtype, way: str) -> None:
    model, x, y = around(torch.float32, 16)
    opt = WAYS[way](model)
    steps(model, opt, x, y, 2)
    held = copy.deepcopy(opt.state_dict()["state"])
    opt.step(lambda: F.cross_entropy(model.to(low)(x.to(low)), y) * torch.nan)
    assert opt.skipped == 1 and same_state(held, opt.state_dict()["state"])
    steps(model.to(low), opt, x.to(low), y, 1)
    steps(model.float(), opt, x, y, 1)
    assert opt.skipped == 1 and all(p.dtype is torch.float32 for p in model.parameters())


@pytest.mark.parametrize(("way", "workers"), [("M", 2), ("adam", 2), ("memory", 2), ("adam", ("process", 1))], ids=str)
def test_workers_have_the_same_bits(way: str, workers: Any) -> None:
    settings: Any = {"M": (lw.LocoProp, {"lr": 5e-3}), "adam": (lw.AltMin, {}), "memory": (
        lw.AltMin, {"weights": "memory"})}[way]  # fmt: skip
    found = []
    for each in (None, workers):
        model, x, y = around(torch.bfloat16, 16)
        opt = settings[0](model, workers=each, **settings[1])
        steps(model, opt, x, y, 2)
        found.append((list(model.parameters()), opt.state_dict()["state"]))
    assert all(map(torch.equal, found[0][0], found[1][0])) and same_state(found[0][1], found[1][1])


@LOW
def test_moves_for_an_outer_optimizer_are_rounded_as_moves(low: torch.dtype) -> None:
    """`write="grad"`: a difference of rounded weights has few digits of the move, or none."""
    found = []
    for dtype in (low, torch.float64):
        model, (x, y) = dense(low).to(dtype), batch(low, 200)
        before = [p.detach().clone() for p in model.parameters()]
        steps(model, lw.LocoProp(model, lr=1e-5, write="grad"), x.to(dtype), y, 1)
        assert all(map(torch.equal, model.parameters(), before))
        found.append([p.grad for p in model.parameters()])
    for g, want in zip(*found, strict=True):
        assert g.dtype is low
        assert (g.double() - want).norm() <= 16 * torch.finfo(low).eps * want.norm()


@LOW
def test_a_gradient_scaler_keeps_small_cotangents(low: torch.dtype) -> None:
    """They are divided by its factor in float32: in float16 numbers below 6·10⁻⁸ would be gone."""
    moves = []
    for dtype, factor in ((low, 2.0**15), (torch.float64, 1.0)):
        model, (x, y) = dense(low).to(dtype), batch(low, 40)
        before = [p.detach().double() for p in model.parameters()]
        kind = torch.promote_types(dtype, torch.float32)
        opt = lw.LocoProp(model, lr=0.1, gamma=2e6, steps=2, write="grad")
        scaler = torch.amp.GradScaler("cpu", init_scale=factor, enabled=factor > 1)
        with opt.watch():
            scaler.scale(F.cross_entropy(model(x.to(dtype)).to(kind), y) * 1e-6).backward()
        opt.step()
        assert all(map(torch.equal, [p.detach().double() for p in model.parameters()], before))
        moves.append([p.grad.double() / factor for p in model.parameters()])
    for found, want in zip(*moves, strict=True):
        assert (found - want).norm() <= 16 * torch.finfo(low).eps * want.norm()


@LOW
def test_stale_minibatches_that_were_saved_in_half_precision_are_given_to_layers(low: torch.dtype) -> None:
    """As earlier releases saved them: the steps that follow are those from the same numbers in float32."""

    def in_type(state: dict[str, Any], *kinds: torch.dtype) -> dict[str, Any]:
        found = copy.deepcopy(state)
        for data in (its for heard in found["stale"]["heard"] for its in heard.values()):
            for kind in kinds:
                data |= {k: v.to(kind) for k, v in data.items() if isinstance(v, Tensor)}
        return found

    def run(change: Callable[[dict[str, Any]], dict[str, Any]]) -> list[Tensor]:
        model = dense(low)
        opt = lw.AltMin(model, schedule="async", staleness=3, lr=0.1)
        for t in range(8):
            if t == 4:
                opt.load_state_dict(change(opt.state_dict()))
            x, y = batch(low, 16)
            opt.step(lambda x=x * (t + 1), y=y: F.cross_entropy(model(x), y))  # type: ignore[misc]
        return [p.detach() for p in model.parameters()]

    def forgotten(state: dict[str, Any]) -> dict[str, Any]:
        found = copy.deepcopy(state)
        found["stale"] |= {"heard": [], "layers": []}
        return found

    halves, same_numbers = run(lambda s: in_type(s, low)), run(lambda s: in_type(s, low, torch.float32))
    assert all(map(torch.equal, halves, same_numbers))
    assert not all(map(torch.equal, halves, run(forgotten)))


@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
def test_stale_minibatches_of_a_converted_model_are_given_in_its_type(kind: torch.dtype) -> None:
    stale, data = Stale(2), torch.randn(6, 1, 4, dtype=torch.float16)
    for step in range(12):
        a = (data * (step + 1)).to(torch.float32 if step < 6 else kind)
        weight = torch.zeros(1, 4, 4, dtype=a.dtype)
        given = stale.exchange({"w": local.LocalProblem(a, weight, None, a + 1)})["w"]
        back = min(stale.delay("w", step), step)
        assert torch.equal(given.a, (data * (step + 1 - back)).to(torch.float32).to(a.dtype))
        assert given.target.dtype == given.a.dtype == a.dtype
