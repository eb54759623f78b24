"""Steps whose verdict stays on the device, `on_nonfinite="defer"`, shown on the CPU, where nothing else differs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layerwise as lw
from layerwise.errors import BadInput
from layerwise.tensors import Verdict, write_where

X, Y = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
# K-FAC and Newton wait for what they measure at steps 0, 1, 2, 4, 8, ... of a period; not at the three from 5 on.
PERIODS: dict[str, int] = {"update_factors_every": 100, "update_inverses_every": 100}
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "KFAC": lambda model, **words: lw.optim.KFAC(model, **PERIODS, **words),
    "KFAC of two groups": lambda model, **words: lw.optim.KFAC(
        model, [{"params": [p], "lr": 0.01 * n, "damping": 0.01 * n} for n, p in enumerate(model.parameters(), 1)],
        weight_decay=1e-3, **PERIODS, **words,
    ),
    "DiagNewton": lambda model, **words: lw.optim.DiagNewton(model, momentum=0.0, update_every=100, **words),
    "LocoProp": lw.LocoProp,
    "AltMin": lw.AltMin,
    "AltMin by SGD": lambda model, **words: lw.AltMin(model, weights="sgd", **words),
    "AltMin sweep": lambda model, **words: lw.AltMin(model, codes="sweep", **words),
}  # fmt: skip


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)
    return nn.Sequential(*layers).to(dtype)


def stepped(make: Callable[..., Any], on_nonfinite: str, inputs: list[Tensor]) -> tuple[nn.Module, Any]:
    """A net with its optimizer, after a step for each input."""
    model = net()
    optimizer = make(model, on_nonfinite=on_nonfinite)
    for x in inputs:
        optimizer.step(lambda x=x: F.cross_entropy(model(x), Y))
    return model, optimizer


def state_of(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Parameters, buffers, and the tensors of the optimizer's state, by name."""
    names = {id(p): name for name, p in model.named_parameters()}
    state = {f"{names[id(p)]} {key}": t for p, own in optimizer.state.items() for key, t in own.items()}
    return {n: t.detach().clone() for n, t in {**model.state_dict(), **state}.items() if isinstance(t, Tensor)}


GOOD = [X + 0.01 * n for n in range(6)]


def spoiled(value: float) -> Tensor:
    x = X.clone()
    x[0, 0] = value
    return x


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_good_steps_move_as_those_that_are_judged_at_once(name: str) -> None:
    one, two = (state_of(*stepped(OPTIMIZERS[name], kind, GOOD)) for kind in ("skip", "defer"))
    assert one.keys() == two.keys()
    for key, t in one.items():
        assert torch.allclose(two[key], t, rtol=1e-12, atol=1e-14), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_verdict_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a good step, and of a bad one with a finite loss (the CPU knows that of another anyhow)."""

    def read(self: Verdict) -> None:
        raise AssertionError("a verdict is read")

    model, optimizer = stepped(OPTIMIZERS[name], "defer", GOOD[:5])
    monkeypatch.setattr(Verdict, "read", read)
    for x in (GOOD[5], spoiled(1e200)):
        optimizer.step(lambda x=x: F.cross_entropy(model(x), Y))
    monkeypatch.undo()
    assert optimizer.skipped == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_bad_step_changes_nothing(name: str, value: float) -> None:
    """No parameter, buffer or state, to the bit; it counts, and the next good step is as if it had not been."""
    model, optimizer = stepped(OPTIMIZERS[name], "defer", GOOD[:5])
    before = state_of(model, optimizer)
    optimizer.step(lambda: F.cross_entropy(model(spoiled(value)), Y))
    after = state_of(model, optimizer)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert optimizer.why_skipped() is not None
    assert optimizer.skipped == optimizer.state_dict()["skipped"] == 1
    optimizer.step(lambda: F.cross_entropy(model(GOOD[5]), Y))
    assert optimizer.skipped == 1 and optimizer.why_skipped() is None
    want = state_of(*stepped(OPTIMIZERS[name], "skip", GOOD))
    for key, t in state_of(model, optimizer).items():
        assert torch.allclose(t, want[key], rtol=1e-12, atol=1e-14), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_bad_first_step(name: str) -> None:
    """Also where there is no state yet to go back to."""
    model, optimizer = stepped(OPTIMIZERS[name], "defer", [])
    before = {name: t.clone() for name, t in model.state_dict().items()}
    optimizer.step(lambda: F.cross_entropy(model(spoiled(float("nan"))), Y))
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert optimizer.skipped == 1


def test_a_gradient_that_overflows_in_a_product_alone() -> None:
    """Finite, and of two groups: the bound |g|²/λ of one is beyond the type's range."""
    model, optimizer = stepped(OPTIMIZERS["KFAC of two groups"], "defer", GOOD[:5])
    before = state_of(model, optimizer)
    optimizer.step(lambda: 1e160 * F.cross_entropy(model(X), Y))
    assert "gradient" in optimizer.why_skipped() and optimizer.skipped == 1
    assert all(torch.equal(before[key], t) for key, t in state_of(model, optimizer).items() if "tracked" not in key)


def test_a_running_average_on_the_host_is_judged_at_once() -> None:
    regularizer = lw.local.Elastic(1.0)
    make = partial(lw.LocoProp, regularizer=regularizer)
    inputs = [*GOOD[:2], spoiled(1e200), GOOD[3]]
    states = [state_of(*stepped(make, kind, inputs)) for kind in ("skip", "defer")]
    assert all(torch.equal(states[1][key], t) for key, t in states[0].items())


def test_why_a_step_was_skipped_where_it_is_judged_at_once() -> None:
    model, optimizer = stepped(lw.LocoProp, "skip", [spoiled(float("nan"))])
    assert "input of 0" in optimizer.why_skipped()
    optimizer.step(lambda: F.cross_entropy(model(X), Y))
    assert optimizer.why_skipped() is None


def test_copies_keep_what_is_left() -> None:
    _, optimizer = stepped(lw.LocoProp, "defer", [*GOOD[:2], spoiled(float("nan"))])
    assert copy.deepcopy(optimizer).skipped == pickle.loads(pickle.dumps(optimizer)).skipped == optimizer.skipped == 1


def test_refusals() -> None:
    model = net()
    with pytest.raises(BadInput, match="another optimizer"):
        lw.LocoProp(model, write="grad", on_nonfinite="defer")
    with (
        pytest.raises(BadInput, match="another optimizer"),
        lw.optim.Preconditioner(model, on_nonfinite="defer").watch(),
    ):
        pass
    for make in (lw.LocoProp, lw.optim.KFAC):
        with pytest.raises(BadInput, match="skip, raise, defer"):
            make(model, on_nonfinite="later")


def test_a_masked_copy() -> None:
    """Bits of either side, whatever they hold, for several types at once."""
    nan = float("nan")
    for flag in (True, False):
        old = [torch.tensor([1.0, nan]), torch.tensor(3), torch.randn(2, 3, dtype=torch.float64).mT]
        new = [torch.tensor([nan, 2.0]), torch.tensor(4), torch.randn(3, 2, dtype=torch.float64)]
        want = [t.clone() for t in (new if flag else old)]
        write_where(torch.tensor(flag), old, new)
        assert all(torch.equal(t.nan_to_num(7), w.nan_to_num(7)) for t, w in zip(old, want, strict=True))
