"""What runs on the pretend device: the same values as on the CPU, on the parameters' device, and what it costs.

Run by `test_devices.py` in a process of its own, since a registered device changes the whole process.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import quantity_table
import torch
import torch.nn.functional as F
from pretend_device import DEVICE, counted
from quantity_checks import Truth
from quantity_table import COLUMNS, Column
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo import Case, Functional, Instance, case, cases

import layerwise as lw
from layerwise import errors

torch.__future__.set_swap_module_params_on_conversion(True)  # or tied parameters would come apart

FEW = ("mlp_tanh", "conv2d", "tied_embedding", "functional_conv", "residual")
APART = {  # models that the pretend device cannot run, and why
    "position_embedding": "its forward makes a tensor on the CPU",
    "constant_start": "its forward makes a tensor on the CPU",
    "char_gpt": "its forward makes a tensor on the CPU",
    "softmax_weights": "torch's second derivative ends the process",
}
SECOND = {"embedding_bag", "embedding_bag_padded"}  # torch has second derivatives of these on the CPU alone


def on_device(data: Any) -> Any:
    """Tensors anywhere in the data, moved."""
    return pytree.tree_map(lambda x: x.to(DEVICE) if isinstance(x, Tensor) else x, data)


def moved(instance: Instance) -> Instance:
    """The instance with its model and batch on the device."""
    if isinstance(instance.model, Functional):
        model: Any = Functional({}, instance.model.forward)
        model.params = {n: p.detach().to(DEVICE).requires_grad_() for n, p in instance.model.params.items()}
    else:
        model = instance.model.to(DEVICE)
    return replace(instance, model=model, x=on_device(instance.x), y=on_device(instance.y))


def tensors_of(result: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in a result, but where a parameter's elements lie, which is the same for all devices."""
    if isinstance(result, Tensor):
        yield path, result
    elif isinstance(result, list | tuple):
        for i, x in enumerate(result):
            yield from tensors_of(x, f"{path}[{i}]")
    elif hasattr(result, "items"):
        for name, x in result.items():
            yield from tensors_of(x, f"{path}.{name}")
    elif hasattr(result, "__dict__"):
        for name, x in vars(result).items():
            if not name.startswith("_") and name != "layout":
                yield from tensors_of(x, f"{path}.{name}")


def assert_same(on_cpu: Any, found: Any, rel: float = 1e-12) -> None:
    """Equal up to rounding, and every tensor on the device."""
    one, two = list(tensors_of(on_cpu)), list(tensors_of(found))
    assert one
    assert [path for path, _ in one] == [path for path, _ in two]
    for (path, want), (_, got) in zip(one, two, strict=True):
        assert got.device == DEVICE, path
        torch.testing.assert_close(got.cpu(), want, rtol=0.0, atol=rel * float(want.abs().max() if want.numel() else 0))


def ask(column: Column, truth: Truth, instance: Instance, device: Any) -> Any:
    """What the quantity gives; of an operator, its product with ones."""
    quantity_table._generator = lambda: torch.Generator(device).manual_seed(7)
    torch.manual_seed(3)
    if column.build is not None:
        ones = {name: torch.ones_like(p) for name, p in instance.params.items()}
        return column.build(instance.subject, instance.loss) @ ones
    with lw.observe(instance.subject, quantity := column.ask(truth), samples=truth.samples) as seen:
        instance.loss().backward()
    return seen[quantity]


def compare(one: Case) -> int:
    """Compare every quantity of a model; how many were compared."""
    truth, compared = Truth(one), 0
    there = moved(one.make(seed=0))
    for name, column in COLUMNS.items():
        if column.undefined(truth) or (column.second and one.problem.name in SECOND):
            continue
        try:
            want = ask(column, truth, truth.fresh(), "cpu")
        except errors.LayerwiseError:
            continue  # refused on the CPU; on this device torch ends the process at an error in a backward pass
        for p in there.params.values():
            p.grad = None
        try:
            assert_same(want, ask(column, truth, there, DEVICE))
        except Exception as error:
            raise AssertionError(f"{name}: {error}") from error
        compared += 1
    return compared


# The device itself ------------------------------------------------------------------------------


def test_the_device_is_torchs_accelerator() -> None:
    assert torch.accelerator.current_accelerator() == torch.device("pretend")
    assert torch.get_device_module(DEVICE).device_count() == 1


def test_it_raises_where_devices_meet() -> None:
    x, y = torch.randn(3, 3, device=DEVICE), torch.randn(3, 3)
    for mix in (lambda: x + y, lambda: x @ y, lambda: torch.cat([x, y]), lambda: y.add_(x), lambda: F.linear(x, y)):
        with pytest.raises(RuntimeError, match="same device"):
            mix()
    assert (x + torch.tensor(2.0)).device == DEVICE  # a number
    for draw in (lambda g: torch.randn(3, device=DEVICE, generator=g), lambda g: x.normal_(generator=g)):
        with pytest.raises(RuntimeError, match="for generator"):
            draw(torch.Generator())


