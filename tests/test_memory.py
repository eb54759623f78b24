"""Memory: large pages change no value; a thousand steps leave nothing behind."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import layerwise as lw
from layerwise import tensors as memory
from layerwise.rows import contract
from layerwise.rows.base import Rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("elements", [0, 3, 2**21 + 7])
def test_shape_type_and_use(dtype: torch.dtype, elements: int) -> None:
    tensor = memory.empty((elements,), torch.zeros((), dtype=dtype))
    tensor.fill_(2)
    assert tensor.dtype == dtype and tensor.shape == (elements,) and tensor.is_contiguous()
    assert float(tensor.sum()) == 2.0 * elements


def test_without_the_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_madvise", lambda: None)
    assert memory.empty((2**22,), torch.zeros(())).fill_(1).sum() == 2**22


def test_large_per_sample_gradients_are_those_of_small_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(40, 1, 1, 300, generator=generator)
    g = torch.randn(1, 40, 1, 1, 400, generator=generator)
    large = contract.per_sample(Rows(a, g, 300))
    assert large.numel() * 4 >= memory._LARGE
    for n in range(40):
        assert torch.equal(large[0, n], contract.per_sample(Rows(a[n : n + 1], g[:, n : n + 1], 300))[0, 0])


# Steps ----------------------------------------------------------------------------------------------


def _resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _live() -> int:
    """Tensors that Python holds, those in reference cycles too: nothing is collected first."""
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


def _hooks(model: nn.Module) -> int:
    """Hooks on modules and parameters. (On nodes of the graph they would show as calls; see test_observe.)"""
    modules = sum(len(v) for m in model.modules() for k, v in vars(m).items() if "hooks" in k)
    return modules + sum(len(p._backward_hooks or ()) for p in model.parameters())


def _mlp() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    return model, model


def _odd() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """A weight norm, attention inside a checkpoint, constants and a derived weight."""
    first = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    model = nn.ModuleList([first, nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)])

    def run(x: Tensor) -> Tensor:
        h = first(x).unsqueeze(1) + torch.ones(len(x), 2, 1)
        h = checkpoint(lambda h: model[1](h, h, h)[0], h, use_reentrant=False)
        return F.linear(h.mean(1), model[2].weight * 2, model[2].bias)

    return model, run


@pytest.mark.usefixtures("one_arena")
@pytest.mark.parametrize(
    ("make", "steps", "error"),
    [(_mlp, 150, None), pytest.param(_mlp, 1000, None, marks=pytest.mark.slow), (_odd, 40, None)]
    + [(make, 40, error) for make in (_mlp, _odd) for error in ("body", "backward", "refused")],
)
def test_steps_leave_nothing(make: Callable, steps: int, error: str | None) -> None:
    """Tensors, resident memory, modes and hooks after many steps, where every second one raises.

    The collector is off: a tensor in a reference cycle counts as left behind.
    """
    model, run = make()
    x, y = torch.randn(6, 4), torch.randint(3, (6,))

    def fail(g: Tensor) -> None:
        raise ZeroDivisionError

    def step(i: int) -> None:
        model.zero_grad()
        try:
            with lw.observe(model, lw.Variance(), lw.SquaredNorm(), lw.DiagGGN(1), lw.ClippedGrad(1.0)) as seen:
                z = run(x)
                if error == "backward" and i % 2:
                    z.register_hook(fail)
                F.cross_entropy(z - z.mean(0) if error == "refused" and i % 2 else z, y).backward()
                if error == "body" and i % 2:
                    raise ZeroDivisionError
            _ = seen.variance, seen.diag_ggn, seen.grad
        except (ZeroDivisionError, lw.errors.SamplesMixed):
            assert error is not None and i % 2

    gc.collect()
    gc.disable()
    try:
        for i in range(20):
            step(i)
        if error is not None:
            gc.collect()  # a traceback is a cycle of its own
        tensors, hooks = _live(), _hooks(model)
        resident = 0
        for i in range(steps):
            if i == steps // 2:
                resident = _resident()
            step(i)
        grown = _resident() - resident
        if error is not None:
            gc.collect()
        assert _live() == tensors
        assert _hooks(model) == hooks
        assert not torch.overrides._get_current_function_mode_stack()
    finally:
        gc.enable()
    if error is None:
        assert grown < 2**20


@pytest.mark.parametrize("quantities", [(), (lw.SecondMoment(), lw.SquaredNorm())], ids=["none", "two"])
def test_inputs_are_let_go_while_the_backward_pass_runs(quantities: tuple[lw.Quantity, ...]) -> None:
    """As in a plain backward pass, so that the memory serves for what is still to come."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 2))
    left: list[int] = []

    def count(_: Tensor) -> None:
        tensors = [o for o in gc.get_objects() if type(o) is Tensor and o.shape == (5, 7)]
        left.append(sum(t.untyped_storage().nbytes() >= t.numel() * t.element_size() for t in tensors))

    with lw.observe(model, *quantities):
        first = model[0](torch.randn(5, 3))
        first.register_hook(count)  # the last cotangent to arrive
        model[1:](first).square().mean().backward()
    assert left == [0]
