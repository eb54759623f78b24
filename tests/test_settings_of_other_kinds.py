"""Settings that are no numbers, no mappings, no parameters of the optimizer's: each is named, with what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import layerwise as lw
from layerwise.errors import BadInput

OPTIMIZERS = (lw.optim.LocoProp, lw.optim.AltMin, lw.optim.KFAC, lw.optim.DiagNewton)
NUMBERS = {
    "lr": OPTIMIZERS, "gamma": OPTIMIZERS[:1], "decay": (OPTIMIZERS[0], OPTIMIZERS[3]), "eps": OPTIMIZERS[:2],
    "momentum": OPTIMIZERS, "coupling": OPTIMIZERS[1:2], "l1": OPTIMIZERS[1:2], "code_l1": OPTIMIZERS[1:2],
    "damping": (*OPTIMIZERS[2:], lw.optim.Preconditioner), "weight_decay": OPTIMIZERS[2:], "kl_clip": OPTIMIZERS[2:],
    "factor_decay": (OPTIMIZERS[2], lw.optim.Preconditioner),
}  # fmt: skip


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.mark.parametrize("value", ["1e-3", [1e-3]])
@pytest.mark.parametrize(
    "make, name",
    [pytest.param(make, name, id=f"{make.__name__}-{name}") for name, all_ in NUMBERS.items() for make in all_],
)
def test_numbers_read_as_strings(make: Any, name: str, value: Any) -> None:
    with pytest.raises(BadInput, match=name):
        make(_net(), **{name: value})


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_numbers_of_a_group_that_is_added(make: Any) -> None:
    net = _net()
    optimizer = make(net, params=net[0].parameters())
    with pytest.raises(BadInput, match=r"string.*float\(\.\.\.\)"):
        optimizer.add_param_group({"params": list(net[2].parameters()), "lr": "1e-3"})


@pytest.mark.parametrize("layers", ["0.*", [{"lr": 1.0}], {"0.*": 1e-3}])
@pytest.mark.parametrize("make", OPTIMIZERS[:2])
def test_layers_of_another_form(make: Any, layers: Any) -> None:
    with pytest.raises(BadInput, match="layers= maps patterns to settings"):
        make(_net(), layers=layers)


@pytest.mark.parametrize("make", OPTIMIZERS[:2])
def test_a_preset_that_is_no_name(make: Any) -> None:
    with pytest.raises(BadInput, match="knows the presets"):
        make(_net(), preset=["M"])


def _step(bias: bool = True, **settings: Any) -> None:
    torch.manual_seed(0)
    net, x, y = nn.Linear(3, 2, bias), torch.randn(5, 3), torch.randint(2, (5,))
    lw.optim.LocoProp(net, **settings).step(lambda: F.cross_entropy(net(x), y))


def test_an_optimizer_that_takes_no_bias() -> None:
    solver = lw.local.LocalSteps(2, torch.optim.Muon)
    with pytest.raises(BadInput, match=r"Muon does not take .*bias \(2,\).*layers="):
        _step(solver=solver)
    _step(solver=solver, bias=False)


@pytest.mark.parametrize("given", [None, 3.0, torch.zeros(2)])
def test_a_target_unlike_the_outputs(given: Any) -> None:
    with pytest.raises(BadInput, match=r"the target of weight is .* like z, \(5, 1, 2\)"):
        _step(target=lambda z, g, transfer: given)


def test_a_regularizer_that_is_a_word() -> None:
    with pytest.raises(BadInput, match="got 'l2'"):
        _step(regularizer="l2")


def test_solvers_that_need_other_terms() -> None:
    with pytest.raises(BadInput, match=r"eta=.*Proximal"):
        _step(solver=lw.local.ProximalSolve())
    with pytest.raises(BadInput, match=r"Whitening gives: leave that out"):
        _step(solver=lw.local.Memory(), regularizer=lw.local.Whitening())
