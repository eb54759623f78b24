"""LocoProp's and AltMin's keywords: the values whose fields they are, and presets, over which they win."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from local_cases import mlp
from torch import Tensor

import layerwise as lw
from layerwise import local
from layerwise.errors import BadInput

Settings = dict[str, Any]
METHODS: dict[str, Any] = {"LocoProp": lw.LocoProp, "AltMin": lw.AltMin}

# What the presets stand for, from the papers and programs: a second copy, not the library's.
_PUBLISHED = {"lr": 1e-5, "gamma": 10.0, "steps": 10, "rows": "all", "decay": 0.9, "momentum": 0.999, "eps": 1e-5}
_SHARES = {**_PUBLISHED, "rows": "auto"}
PRESETS: dict[tuple[str, str], Settings] = {
    ("LocoProp", "M"): {**_SHARES, "lr": 5e-5, "momentum": 0.99, "loss": "matching"},
    ("LocoProp", "S"): {**_SHARES, "loss": "squared"},
    ("LocoProp", "published-M"): {**_PUBLISHED, "loss": "matching"},
    ("LocoProp", "published-S"): {**_PUBLISHED, "loss": "squared"},
    ("AltMin", "published"): {
        "codes": "sweep", "weights": "adam", "lr": 8e-3, "coupling": 3e-3, "steps": 1, "rows": "all",
    },
}  # fmt: skip

# Every keyword that can stand beside a preset, with values that are not the presets'.
GIVEN: dict[str, list[Settings]] = {
    "LocoProp": [
        {"lr": 3e-4}, {"loss": "matching"}, {"loss": "squared"}, {"loss": local.SIGMOID}, {"target": local.Mirror()},
        {"target": local.GradientStep(3.0)}, {"gamma": 1e3, "target": local.GradientStep(clip="range")},
        {"regularizer": local.WeightDecay(0.1)}, {"solver": local.LocalSteps(4, rows=5)},
        {"solver": local.LocalSteps(4, torch.optim.SGD)}, {"solver": local.ProximalSolve(0.5)},
        {"solver": local.Newton(2, damping=1.0)}, {"solver": local.Spectral(3)}, {"layers": {"2": {"lr": 1e-3}}},
        {"order": "input_to_output"}, {"write": "grad"}, {"workers": 2}, {"parallel": False}, {"gamma": 3.0},
        {"steps": 4}, {"rows": 5}, {"decay": 0.5}, {"momentum": 0.5}, {"eps": 1e-2}, {"on_nonfinite": "raise"},
    ],
    "AltMin": [
        {"codes": "jacobi"}, {"codes": "gauss-newton"}, {"weights": "adam"}, {"weights": "sgd"}, {"weights": "memory"},
        {"weights": local.Memory(forget=0.1)}, {"weights": local.Spectral(3)},
        {"weights": local.LocalSteps(3, torch.optim.SGD)}, {"lr": 0.05}, {"coupling": 0.5},
        {"coupling": local.Coupling(0.5, add=0.1)}, {"steps": 3}, {"rows": 4}, {"betas": (0.5, 0.9)}, {"eps": 0.1},
        {"momentum": 0.5, "weights": "sgd"}, {"l1": 0.1}, {"code_l1": 1e-4}, {"normalise": True},
        {"regularizer": local.WeightDecay(0.1)}, {"layers": {"2": {"weights": "sgd"}}},
        {"code_step": local.CodeStep(2, 0.1)}, {"repeats": 2}, {"repeats": 2, "multipliers": True}, {"workers": 2},
        {"parallel": False}, {"schedule": "async"}, {"schedule": "async", "staleness": 4}, {"reduction": "sum"},
        {"on_nonfinite": "raise"},
    ],
}  # fmt: skip
# Numbers of a preset that go with a choice of its, and leave with it.
OF_A_CHOICE = {
    "LocoProp": {"solver": ("lr",), "target": ("gamma",)},
    "AltMin": {"weights": ("lr",)},
}
QUIET = [  # without effect here: a row of a dense layer is a sample
    {"workers": 2},
    {"parallel": False},
    {"on_nonfinite": "raise"},
    {"normalise": True},
]


def trained(method: str, settings: Settings, steps: int = 3) -> tuple[dict[str, Tensor], Settings, Settings]:
    """The parameters (or what is in `.grad`) after some steps, the numbers of the groups, and the state."""
    net = mlp(5, 6, 4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = METHODS[method](net, **settings)
    for t in range(steps):
        gen = torch.Generator().manual_seed(t)
        x, y = torch.randn(12, 5, generator=gen, dtype=torch.float64), torch.randint(3, (12,), generator=gen)
        opt.step(lambda x=x, y=y: F.cross_entropy(net(x), y))
    assert opt.skipped == 0
    grads = {f"{name}.grad": p.grad for name, p in net.named_parameters() if p.grad is not None}
    state = opt.state_dict()
    return {**{name: p.detach() for name, p in net.named_parameters()}, **grads}, state["param_groups"], state["state"]


def same(one: Any, two: Any) -> bool:
    """Whether two nests of containers, tensors and numbers are equal bit by bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[k], two[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)