def test_it_draws_from_a_generator_of_its_own() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    x = torch.randn(4, device=DEVICE)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(x.cpu(), torch.randn(4))


def test_it_counts() -> None:
    x = torch.randn(3, 4, device=DEVICE)
    with counted() as count:
        y = (x.t() @ x).relu()
    assert (count.launches, count.synchronisations, count.uploads) == (2, 0, 0)
    for wait in (lambda: y.sum().item(), lambda: y.cpu(), lambda: y.tolist(), lambda: bool(y.any()), y.nonzero,
                 lambda: y[y > 0], lambda: torch.equal(y, y)):  # fmt: skip
        with counted() as count:
            wait()
        assert count.synchronisations == 1
    with counted() as count:
        torch.ones(3).to(DEVICE)
    assert count.uploads == 1


# The same values --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEW)
def test_the_zoo(name: str) -> None:
    assert compare(case(name)) >= 10


@pytest.mark.slow
@pytest.mark.parametrize("one", cases(), ids=lambda one: one.id)
def test_the_whole_zoo(one: Case) -> None:
    if one.problem.name in APART:
        pytest.skip(APART[one.problem.name])
    compare(one)


X, Y = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)
    return nn.Sequential(*layers).double()


class Run:
    """A net with its batch on a device, and a loss."""

    def __init__(self, device: Any) -> None:
        self.model, self.x, self.y = net().to(device), X.to(device), Y.to(device)
        torch.manual_seed(1)

    def loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.x), self.y)


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "KFAC": lw.optim.KFAC,
    "DiagNewton": lw.optim.DiagNewton,
    "LocoProp": lw.LocoProp,
    "AltMin": lw.AltMin,
    "AltMin memory": lambda model: lw.AltMin(model, weights="memory"),
    "AltMin sweep": lambda model: lw.AltMin(model, codes="sweep"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_and_their_checkpoints(name: str) -> None:
    """Three steps, and a fourth after a save and a load, move the parameters as on the CPU."""
    states = []
    for device in ("cpu", DEVICE):
        run = Run(device)
        optimizer = OPTIMIZERS[name](run.model)
        for _ in range(3):
            optimizer.step(run.loss)
        saved = io.BytesIO()
        torch.save({"model": run.model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
        saved.seek(0)
        loaded = torch.load(saved)
        run = Run(device)
        run.model.load_state_dict(loaded["model"])
        optimizer = OPTIMIZERS[name](run.model)
        optimizer.load_state_dict(loaded["optimizer"])
        optimizer.step(run.loss)
        states.append(run.model.state_dict())
    assert_same(*states)


def test_a_preconditioner_in_front_of_an_optimizer_of_torch() -> None:
    states = []
    for device in ("cpu", DEVICE):
        run = Run(device)
        preconditioner, sgd = lw.optim.Preconditioner(run.model), torch.optim.SGD(run.model.parameters(), 0.1)
        for _ in range(2):
            sgd.zero_grad()
            with preconditioner.watch():
                run.loss().backward()
            preconditioner.step()
            sgd.step()
        states.append(run.model.state_dict())
    assert_same(*states)


def test_inverses() -> None:
    found = []
    for device in ("cpu", DEVICE):
        run = Run(device)
        with lw.observe(run.model, lw.KFLR(), lw.DiagGGN()) as seen:
            run.loss().backward()
        found.append([seen.kflr.inverse(damping=0.1) @ seen.grad, seen.diag_ggn])
    assert_same(*found)


def test_accumulate() -> None:
    found = []
    for device in ("cpu", DEVICE):
        run = Run(device)
        batches = [(run.x[:5], run.y[:5]), (run.x[5:], run.y[5:])]
        seen = lw.accumulate(run.model, F.cross_entropy, batches, lw.Variance(), lw.EKFAC(1))
        found.append([seen.variance, seen.ekfac, seen.grad])
    assert_same(*found)


def test_the_monitor() -> None:
    histories = []
    for device in ("cpu", DEVICE):
        run, history = Run(device), []
        monitor = lw.monitor.Monitor(run.model, lambda step, record, into=history: into.append(record), every=1)
        sgd = torch.optim.SGD(run.model.parameters(), 0.1)
        for _ in range(2):
            sgd.zero_grad()
            with monitor.step():
                run.loss().backward()
            sgd.step()
        histories.append(history)
    assert histories[0]
    for one, two in zip(*histories, strict=True):
        assert two == pytest.approx(one, rel=1e-10, nan_ok=True)
