"""Saved states that do not fit are refused whole, by name; and optimizers are copied and pickled as torch's are."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from grids import one_in
from state_checks import same, through_a_file
from torch import Tensor, nn

import layerwise as lw
from layerwise import local
from layerwise.errors import BadInput
from layerwise.optim.second_order.preconditioner import Preconditioner

Make = Callable[[nn.Module], Any]

MAKERS: dict[str, Make] = {
    "LocoProp": lambda m: lw.LocoProp(m),
    "LocoProp elastic": lambda m: lw.LocoProp(m, regularizer=local.Elastic(0.1)),
    "LocoProp adam, threads": lambda m: lw.LocoProp(m, solver=local.LocalSteps(3, torch.optim.Adam), workers=2),
    "AltMin": lambda m: lw.AltMin(m),
    "AltMin sgd": lambda m: lw.AltMin(m, weights="sgd"),
    "AltMin memory": lambda m: lw.AltMin(m, weights="memory", codes="jacobi", coupling=0.1),
    "AltMin sweep": lambda m: lw.AltMin(m, codes="sweep"),
    "AltMin async": lambda m: lw.AltMin(m, schedule="async"),
    "KFAC": lambda m: lw.optim.KFAC(m, update_factors_every=1),
    "KFAC ekfac": lambda m: lw.optim.KFAC(m, kind="ekfac", update_factors_every=1),
    "KFAC foof": lambda m: lw.optim.KFAC(m, kind="foof", update_factors_every=1),
    "DiagNewton": lambda m: lw.optim.DiagNewton(m, update_every=1),
}
SINCE_VERSION_2 = ("optimizer", "version", "entries")
every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def net(wide: int = 5, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, wide), nn.Tanh(), nn.Linear(wide, 3)
    return nn.Sequential(*layers).to(dtype)


def closure_of(model: nn.Module, seed: int = 0) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(7, 1, 4, 4, generator=generator), torch.randint(3, (7,), generator=generator)
    x = x.to(next(model.parameters()).dtype)
    return lambda: F.cross_entropy(model(x), y)


def trained(make: Make, model: nn.Module | None = None, steps: int = 3) -> tuple[nn.Module, Any]:
    model = net() if model is None else model
    opt = make(model)
    for seed in range(steps):
        opt.step(closure_of(model, seed))
    return model, opt


def refused(opt: Any, state: Any, says: str) -> None:
    """The state is refused with these words, and nothing has changed."""
    before, groups = copy.deepcopy(opt.state_dict()), copy.deepcopy(settings_of(opt))
    with pytest.raises(BadInput, match=says):
        opt.load_state_dict(state)
    assert same(opt.state_dict(), before) and settings_of(opt) == groups


def settings_of(opt: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in group.items() if k != "params"} for group in getattr(opt, "param_groups", [])]


def tensors_in(state: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to all floating-point tensors of a state."""
    if isinstance(state, Tensor):
        return [way] if state.is_floating_point() and state.numel() else []
    parts = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    return [found for key, value in parts for found in tensors_in(value, (*way, key))]


def put(state: Any, way: tuple[Any, ...], value: Any) -> None:
    for key in way[:-1]:
        state = state[key]
    state[way[-1]] = value


def get(state: Any, way: tuple[Any, ...]) -> Any:
    for key in way:
        state = state[key]
    return state


# What does not fit -------------------------------------------------------------------------------------------------


@every
def test_the_state_of_other_shapes_is_refused(make: Make) -> None:
    _, opt = trained(make)
    _, other = trained(make, net(wide=6))
    state = other.state_dict()
    # every shape of the wider model fails, a state that names the same parameters, too
    refused(opt, state, "fit|shape|moments|averages|codes")


@one_in(3, ours=MAKERS, theirs=MAKERS)
def test_pairs_of_optimizers(ours: str, theirs: str) -> None:
    """A state of the same kind loads, and the optimizer goes on; that of another is refused."""
    model, opt = trained(MAKERS[ours])
    _, other = trained(MAKERS[theirs])
    state = through_a_file(other.state_dict())
    kinds = (type(opt), type(other))
    if kinds[0] is not kinds[1]:
        refused(opt, state, f"that of {kinds[1].__name__}, and cannot be loaded into {kinds[0].__name__}")
        return
    try:
        opt.load_state_dict(state)
    except BadInput as error:
        assert ours != theirs, error
    opt.step(closure_of(model, 9))
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters()) and opt.skipped == 0


