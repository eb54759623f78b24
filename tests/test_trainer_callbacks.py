"""The callbacks that enter `opt.watch()`, by the hooks of their trainers; docs/trainers.md has them in real ones."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layerwise as lw
from layerwise.errors import BadInput

pytestmark = pytest.mark.usefixtures("float64")

LIBRARIES = {"lightning": "Callback", "pytorch_lightning": "Callback", "transformers": "TrainerCallback"}


@pytest.fixture
def callback(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A new callback of a library: over a stand-in, so that no other than it can be imported."""
    import layerwise.compat

    name = "transformers" if request.param == "transformers" else "lightning"
    module = f"layerwise.compat.{name}"
    for library, base in LIBRARIES.items():
        stand_in = types.ModuleType(library)
        setattr(stand_in, base, type(base, (), {}))
        monkeypatch.setitem(sys.modules, library, stand_in if library == request.param else None)
    monkeypatch.delitem(sys.modules, module, raising=False)
    yield importlib.import_module(module).StepCallback()
    sys.modules.pop(module)
    vars(layerwise.compat).pop(name)


by_lightning = pytest.mark.parametrize("callback", ["lightning", "pytorch_lightning"], indirect=True)
by_transformers = pytest.mark.parametrize("callback", ["transformers"], indirect=True)
every = pytest.mark.parametrize(
    "make",
    [lambda m: lw.optim.KFAC(m), lambda m: lw.optim.DiagNewton(m), lambda m: lw.LocoProp(m, lr=1e-3)],
    ids=["KFAC", "DiagNewton", "LocoProp"],
)
K = 2


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(4)]


def passed(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(net(x), y) / K
    loss.backward()
    return loss.detach()


def wanted(make: Callable[[nn.Module], Any]) -> nn.Module:
    net = model()
    opt, all_ = make(net), batches()
    for start in range(0, len(all_), K):
        opt.zero_grad()
        opt.step(lambda s=start: torch.stack([passed(net, *b) for b in all_[s : s + K]]).sum())
    return net


def same(one: nn.Module, two: nn.Module) -> None:
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
    assert not torch.overrides._get_current_function_mode_stack()


class Wrapper:
    """As Accelerate's: steps where gradients are complete, and returns nothing."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self, closure: Any = None) -> None:
        self.optimizer.step(closure)


@by_transformers
@every
def test_the_loop_of_transformers(callback: Any, make: Callable[[nn.Module], Any]) -> None:
    net = model()
    opt = Wrapper(make(net))
    callback.on_train_begin(None, None, None, optimizer=opt)
    for i, (x, y) in enumerate(batches()):
        if i % K == 0:
            callback.on_step_begin(None, None, None, optimizer=opt)
        passed(net, x, y)
        if (i + 1) % K == 0:
            callback.on_pre_optimizer_step(None, None, None, optimizer=opt)
            assert not torch.overrides._get_current_function_mode_stack()
            opt.step()
            net.zero_grad()
    same(net, wanted(make))


@by_lightning
@every
@pytest.mark.parametrize("closure", [True, False], ids=["automatic", "closure first"])
def test_the_loop_of_lightning(callback: Any, make: Callable[[nn.Module], Any], closure: bool) -> None:
    """Automatic optimization gives the step a closure; in 16-bit precision it runs that before."""
    net = model()
    opt = make(net)
    trainer = types.SimpleNamespace(optimizers=[opt])
    for i, (x, y) in enumerate(batches()):
        callback.on_train_batch_start(trainer, net, (x, y), i)

        def run(x: Tensor = x, y: Tensor = y, i: int = i) -> Tensor:
            loss = F.cross_entropy(net(x), y) / K
            if i % K == 0:
                opt.zero_grad()
            loss.backward()
            return loss.detach()

        if (i + 1) % K:
            run()
        elif closure:
            opt.step(run)
        else:
            run()
            opt.step()
        callback.on_train_batch_end(trainer, net, None, (x, y), i)
        assert not torch.overrides._get_current_function_mode_stack()
    callback.on_fit_end(trainer, net)
    same(net, wanted(make))


@by_lightning
def test_an_error_in_lightning_leaves_nothing(callback: Any) -> None:
    net = model()
    opt = lw.optim.KFAC(net)
    callback.on_train_batch_start(types.SimpleNamespace(optimizers=[opt]), net, None, 0)
    passed(net, *batches()[0])
    callback.on_exception(None, net, KeyError())
    assert not torch.overrides._get_current_function_mode_stack()
    with pytest.raises(BadInput, match="closure"):
        opt.step()


@by_transformers
def test_an_error_in_transformers_is_ended_by_close_or_the_next_training(callback: Any) -> None:
    net = model()
    opt = lw.LocoProp(net)
    for end in (callback.close, lambda: callback.on_train_begin(None, None, None)):
        callback.on_step_begin(None, None, None, optimizer=opt)
        passed(net, *batches()[0])
        end()
        assert not torch.overrides._get_current_function_mode_stack()
        with pytest.raises(BadInput, match="closure"):
            opt.step()


@by_transformers
def test_other_optimizers_are_refused(callback: Any) -> None:
    net = model()
    with pytest.raises(BadInput, match=r"none of the optimizers of lw\.optim"):
        callback.on_step_begin(None, None, None, optimizer=torch.optim.SGD(net.parameters(), 0.1))
    with pytest.raises(BadInput, match="AltMin runs the model again"):
        callback.on_step_begin(None, None, None, optimizer=lw.AltMin(net))
    assert not torch.overrides._get_current_function_mode_stack()


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_a_missing_library_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in LIBRARIES:
        monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"layerwise.compat.{name}", raising=False)
    with pytest.raises(ImportError, match=f"needs {name}.*pip install"):
        importlib.import_module(f"layerwise.compat.{name}")
