"""Parts of a watched step that are bad, or fail: the step is skipped whole, of the other parts, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import GradScaler

import layerwise as lw
from layerwise.errors import BadInput, NonFinite

pytestmark = pytest.mark.usefixtures("float64")

# Each measures at every step, but those that say so.
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "KFAC": lambda m, **k: lw.optim.KFAC(m, update_factors_every=1, **k),
    "KFAC, exact": lambda m, **k: lw.optim.KFAC(m, kind="kflr", update_factors_every=1, **k),
    "KFAC, measures nothing": lambda m, **k: lw.optim.KFAC(m, kind="kflr", update_factors_every=100, **k),
    "EKFAC": lambda m, **k: lw.optim.KFAC(m, kind="ekfac", update_factors_every=1, **k),
    "FOOF": lambda m, **k: lw.optim.KFAC(m, kind="foof", update_factors_every=1, **k),
    "DiagNewton": lambda m, **k: lw.optim.DiagNewton(m, update_every=1, **k),
    "DiagNewton, Hessian": lambda m, **k: lw.optim.DiagNewton(m, kind="diag-hessian", update_every=1, **k),
    "LocoProp": lambda m, **k: lw.LocoProp(m, **k),
}
every = pytest.mark.parametrize("name", OPTIMIZERS)
CURVATURE = [name for name in OPTIMIZERS if name != "LocoProp"]
KINDS: list[Any] = ["kfac", "kflr", "ekfac", "diag-ggn"]
WARM = 3


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))


def batch(step: int, n: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator)


def parts(step: int, count: int = 3) -> list[tuple[Tensor, Tensor]]:
    x, y = batch(step)
    return [(a.clone(), b.clone()) for a, b in zip(x.chunk(count), y.chunk(count), strict=True)]


def spoil(x: Tensor) -> None:
    """An infinite input, which tanh takes to 1: the loss is finite, and its gradient is not."""
    x[0, 1] = float("inf")


def passed(
    model: nn.Module, x: Tensor, y: Tensor, share: float = 1.0, scale: Callable[..., Tensor] = lambda t: t
) -> None:
    loss = F.cross_entropy(model(x), y) * share
    assert torch.isfinite(loss)
    scale(loss).backward()


def warm(model: nn.Module, opt: Any) -> None:
    """Take some steps, after which a step in another state would show."""
    for step in range(WARM):
        opt.step(lambda step=step: F.cross_entropy(model(batch(step)[0]), batch(step)[1]))


def flat(values: Any) -> list[Any]:
    if isinstance(values, dict):
        return [leaf for key in values for leaf in flat(values[key])]
    if isinstance(values, list | tuple):
        return [leaf for value in values for leaf in flat(value)]
    return [values]


def everything(model: nn.Module, opt: Any) -> list[Any]:
    """What a skipped step must leave, but its count; a step of a deferred verdict is counted among the steps, too."""
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    for state in (saved[1], saved[1].get("preconditioner", {})):
        state.pop("skipped", None)
        if opt._on_nonfinite == "defer":
            state.pop("steps", None)
    return flat(saved)


def equal(one: Sequence[Any], two: Sequence[Any]) -> bool:
    return len(one) == len(two) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(one, two, strict=True)
    )


# Bad parts --------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("contexts", [1, 3])
@pytest.mark.parametrize("bad", [0, 1, 2])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
def test_a_step_with_a_bad_part_is_skipped_whole(name: str, contexts: int, bad: int, scaled: bool) -> None:
    model = net()
    opt = OPTIMIZERS[name](model)
    warm(model, opt)
    scaler = GradScaler("cpu", init_scale=64.0, enabled=scaled)
    taken = parts(WARM)
    spoil(taken[bad][0])
    before = everything(model, opt)
    opt.zero_grad()
    with opt.watch() if contexts == 1 else nullcontext():
        for x, y in taken:
            with nullcontext() if contexts == 1 else opt.watch():
                passed(model, x, y, 1 / 3, scaler.scale)
    scaler.step(opt)
    if scaled:
        scaler.update()
        assert scaler.get_scale() == 32.0
    assert equal(everything(model, opt), before)
    assert opt.skipped == (not scaled)  # the scaler calls no step of an overflow

    opt.zero_grad()  # the next batch is a step of its own
    with opt.watch():
        passed(model, *batch(WARM))
    opt.step()
    wanted = net()
    other = OPTIMIZERS[name](wanted)
    warm(wanted, other)
    other.step(lambda: F.cross_entropy(wanted(batch(WARM)[0]), batch(WARM)[1]))
    assert equal(list(model.state_dict().values()), list(wanted.state_dict().values()))


@every
@pytest.mark.parametrize("on_nonfinite", ["skip", "defer", "raise"])
def test_a_bad_batch_in_a_context_is_skipped_or_named(name: str, on_nonfinite: str) -> None:
    model = net()
    opt = OPTIMIZERS[name](model, on_nonfinite=on_nonfinite)
    warm(model, opt)
    before = everything(model, opt)
    x, y = batch(WARM)
    spoil(x)
    opt.zero_grad()
    with opt.watch():
        passed(model, x, y)
    with pytest.raises(NonFinite, match=r"0\.weight|0\.bias") if on_nonfinite == "raise" else nullcontext():
        opt.step()
    assert equal(everything(model, opt), before)
    assert opt.skipped == (on_nonfinite != "raise")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_bad_part_in_front_of_another_optimizer_skips_the_step(kind: Any, bad: int) -> None:
    model = net()
    pre, outer = lw.optim.Preconditioner(model, kind), torch.optim.SGD(model.parameters(), lr=0.1)
    taken = parts(0)
    spoil(taken[bad][0])
    before = copy.deepcopy(model.state_dict())
    for x, y in taken:
        with pre.watch():
            passed(model, x, y, 1 / 3)
    assert pre.step() is False and pre.skipped == 1
    outer.step()
    assert equal(flat(model.state_dict()), flat(before))


@pytest.mark.parametrize("name", CURVATURE)
def test_a_bad_part_whose_gradients_are_dropped_by_hand_is_forgotten(name: str) -> None:
    """As in a loop that looks at its gradients, and leaves a batch out."""
    model, wanted = net(), net()
    opt, other = OPTIMIZERS[name](model), OPTIMIZERS[name](wanted)
    warm(model, opt)
    warm(wanted, other)
    x, y = batch(100)
    spoil(x)
    with opt.watch():
        passed(model, x, y)
    model.zero_grad()
    with opt.watch():
        passed(model, *batch(WARM))
    opt.step()
    other.step(lambda: F.cross_entropy(wanted(batch(WARM)[0]), batch(WARM)[1]))
    assert opt.skipped == 0
    assert equal(flat(model.state_dict()), flat(wanted.state_dict()))


@pytest.mark.parametrize("name", CURVATURE)
def test_a_closure_that_returns_a_loss_writes_no_grad_for_a_bad_batch(name: str) -> None:
    model = net()
    opt = OPTIMIZERS[name](model)
    warm(model, opt)
    x, y = batch(WARM)
    spoil(x)
    opt.step(lambda: F.cross_entropy(model(x), y))
    assert opt.skipped == 1 and all(p.grad is None for p in model.parameters())


# Parts that fail --------------------------------------------------------------------------------------------------


class _Failed(Exception):
    """What a part raises."""


class _InFront:
    """A `Preconditioner` with the optimizer behind it, as one optimizer."""

    def __init__(self, model: nn.Module, kind: str) -> None:
        self.pre, self.outer = lw.optim.Preconditioner(model, kind), torch.optim.SGD(model.parameters(), lr=0.1)  # type: ignore[arg-type]
        self.watch, self.zero_grad, self.state_dict = self.pre.watch, self.outer.zero_grad, self.pre.state_dict

    def step(self) -> None:
        self.pre.step()
        self.outer.step()


FAILING: dict[str, Callable[[nn.Module], Any]] = {  # without draws, of which a failed pass takes some
    "KFAC, exact": OPTIMIZERS["KFAC, exact"],
    "KFAC, measures nothing": OPTIMIZERS["KFAC, measures nothing"],
    "FOOF": OPTIMIZERS["FOOF"],
    "DiagNewton": lambda m: lw.optim.DiagNewton(m, draws=None, update_every=1),
    "DiagNewton, Hessian": lambda m: lw.optim.DiagNewton(m, kind="diag-hessian", draws=None, update_every=1),
    "LocoProp": OPTIMIZERS["LocoProp"],
    "LocoProp, S": lambda m: lw.LocoProp(m, preset="S"),
    "Preconditioner": lambda m: _InFront(m, "kflr"),
    "Preconditioner, diagonal": lambda m: _InFront(m, "diag-ggn"),
}


def failed(model: nn.Module, x: Tensor, y: Tensor, when: str) -> None:
    """A part that raises before its backward pass, in it (when the later layers have their gradients), or after it.

    Or after one that reaches no parameter.
    """

    def raises(g: Tensor) -> None:
        raise _Failed

    hidden = model[:2](x)  # type: ignore[index]
    if when in ("in it", "caught"):
        hidden.register_hook(raises)
    loss = F.cross_entropy(model[2:](hidden), y)  # type: ignore[index]
    if when == "elsewhere":
        x.clone().requires_grad_().sum().backward()
    if when in ("before it", "elsewhere"):
        raise _Failed
    if when == "caught":
        with pytest.raises(_Failed):
            loss.backward()
        return
    loss.backward()
    raise _Failed


def parts_taken(
    model: nn.Module, opt: Any, taken: Sequence[tuple[Tensor, Tensor]], fails: int | None, when: str
) -> None:
    """Each part in a context of its own. fails: the part that does."""
    for at, (x, y) in enumerate(taken):
        with suppress(_Failed, *([BadInput] if at == fails else [])), opt.watch():
            if at == fails:
                failed(model, x, y, when)
            else:
                passed(model, x, y)


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", FAILING)
@pytest.mark.parametrize("when", ["before it", "elsewhere", "in it", "caught", "after it"])
@pytest.mark.parametrize("fails", [0, 1, 2])
def test_a_part_that_fails_is_left_out_or_the_step_is_refused(name: str, when: str, fails: int) -> None:
    """By what `.grad` holds: where it is the sum of the other parts, the step is theirs; else there is none."""
    model, wanted = net(), net()
    opt, other = FAILING[name](model), FAILING[name](wanted)
    taken = parts(0)
    parts_taken(wanted, other, [part for at, part in enumerate(taken) if at != fails], None, "")
    parts_taken(model, opt, taken, fails, when)
    before = copy.deepcopy((model.state_dict(), opt.state_dict()))
    if torch.equal(gradient(model), gradient(wanted)):
        assert opt.step() == other.step()  # the losses
        assert equal(flat(model.state_dict()), flat(wanted.state_dict()))
        assert not equal(flat(model.state_dict()), flat(before[0]))
        assert when != "after it"
        return
    assert when not in ("before it", "elsewhere")
    for _ in range(2):
        with pytest.raises(BadInput, match=r"zero_grad\(\)"):
            opt.step()
    assert equal(flat((model.state_dict(), opt.state_dict())), flat(before))


@pytest.mark.parametrize("name", FAILING)
@pytest.mark.parametrize("when", ["before it", "in it", "caught", "after it"])
@pytest.mark.parametrize("zero", ["optimizer", "model", "in the next context"])
def test_after_zero_grad_the_step_is_that_of_the_whole_batch(name: str, when: str, zero: str) -> None:
    model, wanted = net(), net()
    opt, other = FAILING[name](model), FAILING[name](wanted)
    if zero == "in the next context" and isinstance(opt, _InFront):
        return  # it is not told
    taken = parts(0)
    parts_taken(wanted, other, taken, None, "")
    other.step()
    parts_taken(model, opt, taken, 1, when)
    if zero == "in the next context":
        with opt.watch():
            opt.zero_grad()
            passed(model, *taken[0])
        parts_taken(model, opt, taken[1:], None, "")
    else:
        (opt if zero == "optimizer" else model).zero_grad()
        parts_taken(model, opt, taken, None, "")
    opt.step()
    assert equal(flat(model.state_dict()), flat(wanted.state_dict()))


@pytest.mark.parametrize("name", [name for name in FAILING if "Preconditioner" not in name])
def test_a_closure_that_catches_what_a_backward_pass_raises_is_refused(name: str) -> None:
    """Unless `.grad` is as it was before that pass."""
    model, wanted = net(), net()
    opt, other = FAILING[name](model), FAILING[name](wanted)
    first, second = parts(0, 2)

    def closure(net: nn.Module, fails: bool) -> Tensor:
        net.zero_grad()
        loss = F.cross_entropy(net(first[0]), first[1])
        loss.backward()
        if fails:
            failed(net, *second, "caught")
        return loss.detach()

    whole = False
    before = copy.deepcopy(model.state_dict())
    try:
        opt.step(lambda: closure(model, True))
        whole = True
    except BadInput as error:
        assert "zero_grad()" in str(error)
    closure(wanted, False)
    assert whole == torch.equal(gradient(model), gradient(wanted))
    if whole:
        other.step(lambda: closure(wanted, False))
    assert equal(flat(model.state_dict()), flat(wanted.state_dict() if whole else before))