@every
def test_each_missing_key_is_refused(make: Make) -> None:
    _, opt = trained(make)
    state = opt.state_dict()
    for key in state:
        refused(opt, {k: v for k, v in state.items() if k != key}, key)
    for key in set(state["param_groups"][0]) & set(opt.defaults):
        less = [{k: v for k, v in group.items() if k != key} for group in state["param_groups"]]
        refused(opt, {**state, "param_groups": less}, f"lacks {key}")
    for number, own in state["state"].items():
        name = state["param_groups"][0]["param_names"][number]
        for key in own:
            if len(own) == 1 or key in ("B", "inverse", "inverted"):  # a memory has them in some of its forms
                says = f"{name} lacks .*, with which it was saved|{name} has one of inverse and inverted"
            else:
                says = f"{name} lacks {key}"
            less = {**state["state"], number: {k: v for k, v in own.items() if k != key}}
            refused(opt, {**state, "state": less}, says)


@every
def test_what_was_cut_whole_is_refused_by_name(make: Make) -> None:
    """Neither the state of a parameter, nor an average, nor a block is begun anew because a file has lost it."""
    _, opt = trained(make)
    state = opt.state_dict()
    names = state["param_groups"][0]["param_names"]
    for number in state["state"]:
        says = rf"{names[number]} lacks .*, with which it was saved"
        refused(opt, {**state, "state": {n: its for n, its in state["state"].items() if n != number}}, says)
        refused(opt, {**state, "state": {**state["state"], number: {}}}, says)
    refused(opt, {**state, "state": {}}, "with which it was saved")
    refused(opt, {k: v for k, v in state.items() if k not in ("optimizer", "version")}, "lacks optimizer, version")
    for wrong in ({}, None, {"0.weight": 1.5}, [1]):
        refused(opt, {**state, "entries": wrong}, "entries")
    if "preconditioner" in state:
        its = state["preconditioner"]
        for name in its["blocks"]:
            blocks = {n: b for n, b in its["blocks"].items() if n != name}
            refused(opt, {**state, "preconditioner": {**its, "blocks": blocks}}, f"block of {name} lacks")


def test_an_average_that_was_cut_is_refused_by_name() -> None:
    _, opt = trained(lambda m: lw.LocoProp(m, decay=0.9))
    state = opt.state_dict()
    for name in state["averages"]:
        averages = {n: t for n, t in state["averages"].items() if n != name}
        refused(opt, {**state, "averages": averages}, f"{name} lacks the entries average")


@pytest.mark.thinned(3)
@every
def test_nan_in_any_tensor_is_refused_by_name(make: Make) -> None:
    _, opt = trained(make)
    ways = tensors_in(opt.state_dict())
    assert ways
    for way in ways:
        for bad in (float("nan"), float("inf")):
            state = copy.deepcopy(opt.state_dict())
            get(state, way).select(-1, -1).fill_(bad) if get(state, way).dim() else get(state, way).fill_(bad)
            name = next(str(key) for key in reversed(way) if isinstance(key, str))
            refused(opt, state, rf"{name} of .*NaN|running averages.*NaN|{name} of a minibatch.*NaN")


@pytest.mark.thinned(3)
@every
def test_tensors_of_other_shapes_and_types_are_refused(make: Make) -> None:
    _, opt = trained(make)
    state = opt.state_dict()
    for way in tensors_in({k: v for k, v in state.items() if k != "stale"}):
        old = get(state, way)
        if not old.dim():
            continue
        for new in (torch.zeros(*old.shape, 2), old.double(), old.to(torch.int64), old.to(torch.complex64)):
            changed = copy.deepcopy(state)
            put(changed, way, new)
            refused(opt, changed, "shape|moments|averages")