def idle(method: str, given: Settings) -> set[str]:
    """The numbers of a preset that move nothing beside what is given, and are refused where they are spelled out."""
    chosen = given.get("solver" if method == "LocoProp" else "weights")
    if chosen is None or chosen in ("adam", "sgd"):
        return set()
    if method == "LocoProp" and isinstance(chosen, local.LocalSteps):
        return set() if chosen.optimizer is local.TFRMSProp else {"decay", "momentum", "eps"}
    return {"rows"}


def beside(method: str, preset: str, given: Settings) -> Settings:
    """The settings of a preset, spelled out, but for what is given and the numbers that leave with a choice."""
    wanted = {k: v for k, v in PRESETS[method, preset].items() if k not in given}
    for word, value in given.items():
        numbers = OF_A_CHOICE[method].get(word, ())
        if isinstance(value, local.LocalSteps) and method == "LocoProp":
            numbers = (*numbers, "steps", "rows") if value.optimizer is not local.TFRMSProp else ("steps", "rows")
        if getattr(value, "gamma", 0.0) is None or value == PRESETS[method, preset].get(word):
            continue
        wanted = {k: v for k, v in wanted.items() if k not in numbers}
        if getattr(value, "squared_only", False) and method == "LocoProp":
            wanted["loss"] = "squared"
    return {**{k: v for k, v in wanted.items() if k not in idle(method, given)}, **given}


VALUES: dict[str, dict[str, Any]] = {
    "LocoProp": {
        "objective": lw.optim.Objective, "local_update": lw.optim.LocalUpdate, "execution": lw.optim.Execution,
    },
    "AltMin": {
        "code_update": lw.optim.CodeUpdate, "weight_update": lw.optim.WeightUpdate, "minibatch": lw.optim.Minibatch,
        "execution": lw.optim.Execution,
    },
}  # fmt: skip
OWNER = {
    (method, field.name): argument
    for method, values in VALUES.items() for argument, made in values.items() for field in dataclasses.fields(made)
}  # fmt: skip


def by_value(method: str, given: Settings) -> Settings:
    """Settings with the values in place of the keywords for their fields."""
    parts: dict[str, Settings] = {}
    for word, value in given.items():
        parts.setdefault(OWNER.get((method, word), ""), {})[word] = value
    return parts.pop("", {}) | {argument: VALUES[method][argument](**fields) for argument, fields in parts.items()}


def pairs() -> list[Any]:
    return [
        pytest.param(
            method,
            preset,
            given,
            id=f"{method}-{preset}-{n}-{'-'.join(given)}",
            marks=() if (place + n) % 2 == 0 else pytest.mark.slow,
        )
        for place, (method, preset) in enumerate(PRESETS)
        for n, given in enumerate(GIVEN[method])
    ]


