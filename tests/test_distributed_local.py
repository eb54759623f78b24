"""Layers over ranks: LocoProp and AltMin with `parallel=` have the bits of one process, in every choice."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import ranks
from torch import Tensor, nn

import layerwise as lw
from layerwise import local
from layerwise.errors import BadInput, NonFinite
from layerwise.local import CodeStep, Coupling, Memory
from layerwise.ranks.group import Ranks

Settings = dict[str, Any]
METHODS = {"locoprop": lw.LocoProp, "altmin": lw.AltMin}


class Own:
    """A solver of one's own that travels."""

    def __call__(self, problem: local.LocalProblem) -> tuple[Tensor, Tensor | None]:
        dw, db = local.local_gradient(problem)
        return -1e-3 * dw, None if db is None else -1e-3 * db


class Breaks:
    """A solver that fails at a layer with so many inputs."""

    def __init__(self, inputs: int, error: str) -> None:
        self.inputs, self.error = inputs, error

    def __call__(self, problem: local.LocalProblem) -> tuple[Tensor, Tensor | None]:
        if problem.weight.shape[-1] == self.inputs:
            raise {"nonfinite": NonFinite, "value": ValueError}[self.error]("told to")
        return Own()(problem)


class Rich(nn.Module):
    """An embedding, a convolution, batch norm, a shared layer and a lone scale."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(7, 6), nn.Conv1d(6, 4, 3, padding=1)
        self.norm, self.shared, self.head = nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv(self.embed(x).transpose(1, 2)))).mean(2)
        return self.head(torch.tanh(self.shared(torch.tanh(self.shared(h)))) * self.scale)


def made(kind: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    if kind == "rich":
        return Rich().to(dtype)
    if kind == "conv":
        layers = [nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)]
        return nn.Sequential(*layers).to(dtype)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)


def batch(kind: str, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (12,), generator=g)
    if kind == "rich":
        return torch.randint(7, (12, 5), generator=g), y
    shape = (12, 2, 5, 5) if kind == "conv" else (12, 6)
    return torch.randn(shape, generator=g, dtype=dtype), y


def trained(
    method: str, kind: str, settings: Settings, parallel: Any, steps: int = 3, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """Parameters, losses, the state, and what `.grad` holds, after some steps."""
    net = made(kind, dtype)
    opt = METHODS[method](net, parallel=parallel, **copy.deepcopy(settings))
    losses = []
    for t in range(steps):
        x, y = batch(kind, dtype, t)
        losses.append(float(opt.step(lambda x=x, y=y: F.cross_entropy(net(x), y))))
    return {
        "model": {n: t.detach().clone() for n, t in net.state_dict().items()},
        "grads": {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None},
        "losses": losses, "skipped": opt.skipped, "state": opt.state_dict(),
        "here": {n for n, p in net.named_parameters() if opt.state.get(p)},
    }  # fmt: skip


def same(x: Any, y: Any) -> bool:
    if isinstance(x, Tensor):
        alike = isinstance(y, Tensor) and x.dtype == y.dtype and x.is_contiguous() == y.is_contiguous()
        return alike and torch.equal(x, y)
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(same(x[k], y[k]) for k in x)
    if isinstance(x, (list, tuple)):
        return len(x) == len(y) and all(map(same, x, y))
    return repr(x) == repr(y)


LOCOPROP: dict[str, Settings] = {
    "M": {"lr": 1e-3},
    "S": {"loss": "squared", "lr": 1e-3},
    "published": {"preset": "published-M", "lr": 1e-3},
    "adam, fresh": {"solver": local.LocalSteps(5, optimizer=torch.optim.Adam, state="fresh"), "lr": 1e-3},
    "exact": {"solver": local.ProximalSolve(1.0), "loss": "squared"},
    "cg": {"solver": local.ConjugateGradient(5), "loss": "squared", "regularizer": local.Proximal(1.0)},
    "spectral": {"solver": local.Spectral(4), "loss": "squared"},
    "newton": {"solver": local.Newton(2), "regularizer": local.Proximal(1.0), "gamma": 0.1},
    "anderson": {"solver": local.Anderson(4), "regularizer": local.Proximal(1.0), "gamma": 0.1},
    "one's own": {"solver": Own()},
    "elastic, by layer": {"regularizer": local.Elastic(1.0, 0.9), "layers": {"0": {"loss": "squared", "lr": 1e-4}}},
    "mirror": {"target": local.Mirror(), "lr": 1e-3},
    "grad": {"write": "grad", "lr": 1e-3},
    "threads at home": {"workers": 2, "lr": 1e-3},
}
ALTMIN: dict[str, Settings] = {
    "adam": {},
    "sgd": {"weights": "sgd"},
    "memory": {"weights": "memory", "codes": "jacobi"},
    "memory, gauss-newton": {"weights": "memory"},
    "memory, sweep": {"weights": Memory(every=2), "codes": "sweep"},
    "sweep": {"codes": "sweep", "regularizer": local.Elastic(1.0, 0.9)},
    "sweep, closed": {"codes": "sweep", "code_step": CodeStep(own=0.3, solve="closed")},
    "published": {"preset": "published", "coupling": Coupling(0.003, add=1e-3)},
    "multipliers": {"codes": "sweep", "repeats": 2, "multipliers": True, "weights": "sgd"},
    "sparse": {"l1": 1e-3, "code_l1": 1e-3},
    "async": {"schedule": "async", "staleness": 2, "weights": "sgd"},
    "by layer": {"layers": {"0": {"weights": "sgd", "lr": 0.01}, "2": {"weights": Memory(), "coupling": 1.0}}},
}
CASES = [("locoprop", "dense", name, torch.float64) for name in LOCOPROP]
CASES += [("altmin", "dense", name, torch.float64) for name in ALTMIN]
CASES += [(m, kind, name, torch.float32) for m, name in (("locoprop", "M"), ("locoprop", "exact"), ("altmin", "adam"),
          ("altmin", "memory")) for kind in ("rich", "conv")]  # fmt: skip
CASES += [("altmin", "conv", "sweep", torch.float32), ("altmin", "rich", "sweep", torch.float64)]
CASES += [(*case, torch.bfloat16) for case in (("locoprop", "rich", "M"), ("locoprop", "dense", "grad"),
          ("altmin", "rich", "adam"), ("altmin", "conv", "memory"))]  # fmt: skip


def settings_of(method: str, name: str) -> Settings:
    return (LOCOPROP if method == "locoprop" else ALTMIN)[name]


def over(rank: int, method: str, kind: str, name: str, dtype: torch.dtype) -> dict[str, Any]:
    return trained(method, kind, settings_of(method, name), True, dtype=dtype)


@pytest.mark.parametrize(("method", "kind", "name", "dtype"), CASES, ids=str)
def test_ranks_have_the_bits_of_one_process(method: str, kind: str, name: str, dtype: torch.dtype) -> None:
    wanted = trained(method, kind, settings_of(method, name), None, dtype=dtype)
    assert wanted["skipped"] == 0
    found = ranks(2)(over, method, kind, name, dtype)
    for one in found:
        for what in ("model", "grads", "losses", "skipped", "state"):
            assert same(one[what], wanted[what]), what
    assert not found[0]["here"] & found[1]["here"]
    assert found[0]["here"] | found[1]["here"] == wanted["here"]
    assert all(one["here"] for one in found) or len(wanted["here"]) < 2, "both ranks own layers"


@pytest.mark.slow
@pytest.mark.parametrize(("method", "name"), [("locoprop", "M"), ("altmin", "memory"), ("altmin", "sweep")])
def test_four_ranks_have_the_bits_of_one_process(method: str, name: str) -> None:
    wanted = trained(method, "rich", settings_of(method, name), None)
    for one in ranks(4)(over, method, "rich", name, torch.float64):
        assert all(same(one[what], wanted[what]) for what in ("model", "losses", "state"))


# State ------------------------------------------------------------------------------------------------------------


def half(rank: int, method: str, settings: Settings, start: bytes | None, parallel: bool = True) -> bytes:
    """Two steps from a saved state, or the first two; the state as it is saved."""
    net = made("rich", torch.float64)
    opt = METHODS[method](net, parallel=parallel or None, **settings)
    if start is not None:
        saved = torch.load(io.BytesIO(start), weights_only=False)
        net.load_state_dict(saved["model"])
        opt.load_state_dict(saved["opt"])
    for t in range(2):
        x, y = batch("rich", torch.float64, t + 2 * (start is not None))
        opt.step(lambda x=x, y=y: F.cross_entropy(net(x), y))
    out = io.BytesIO()
    torch.save({"model": net.state_dict(), "opt": opt.state_dict()}, out)
    return out.getvalue()


@pytest.mark.parametrize(
    ("method", "settings"),
    [("locoprop", {"lr": 1e-3, "regularizer": local.Elastic(1.0, 0.9)}),
     ("altmin", {"weights": "memory", "codes": "jacobi"}), ("altmin", {"schedule": "async"})],
    ids=["locoprop", "memory", "async"],
)  # fmt: skip
def test_a_state_goes_on_in_one_process_or_over_ranks_bitwise(method: str, settings: Settings) -> None:
    def load(content: bytes) -> Any:
        return torch.load(io.BytesIO(content), weights_only=False)

    alone = half(0, method, settings, None, False)
    wanted = load(half(0, method, settings, alone, False))
    shared = ranks(2)(half, method, settings, None)
    assert all(same(load(one), load(alone)) for one in shared)
    assert same(load(half(0, method, settings, shared[1], False)), wanted)
    for one in ranks(2)(half, method, settings, alone):
        assert same(load(one), wanted)


def kept(rank: int, start: bytes) -> set[str]:
    """Whose state a rank holds a step after loading all of it."""
    net = made("dense", torch.float64)
    opt = lw.LocoProp(net, parallel=True)
    opt.load_state_dict(torch.load(io.BytesIO(start), weights_only=False))
    x, y = batch("dense", torch.float64, 0)
    opt.step(lambda: F.cross_entropy(net(x), y))
    return {n for n, p in net.named_parameters() if opt.state.get(p)}


def test_loaded_state_stays_with_the_owners_alone() -> None:
    out = io.BytesIO()
    torch.save(trained("locoprop", "dense", {}, None)["state"], out)
    mine, yours = ranks(2)(kept, out.getvalue())
    assert mine and yours and not mine & yours and len(mine | yours) == 6


def traced(rank: int, parallel: bool = True) -> dict[str, Any]:
    """A trace, a group of our own, and a refit at the end."""
    net, trace = made("dense", torch.float64), lw.optim.Trace(every=2)
    opt = lw.AltMin(net, parallel=dist.new_group([0, 1]) if parallel else None, trace=trace)
    for t in range(3):
        x, y = batch("dense", torch.float64, t)
        opt.step(lambda x=x, y=y: F.cross_entropy(net(x), y))
    rows = trace.rows()
    mean = opt.refit([lambda: F.cross_entropy(net(x), y)] * 2)
    return {"rows": rows, "mean": mean, "model": dict(net.state_dict())}


def test_traces_and_refits_are_those_of_one_process() -> None:
    wanted = traced(0, False)
    assert wanted["rows"] and all(same(one, wanted) for one in ranks(2)(traced))


def large(rank: int) -> list[bool]:
    """Tensors that travel by themselves, in two layouts."""
    start = torch.arange(2.0**17).view(2**9, 2**8)
    found = []
    for t in (start.clone(), start.clone().t(), torch.ones(3)):
        wanted = t.clone()
        if rank == 0:
            t.zero_()
        Ranks().send_from(1, [t])
        found.append(torch.equal(t, wanted))
    return found


def test_large_tensors_arrive_in_any_layout() -> None:
    assert ranks(2)(large) == [[True] * 3] * 2


def company(rank: int, parallel: bool = True) -> dict[str, Any]:
    """A bias that is fitted with its weight in some batches, and moves along its gradient in others."""
    torch.manual_seed(0)
    net = nn.ParameterDict({f"{k}{n}": torch.randn(*s, dtype=torch.float64) for n in range(4)
                            for k, s in (("w", (5, 5)), ("b", (5,)))})  # fmt: skip
    opt = lw.LocoProp(net, lr=1e-3, parallel=parallel or None)
    for t in range(4):
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(t), dtype=torch.float64)

        def closure(x: Tensor = x, apart: bool = t % 2 == 1) -> Tensor:
            for n in range(4):
                z = F.linear(x, net[f"w{n}"]) + net[f"b{n}"] if apart else F.linear(x, net[f"w{n}"], net[f"b{n}"])
                x = torch.tanh(z)
            return x.square().mean()

        opt.step(closure)
    return {"model": {n: p.detach().clone() for n, p in net.items()}, "state": opt.state_dict()}


def test_state_follows_a_parameter_to_another_owner() -> None:
    wanted = company(0, False)
    assert all(same(one, wanted) for one in ranks(2)(company))


# What one rank meets, all meet ------------------------------------------------------------------------------------


def nan_on_one(rank: int, method: str, raises: bool) -> Any:
    net = made("rich" if not raises else "dense", torch.float64)
    kind = "dense" if raises else "rich"
    opt = METHODS[method](net, parallel=True, on_nonfinite="raise" if raises else "skip")
    before = copy.deepcopy(net.state_dict())
    x, y = batch(kind, torch.float64, 0)
    factor = float("nan") if rank == 1 else 1.0
    try:
        opt.step(lambda: F.cross_entropy(net(x), y) * factor)
    except NonFinite as error:
        return str(error), same(dict(net.state_dict()), dict(before))
    skipped = opt.skipped, same(dict(net.state_dict()), dict(before)), len(opt.state)
    opt.step(lambda: F.cross_entropy(net(x), y))
    return skipped, {n: t.clone() for n, t in net.state_dict().items()}


@pytest.mark.parametrize("method", METHODS)
def test_a_nan_on_one_rank_is_skipped_by_all(method: str) -> None:
    found = ranks(2)(nan_on_one, method, False)
    assert [one[0] for one in found] == [(1, True, 0)] * 2
    assert same(found[0][1], found[1][1])


def test_a_nan_on_one_rank_is_raised_on_all_by_its_place() -> None:
    for text, unchanged in ranks(2)(nan_on_one, "locoprop", True):
        assert unchanged and "holds NaN" in text


def breaks(rank: int, error: str) -> Any:
    net = made("dense", torch.float64)
    before = copy.deepcopy(net.state_dict())
    opt = lw.LocoProp(net, parallel=True, solver=Breaks(8, error))
    x, y = batch("dense", torch.float64, 0)
    try:
        opt.step(lambda: F.cross_entropy(net(x), y))
        said = "nothing"
    except Exception as found:
        said = f"{type(found).__name__}: {found}"
    return said, opt.skipped, same(dict(net.state_dict()), dict(before))


def test_an_error_in_one_ranks_solver_reaches_all_and_nothing_moves() -> None:
    assert ranks(2)(breaks, "nonfinite") == [("nothing", 1, True)] * 2
    found = ranks(2)(breaks, "value")
    assert all(skipped == 0 and unchanged for _, skipped, unchanged in found)
    assert sorted(text.split(":")[0] for text, _, _ in found) == ["RankFailed", "ValueError"]
    assert all("told to" in text for text, _, _ in found)


# Ranks that disagree ----------------------------------------------------------------------------------------------


def disagree(rank: int, about: str) -> str:
    net = made("dense", torch.float64)
    settings: Settings = {"lr": 1e-3}
    x, y = batch("dense", torch.float64, 0)
    if rank == 1:
        if about == "shape":
            net[2] = nn.Linear(9, 7).double()
            net[4] = nn.Linear(7, 3).double()
        elif about == "frozen":
            net[2].weight.requires_grad_(False)
        elif about == "setting":
            settings["gamma"] = 3.0
        elif about == "solver":
            settings["solver"] = local.LocalSteps(3)
        elif about == "batch":
            x, y = x[:8], y[:8]
        elif about == "samples":
            x = x + 0.1
        elif about == "values":
            with torch.no_grad():
                net[2].bias[3] += 1e-9
    try:
        opt = lw.LocoProp(net, parallel=True, **settings)
        opt.step(lambda: F.cross_entropy(net(x), y))
        if about == "later" and rank == 1:
            opt.param_groups[0]["lr"] = 1e-4
        opt.step(lambda: F.cross_entropy(net(x), y))
    except BadInput as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("about", "names"),
    [("nothing", ""), ("shape", "'2.weight'"), ("frozen", "'2.weight'"), ("setting", "'parameter group 0'"),
     ("solver", "'solver'"), ("batch", "'the batch'"), ("samples", "different losses"), ("values", "'2.bias'"),
     ("later", "'parameter group 0'")],
)  # fmt: skip
def test_ranks_that_disagree_are_refused_by_name(about: str, names: str) -> None:
    for said in ranks(2)(disagree, about):
        assert (names in said and "rank 1" in said) if names else not said


def test_wrong_choices_are_refused() -> None:
    for wrong in ("ranks", 2):
        with pytest.raises(BadInput, match="parallel"):
            lw.LocoProp(made("dense", torch.float64), parallel=wrong)
    with pytest.raises(BadInput, match="order"):
        lw.LocoProp(made("dense", torch.float64), parallel=True, order="output_to_input")


def test_one_process_is_a_group_of_one() -> None:
    assert same(trained("locoprop", "rich", {"lr": 1e-3}, True), trained("locoprop", "rich", {"lr": 1e-3}, None))