@pytest.mark.thinned(3)
@every
def test_what_is_no_tensor_of_numbers_is_refused(make: Make) -> None:
    """On the meta device, sparse, or of another kind: each tensor of each state, by its key."""
    _, opt = trained(make)
    state = opt.state_dict()
    for way in tensors_in(state):
        old = get(state, way)
        none = () if str(way[-1]).startswith("basis") else (None,)  # a side of a block may have no basis
        for value in (old.to("meta"), old.reshape(-1).to_sparse(), old.tolist(), "x", True, {}, *none):
            changed = copy.deepcopy(state)
            put(changed, way, value)
            refused(opt, changed, str(way[-1]))
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    refused(opt, torch.load(file, weights_only=True, map_location="meta"), "meta device")


@every
@pytest.mark.parametrize("change", [{"lr": -1.0}, {"lr": float("nan")}, {"lr": "fast"}, {"lr": None}])
def test_settings_that_cannot_be_are_refused(make: Make, change: dict[str, Any]) -> None:
    _, opt = trained(make)
    state = opt.state_dict()
    refused(opt, {**state, "param_groups": [{**state["param_groups"][0], **change}]}, "parameter group 0")


_SETTINGS: dict[str, list[tuple[str, Any]]] = {
    "AltMin": [("normalise", "no"), ("normalise", 1), ("betas", (0.9,)), ("betas", 0.9), ("eps", float("inf")),
               ("weights", "sgd"), ("weights", None), ("steps", True), ("rows", 2.0), ("coupling", 0.0),
               ("l1", float("nan")), ("momentum", "0.9")],
    "LocoProp": [("loss", "other"), ("gamma", 0.0), ("decay", 1.0), ("eps", float("nan")), ("eps", float("inf")),
                 ("steps", 1.5), ("rows", True), ("momentum", None)],
    "KFAC": [("damping", 0.0), ("momentum", 1.0), ("weight_decay", -1.0), ("weight_decay", "no")],
}  # fmt: skip


@pytest.mark.parametrize("name", _SETTINGS)
def test_each_setting_of_another_kind_or_range_is_refused_by_name(name: str) -> None:
    _, opt = trained(MAKERS[name])
    state = opt.state_dict()
    for key, value in _SETTINGS[name]:
        refused(opt, {**state, "param_groups": [{**state["param_groups"][0], key: value}]}, "parameter group 0")


