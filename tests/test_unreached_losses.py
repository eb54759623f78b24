"""A loss that depends on nothing of what an optimizer moves is refused, by one rule; one part of several may be."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from state_checks import same
from torch import Tensor, nn

import layerwise as lw
from layerwise.errors import BadInput

pytestmark = pytest.mark.usefixtures("float64")

Make = Callable[..., Any]
Loss = Callable[[nn.Module], Tensor]

RECORDED: dict[str, Make] = {
    "KFAC": lambda m, p=None: lw.optim.KFAC(m, p, kind="kflr", update_factors_every=2),
    "DiagNewton": lambda m, p=None: lw.optim.DiagNewton(m, p, update_every=2),
    "LocoProp": lambda m, p=None: lw.LocoProp(m, p),
    "LocoProp, into .grad": lambda m, p=None: lw.LocoProp(m, p, write="grad"),
}
OPTIMIZERS: dict[str, Make] = {
    **RECORDED,
    "KFAC, quadratic": lambda m, p=None: lw.optim.KFAC(m, p, step_size="quadratic"),
    "LocoProp, in turn": lambda m, p=None: lw.LocoProp(m, p, order="input_to_output"),
    "AltMin, jacobi": lambda m, p=None: lw.AltMin(m, p),
    "AltMin, sparse": lambda m, p=None: lw.AltMin(m, p, code_l1=0.1),
    "AltMin, sweep": lambda m, p=None: lw.AltMin(m, p, codes="sweep", repeats=2),
    "AltMin, Gauss-Newton": lambda m, p=None: lw.AltMin(m, p, weights="memory"),
    "Pipeline of one stage": lambda m, p=None: _Stage(m, p),
}
X, Y = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
OTHER = nn.Linear(4, 3).double()


class _Stage(lw.distributed.Pipeline):
    """A pipeline's only stage, stepped with a closure."""

    def step(self, closure: Any = None) -> Any:
        return super().step(X, lambda out: closure())


def whole(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(X), Y)


def detached(model: nn.Module) -> Tensor:
    return whole(model).detach()


def under_no_grad(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return whole(model)


def of_another_model(model: nn.Module) -> Tensor:
    return F.cross_entropy(OTHER(X), Y)


def of_another_models_weight(model: nn.Module) -> Tensor:
    return OTHER.weight.square().sum()


def backward_through_another_model(model: nn.Module) -> Tensor:
    loss = of_another_model(model)
    loss.backward()
    return loss.detach()


UNREACHED: list[Loss] = [
    detached, under_no_grad, of_another_model, of_another_models_weight, backward_through_another_model,
]  # fmt: skip


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def everything(model: nn.Module, opt: Any) -> Any:
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return copy.deepcopy((model.state_dict(), opt.state_dict(), grads))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_refused_in_a_closure(name: str) -> None:
    """Before the first step and after it, of two of which K-FAC measures its factors at one."""
    model = net()
    opt = OPTIMIZERS[name](model)
    for _ in range(2):
        before = everything(model, opt)
        for loss in UNREACHED:
            with pytest.raises(BadInput, match="depends on none of the parameters that this step moves"):
                opt.step(lambda loss=loss: loss(model))
            assert same(everything(model, opt), before), loss.__name__
        opt.step(lambda: whole(model))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_layers_that_do_not_move_are_not_reached(name: str) -> None:
    """A loss of the first layer alone, where the optimizer has only the last one."""
    model = net()
    opt = OPTIMIZERS[name](model, [(n, p) for n, p in model.named_parameters() if n.startswith("2.")])
    with pytest.raises(BadInput, match="depends on none of the parameters"):
        opt.step(lambda: F.cross_entropy(model[0](X), Y))
    opt.step(lambda: whole(model))


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("loss", [of_another_model, of_another_models_weight])
@pytest.mark.parametrize("name", RECORDED)
def test_it_is_refused_after_a_watch(name: str, loss: Loss, steps: int) -> None:
    model = net()
    opt = RECORDED[name](model)
    for _ in range(steps):
        opt.step(lambda: whole(model))
    opt.zero_grad()
    before = everything(model, opt)
    with pytest.raises(BadInput, match=r"depends on none of the parameters|0 parameters have a gradient"):
        with opt.watch():
            loss(model).backward()
        opt.step()
    assert same(everything(model, opt), before)


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("name", RECORDED)
def test_one_of_several_passes_may_reach_nothing(name: str, watched: bool) -> None:
    """As where a second model is trained in the same loop: the step is that of the passes that reach something."""
    model, alone = net(), net()
    opt, wanted = RECORDED[name](model), RECORDED[name](alone)

    def passes() -> Tensor:
        backward_through_another_model(model)
        loss = whole(model)
        loss.backward()
        return loss.detach() + backward_through_another_model(model)

    for _ in range(2):
        wanted.step(lambda: whole(alone))
        if watched:
            with opt.watch():
                passes()
            opt.step()
        else:
            opt.step(passes)
        opt.zero_grad()
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


class _Scaled(nn.Module):
    """A model without a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, -1.0, 0.5, 2.0]))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale)[:, :3]


def test_a_sweep_moves_parameters_without_a_layer() -> None:
    found = []
    for codes in ("jacobi", "sweep"):
        model = _Scaled()
        opt = lw.AltMin(model, codes=codes)
        for _ in range(3):
            opt.step(lambda model=model: whole(model))
        found.append(model.scale.detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)
    assert not torch.equal(found[0], _Scaled().scale)


def test_a_preconditioner_needs_gradients() -> None:
    model = net()
    pre = lw.optim.Preconditioner(model, update_factors_every=2)
    with pytest.raises(BadInput, match="depends on none of the parameters"), pre.watch():
        of_another_model(model).backward()
    with pre.watch():
        whole(model).backward()
    model.zero_grad()
    with pytest.raises(BadInput, match="there are none"):
        pre.step()