@pytest.mark.parametrize(("method", "preset", "given"), pairs())
def test_what_is_spelled_out_wins_over_a_preset(method: str, preset: str, given: Settings) -> None:
    """The bits, the numbers and the local optimizers' state are those of the preset's settings spelled out."""
    found = trained(method, {"preset": preset, **given})
    want = trained(method, beside(method, preset, given))
    for group in (*found[1], *want[1]):
        for word in idle(method, given):
            group.pop(word, None)
    assert same(found, want)
    quiet = given in QUIET or given.items() <= PRESETS[method, preset].items()
    assert same(found[0], trained(method, {"preset": preset})[0]) == quiet
    for word, value in given.items():
        if word in found[1][0] and isinstance(value, int | float | str | tuple):
            assert found[1][0][word] == value


@pytest.mark.parametrize(("method", "preset", "given"), pairs())
def test_a_value_has_the_bits_of_its_keywords(method: str, preset: str, given: Settings) -> None:
    settings = {"preset": preset, **given}
    assert same(trained(method, by_value(method, settings), 2), trained(method, settings, 2))


@pytest.mark.parametrize(("method", "preset"), PRESETS)
def test_a_preset_spelled_out_in_values_has_its_bits(method: str, preset: str) -> None:
    values = by_value(method, PRESETS[method, preset])
    assert same(trained(method, values, 2), trained(method, {"preset": preset}, 2))


@pytest.mark.parametrize(("method", "word"), OWNER, ids=str)
def test_a_value_beside_a_keyword_for_its_field_is_refused_by_name(method: str, word: str) -> None:
    argument, value = OWNER[method, word], next(g[word] for g in GIVEN[method] if word in g)
    made = VALUES[method][argument]
    with pytest.raises(BadInput, match=f"{word}= is the field '{word}' of {argument}="):
        METHODS[method](mlp(5, 3), **{word: value, argument: made()})
    with pytest.raises(BadInput, match=f"{argument}= takes a lw.optim.{made.__name__}"):
        METHODS[method](mlp(5, 3), **{argument: value})
    net = mlp(5, 3)
    more: Settings = {
        "multipliers": {"repeats": 2, "codes": "sweep"}, "staleness": {"schedule": "async"},
        "code_step": {"codes": "sweep"}, "momentum": {"weights": "sgd"} if method == "AltMin" else {},
    }.get(word, {})  # fmt: skip
    METHODS[method](net, **{argument: None, word: value, **more})  # None is not given, on either side
    if inspect.signature(METHODS[method]).parameters[word].default is None:
        METHODS[method](net, **{argument: made(), word: None})


@pytest.mark.parametrize("method", METHODS)
def test_a_constructor_shows_its_keywords_and_takes_no_others(method: str) -> None:
    shown = inspect.signature(METHODS[method]).parameters
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in shown.values())
    defaults = {name: p.default for name, p in shown.items() if name != "model" and name not in VALUES[method]}
    assert same(trained(method, defaults, 2), trained(method, {}, 2))
    with pytest.raises(TypeError) as said:
        METHODS[method](mlp(5, 3), speed=1)
    assert str(said.value) == f"{method}.__init__() got an unexpected keyword argument 'speed'"


def test_a_gamma_beside_a_target_with_another_one_is_refused() -> None:
    with pytest.raises(BadInput, match=r"GradientStep\(gamma=3.0.*gamma=2.0"):
        lw.LocoProp(mlp(5, 3), gamma=2.0, target=local.GradientStep(3.0))


def test_every_keyword_is_among_those_given() -> None:
    """But the model, its parameters, the preset itself, and a trace, which changes nothing."""
    for method, cases in GIVEN.items():
        words = {word for given in cases for word in given}
        shown = set(inspect.signature(METHODS[method]).parameters)
        assert shown - {"model", "params", "preset", "trace"} == words | VALUES[method].keys()


def test_a_group_cannot_ask_for_a_solver_that_was_not_given() -> None:
    net = mlp(5, 3)
    x, y = torch.ones(2, 5, dtype=torch.float64), torch.tensor([0, 1])
    opt = lw.AltMin(net, [{"params": net.parameters(), "weights": "solver"}])
    with pytest.raises(BadInput, match=r"0\.weight asks for weights=\"solver\""):
        opt.step(lambda: F.cross_entropy(net(x), y))