def _numbers_in(state: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to all numbers, and tensors of one number, of a state."""
    if isinstance(state, int | float) or (isinstance(state, Tensor) and not state.dim()):
        return [way]
    parts = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return [found for key, value in parts for found in _numbers_in(value, (*way, key))]


@pytest.mark.thinned(3)
@every
def test_each_counter_is_of_its_own_type_and_range(make: Make) -> None:
    _, opt = trained(make)
    state = {key: value for key, value in opt.state_dict().items() if key != "param_groups"}
    for way in _numbers_in(state):
        old = get(state, way)
        if way[-1] == "version" or isinstance(old, bool) or {"shape", "size", "axes"} & set(way):
            continue
        wrong: list[Any] = ["3", None, -1 if not isinstance(old, Tensor) else torch.tensor(-1.0), True]
        wrong += [float(old)] * isinstance(old, Tensor) + [torch.tensor(float(old))] * (not isinstance(old, Tensor))
        for value in wrong:
            changed = copy.deepcopy(opt.state_dict())
            put(changed, way, value)
            refused(opt, changed, "|".join(str(key) for key in way if isinstance(key, str)))


@pytest.mark.parametrize(
    ("name", "key"), [("AltMin", "exp_avg_sq"), ("LocoProp", "mean_square"), ("AltMin memory", "A")]
)
def test_squares_that_are_negative_are_refused(name: str, key: str) -> None:
    _, opt = trained(MAKERS[name])
    state = copy.deepcopy(opt.state_dict())
    next(own for own in state["state"].values() if key in own)[key].neg_()
    refused(opt, state, f"{key}.*negative")


@pytest.mark.parametrize("theirs", ["adam", "sgd", "memory"])
@pytest.mark.parametrize("ours", ["adam", "sgd", "memory"])
def test_the_state_of_another_way_to_update_weights_is_refused(ours: str, theirs: str) -> None:
    def made(weights: str) -> Make:
        return lambda m: lw.AltMin(m, weights=weights, codes="jacobi")  # type: ignore[arg-type]

    _, opt = trained(made(ours))
    _, other = trained(made(theirs))
    if ours == theirs:
        opt.load_state_dict(other.state_dict())
    else:
        refused(opt, other.state_dict(), f"saved with weights='{theirs}', and ours has '{ours}'")


@every
def test_a_loaded_state_shares_no_memory_with_the_given_one(make: Make) -> None:
    _, other = trained(make)
    model, opt = trained(make)
    given = copy.deepcopy(other.state_dict())
    kept = copy.deepcopy(given)
    opt.load_state_dict(given)
    assert same(given, kept)
    for seed in range(5, 8):
        opt.step(closure_of(model, seed))
    assert same(given, kept)
    opt.load_state_dict(given)
    for way in _ways_to_tensors(given):
        get(given, way).zero_()
    assert same(opt.state_dict(), kept)


def _ways_to_tensors(state: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to all tensors of a state."""
    if isinstance(state, Tensor):
        return [way]
    parts = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    return [found for key, value in parts for found in _ways_to_tensors(value, (*way, key))]


@every
def test_a_setting_that_was_deleted_is_named(make: Make) -> None:
    model, opt = trained(make)
    for key in set(opt.param_groups[0]) & set(opt.defaults):
        held = opt.param_groups[0].pop(key)
        before = copy.deepcopy((model.state_dict(), opt.state_dict()["state"]))
        with pytest.raises(BadInput, match=f"parameter group 0 lacks {key}"):
            opt.step(closure_of(model, 5))
        assert same((model.state_dict(), opt.state_dict()["state"]), before)
        opt.param_groups[0][key] = held
    opt.step(closure_of(model, 5))


@every
def test_what_is_no_state_is_refused(make: Make) -> None:
    model, opt = trained(make)
    state = opt.state_dict()
    for wrong in (None, [], 3, {}, {"state": {}}, {**state, "version": 99}, {**state, "state": None},
                  {**state, "param_groups": None}, {**state, "param_groups": []}):  # fmt: skip
        refused(opt, wrong, "saved")
    numbers, names = (state["param_groups"][0][key] for key in ("params", "param_names"))
    for change in ({"params": None}, {"param_names": None}, {"params": 3}, {"param_names": [None, *names[1:]]},
                   {"param_names": [0, *names[1:]]}, {"params": ["0", *numbers[1:]]}, {"params": [[], *numbers[1:]]},
                   {"param_names": names[0]}):  # fmt: skip
        refused(opt, {**state, "param_groups": [{**state["param_groups"][0], **change}]}, "saved")
    refused(opt, {**state, "state": {**state["state"], 0: None}}, "not a dict")
    refused(opt, {**state, "state": {**state["state"], 99: {"x": torch.ones(1)}}}, "99")
    torch_opt = torch.optim.Adam(model.parameters())
    refused(opt, torch_opt.state_dict(), "lacks")
    for key in state.keys() & {"averages", "stale", "preconditioner", "entries"}:
        for wrong in (None, "x", 3, [], torch.ones(2), {"x": 3}, {3: torch.ones(2)}, {None: None}):
            refused(opt, {**state, key: wrong}, ".")


def test_minibatches_of_stale_layers_that_were_cut_are_named() -> None:
    model, opt = trained(MAKERS["AltMin async"])
    state = opt.state_dict()
    for at in range(len(state["stale"]["heard"])):
        for whole in (True, False):
            changed = copy.deepcopy(state)
            heard = changed["stale"]["heard"]
            heard.pop(at) if whole else heard[at].popitem()
            refused(opt, changed, "stale layers.*cut")
    old = copy.deepcopy(state)
    del old["stale"]["layers"]  # as it was saved before
    opt.load_state_dict(old)
    assert same(opt.state_dict(), state)
    shorter = lw.AltMin(model, schedule="async", staleness=1)  # no layer is ever given what is older
    shorter.load_state_dict(state)
    assert same(shorter.state_dict()["stale"]["heard"], state["stale"]["heard"][-2:])


@every
def test_states_without_a_version_load(make: Make) -> None:
    """Those of releases 0.1 and 0.2."""
    model, opt = trained(make)
    state = copy.deepcopy(opt.state_dict())
    old = {k: v for k, v in state.items() if k not in SINCE_VERSION_2}
    if "preconditioner" in old:
        old["preconditioner"] = {k: v for k, v in old["preconditioner"].items() if k not in SINCE_VERSION_2}
    opt.step(closure_of(model, 8))
    opt.load_state_dict(through_a_file(old))
    assert same(opt.state_dict(), state)


@every
def test_a_state_loads_again_after_another_was_loaded(make: Make) -> None:
    model, opt = trained(make)
    state = copy.deepcopy(opt.state_dict())
    for seed in (8, 9):
        opt.step(closure_of(model, seed))
        opt.load_state_dict(copy.deepcopy(state))
    assert same(opt.state_dict()["state"], state["state"])


def test_a_preconditioner_refuses_what_does_not_fit() -> None:
    model = net()
    pre = Preconditioner(model, update_factors_every=1)
    with pre.watch():
        closure_of(model)().backward()
    pre.step()
    state = pre.state_dict()
    refused(pre, {**state, "damping": -1.0}, "damping")
    refused(pre, {**state, "steps": -1}, "steps")
    refused(pre, lw.LocoProp(model).state_dict(), "that of LocoProp")
    refused(pre, {k: v for k, v in state.items() if k != "blocks"}, "blocks")
    for key in state["blocks"]["0.weight"]:
        if key not in ("A", "B"):
            less = {k: v for k, v in state["blocks"]["0.weight"].items() if k != key}
            refused(pre, {**state, "blocks": {**state["blocks"], "0.weight": less}}, "0.weight lacks")


# Copies --------------------------------------------------------------------------------------------------------------


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_copy_goes_on_bitwise_and_apart(name: str, copied: Callable[[Any], Any], steps: int) -> None:
    model, opt = trained(MAKERS[name], steps=steps)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 2, 0.5)
    its_model, its = copied((model, opt))
    assert settings_of(its) == settings_of(opt) and its.skipped == opt.skipped
    before = copy.deepcopy((its_model.state_dict(), its.state_dict()))
    for seed in range(4, 7):
        opt.step(closure_of(model, seed))
    assert same((its_model.state_dict(), its.state_dict()), before)
    for seed in range(4, 7):
        its.step(closure_of(its_model, seed))
    assert same((its_model.state_dict(), its.state_dict()), (model.state_dict(), opt.state_dict()))
    schedule.step()


