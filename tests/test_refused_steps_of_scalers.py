"""Steps under `torch.amp.GradScaler` that are skipped, taken by hand, or follow an `unscale_` after the passes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import GradScaler

import layerwise as lw
from layerwise.errors import BadInput

Order = Callable[[Any, Any, GradScaler], None]
SCALE = 2.0**9
X, Y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


def net(activation: type[nn.Module] = nn.Tanh) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, 3))


def scaler(enabled: bool = True) -> GradScaler:
    return GradScaler("cpu", init_scale=SCALE, enabled=enabled)


# In front of another optimizer: what runs after the context, up to the scaler's own step ------------------------------


def step_first(ours: Any, outer: Any, own: GradScaler) -> None:
    ours.step()


def unscale_first(ours: Any, outer: Any, own: GradScaler) -> None:
    own.unscale_(outer)
    ours.step()


def unscale_after(ours: Any, outer: Any, own: GradScaler) -> None:
    ours.step()
    own.unscale_(outer)


ORDERS = pytest.mark.parametrize("order", [step_first, unscale_first, unscale_after])


def in_front(
    model: nn.Module, ours: Any, outer: Any, own: GradScaler, order: Order, loss: Callable[[], Tensor]
) -> None:
    outer.zero_grad()
    with ours.watch():
        own.scale(loss()).backward()
    order(ours, outer, own)
    own.step(outer)
    own.update()


OUTER = {
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "Adam": lambda m: torch.optim.Adam(m.parameters()),
}


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("before", [0, 3])
@ORDERS
def test_a_skipped_step_of_a_preconditioner_moves_nothing_and_training_goes_on(
    order: Order, before: int, outer: str
) -> None:
    """Gradients are finite, and a factor overflows, or (where none is due) the product with the gradient."""
    model = net(nn.ReLU)
    sgd, own = OUTER[outer](model), scaler()
    pre = lw.optim.Preconditioner(model, "foof", update_factors_every=4)

    def good() -> Tensor:
        return F.cross_entropy(model(X), Y)

    def bad() -> Tensor:
        return F.cross_entropy(model(X * 1e20), Y)

    for _ in range(before):
        in_front(model, pre, sgd, own, order, good)
    held = copy.deepcopy(model.state_dict())
    in_front(model, pre, sgd, own, order, bad)
    assert pre.skipped == 1
    assert all(torch.equal(p, held[name]) for name, p in model.state_dict().items())
    in_front(model, pre, sgd, own, order, good)
    assert not any(torch.equal(p, held[name]) for name, p in model.state_dict().items())
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("inside", [True, False])
@ORDERS
def test_local_learning_into_grad_is_that_without_a_scaler(order: Order, inside: bool) -> None:
    def run(own: GradScaler, order: Order) -> Tensor:
        model = net().double()
        outer, opt = torch.optim.SGD(model.parameters(), lr=1.0), lw.LocoProp(model, write="grad")
        for _ in range(3):
            outer.zero_grad()
            with opt.watch():
                own.scale(F.cross_entropy(model(X.double()), Y)).backward()
                if inside:
                    order(opt, outer, own)
            if not inside:
                order(opt, outer, own)
            own.step(outer)
            own.update()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    torch.testing.assert_close(run(scaler(), order), run(scaler(False), step_first), rtol=1e-12, atol=1e-14)


@ORDERS
def test_a_skipped_step_of_local_learning_into_grad_moves_nothing(order: Order) -> None:
    model = net(nn.ReLU)
    outer, own = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9), scaler()
    opt = lw.LocoProp(model, write="grad")
    in_front(model, opt, outer, own, order, lambda: F.cross_entropy(model(X), Y))
    held = copy.deepcopy(model.state_dict())
    in_front(model, opt, outer, own, order, lambda: F.cross_entropy(model(X * 1e30), Y))
    assert opt.skipped == 1
    assert all(torch.equal(p, held[name]) for name, p in model.state_dict().items())
    in_front(model, opt, outer, own, order, lambda: F.cross_entropy(model(X), Y))
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_skipped_closure_without_a_backward_pass_is_found_by_the_scaler() -> None:
    model = net(nn.ReLU)
    outer, own = torch.optim.SGD(model.parameters(), lr=1.0), scaler()
    opt = lw.LocoProp(model, write="grad")
    opt.step(lambda: own.scale(F.cross_entropy(model(X * 1e30), Y)))
    own.step(outer)
    own.update()
    assert opt.skipped == 1 and own.get_scale() < SCALE


@pytest.mark.parametrize("most", [1e-4, 1e4])
def test_clipping_before_local_learning_into_grad_is_refused(most: float) -> None:
    """It changes nothing of the movement, and hides whether the scaler's factor is still there."""
    model = net()
    outer, own = torch.optim.SGD(model.parameters(), lr=1.0), scaler()
    opt = lw.LocoProp(model, write="grad")
    with opt.watch():
        own.scale(F.cross_entropy(model(X), Y)).backward()
    own.unscale_(outer)
    held = copy.deepcopy(model.state_dict())
    nn.utils.clip_grad_norm_(model.parameters(), most)
    if most > 1:  # nothing was clipped
        opt.step()
        return
    with pytest.raises(BadInput, match=r"clip after opt.step\(\)"):
        opt.step()
    assert all(torch.equal(p, held[name]) for name, p in model.state_dict().items())


def test_clipping_before_local_learning_into_grad_has_no_effect_without_a_scaler() -> None:
    found = []
    for clipped in (False, True):
        model = net()
        opt = lw.LocoProp(model, write="grad")
        with opt.watch():
            F.cross_entropy(model(X), Y).backward()
        if clipped:
            nn.utils.clip_grad_norm_(model.parameters(), 1e-4)
        opt.step()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize("first", ["nothing", "unscale", "unscale and clip"])
@pytest.mark.parametrize(
    "make", [lambda m: lw.optim.KFAC(m, kind="kflr", lr=0.1), lambda m: lw.optim.DiagNewton(m, lr=0.1)]
)
def test_a_step_that_the_scaler_does_not_call(make: Callable[[nn.Module], Any], first: str) -> None:
    """`opt.step()` where `scaler.step(opt)` was meant moves as far."""

    def run(own: GradScaler) -> Tensor:
        model = net().double()
        opt = make(model)
        for _ in range(3):
            opt.zero_grad()
            with opt.watch():
                own.scale(F.cross_entropy(model(X.double()), Y)).backward()
            if first != "nothing":
                own.unscale_(opt)
            if first == "unscale and clip":
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            opt.step()
            own.update() if first != "nothing" and own.is_enabled() else None
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    torch.testing.assert_close(run(scaler()), run(scaler(False)), rtol=1e-12, atol=1e-14)
