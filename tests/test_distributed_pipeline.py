"""A model in stages has the bits of `AltMin(codes="sweep")` on the whole model."""

from __future__ import annotations

import copy
import os
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import ranks, said_by_the_survivor
from test_distributed_local import Settings, same
from torch import Tensor, nn

import layerwise as lw
from layerwise.distributed import Pipeline, Stage, split
from layerwise.errors import BadInput, NonFinite
from layerwise.local import CodeStep, Coupling, Elastic, Memory, ProximalSolve


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.norm(self.inside(x)))


def whole(kind: str, dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    if kind == "conv":
        features = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 2))
        head = nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 3))
        return nn.Sequential(features, head).to(dtype)
    if kind == "residual":
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), Residual(), nn.Linear(8, 7), nn.Tanh(),
                             nn.Linear(7, 3)).to(dtype)  # fmt: skip
    sizes = (6, 9, 8, 7, 3)
    layers: list[nn.Module] = []
    for i, o in pairwise(sizes):
        layers += [nn.Linear(i, o), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def batch(kind: str, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shape = (12, 2, 5, 5) if kind == "conv" else (12, 6)
    return torch.randn(shape, generator=g, dtype=dtype), torch.randint(3, (12,), generator=g)


def named(net: nn.Module, opt: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state by parameter name."""
    return {n: dict(opt.state[p]) for n, p in net.named_parameters() if p in opt.state}


def serial(kind: str, settings: Settings, dtype: torch.dtype, steps: int = 3) -> dict[str, Any]:
    net = whole(kind, dtype)
    opt = lw.AltMin(net, **{"codes": "sweep", **copy.deepcopy(settings)})
    losses = []
    for t in range(steps):
        x, y = batch(kind, dtype, t)
        losses.append(float(opt.step(lambda x=x, y=y: F.cross_entropy(net(x), y))))
    return {"model": dict(net.state_dict()), "state": named(net, opt), "losses": losses, "skipped": opt.skipped,
            "mu": [g["coupling"] for g in opt.param_groups]}  # fmt: skip


def staged(
    rank: int, stages: int, kind: str, settings: Settings, dtype: torch.dtype, cuts: list[str] | None = None
) -> dict[str, Any]:
    stage = split(whole(kind, dtype), stages, cuts)[rank]
    opt = Pipeline(stage, **settings)
    losses = []
    for t in range(3):
        x, y = batch(kind, dtype, t)
        losses.append(float(opt.step(x if rank == 0 else None, lambda out, y=y: F.cross_entropy(out, y))))
    return {"model": dict(stage.state_dict()), "state": named(stage, opt), "losses": losses, "skipped": opt.skipped,
            "mu": [g["coupling"] for g in opt.param_groups]}  # fmt: skip


SETTINGS: dict[str, Settings] = {
    "adam": {},
    "sgd": {"weights": "sgd", "steps": 3},
    "memory": {"weights": "memory", "codes": "sweep"},
    "solver": {"weights": ProximalSolve(1.0), "code_step": CodeStep(own=0.3)},
    "published": {"preset": "published"},
    "closed": {"code_step": CodeStep(own=0.3, solve="closed")},
    "sparse, growing": {"l1": 1e-4, "code_l1": 1e-3, "coupling": Coupling(0.05, add=0.01)},
    "by layer": {"layers": {"0*": {"coupling": 0.2, "lr": 1e-3}, "4*": {"weights": Memory(), "coupling": 1.0}},
                 "regularizer": Elastic(1.0, 0.9)},
    "repeats, async": {"repeats": 2, "schedule": "async", "staleness": 2, "weights": "sgd"},
}  # fmt: skip
DENSE = ["sgd", "solver", "published", "closed", "sparse, growing", "by layer", "repeats, async"]
CASES: list[tuple[str, str, torch.dtype]] = [("dense", name, torch.float64) for name in DENSE]
CASES += [(kind, name, dtype) for kind in ("dense", "conv") for name in ("adam", "memory")
          for dtype in (torch.float32, torch.float64)]  # fmt: skip
CASES += [("conv", "sgd", torch.float32), ("residual", "adam", torch.float64)]


def joined(parts: list[dict[str, Any]], what: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in parts:
        assert not found.keys() & part[what].keys()
        found |= part[what]
    return found


def check(parts: list[dict[str, Any]], wanted: dict[str, Any]) -> None:
    assert wanted["skipped"] == 0
    assert same(joined(parts, "model"), wanted["model"]) and same(joined(parts, "state"), wanted["state"])
    for part in parts:
        assert part["losses"] == wanted["losses"] and part["skipped"] == 0 and set(part["mu"]) <= set(wanted["mu"])


@pytest.mark.parametrize(("kind", "name", "dtype"), CASES, ids=str)
def test_two_stages_have_the_bits_of_the_whole(kind: str, name: str, dtype: torch.dtype) -> None:
    wanted = serial(kind, SETTINGS[name], dtype)
    check(ranks(2)(staged, 2, kind, SETTINGS[name], dtype), wanted)


@pytest.mark.parametrize("cut", ["0", "2", "4"])
def test_every_cut_has_the_same_bits(cut: str) -> None:
    check(ranks(2)(staged, 2, "dense", {}, torch.float32, [cut]), serial("dense", {}, torch.float32))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adam", "memory", "closed", "by layer"])
def test_four_stages_have_the_bits_of_the_whole(name: str) -> None:
    check(ranks(4)(staged, 4, "dense", SETTINGS[name], torch.float64), serial("dense", SETTINGS[name], torch.float64))


@pytest.mark.parametrize("name", ["adam", "memory"])
def test_one_stage_is_the_whole(name: str) -> None:
    """In this process, without a group."""
    check([staged(0, 1, "conv", SETTINGS[name], torch.float64)], serial("conv", SETTINGS[name], torch.float64))


# What passes ------------------------------------------------------------------------------------------------------


def messages(rank: int) -> list[tuple[str, tuple[int, ...]]]:
    stage = split(whole("dense", torch.float64), 2)[rank]
    opt = Pipeline(stage)
    said: list[tuple[str, tuple[int, ...]]] = []
    for what in ("send", "receive"):
        act = getattr(opt._stages, what)

        def noted(other: int, tensors: list[Tensor], act: Any = act, what: str = what) -> None:
            said.extend((what, tuple(t.shape)) for t in tensors)
            act(other, tensors)

        setattr(opt._stages, what, noted)
    x, y = batch("dense", torch.float64, 0)
    opt.step(x, lambda out: F.cross_entropy(out, y))
    return said


def test_an_activation_passes_up_and_a_code_down_and_nothing_else() -> None:
    below, above = ranks(2)(messages)
    width = below[1][1]
    assert len(width) == 2 and width[0] == 12
    assert below == [("send", (13,)), ("send", width), ("receive", width)]
    assert above == [("receive", (13,)), ("receive", width), ("send", width)]


# Faults -----------------------------------------------------------------------------------------------------------


def spoiled(rank: int, where: str, raises: bool) -> Any:
    stage = split(whole("conv", torch.float64), 2)[rank]
    opt = Pipeline(stage, on_nonfinite="raise" if raises else "skip", weights="memory", codes="sweep")
    before = copy.deepcopy(dict(stage.state_dict()))
    x, y = batch("conv", torch.float64, 0)
    bad = x.clone()
    if where == "input":
        bad[0] = float("nan")
    factor = float("inf") if where == "loss" else 1.0
    if where == "weight" and rank == 1:
        with torch.no_grad():
            next(stage.parameters()).fill_(1e300)
        before = copy.deepcopy(dict(stage.state_dict()))
    try:
        opt.step(bad, lambda out: F.cross_entropy(out, y) * factor)
    except NonFinite as error:
        return str(error), same(dict(stage.state_dict()), before), len(opt.state)
    return opt.skipped, same(dict(stage.state_dict()), before), len(opt.state)


@pytest.mark.parametrize("where", ["input", "loss", "weight"])
def test_all_stages_skip_what_spoils_one(where: str) -> None:
    assert ranks(2)(spoiled, where, False) == [(1, True, 0)] * 2
    said = ranks(2)(spoiled, where, True)
    assert said[0] == said[1] and said[0][1:] == (True, 0)


def breaks_above(rank: int) -> Any:
    """A memory whose solution is not finite, in the upper stage alone."""
    stage = split(whole("dense", torch.float64), 2)[rank]
    opt = Pipeline(stage, layers={"6*": {"weights": _never_finite, "coupling": 1.0}})
    before = copy.deepcopy(dict(stage.state_dict()))
    x, y = batch("dense", torch.float64, 0)
    opt.step(x, lambda out: F.cross_entropy(out, y))
    return opt.skipped, same(dict(stage.state_dict()), before), len(opt.state)


def _never_finite(problem: Any) -> Any:
    return problem.weight * float("nan"), None if problem.bias is None else problem.bias * 0


def test_all_stages_go_back_from_a_solution_that_is_not_finite() -> None:
    assert ranks(2)(breaks_above) == [(1, True, 0)] * 2


def refusals(rank: int) -> dict[str, str]:
    said = {}
    stage = split(whole("dense", torch.float64), 2)[rank]
    nets = {
        "settings": (stage, {"lr": 0.1 * (rank + 1)}),
        "pattern": (stage, {"layers": {"none*": {"lr": 0.1}}}),
        "names": (Stage({"0": nn.Linear(6, 6)}), {}),
    }
    for name, (net, settings) in nets.items():
        try:
            Pipeline(net, **settings)
        except BadInput as error:
            said[name] = str(error)
    return said


def test_stages_that_disagree_are_refused_by_name() -> None:
    for said in ranks(2)(refusals):
        assert "'lr'" in said["settings"] and "rank 1" in said["settings"]
        assert "'none*'" in said["pattern"] and "0.weight" in said["names"]


@pytest.mark.parametrize(
    ("wrong", "match"),
    [({"codes": "jacobi"}, "sweep"), ({"preset": "published", "codes": "jacobi"}, "sweep"),
     ({"parallel": True}, "parallel"), ({"trace": lw.optim.Trace()}, "trace"),
     ({"multipliers": True, "repeats": 2}, "multipliers")],
    ids=str,
)  # fmt: skip
def test_wrong_choices_are_refused(wrong: Settings, match: str) -> None:
    with pytest.raises(BadInput, match=match):
        Pipeline(whole("dense", torch.float64), **wrong)


def test_steps_need_inputs_and_a_loss() -> None:
    opt = Pipeline(whole("dense", torch.float64))
    with pytest.raises(BadInput, match="inputs"):
        opt.step(None, lambda out: out.sum())
    with pytest.raises(BadInput, match="loss"):
        opt.step(torch.zeros(2, 6))
    with pytest.raises(BadInput, match="refit"):
        opt.refit([])


def ends_in_tanh(rank: int) -> str:
    net = whole("dense", torch.float64)
    stage = Stage({"0": net[0], "1": net[1]}) if rank == 0 else Stage({"2": net[2]})
    opt = Pipeline(stage)
    x, y = batch("dense", torch.float64, 0)
    try:
        opt.step(x, lambda out: F.cross_entropy(out, y))
    except lw.errors.LayerwiseError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_stage_that_ends_elsewhere_is_refused() -> None:
    first, second = ranks(2)(ends_in_tanh)
    assert "BadInput" in first and "stage 0" in first and "RankFailed" in second


def killed(rank: int) -> str:
    stage = split(whole("dense", torch.float64), 2)[rank]
    opt = Pipeline(stage)
    x, y = batch("dense", torch.float64, 0)
    for t in range(3):
        if rank == 1 and t == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            opt.step(x, lambda out: F.cross_entropy(out, y))
        except lw.errors.RankLost as error:
            return str(error)
    return ""


@pytest.mark.slow
def test_a_killed_stage_ends_the_others_with_a_clear_message() -> None:
    ok, said = said_by_the_survivor(killed)
    assert ok and "was killed" in said and "step 2" in said


# Stages and checkpoints -------------------------------------------------------------------------------------------


def test_split_keeps_names_and_modules_and_balances() -> None:
    net = whole("conv", torch.float32)
    parts = split(net, 3)
    assert [list(dict(part.named_parameters())) for part in parts] == [
        ["0.0.weight", "0.0.bias", "0.2.weight", "0.2.bias", "0.3.weight", "0.3.bias"],
        ["1.2.weight", "1.2.bias"], ["1.4.weight", "1.4.bias"],
    ]  # fmt: skip
    x = batch("conv", torch.float32, 0)[0]
    h = x
    for part in parts:
        h = part(h)
    assert torch.equal(h, copy.deepcopy(net)(x)) or torch.allclose(h, net(x))
    assert parts[0].get_parameter("0.0.weight") is net.get_parameter("0.0.weight")
    wide = nn.Sequential(*(nn.Linear(n, m) for n, m in ((2, 50), (50, 50), (50, 2), (2, 2), (2, 2))))
    assert [sum(1 for _ in part.parameters()) // 2 for part in split(wide, 2)] == [1, 4]


@pytest.mark.parametrize(
    ("stages", "cuts", "match"),
    [(5, None, "1 to 4"), (2, ["1"], "after linear"), (2, [], "1 different"), (0, None, "1 to 4")],
    ids=str,
)
def test_wrong_cuts_are_refused(stages: int, cuts: list[str] | None, match: str) -> None:
    with pytest.raises(BadInput, match=match):
        split(whole("dense", torch.float32), stages, cuts)


def test_what_is_no_chain_is_refused() -> None:
    with pytest.raises(BadInput, match="Residual"):
        split(Residual(), 2)  # type: ignore[arg-type]
    tied = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    tied[2].weight = tied[0].weight
    with pytest.raises(BadInput, match="stages 0 and 1"):
        split(tied, 2)
    layer = nn.Linear(3, 3)
    with pytest.raises(BadInput, match="twice"):
        split(nn.Sequential(layer, nn.Tanh(), layer), 2)


def stage_life(rank: int, folder: str, stages: int, last: int, settings: Settings) -> int:
    stage = split(whole("dense", torch.float64), stages)[rank]
    opt = Pipeline(stage, **settings)
    start = lw.distributed.load(folder, stage, opt).step
    for t in range(start, last):
        x, y = batch("dense", torch.float64, t)
        opt.step(x, lambda out, y=y: F.cross_entropy(out, y))
    lw.distributed.save(folder, last, stage, opt)
    return start


@pytest.mark.parametrize("name", ["by layer", "repeats, async"])
def test_checkpoints_pass_between_stages_and_the_whole_bitwise(name: str, tmp_path: Path) -> None:
    """Two stages, then one, then the whole model with AltMin."""
    settings, folder = SETTINGS[name], str(tmp_path)
    assert ranks(2)(stage_life, folder, 2, 2, settings) == [0, 0]
    assert stage_life(0, folder, 1, 3, settings) == 2
    assert ranks(2)(stage_life, folder, 2, 4, settings) == [3, 3]
    found = whole("dense", torch.float64)
    opt = lw.AltMin(found, codes="sweep", **settings)
    assert lw.distributed.load(folder, found, opt).step == 4
    x, y = batch("dense", torch.float64, 4)
    opt.step(lambda: F.cross_entropy(found(x), y))
    wanted = serial("dense", settings, torch.float64, 5)
    assert same(dict(found.state_dict()), wanted["model"]) and same(named(found, opt), wanted["state"])