def test_a_preconditioner_is_copied() -> None:
    def step(model: nn.Module, pre: Preconditioner) -> dict[str, Tensor]:
        with pre.watch():
            closure_of(model)().backward()
        pre.step()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    model = net()
    pre = Preconditioner(model, update_factors_every=1)
    step(model, pre)
    for its_model, its in (copy.deepcopy((model, pre)), pickled((model, pre))):
        again = copy.deepcopy((its_model, its))
        assert same(step(its_model, its), step(*again))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.table, self.head = (
            nn.MultiheadAttention(4, 2, batch_first=True),
            nn.Embedding(7, 4),
            nn.Linear(4, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        return self.head(self.mix(h, h, h)[0].mean(1))


@pytest.mark.parametrize("asked", [False, True], ids=["not asked for", "asked for"])
@pytest.mark.parametrize("quantity", [lw.KFAC, lw.KFLR, lw.EKFAC, lw.KFRA, lw.Variance])
def test_what_was_seen_is_pickled(quantity: Any, asked: bool) -> None:
    model: nn.Module = net() if quantity is lw.KFRA else Attention()
    x = torch.randn(6, 1, 4, 4) if quantity is lw.KFRA else torch.randint(7, (6, 5))
    with lw.observe(model, quantity()) as seen:
        F.cross_entropy(model(x), torch.randint(3, (6,))).backward()
    name = quantity().name
    found = getattr(seen, name) if asked else None
    for its in (copy.deepcopy(seen), pickled(seen)):
        wanted, got = getattr(seen, name) if found is None else found, getattr(its, name)
        assert same(dict(seen.grad), dict(its.grad))
        keys = list(wanted) if isinstance(wanted, Mapping) else list(wanted.forms)
        assert keys
        for key in keys if isinstance(wanted, Mapping) else {key.split("[")[0] for key in keys}:
            mine, theirs = (v[key] if isinstance(v, Mapping) else v.to_dense(key) for v in (wanted, got))
            assert torch.equal(mine, theirs)
    file = io.BytesIO()
    torch.save(seen, file)
