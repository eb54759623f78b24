"""What is decided once for a layer is decided anew where it no longer holds: a fresh optimizer makes the same steps."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from state_checks import same
from torch import Tensor, nn

import layerwise as lw
from layerwise import local
from layerwise.errors import BadInput

Make = Callable[[nn.Module, Any], Any]  # of a model and the parameters, None for all

MAKERS: dict[str, Make] = {
    "LocoProp": lambda m, p: lw.LocoProp(m, p, rows=3),
    "LocoProp S": lambda m, p: lw.LocoProp(m, p, preset="S"),
    "LocoProp, Adam, elastic": lambda m, p: lw.LocoProp(
        m, p, solver=local.LocalSteps(3, torch.optim.Adam), regularizer=local.Elastic(0.1)
    ),
    "AltMin": lambda m, p: lw.AltMin(m, p),
    "AltMin sgd": lambda m, p: lw.AltMin(m, p, weights="sgd", rows=3),
    "AltMin memory": lambda m, p: lw.AltMin(m, p, weights="memory"),
    "AltMin sweep": lambda m, p: lw.AltMin(m, p, codes="sweep", betas=[0.9, 0.99]),
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def step(model: nn.Module, opt: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(12, 4, generator=generator), torch.randint(3, (12,), generator=generator)
    x = x.to(next(model.parameters()).dtype)
    torch.manual_seed(seed)
    opt.step(lambda: F.cross_entropy(model(x), y))


def setting(**values: Any) -> Callable[[nn.Module, Any], Any]:
    """Sets what a group has of these."""

    def change(model: nn.Module, opt: Any) -> None:
        for group in opt.param_groups:
            group.update({key: value for key, value in values.items() if key in group})

    return change


def in_place(model: nn.Module, opt: Any) -> None:
    group = opt.param_groups[0]
    if isinstance(group.get("betas"), list):
        group["betas"][0] = 0.5


def scheduled(model: nn.Module, opt: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a scheduler's step before the optimizer's
        torch.optim.lr_scheduler.ExponentialLR(opt, 0.5).step()


def frozen(name: str) -> Callable[[nn.Module, Any], Any]:
    return lambda model, opt: model.get_parameter(name).requires_grad_(False)


def doubled(model: nn.Module, opt: Any) -> None:
    model.double()


def elsewhere(model: nn.Module, opt: Any) -> None:
    for p in model.parameters():
        p.data = p.data.clone()


def in_another_order(model: nn.Module, opt: Any) -> None:
    for p in model.parameters():
        if p.dim() == 2:
            p.data = p.data.t().contiguous().t()


CHANGES: dict[str, Callable[[nn.Module, Any], Any]] = {
    "lr": setting(lr=1e-3), "betas": setting(betas=(0.5, 0.9)), "betas in place": in_place,
    "momentum": setting(momentum=0.3), "steps": setting(steps=4), "rows": setting(rows=5),
    "coupling, gamma": setting(coupling=0.3, gamma=0.7), "l1": setting(l1=0.01), "a scheduler": scheduled,
    "a frozen bias": frozen("2.bias"), "a frozen weight": frozen("2.weight"), "another type": doubled,
    "other memory": elsewhere, "another order of elements": in_another_order,
}  # fmt: skip


def _refusal(model: nn.Module, opt: Any, seed: int) -> str | None:
    """Take a step; its refusal, as where the moments of a memory are of a bias that is frozen now."""
    try:
        step(model, opt, seed)
    except BadInput as error:
        return str(error)
    return None


def goes_on_as_fresh(
    make: Make, change: Callable[[nn.Module, Any], Any], before: int, model: nn.Module, opt: Any, params: Any = None
) -> None:
    """A change, then two steps, which are those of an optimizer that was loaded and changed, before its first."""
    fresh = net()
    other = make(fresh, None if params is None else params(fresh))
    fresh.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    change(model, opt)
    change(fresh, other)
    for seed in range(before, before + 2):
        assert _refusal(model, opt, seed) == _refusal(fresh, other, seed)
        assert same(dict(model.state_dict()), dict(fresh.state_dict()))
        assert same(opt.state_dict()["state"], other.state_dict()["state"])


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("change", CHANGES)
def test_after_a_change_the_step_is_that_of_a_fresh_optimizer(name: str, change: str) -> None:
    model = net()
    opt = MAKERS[name](model, None)
    for seed in range(3):
        step(model, opt, seed)
    goes_on_as_fresh(MAKERS[name], CHANGES[change], 3, model, opt)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("frozen_one", ["2.bias", "2.weight", "0.weight"])
def test_after_thawing_the_step_is_that_of_a_fresh_optimizer(name: str, frozen_one: str) -> None:
    model = net()
    opt = MAKERS[name](model, None)
    step(model, opt, 0)
    model.get_parameter(frozen_one).requires_grad_(False)
    _refusal(model, opt, 1)
    goes_on_as_fresh(MAKERS[name], lambda m, o: m.get_parameter(frozen_one).requires_grad_(True), 2, model, opt)


@pytest.mark.parametrize("name", MAKERS)
def test_after_a_group_is_added_the_step_is_that_of_a_fresh_optimizer(name: str) -> None:
    def some(model: nn.Module) -> list[Tensor]:
        return [p for at, p in model.named_parameters() if not at.startswith("2")]

    def added(model: nn.Module, opt: Any) -> None:
        opt.add_param_group({"params": list(model[2].parameters()), "lr": 2e-3})  # type: ignore[index]

    model = net()
    opt = MAKERS[name](model, some(model))
    for seed in range(2):
        step(model, opt, seed)
    goes_on_as_fresh(MAKERS[name], added, 2, model, opt, some)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("copied", [False, True], ids=["loaded", "copied"])
def test_after_a_load_or_a_copy_the_step_is_that_of_a_fresh_optimizer(name: str, copied: bool) -> None:
    """Of a state with other settings; each has its own plans from then on."""
    model = net()
    opt = MAKERS[name](model, None)
    for seed in range(3):
        step(model, opt, seed)
    loaded = copy.deepcopy(opt.state_dict())
    for group in loaded["param_groups"]:
        group["lr"] *= 0.5
    twin = copy.deepcopy((model, opt))
    if copied:
        twin[1].param_groups[0]["lr"] *= 0.5  # which the first one's settings do not share
        goes_on_as_fresh(MAKERS[name], lambda m, o: None, 3, *twin)
    else:
        step(model, opt, 3)
        opt.load_state_dict(loaded)
    goes_on_as_fresh(MAKERS[name], lambda m, o: None, 5, model, opt)
